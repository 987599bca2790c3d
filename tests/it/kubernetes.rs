//! Nodes whose subnets Kubernetes gives: by value, by file, and by an API server that is asked with a pod's
//! service account.

mod answers;
mod api_server;

use std::{fs, process::Command};

use gossamer::lab::{Agent, Host, Lab, NetNs, Pinger};
use nix::sys::signal::Signal;

use self::api_server::ApiServer;
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

/// Hosts number 1 to `count`, registered with one subnet each.
fn nodes(lab: &mut Lab, server: &ApiServer, count: u16) -> anyhow::Result<Vec<Host>> {
    let hosts: Vec<Host> =
        (1..=count).map(|n| lab.host(n, &format!("n{n}"))).collect::<Result<_, _>>()?;
    for (number, host) in hosts.iter().enumerate() {
        let cidr = format!("10.42.{number}.0/24");
        server.register(&host.name, &host.ip.to_string(), &[&cidr]);
    }
    Ok(hosts)
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
