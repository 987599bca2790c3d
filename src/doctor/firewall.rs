//! Checks of other programs' chains: which packets to gossamer's ports, and which packets of pods, they drop.

use std::path::Path;

use ipnet::IpNet;

use super::{Examination, Finding};
use crate::{
    api::{CheckState, PathStatus},
    dataplane::{
        foreign::{ClosedPort, Extent, ForeignChains, ForeignTables},
        remedies::open_chain,
    },
    model::PathState,
};

/// Sockets of Docker's daemon.
const DOCKER_SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];

/// Runs the checks `firewall`, `forwarding` and `docker`.
pub fn examine(examination: &Examination, findings: &mut Vec<Finding>) {
    let numbers = examination.numbers();
    let ports = [numbers.gossip_port, numbers.vxlan_port];
    let read = ForeignTables::open().and_then(|mut tables| {
        Ok((tables.chains(&numbers.networks)?, tables.closed_ports(&ports)?))
    });
    let (chains, closed) = match read {
        Ok(read) => read,
        Err(error) => {
            let seen = format!("nftables cannot be read: {error}");
            let checks = ["firewall", "forwarding", "docker"];
            let skipped = |check| Finding::skipped(check, &*seen).refused_by(&error);
            return findings.extend(checks.map(skipped));
        }
    };
    // If packets are known to arrive, the reading of the rules has missed one that accepts them.
    let is_tunnel = |port: u16| port == numbers.vxlan_port;
    let paths = || examination.status().into_iter().flat_map(|status| &status.paths);
    let is_open = |path: &PathStatus| path.state == PathState::Ok || path.pods_answer;
    let tunnels_work = paths().count() > 0 && paths().all(is_open);
    let gossip_works = examination.status().is_some_and(|status| status.connections > 0);
    // The agent reports chains that drop tunnel packets itself.
    let is_told = |closed: &ClosedPort| {
        let mut told = examination.reported_by_agent("firewall");
        is_tunnel(closed.port) && told.any(|problem| problem.subject == closed.chain)
    };
    let mut reported = examination.has_report("firewall");
    for closed in closed.iter().filter(|closed| !is_told(closed)) {
        let works = if is_tunnel(closed.port) { tunnels_work } else { gossip_works };
        let finding = of_port(closed, is_tunnel(closed.port), works);
        reported |= finding.is_some();
        findings.extend(finding);
    }
    if !reported {
        let some = closed.iter().find(|closed| closed.extent == Extent::Some);
        let seen = some.map_or_else(
            || format!("UDP {} and {} are accepted", ports[0], ports[1]),
            |ClosedPort { chain, port, .. }| {
                format!("packets of members arrive; chain {chain} drops some packets to UDP {port}")
            },
        );
        findings.push(Finding::ok("firewall", seen));
    }
    findings.extend(forwarding(examination, &chains, &numbers.networks));
    findings.extend(docker(examination, &chains));
}

/// Returns what a chain that drops packets to a port means. `works` is whether such packets of members are
/// known to arrive.
fn of_port(closed: &ClosedPort, is_tunnel: bool, works: bool) -> Option<Finding> {
    let ClosedPort { chain, port, extent } = closed;
    let fix = open_chain(chain, &[*port]);
    let (what, arrive) =
        if is_tunnel { ("tunnel packets", "arrive") } else { ("gossip", "arrives") };
    let finding = match extent {
        Extent::All { by_port: false } if works => {
            let why = format!(
                "according to its rules it drops the port of {what}, but {what} still {arrive}"
            );
            Finding::notice("firewall", format!("chain {chain} drops UDP {port}"), why, fix)
        }
        Extent::All { .. } => {
            let why = format!("that is the port of {what}: members do not reach this host");
            Finding::problem("firewall", format!("chain {chain} drops UDP {port}"), why, fix)
        }
        Extent::Some if works => return None,
        Extent::Some => Finding::notice(
            "firewall",
            format!("chain {chain} drops some packets to UDP {port}"),
            format!(
                "that is the port of {what}, and no packet of a member is known to arrive: the rule may \
                 match them by interface or address"
            ),
            fix,
        ),
        Extent::AboveRate if is_tunnel => Finding::notice(
            "firewall",
            format!("chain {chain} drops UDP {port} above some rate"),
            "all traffic between pods of two hosts uses that port: under load many packets are lost",
            fix,
        ),
        // Gossip sends so few packets that no rate limit affects it.
        Extent::AboveRate => return None,
    };
    Some(finding)
}

/// Runs the check `docker`: the agent's result, or without an agent what the chains show.
fn docker(examination: &Examination, chains: &ForeignChains) -> Vec<Finding> {
    if examination.has_report("docker") {
        return Vec::new();
    }
    let finding = |chain: &String| {
        Finding::problem(
            "docker",
            format!("chain {chain} drops what other hosts send to containers"),
            "Docker 28 and later let only their own bridge reach a container's address",
            "start dockerd with --allow-direct-routing, or make the network with -d gossamer",
        )
    };
    // The agent reports such chains itself.
    let dropping = chains.direct_access.iter().filter(|_| !examination.is_host_checked());
    let findings: Vec<Finding> = dropping.map(finding).collect();
    if findings.is_empty() {
        return vec![match DOCKER_SOCKETS.iter().any(|socket| Path::new(socket).exists()) {
            true => Finding::ok("docker", "containers are reachable directly"),
            false => Finding::skipped("docker", "no Docker runs on this host"),
        }];
    }
    findings
}

/// Returns the results of the agent's trials; without them, a guess from the chains.
fn forwarding(
    examination: &Examination,
    chains: &ForeignChains,
    networks: &[IpNet],
) -> Vec<Finding> {
    if examination.has_problem("forwarding") {
        return Vec::new();
    }
    let tried = examination.status().map(|status| &status.kernel.forwarding);
    let detail = tried.map_or("no agent tests it", |tried| &tried.detail);
    let detail = if detail.is_empty() { "not tested yet" } else { detail };
    match tried.map(|tried| tried.state) {
        Some(CheckState::Ok) => return vec![Finding::ok("forwarding", detail)],
        Some(CheckState::Failing) => {
            let seen = format!("{detail}: see the other checks");
            return vec![Finding::skipped("forwarding", seen)];
        }
        // The agent's notice already contains the reason and the likely cause.
        _ if examination.has_report("forwarding") => return Vec::new(),
        _ => {}
    }
    let guess = chains.guess().map(|chain| {
        let of_family =
            |network: &&IpNet| network.addr().is_ipv6() == chain.chain.starts_with("ip6 ");
        let network = networks.iter().find(of_family).or(networks.first());
        let fix =
            network.map_or_else(|| "accept the overlay's network".to_owned(), |n| chain.fix(*n));
        Finding::notice(
            "forwarding",
            format!("{chain}, and no rule in it seems to accept packets of pods"),
            "this follows from the rules alone; no packet was tested. A packet passes only if every chain \
             accepts it",
            fix,
        )
    });
    let guess: Vec<Finding> = guess.collect();
    if guess.is_empty() { vec![Finding::skipped("forwarding", detail)] } else { guess }
}
