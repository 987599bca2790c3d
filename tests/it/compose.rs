//! docker-compose.yml with a real Docker: five hosts as containers on two networks.

use std::{path::Path, process::Command, time::Duration};

use gossamer::lab::Lab;

use crate::{
    common::{isolated, skipped, wait_until},
    dockerd::{DOCKERD, Dockerd},
};

/// What `cargo static` makes.
const STATIC: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/target/x86_64-unknown-linux-gnu/dist/gossamer");
const COMPOSE: &str = "/usr/bin/docker-compose";
/// Containers start slowly on a busy machine.
const LONG: Duration = Duration::from_secs(60);

struct Compose<'a>(&'a Dockerd);

impl Compose<'_> {
    fn done(&self, arguments: &str) -> String {
        let mut compose = Command::new(COMPOSE);
        compose
            .args(["--project-name", "demo", "--project-directory", env!("CARGO_MANIFEST_DIR")])
            .args(["--file", concat!(env!("CARGO_MANIFEST_DIR"), "/docker-compose.yml")])
            .args(arguments.split_whitespace())
            .env("DOCKER_HOST", &self.0.socket)
            .env("GOSSAMER_TARGET", "local");
        let output = compose.output().expect("docker-compose runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker-compose {arguments}: {error}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The latest line of a host about its pods.
    fn line(&self, node: &str) -> String {
        let log = self.done(&format!("logs --no-color --tail 50 {node}"));
        let mut lines = log.lines().rev();
        lines.find(|line| line.contains("pods reach")).unwrap_or_default().to_owned()
    }

    /// Waits until these hosts say this of their pods.
    fn expect(&self, nodes: &[&str], words: &str) {
        for node in nodes {
            let mut last = String::new();
            let what = format!("{node} says {words:?}");
            wait_until(&what, LONG, || {
                last = self.line(node);
                last.contains(words)
            });
        }
    }
}

#[test]
fn five_hosts_as_containers_survive_what_happens_to_containers() {
    let missing = [DOCKERD, COMPOSE, STATIC].into_iter().find(|path| !Path::new(path).exists());
    if let Some(missing) = missing {
        let why = format!("{missing} is missing (cargo static makes the static program)");
        return skipped("five_hosts_as_containers_survive_what_happens_to_containers", &why);
    }
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "machine")?;
        std::fs::create_dir_all(host.dir.join("plugins"))?;
        let docker = Dockerd::start(&host, "");
        let compose = Compose(&docker);
        compose.done("up --build --detach");
        let all = ["node1", "node2", "node3", "node4", "node5"];
        // Two pods of each host, and nine others: 90 pairs.
        compose.expect(&all, "5 members up, pods reach 18 of 18");
        let status = compose.done("exec -T node5 gossamer status");
        assert!(status.contains("5 alive of 5"), "{status}");

        // Without power, and back.
        compose.done("kill node4");
        compose.expect(&["node1", "node5"], "silent: node4");
        compose.done("start node4");
        compose.expect(&all, "5 members up, pods reach 18 of 18");

        // The two networks cannot reach each other; each half goes on.
        compose.done("pause router");
        docker.done("network disconnect demo_right demo_router_1");
        compose.expect(&["node1"], "pods reach 10 of 18");
        docker.done("network connect --ip 10.88.2.254 demo_right demo_router_1");
        compose.done("unpause router");
        compose.expect(&all, "5 members up, pods reach 18 of 18");

        // A host is pulled out of its network and plugged in again, under another address perhaps.
        docker.done("network disconnect demo_left demo_node2_1");
        compose.expect(&["node5"], "silent: node2");
        docker.done("network connect demo_left demo_node2_1");
        compose.expect(&all, "5 members up, pods reach 18 of 18");

        compose.done("--profile more up --detach --scale more=2");
        compose.expect(&all, "7 members up, pods reach 26 of 26");
        compose.done("--profile more down --volumes");
        Ok(())
    });
}
