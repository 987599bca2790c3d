//! docker-compose.yml with a real Docker: five hosts as containers on two networks, and the commands of
//! docs/CONTAINERS.md.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use gossamer::lab::Lab;

use crate::{
    common::{isolated, skipped, wait_until},
    dockerd::{DOCKERD, Dockerd},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// The output of `cargo static`.
const STATIC: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/target/x86_64-unknown-linux-gnu/dist/gossamer");
const COMPOSE: &str = "/usr/bin/docker-compose";
/// Containers start slowly on a busy machine.
const CONTAINER_START_TIMEOUT: Duration = Duration::from_secs(60);

const HOSTS: [&str; 5] = ["node1", "node2", "node3", "node4", "node5"];

/// Expected lines after a command: for each group of hosts, the text that each of them logs about its
/// pods.
type ExpectedLines = &'static [(&'static [&'static str], &'static str)];

const ALL_CONNECTED: ExpectedLines = &[(&HOSTS, "7 members up, pods reach 26 of 26")];
/// The commands of the page, and the result of each.
const STEPS: [(&str, ExpectedLines); 12] = [
    // This test needs the result, which takes minutes to build.
    ("cargo static", &[]),
    ("export GOSSAMER_TARGET=local", &[]),
    // Two pods of each host, and nine others: 90 pairs.
    ("docker-compose up --build", &[(&HOSTS, "5 members up, pods reach 18 of 18")]),
    ("docker-compose exec node3 gossamer members", &[]),
    ("docker-compose --profile more up -d --no-recreate --scale more=2", ALL_CONNECTED),
    ("docker-compose kill node4", &[(&["node1", "node5"], "silent: node4")]),
    ("docker-compose start node4", ALL_CONNECTED),
    (
        "docker-compose stop router",
        &[(&["node1"], "reach 10 of 26"), (&["node5"], "reach 14 of 26")],
    ),
    ("docker-compose start router", ALL_CONNECTED),
    ("docker network disconnect gossamer-left gossamer-node2", &[(&["node5"], "silent: node2")]),
    ("docker network connect gossamer-left gossamer-node2", ALL_CONNECTED),
    ("docker-compose --profile more down -v", &[]),
];

/// Returns the commands in the code blocks of a section of docs/CONTAINERS.md, without comments.
pub fn documented(section: &str) -> Vec<String> {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/CONTAINERS.md")).expect("the page");
    let section = page.split("\n## ").find(|text| text.starts_with(section));
    let blocks = section.expect("a section").split("```sh\n").skip(1);
    let blocks = blocks.map(|text| text.split("```").next().unwrap_or_default());
    let lines = blocks.flat_map(str::lines);
    lines.map(|line| line.split(" # ").next().unwrap_or_default().trim().to_owned()).collect()
}

struct Compose<'a>(&'a Dockerd);

impl Compose<'_> {
    /// Builds a command as a user types it: in the repository's directory, on a terminal.
    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("script");
        shell.args(["--quiet", "--return", "--command", command, "/dev/null"]).current_dir(ROOT);
        shell
            .env("DOCKER_HOST", &self.0.socket)
            .env("GOSSAMER_TARGET", "local")
            .env("SHELL", "/bin/sh");
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell
    }

    fn begin(&self, command: &str) -> Child {
        self.shell(command).stdout(Stdio::null()).spawn().expect("script runs")
    }

    fn done(&self, command: &str) -> String {
        let Output { status, stdout, .. } = self.shell(command).output().expect("script runs");
        let said = String::from_utf8_lossy(&stdout).into_owned();
        assert!(status.success(), "{command}: {said}");
        said
    }

    /// Returns the latest line of a host about its pods.
    fn line(&self, node: &str) -> String {
        // Not by docker-compose, whose start takes a second of CPU time.
        let label = format!("label=com.docker.compose.service={node}");
        let container = self.0.done(&format!("ps --all --quiet --filter {label}"));
        let log = self.0.done(&format!("logs --tail 50 {container}"));
        let mut lines = log.lines().rev();
        lines.find(|line| line.contains("pods reach")).unwrap_or_default().to_owned()
    }

    /// Waits until these hosts log this text about their pods.
    fn expect(&self, nodes: &[&str], words: &str) {
        for node in nodes {
            let what = format!("{node} logs {words:?}");
            wait_until(&what, CONTAINER_START_TIMEOUT, || self.line(node).contains(words));
        }
    }
}

#[test]
fn compose_page_has_exactly_the_tested_commands() {
    assert_eq!(documented("docker-compose"), STEPS.map(|(command, _)| command));
    // The other files mention only these commands.
    for file in ["README.md", "docker-compose.yml", "Dockerfile"] {
        let text = fs::read_to_string(Path::new(ROOT).join(file)).expect(file);
        let mentions = text
            .split("docker-compose ")
            .skip(1)
            .map(|rest| rest.split(['`', '\n', '(']).next().unwrap_or_default().trim());
        for mention in mentions.filter(|mention| mention.starts_with(char::is_alphabetic)) {
            let command = format!("docker-compose {mention}");
            assert!(STEPS.iter().any(|(tested, _)| *tested == command), "{file}: {command}");
        }
    }
}

#[test]
fn five_containerized_hosts_recover_from_the_faults_of_the_page() {
    let missing = [DOCKERD, COMPOSE, STATIC].into_iter().find(|path| !Path::new(path).exists());
    if let Some(missing) = missing {
        let why = format!("{missing} is missing (cargo static makes the static program)");
        return skipped("five_containerized_hosts_recover_from_the_faults_of_the_page", &why);
    }
    isolated(|lab: &mut Lab| {
        let host = lab.host(1, "machine")?;
        fs::create_dir_all(host.dir.join("plugins"))?;
        let docker = Dockerd::start(&host, "");
        let compose = Compose(&docker);
        let mut shown = None;
        for (command, seen) in &STEPS[2..] {
            if command.ends_with("up --build") {
                shown = Some(compose.begin(command));
                let started = || docker.done("ps --quiet").lines().count() == HOSTS.len() + 1;
                wait_until("the containers have not started", CONTAINER_START_TIMEOUT, started);
            } else {
                let said = compose.done(command);
                if command.ends_with("gossamer members") {
                    HOSTS.iter().for_each(|node| assert!(said.contains(node), "{said}"));
                }
            }
            seen.iter().for_each(|(nodes, words)| compose.expect(nodes, words));
        }
        // `docker-compose down` has removed the containers.
        shown.expect("it was begun").wait()?;
        assert_eq!(docker.done("ps --all --quiet"), "");
        Ok(())
    });
}
