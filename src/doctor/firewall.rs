//! Chains of others: what they do with our ports, and with packets of pods.

use super::{Finding, Patient};
use crate::dataplane::kernel::FirewallTable;

pub fn examine(patient: &Patient, findings: &mut Vec<Finding>) {
    let numbers = patient.numbers();
    let ports = [numbers.gossip_port, numbers.vxlan_port];
    let read = FirewallTable::open().and_then(|mut table| {
        Ok((table.foreign_chains(&numbers.networks)?, table.closed_ports(&ports)?))
    });
    let (chains, closed) = match read {
        Ok(read) => read,
        Err(error) => {
            let seen = format!("nftables cannot be read: {error}");
            let checks = ["firewall", "forwarding", "docker"];
            return findings.extend(checks.map(|check| Finding::skipped(check, &*seen)));
        }
    };
    for (chain, port) in &closed {
        let what = if *port == numbers.vxlan_port { "tunnel packets" } else { "gossip" };
        let rule = match chain.split(' ').collect::<Vec<_>>()[..] {
            ["ip", "filter", "INPUT"] => {
                format!("iptables -I INPUT -p udp --dport {port} -j ACCEPT")
            }
            ["ip6", "filter", "INPUT"] => {
                format!("ip6tables -I INPUT -p udp --dport {port} -j ACCEPT")
            }
            _ => format!("nft insert rule {chain} udp dport {port} accept"),
        };
        findings.push(Finding::problem(
            "firewall",
            format!("chain {chain} drops UDP {port}"),
            format!("that is the port of {what}: members do not reach this host"),
            rule,
        ));
    }
    if closed.is_empty() {
        findings
            .push(Finding::ok("firewall", format!("UDP {} and {} are let in", ports[0], ports[1])));
    }
    let network = numbers.networks.first().map_or("NETWORK".to_owned(), ToString::to_string);
    for chain in &chains.closed {
        findings.push(Finding::problem(
            "forwarding",
            format!(
                "chain {chain} drops what is forwarded, and no rule in it seems to let pods' packets \
                 pass"
            ),
            "each chain has to let a packet pass; Docker closes this one",
            format!("iptables -I FORWARD -s {network} -j ACCEPT; iptables -I FORWARD -d {network} -j ACCEPT"),
        ));
    }
    if chains.closed.is_empty() {
        findings.push(Finding::ok("forwarding", "no chain is in the way of pods' packets"));
    }
    for chain in &chains.dropping {
        findings.push(Finding::problem(
            "docker",
            format!("chain {chain} drops what other hosts send to containers"),
            "Docker 28 and later let nobody but their own bridge speak to a container's address",
            "start dockerd with --allow-direct-routing, or make the network with -d gossamer",
        ));
    }
    if chains.dropping.is_empty() {
        findings.push(Finding::ok("docker", "containers may be spoken to directly"));
    }
}
