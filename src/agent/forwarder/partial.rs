//! Warnings of rules that do something with some packets of pods alone, which no trial meets.

use ipnet::IpNet;

use super::{Setting, explain::bridge_name, marks};
use crate::{
    dataplane::kernel::{Act, FirewallTable, Partial, Traffic},
    netlink::Netlink,
};

/// What is said of each such rule, with what exempts the overlay.
pub fn warnings(netlink: &mut Netlink, setting: &Setting) -> Vec<String> {
    let bridge = netlink.link(bridge_name(setting)).ok().flatten();
    let links = bridge.into_iter().map(|link| (link.index, link.name));
    let interfaces: Vec<(u32, String)> =
        links.chain([(setting.device, setting.device_name.clone())]).collect();
    let Ok(mut table) = FirewallTable::open() else { return Vec::new() };
    let mut sentences = Vec::new();
    let mut known = Vec::new();
    for network in setting.networks.iter() {
        let networks = [network];
        let traffic = Traffic {
            sources: &networks,
            destinations: &networks,
            interfaces: &interfaces,
            tunnel: None,
        };
        for partial in table.partial_rules(&traffic).unwrap_or_default() {
            sentences.extend(sentence(netlink, setting, &partial, network));
            known.push((partial.chain, partial.handle));
        }
    }
    for partial in of_tunnels(netlink, setting, &mut table) {
        if !known.contains(&(partial.chain.clone(), partial.handle)) {
            sentences.extend(sentence_of_tunnels(setting, &partial));
        }
    }
    sentences
}

/// Rules that tunnel packets meet as they come in.
fn of_tunnels(netlink: &mut Netlink, setting: &Setting, table: &mut FirewallTable) -> Vec<Partial> {
    let peers = setting.peers.iter().filter(|peer| peer.tunnelled);
    let sources: Vec<IpNet> = peers.map(|peer| IpNet::from(peer.underlay)).collect();
    if sources.is_empty() {
        return Vec::new();
    }
    let links = netlink.links().unwrap_or_default().into_iter();
    let underlay = links.filter(|link| link.index == setting.underlay);
    let interfaces: Vec<(u32, String)> = underlay.map(|link| (link.index, link.name)).collect();
    let traffic = Traffic {
        sources: &sources,
        destinations: &[IpNet::from(setting.local)],
        interfaces: &interfaces,
        tunnel: Some(setting.port),
    };
    table.partial_rules(&traffic).unwrap_or_default()
}

fn sentence(
    netlink: &mut Netlink,
    setting: &Setting,
    partial: &Partial,
    network: IpNet,
) -> Option<String> {
    let Partial { act, base, chain, is_early, .. } = partial;
    if let Act::Redirects(port) = act {
        let packets =
            port.map_or("some packets".to_owned(), |port| format!("packets to port {port}"));
        return Some(format!(
            "chain {chain} sends {packets} between pods of different hosts to another address or to this \
             host itself (redirect or DNAT, as for a transparent proxy), because no rule leaves out the \
             overlay: {}",
            to(base, network)
        ));
    }
    let what = taken(partial);
    let done = match act {
        Act::Marks(mark) => {
            let elsewhere = marks::leads(netlink, setting, network, (*mark, *is_early))?;
            format!(
                "gives some packets between pods the mark {mark:#x}: {what}; with it they {elsewhere}"
            )
        }
        Act::Translates => format!(
            "gives some packets between pods another source address (SNAT or masquerading): {what}"
        ),
        act => format!("{}: {what}", fate(*act, "packets between pods")?),
    };
    Some(format!("chain {chain} {done}; if that is not on purpose: {}", both(base, network)))
}

fn sentence_of_tunnels(setting: &Setting, partial: &Partial) -> Option<String> {
    let Partial { act, base, chain, .. } = partial;
    let fate = fate(*act, "tunnel packets")?;
    let port = setting.port;
    let fix = match iptables(base) {
        Some(command) => format!("{command} -p udp --dport {port} -j ACCEPT"),
        None => format!("nft insert rule {base} udp dport {port} accept"),
    };
    Some(format!("chain {chain} {fate}: {}; if that is not on purpose: {fix}", taken(partial)))
}

/// What becomes of packets that are taken out.
fn fate(act: Act, packets: &str) -> Option<String> {
    match act {
        Act::Drops => Some(format!("drops some {packets}")),
        Act::Rejects => Some(format!("rejects some {packets}")),
        Act::Queues => Some(format!(
            "hands some {packets} to a program by a queue where none listens, so they are lost"
        )),
        Act::Redirects(_) | Act::Marks(_) | Act::Translates => None,
    }
}

/// What the rule takes, and which it is.
fn taken(Partial { handle, what, more, .. }: &Partial) -> String {
    let more = match more {
        0 => String::new(),
        1 => ", and 1 more rule does alike".to_owned(),
        more => format!(", and {more} more rules do alike"),
    };
    format!("those {what} (rule with handle {handle}{more})")
}

/// What lets the overlay pass a base chain.
fn both(base: &str, network: IpNet) -> String {
    let family = family(network);
    match iptables(base) {
        Some(command) => format!("{command} -s {network} -d {network} -j ACCEPT"),
        None => format!(
            "nft insert rule {base} {family} saddr {network} {family} daddr {network} accept"
        ),
    }
}

/// The same for what is sent to pods.
fn to(base: &str, network: IpNet) -> String {
    match iptables(base) {
        Some(command) => format!("{command} -d {network} -j ACCEPT"),
        None => format!("nft insert rule {base} {} daddr {network} accept", family(network)),
    }
}

/// What puts a rule before all others of a chain that iptables made.
fn iptables(base: &str) -> Option<String> {
    let program = |family: &str| if family == "ip" { "iptables" } else { "ip6tables" };
    match base.split(' ').collect::<Vec<_>>()[..] {
        [family @ ("ip" | "ip6"), "filter", chain @ ("FORWARD" | "INPUT")] => {
            Some(format!("{} -I {chain}", program(family)))
        }
        [
            family @ ("ip" | "ip6"),
            table @ ("nat" | "mangle" | "raw"),
            chain @ ("PREROUTING" | "POSTROUTING" | "FORWARD" | "INPUT"),
        ] => Some(format!("{} -t {table} -I {chain}", program(family))),
        _ => None,
    }
}

const fn family(network: IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}
