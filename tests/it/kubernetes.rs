//! Nodes whose subnets Kubernetes assigns: by value, by file, or by an API server that is queried with a
//! pod's service account.

mod answers;
mod api_server;
mod chart;
mod dual;
mod manifests;

use std::fs;

use gossamer::lab::{Agent, Host, Lab, NetNs, Pinger};
use nix::sys::signal::Signal;

use self::{
    api_server::{ApiServer, closed_port, variables},
    manifests::start_as_kubelet,
};
use crate::{
    cni::{Runtime, address, namespaces},
    common::{TIMEOUT, assert_logged, has_problem, isolated, new_token, program, tool, wait_until},
};

/// Starts an agent that leases the subnet it is given.
fn start(host: &Host, token: &str, seed: &Host, more: &[&str]) -> anyhow::Result<Agent> {
    let seed = seed.ip.to_string();
    let arguments = ["--lease-source", "podcidr", "--token", token, "--join", &seed];
    Ok(Agent::start(program(), host, &[&arguments, more].concat())?)
}

fn subnet(agent: &mut Agent) -> String {
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    status["subnet"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn nodes_lease_their_given_subnets_and_a_duplicate_is_reported() {
    isolated(|lab| {
        let token = new_token()?;
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
            agent.wait_converged(3, TIMEOUT)?;
            assert_eq!(subnet(agent), format!("10.42.{number}.0/24"));
        }
        let spaces = [NetNs::new("a")?, NetNs::new("b")?];
        Runtime::new(&agents[0]).add("a");
        Runtime::new(&agents[2]).add("b");
        let answered = Pinger::new(&spaces[0])?.ping([10, 42, 2, 2].into(), TIMEOUT)?;
        assert!(answered.is_some());

        let again = ["--pod-cidr", "10.42.1.0/24"];
        let mut fourth = start(&hosts[3], &token, &hosts[0], &again)?;
        let problem = "10.42.1.0/24 was assigned to this node and to n2";
        wait_until(problem, TIMEOUT, || has_problem(&mut fourth, problem));
        assert_eq!(subnet(&mut fourth), "");
        assert_eq!(subnet(&mut agents[1]), "10.42.1.0/24");
        // The former user is gone, and Kubernetes has assigned its subnet to the other node.
        agents[1].end(Signal::SIGTERM)?;
        tool(&hosts[1].netns, "ip link del gossamer.1");
        wait_until("it has its subnet", 2 * TIMEOUT, || subnet(&mut fourth) == "10.42.1.0/24");
        Ok(())
    });
}

/// Creates hosts number 1 to `count`, registered with one subnet each.
fn nodes(lab: &mut Lab, server: &ApiServer, count: u16) -> anyhow::Result<Vec<Host>> {
    let hosts: Vec<Host> =
        (1..=count).map(|n| lab.host(n, &format!("n{n}"))).collect::<Result<_, _>>()?;
    for (number, host) in hosts.iter().enumerate() {
        let cidr = format!("10.42.{number}.0/24");
        server.register(&host.name, &host.ip.to_string(), &[&cidr]);
    }
    Ok(hosts)
}

/// Vagrant's machines have a default route behind a NAT, with the same address on each.
#[test]
fn nodes_started_by_the_manifest_meet_at_their_kubernetes_addresses() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 3)?;
        let token = new_token()?;
        let mut agents = Vec::new();
        for (number, host) in hosts.iter().enumerate() {
            for command in [
                "ip link add nat0 type veth peer name nat1",
                "ip link set nat0 up",
                "ip link set nat1 up",
                "ip addr add 10.0.2.15/24 dev nat0",
                "ip route replace default via 10.0.2.2 dev nat0",
            ] {
                tool(&host.netns, command);
            }
            let ip = host.ip.to_string();
            agents.push(start_as_kubelet(host, &ip, &token, &server.variables(), &[])?);
            // One after the other: the first node is alone for a while.
            agents[number].wait_converged(number + 1, TIMEOUT)?;
        }
        for (number, agent) in agents.iter_mut().enumerate() {
            let status = agent.wait_converged(3, TIMEOUT)?;
            assert_eq!(status["subnet"], format!("10.42.{number}.0/24"));
            assert_eq!(status["kernel"]["underlay_address"], hosts[number].ip.to_string());
        }
        let spaces = namespaces(&["a", "b"])?;
        Runtime::new(&agents[0]).add("a");
        let b = Runtime::new(&agents[2]).add("b");
        tool(&spaces[0], &format!("ping -c 1 -W 5 {}", address(&b)));
        // Edge sites lose their API server temporarily, while a kubelet may restart the agent.
        agents[2].end(Signal::SIGKILL)?;
        let ip = hosts[2].ip.to_string();
        agents[2] = start_as_kubelet(&hosts[2], &ip, &token, &variables(closed_port()), &[])?;
        agents[2].wait_converged(3, TIMEOUT)?;
        assert_logged(&agents[2], "the subnet of the last run");
        tool(&spaces[0], &format!("ping -c 1 -W 5 {}", address(&b)));
        Ok(())
    });
}
