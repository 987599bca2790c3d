//! The CNI plugin with an agent of another version. A rolling upgrade replaces one before the other.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
};

use gossamer::lab::Agent;
use serde_json::{Value, json};

use crate::{
    cni::{Runtime, invoke, namespaces, pods},
    common::{Cluster, TIMEOUT, isolated, program, wait_until},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Serves as an agent of another version until the test ends. It answers unknown requests as its HTTP
/// library does.
fn other_agent(socket: &Path, version: &'static str) -> std::io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream, version));
        }
    });
    Ok(())
}

fn serve(stream: UnixStream, version: &str) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
        request += &line;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let target = request.split_whitespace().nth(1)?;
    let (status, text) = match target {
        "/v1/status" => {
            let kernel = json!({ "in_sync": true });
            let status = json!({ "version": version, "subnet": "10.42.7.0/24", "kernel": kernel });
            ("200 OK", status.to_string())
        }
        // This version has other answers.
        "/v1/pods" => ("200 OK", json!({ "pods": [{ "id": 1 }] }).to_string()),
        "/v1/pods/check" => ("200 OK", "{}".to_owned()),
        "/v1/pods/attach" => {
            let why =
                "Failed to deserialize the JSON body into the target type: unknown field `vlan`";
            ("422 Unprocessable Entity", why.to_owned())
        }
        _ => ("404 Not Found", String::new()),
    };
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n", text.len());
    let answer = format!("{head}connection: close\r\n\r\n{text}");
    reader.get_mut().write_all(answer.as_bytes()).ok()
}

fn call(socket: &Path, verb: &str, more: &Value) -> (bool, Value) {
    let variables = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", "a"),
        ("CNI_NETNS", "/run/netns/a"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];
    let mut config =
        json!({ "cniVersion": "1.1.0", "name": "pods", "type": "gossamer", "socket": socket });
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    invoke(program(), &variables, &config.to_string())
}

#[test]
fn verbs_with_an_agent_of_another_version_succeed_or_ask_for_a_retry() {
    isolated(|lab| {
        let _spaces = namespaces(&["a"])?;
        let none = json!({ "cni.dev/valid-attachments": [] });
        for (number, other) in [(1, "0.0.9"), (2, VERSION)] {
            let host = lab.host(number, &format!("n{number}"))?;
            let socket = host.dir.join("other.sock");
            other_agent(&socket, other)?;
            for verb in ["ADD", "CHECK"] {
                let (done, error) = call(&socket, verb, &json!({}));
                assert!(!done && error["code"] == 11, "{verb}: {error}");
                let own = if other == VERSION { "of another build; restart" } else { "; restart" };
                let said = error["msg"].as_str().expect("a text");
                assert!(
                    said.starts_with(&format!("the agent is version {other}, the plugin")),
                    "{said}"
                );
                assert!(said.contains(VERSION) && said.contains(own), "{said}");
            }
            let (_, error) = call(&socket, "ADD", &json!({}));
            assert!(error["details"].to_string().contains("unknown field `vlan`"), "{error}");
            // The end of a pod does not wait for the agent: it is noted for the next agent.
            for verb in ["DEL", "GC", "STATUS", "VERSION"] {
                let (done, said) = call(&socket, verb, &none);
                assert!(done, "{verb}: {said}");
            }
            assert_eq!(fs::read_dir(host.dir.join("other.sock.pending"))?.count(), 2);
        }
        Ok(())
    });
}

/// Pods that ended while the old agent ran are gone when the new one runs.
#[test]
fn pod_ended_before_an_agent_upgrade_is_removed_afterwards() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        let socket = cluster.agents[0].socket().to_owned();
        cluster.agents[0].end(nix::sys::signal::Signal::SIGTERM)?;
        other_agent(&socket, "0.0.9")?;
        let (done, said) = call(&socket, "DEL", &json!({}));
        assert!(done, "{said}");
        fs::remove_file(&socket)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.agents[0].wait_converged(1, TIMEOUT)?;
        wait_until("the pod is gone", TIMEOUT, || pods(&mut cluster.agents[0]) == 0);
        Ok(())
    });
}
