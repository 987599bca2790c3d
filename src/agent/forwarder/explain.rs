//! What may drop packets of which a trial has shown that they do not pass: read, and never decided by.

use std::{fs, io};

use ipnet::IpNet;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcMessage},
};

use super::Setting;
use crate::{
    dataplane::kernel::{ClosedPort, FirewallTable, open_port},
    netlink::Netlink,
};

/// Where programs and filters hang on interfaces.
const HOOKS: [&str; 2] = ["clsact", "ingress"];
/// Tables of iptables-legacy.
const LEGACY: [(&str, &str); 2] = [
    ("/proc/net/ip_tables_names", "iptables-legacy"),
    ("/proc/net/ip6_tables_names", "ip6tables-legacy"),
];

/// What is in the way of forwarded packets, or where to look for it.
pub fn forwarding(netlink: &mut Netlink, setting: &Setting, port: Option<u32>) -> Vec<String> {
    let networks: Vec<IpNet> = setting.networks.iter().collect();
    let mut reasons = Vec::new();
    match FirewallTable::open().and_then(|mut table| table.foreign_chains(&networks)) {
        Ok(chains) => reasons.extend(chains.suspects().iter().map(|chain| {
            let is_ipv6 = chain.chain.starts_with("ip6 ");
            let network = networks.iter().find(|network| network.addr().is_ipv6() == is_ipv6);
            let network = network.or(networks.first());
            let fix = network.map(|network| chain.fix(*network)).unwrap_or_default();
            format!("{chain}: {fix}")
        })),
        Err(error) => reasons.push(format!("nftables cannot be read ({error})")),
    }
    for (file, program) in LEGACY {
        let tables = fs::read_to_string(file).unwrap_or_default();
        if tables.lines().any(|table| table == "filter") {
            reasons.push(format!(
                "{program} has rules, too, which are not read here: {program} -S FORWARD"
            ));
        }
    }
    for (index, name) in [
        (Some(setting.device), setting.device_name.as_str()),
        (index_of_bridge(netlink, setting), bridge_name(setting)),
        (port, "the port of the trial"),
    ] {
        if index.is_some_and(|index| has_hook(netlink, index).unwrap_or(false)) {
            reasons.push(format!(
                "{name} has filters of its own, maybe an eBPF program: tc filter show dev {0} ingress; \
                 tc filter show dev {0} egress",
                if name == setting.device_name { name } else { bridge_name(setting) }
            ));
        }
    }
    if reasons.is_empty() {
        reasons.push(format!(
            "no rule was found that says so; look at nft list ruleset, iptables-legacy -S FORWARD, bpftool \
             net, and tc filter show dev {}",
            setting.device_name
        ));
    }
    reasons
}

/// Chains that drop tunnel packets which come to this host.
pub fn input(setting: &Setting) -> Vec<String> {
    let port = setting.port;
    let closed = FirewallTable::open().and_then(|mut table| table.closed_ports(&[port]));
    let closed = closed.unwrap_or_default();
    let sentence = |ClosedPort { chain, port, .. }: &ClosedPort| {
        format!(
            "chain {chain} drops UDP {port}, so tunnel packets do not get in: {}",
            open_port(chain, *port)
        )
    };
    closed.iter().map(sentence).collect()
}

/// Whether the host forwards packets of a family at all.
pub fn is_forwarding_on(ipv4: bool) -> bool {
    let name = if ipv4 { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
    fs::read_to_string(format!("/proc/sys/net/{name}")).is_ok_and(|value| value.trim() != "0")
}

fn bridge_name(setting: &Setting) -> &str {
    setting.shape.as_ref().map_or("the bridge", |shape| shape.bridge.as_str())
}

fn index_of_bridge(netlink: &mut Netlink, setting: &Setting) -> Option<u32> {
    netlink.link(bridge_name(setting)).ok()?.map(|link| link.index)
}

fn has_hook(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let mut wanted = TcMessage::default();
    wanted.header.index = index.cast_signed();
    let found = netlink.dump(&RouteNetlinkMessage::GetQueueDiscipline(wanted))?;
    Ok(found.iter().any(|message| {
        let RouteNetlinkMessage::NewQueueDiscipline(message) = message else { return false };
        let is_hook = |attribute: &TcAttribute| {
            matches!(attribute, TcAttribute::Kind(kind) if HOOKS.contains(&kind.as_str()))
        };
        message.header.index == index.cast_signed() && message.attributes.iter().any(is_hook)
    }))
}
