//! Nodes whose subnets Kubernetes gives: by value, by file, and by an API server that is asked with a pod's
//! service account.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
};

use gossamer::lab::{Agent, Host, NetNs, Pinger};
use nix::sys::signal::Signal;
use rustls::pki_types::PrivateKeyDer;
use serde_json::json;

use crate::{
    cni::Runtime,
    common::{PATIENCE, gossamer_token, has_problem, isolated, program, skipped, tool, wait_until},
};

/// An agent that leases what it is told.
fn start(host: &Host, token: &str, seed: &Host, more: &[&str]) -> anyhow::Result<Agent> {
    let seed = seed.ip.to_string();
    let arguments = ["--lease-source", "podcidr", "--token", token, "--join", &seed];
    Ok(Agent::start(program(), host, &[&arguments, more].concat())?)
}

fn subnet(agent: &mut Agent) -> String {
    let status = agent.ask("/v1/status", PATIENCE).expect("a status");
    status["subnet"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn nodes_have_the_subnets_that_they_were_given_and_a_double_one_is_named() {
    isolated(|lab| {
        let token = gossamer_token()?;
        let hosts: Vec<Host> =
            (1..=4).map(|n| lab.host(n, &format!("n{n}"))).collect::<Result<_, _>>()?;
        let file = hosts[2].dir.join("pod-cidr");
        fs::write(&file, "10.42.2.0/24\n")?;
        let mut agents = [
            start(&hosts[0], &token, &hosts[1], &["--pod-cidr", "10.42.0.0/24"])?,
            start(&hosts[1], &token, &hosts[0], &["--pod-cidr", "10.42.1.0/24"])?,
            start(
                &hosts[2],
                &token,
                &hosts[0],
                &["--pod-cidr-file", file.to_str().expect("UTF-8")],
            )?,
        ];
        for (number, agent) in agents.iter_mut().enumerate() {
            agent.wait_converged(3, PATIENCE)?;
            assert_eq!(subnet(agent), format!("10.42.{number}.0/24"));
        }
        let spaces = [NetNs::new("a")?, NetNs::new("b")?];
        Runtime::new(&agents[0]).add("a");
        Runtime::new(&agents[2]).add("b");
        let answered = Pinger::new(&spaces[0])?.ping([10, 42, 2, 2].into(), PATIENCE)?;
        assert!(answered.is_some());

        let again = ["--pod-cidr", "10.42.1.0/24"];
        let mut fourth = start(&hosts[3], &token, &hosts[0], &again)?;
        let problem = "10.42.1.0/24 was given to this node and to n2";
        wait_until(problem, PATIENCE, || has_problem(&mut fourth, problem));
        assert_eq!(subnet(&mut fourth), "");
        assert_eq!(subnet(&mut agents[1]), "10.42.1.0/24");
        // The user is gone, and Kubernetes has given it to the other one.
        agents[1].end(Signal::SIGTERM)?;
        tool(&hosts[1].netns, "ip link del gossamer.1");
        wait_until("it has its subnet", 2 * PATIENCE, || subnet(&mut fourth) == "10.42.1.0/24");
        Ok(())
    });
}

/// An API server of three nodes, as far as it is asked. It ends with the test's process.
fn api_server(addresses: [String; 3]) -> anyhow::Result<u16> {
    let made = rcgen::generate_simple_self_signed(["10.99.0.1".to_owned()])?;
    let account = Path::new("/run/secrets/kubernetes.io/serviceaccount");
    fs::create_dir_all(account)?;
    let certificate = data_encoding::BASE64.encode(made.cert.der());
    let certificate =
        format!("-----BEGIN CERTIFICATE-----\n{certificate}\n-----END CERTIFICATE-----\n");
    fs::write(account.join("ca.crt"), certificate)?;
    fs::write(account.join("token"), "a-token\n")?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    let tls = Arc::new(tls);
    let listener = TcpListener::bind("10.99.0.1:0")?;
    let port = listener.local_addr()?.port();
    let node = |number: usize, ip: &String| {
        let addresses = json!([{ "type": "InternalIP", "address": ip }]);
        json!({
            "metadata": { "name": format!("n{}", number + 1) },
            "spec": { "podCIDR": format!("10.42.{number}.0/24") },
            "status": { "addresses": addresses },
        })
    };
    let mut nodes: Vec<_> =
        addresses.iter().enumerate().map(|(number, ip)| node(number, ip)).collect();
    // One that has been given none yet.
    nodes.push(json!({ "metadata": { "name": "n4" }, "spec": {} }));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Ok(session) = rustls::ServerConnection::new(tls.clone()) else { return };
            let mut stream = BufReader::new(rustls::StreamOwned::new(session, stream));
            let mut lines = Vec::new();
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                lines.push(std::mem::take(&mut line).trim().to_owned());
            }
            let first = lines.first().cloned().unwrap_or_default();
            let target = first.split(' ').nth(1).unwrap_or_default();
            let answer = match target.strip_prefix("/api/v1/nodes/n") {
                Some(number) => number.parse().ok().and_then(|n: usize| nodes.get(n - 1)).cloned(),
                None => Some(json!({ "items": nodes })),
            };
            let allowed = lines.iter().any(|line| line == "authorization: Bearer a-token");
            let answer = answer.filter(|_| allowed);
            let status = if answer.is_some() { "200 OK" } else { "403 Forbidden" };
            let body = answer.unwrap_or_default().to_string();
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.get_mut().write_all((head + &body).as_bytes());
        }
    });
    Ok(port)
}

