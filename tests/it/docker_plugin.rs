//! Requests that Docker sends to its network plugin, and their fate when the agent ends.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use gossamer::{api, lab::Host, runtime};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    common::{Cluster, TIMEOUT, isolated, resume, suspend},
    docker::serve,
};

/// A client of the plugin's socket, in place of Docker.
pub struct Plugin(pub PathBuf);

impl Plugin {
    pub fn on(host: &Host) -> Self {
        Self(host.dir.join("plugins/gossamer.sock"))
    }

    pub fn ask(&self, method: &str, request: &Value) -> Value {
        let target = format!("/{method}");
        let answer =
            runtime::block_on(api::post_json(&self.0, &target, request)).expect("a runtime");
        answer.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    pub fn done(&self, method: &str, request: &Value) -> Value {
        let answer = self.ask(method, request);
        assert!(answer["Err"].is_null() && answer["Error"].is_null(), "{method}: {answer}");
        answer
    }

    pub fn refused(&self, method: &str, request: &Value) -> String {
        let answer = self.ask(method, request);
        let field = if method.starts_with("Ipam") { "Error" } else { "Err" };
        answer[field].as_str().unwrap_or_else(|| panic!("{method}: {answer}")).to_owned()
    }

    /// Sends a request verbatim, without waiting for the answer.
    fn send(&self, method: &str, body: &str) -> anyhow::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.0)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let head = format!("POST /{method} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\n");
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())?;
        Ok(stream)
    }

    /// Requests an address for a container with this MAC.
    pub fn address(&self, pool: &Value, mac: &str) -> String {
        let options = json!({ "com.docker.network.endpoint.macaddress": mac });
        let request = json!({ "PoolID": pool, "Address": "", "Options": options });
        let answer = self.done("IpamDriver.RequestAddress", &request);
        answer["Address"].as_str().expect("an address").to_owned()
    }
}

fn read(mut stream: UnixStream) -> anyhow::Result<String> {
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

pub fn endpoint(id: &str, address: &str) -> Value {
    json!({ "NetworkID": "n", "EndpointID": id, "Interface": { "Address": address } })
}

#[test]
fn docker_requests_sent_before_the_agent_ends_are_answered() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let plugin = Plugin::on(&cluster.hosts[0]);
        let pool = plugin.done("IpamDriver.RequestPool", &json!({ "Pool": "" }))["PoolID"].clone();
        suspend(&cluster.agents[0])?;
        let mut sent = Vec::new();
        for number in 1..=8 {
            let mac = format!("02:42:00:00:00:{number:02}");
            let options = json!({ "com.docker.network.endpoint.macaddress": mac });
            let body = json!({ "PoolID": pool, "Address": "", "Options": options }).to_string();
            sent.push(plugin.send("IpamDriver.RequestAddress", &body)?);
        }
        kill(Pid::from_raw(cluster.agents[0].pid().cast_signed()), Signal::SIGTERM)?;
        resume(&cluster.agents[0])?;
        for stream in sent {
            let answer = read(stream)?;
            assert!(answer.contains("\"Address\":\"10.42."), "{answer}");
        }
        assert!(cluster.agents[0].wait()?.success());
        Ok(())
    });
}

#[test]
fn docker_retry_with_an_empty_body_is_rejected_with_the_reason() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let plugin = Plugin::on(&cluster.hosts[0]);
        for method in ["IpamDriver.RequestAddress", "NetworkDriver.CreateEndpoint"] {
            let answer = read(plugin.send(method, "")?)?;
            assert!(answer.contains("start the container again"), "{answer}");
        }
        Ok(())
    });
}

#[test]
fn docker_request_of_almost_two_mebibytes_is_answered() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        serve(&mut cluster, 0, Signal::SIGTERM)?;
        let body = json!({ "NetworkID": "n", "Options": "x".repeat(2_000_000) }).to_string();
        let plugin = Plugin::on(&cluster.hosts[0]);
        let answer = read(plugin.send("NetworkDriver.DeleteNetwork", &body)?)?;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    });
}
