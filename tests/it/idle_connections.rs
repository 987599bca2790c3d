//! Too many clients, or clients that never complete a request, do not delay other clients.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use gossamer::lab::Agent;
use serde_json::json;

use crate::{
    cni::{Runtime, namespaces},
    common::{TIMEOUT, isolated, program, wait_until},
};

/// More connections than an agent may have open under the kernel's default limit.
const CONNECTIONS: usize = 1_500;

#[test]
fn idle_connections_beyond_the_limit_delay_no_status_and_no_add() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let address: SocketAddr = (host.ip, 9473).into();
        let mut agent =
            Agent::start(program(), &host, &["--init", "--http", &address.to_string()])?;
        agent.wait_converged(1, TIMEOUT)?;
        let limit = std::fs::read_to_string(format!("/proc/{}/limits", agent.pid()))?;
        let files = limit.lines().find(|line| line.starts_with("Max open files")).expect("a limit");
        let words: Vec<&str> = files.split_whitespace().collect();
        let raised: u64 = words[3].parse()?;
        assert_eq!(raised, words[4].parse::<u64>()?.min(65_536), "{files}");

        let connect = || host.netns.run(|| TcpStream::connect(address));
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = connect()?;
            // A refused connection may be closed already.
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
            idle.push(stream);
        }
        let open = std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.count();
        assert!(open < 300, "{open} files are open");
        let _spaces = namespaces(&["a"])?;
        let begun = Instant::now();
        agent.ask("/v1/status", TIMEOUT)?;
        Runtime::new(&agent).add("a");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        let (is_done, answer) = Runtime::new(&agent).call("CHECK", "a", &json!({}));
        assert!(is_done || answer["code"] == 7, "{answer}");

        // The agent closes idle connections in time, although the clients keep them open, and serves
        // other clients.
        wait_until("idle connections keep others out", TIMEOUT, || {
            let asked = || -> std::io::Result<bool> {
                let mut stream = connect()?;
                stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: 10.99.0.11\r\n\r\n")?;
                let mut answer = [0; 12];
                stream.read_exact(&mut answer)?;
                Ok(answer == *b"HTTP/1.1 200")
            };
            asked().unwrap_or(false)
        });
        Ok(())
    });
}