#[test]
fn the_api_server_says_which_subnet_a_node_has_and_where_the_others_are() {
    isolated(|lab| {
        let token = gossamer_token()?;
        let hosts: Vec<Host> =
            (1..=3).map(|n| lab.host(n, &format!("n{n}"))).collect::<Result<_, _>>()?;
        let port = api_server([0, 1, 2].map(|number: usize| hosts[number].ip.to_string()))?;
        let start = |host: &Host, port: u16| {
            let variables = [
                ("KUBERNETES_SERVICE_HOST", "10.99.0.1".to_owned()),
                ("KUBERNETES_SERVICE_PORT", port.to_string()),
                ("GOSSAMER_TOKEN", token.clone()),
            ];
            Agent::start_with(program(), host, &["--lease-source", "podcidr"], &variables)
        };
        // One after the other: the first is alone for a while.
        let mut agents = vec![start(&hosts[0], port)?];
        agents[0].wait_converged(1, PATIENCE)?;
        for host in &hosts[1..] {
            agents.push(start(host, port)?);
        }
        for (number, agent) in agents.iter_mut().enumerate() {
            agent.wait_converged(3, PATIENCE)?;
            assert_eq!(subnet(agent), format!("10.42.{number}.0/24"));
        }
        let fourth = lab.host(4, "n4")?;
        let waiting = start(&fourth, port)?;
        wait_until("it says what it waits for", PATIENCE, || {
            waiting.log().contains("node n4 has no spec.podCIDR yet")
        });
        // Edge sites are cut off from their API server now and then: nobody listens on this port.
        agents[1].end(Signal::SIGTERM)?;
        agents[1] = start(&hosts[1], 1)?;
        agents[1].wait_converged(3, 2 * PATIENCE)?;
        assert_eq!(subnet(&mut agents[1]), "10.42.1.0/24");
        assert!(agents[1].log().contains("the subnet of the last run"), "{}", agents[1].log());
        Ok(())
    });
}

const MANIFESTS: [&str; 2] = ["config/kubernetes.yaml", "config/kubernetes-gossip.yaml"];

/// By the schemas that the Python package `kubernetes-validate` brings along.
#[test]
fn the_manifests_are_what_kubernetes_expects() {
    let validate = Command::new("kubernetes-validate").arg("--strict").args(MANIFESTS).output();
    match validate {
        Err(_) => {
            let why = "kubernetes-validate is not installed (pip)";
            skipped("the_manifests_are_what_kubernetes_expects", why);
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("daemonset/gossamer "), "{output:?}");
        }
    }
}

#[test]
fn the_manifests_name_settings_that_there_are() {
    let help = Command::new(program()).args(["agent", "--help"]).output().expect("gossamer runs");
    let help = String::from_utf8_lossy(&help.stdout);
    let mut names = 0;
    for manifest in MANIFESTS {
        let text = fs::read_to_string(manifest).expect(manifest);
        let flags = text.lines().filter_map(|line| line.trim().strip_prefix("- --"));
        let variables =
            text.lines().filter_map(|line| line.trim().strip_prefix("- name: GOSSAMER_"));
        for flag in flags.map(|flag| format!("--{}", flag.split('=').next().unwrap_or_default())) {
            assert!(help.contains(&flag), "{manifest}: {flag}");
            names += 1;
        }
        for variable in variables.map(|name| format!("GOSSAMER_{name}")) {
            assert!(help.contains(&variable), "{manifest}: {variable}");
            names += 1;
        }
    }
    assert!(names > 10, "{names}");
}
