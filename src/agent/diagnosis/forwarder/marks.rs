//! Policy rules that divert packets by their mark, found by route lookups for such packets.
//!
//! A tunnel packet inherits the mark of the inner packet, so one rule may match either or both.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

use super::TrialInput;
use crate::{
    dataplane::audit::{earlier_rule, likely_program},
    model::{PacketSelector, ip_command, rule_family},
    netlink::{
        Netlink,
        link::Link,
        route::{Query, Rule, local_priority},
    },
};

/// Describes the rules that divert packets of pods, for the family of an overlay network.
pub fn of_pods(netlink: &mut Netlink, setting: &TrialInput, network: IpNet) -> Vec<String> {
    let ipv4 = network.addr().is_ipv4();
    let Some(ways) = ways_of_pods(netlink, setting, network) else { return Vec::new() };
    let sentence = |netlink: &mut Netlink, rule: &Rule, mark: u32, local: u32| {
        let diversion = led(netlink, &ways, mark)?;
        let of_pods = earlier_rule(&format!("to {network}"), rule.priority, ipv4, local);
        let of_tunnels = remedy_for_tunnels(setting, rule, local);
        let remedy = match diversion.is_to_host {
            true => remedy_for_interception(network),
            false => {
                format!("give the overlay and its tunnels precedence: {of_pods}; {of_tunnels}")
            }
        };
        Some(format!(
            "packets with mark {0} {diversion}, because {1}: {remedy}",
            shown(rule, mark),
            because(rule, mark, ipv4, ipv4)
        ))
    };
    each(netlink, ipv4, sentence)
}

/// Describes the rules that divert tunnel packets that contain packets of pods.
pub fn of_tunnels(netlink: &mut Netlink, setting: &TrialInput) -> Vec<String> {
    let ipv4 = setting.local.is_ipv4();
    let Some(way) = way_of_tunnels(netlink, setting) else { return Vec::new() };
    let inside_ipv4 = setting.networks.first.addr().is_ipv4();
    let sentence = |netlink: &mut Netlink, rule: &Rule, mark: u32, local: u32| {
        let diversion = led(netlink, &[way], mark)?;
        Some(format!(
            "tunnel packets with mark {} {diversion}, because {}, which tunnel packets inherit: give \
             them precedence: {}",
            shown(rule, mark),
            because(rule, mark, ipv4, inside_ipv4),
            remedy_for_tunnels(setting, rule, local)
        ))
    };
    each(netlink, ipv4, sentence)
}

/// Returns where packets of pods with this mark go, or the tunnel packets around them, if not where they
/// should. Marks set before routing also affect the inner packet.
pub fn leads(
    netlink: &mut Netlink,
    setting: &TrialInput,
    network: IpNet,
    (mark, is_early): (u32, bool),
) -> Option<String> {
    let of_pods = ways_of_pods(netlink, setting, network).filter(|_| is_early);
    let inside = of_pods.and_then(|ways| led(netlink, &ways, mark));
    inside.map(|diversion| diversion.to_string()).or_else(|| {
        let way = way_of_tunnels(netlink, setting)?;
        led(netlink, &[way], mark).map(|diversion| format!("inside tunnel packets {diversion}"))
    })
}

/// A route lookup and the interface by which the packet should leave.
type Wanted = (Query, u32);

/// Returns the lookups of a packet to a pod of another host, and of one back.
fn ways_of_pods(
    netlink: &mut Netlink,
    setting: &TrialInput,
    network: IpNet,
) -> Option<[Wanted; 2]> {
    let of_family = |ip: &IpAddr| ip.is_ipv4() == network.addr().is_ipv4();
    let vteps = setting.peers.iter().filter(|peer| peer.tunnelled).flat_map(|peer| &peer.vteps);
    let peer = vteps.copied().find(of_family)?;
    let pod = setting.shape.iter().flat_map(|shape| shape.addresses.iter()).find(of_family)?;
    let bridge = netlink.link(&setting.bridge).ok()??.index;
    Some([
        (Query::forwarded(pod, peer, bridge), setting.device),
        (Query::forwarded(peer, pod, setting.device), bridge),
    ])
}

/// Returns the lookup of a tunnel packet to a peer.
fn way_of_tunnels(netlink: &mut Netlink, setting: &TrialInput) -> Option<Wanted> {
    let peer = setting.peers.iter().find(|peer| peer.tunnelled)?;
    let query = Query {
        from: Some(setting.local),
        output: setting.pinned,
        transport: Some(PacketSelector::udp_to(setting.port)),
        ..Query::to(peer.underlay)
    };
    let usual = netlink.route(&query).ok()?;
    Some((query, usual.link))
}

/// Returns where the first of these packets goes that leaves by another interface if it has this mark.
fn led(netlink: &mut Netlink, ways: &[Wanted], mark: u32) -> Option<Diversion> {
    ways.iter().find_map(|(query, wanted)| {
        elsewhere(netlink, &Query { mark: Some(mark), ..*query }, *wanted)
    })
}

/// Returns a sentence for each rule that selects packets by a mark; `sentence` receives the mark, and the
/// priority of the rule of the local table.
fn each(
    netlink: &mut Netlink,
    ipv4: bool,
    sentence: impl Fn(&mut Netlink, &Rule, u32, u32) -> Option<String>,
) -> Vec<String> {
    let rules = netlink.rules(ipv4).unwrap_or_default();
    let local = local_priority(&rules);
    let marked = rules.iter().filter_map(|rule| {
        let (mark, _) = rule.mark.filter(|(mark, _)| *mark != 0)?;
        Some((rule, mark))
    });
    marked.filter_map(|(rule, mark)| sentence(netlink, rule, mark, local)).collect()
}

/// Where the kernel sends a packet that should leave by another interface.
struct Diversion {
    /// Completes "packets with that mark".
    way: String,
    /// Whether this host itself receives the packet, as rules for a transparent proxy have it.
    is_to_host: bool,
}

impl fmt::Display for Diversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.way)
    }
}

/// Returns where the kernel sends a packet, unless it leaves by the wanted interface.
fn elsewhere(netlink: &mut Netlink, query: &Query, wanted: u32) -> Option<Diversion> {
    let lost = |way| Some(Diversion { way, is_to_host: false });
    match netlink.route(query) {
        Ok(found) if found.link == wanted => None,
        Ok(found) => {
            let links = netlink.links().unwrap_or_default();
            match links.iter().find(|link: &&Link| link.index == found.link) {
                Some(link) if link.loopback => Some(Diversion {
                    way: "are delivered to this host".to_owned(),
                    is_to_host: true,
                }),
                Some(link) => lost(format!("leave by {}", link.name)),
                None => lost("have no route".to_owned()),
            }
        }
        Err(error) => lost(format!("have no route ({error})")),
    }
}

/// Returns how to exempt the overlay from a rule that passes packets to a transparent proxy. A policy rule
/// has no effect: the kernel forwards no packet that a TPROXY rule has given to a socket.
fn remedy_for_interception(network: IpNet) -> String {
    let family = rule_family(network.addr().is_ipv4());
    format!(
        "exempt the overlay from the rule for a transparent proxy: in nftables, {family} daddr {network} \
         return before it; in iptables, {family}tables -t mangle -I PREROUTING -d {network} -j RETURN"
    )
}

/// Describes what the rule does with the mark.
fn because(rule: &Rule, mark: u32, ipv4: bool, marked_ipv4: bool) -> String {
    let leads = match (rule.refuses, rule.table) {
        (true, _) => "drops them".to_owned(),
        (false, table) => match likely_program(table, "") {
            Some(program) => format!("sends them to table {table}, probably of {program}"),
            None => format!("sends them to table {table}"),
        },
    };
    format!(
        "{} rule {} (fwmark {}) {leads}, and some rule gives pods' packets that mark (nft list ruleset, \
         {}tables -t mangle -S)",
        ip_command(ipv4),
        rule.priority,
        shown(rule, mark),
        rule_family(marked_ipv4)
    )
}

/// Returns the command that exempts tunnel packets.
fn remedy_for_tunnels(setting: &TrialInput, rule: &Rule, local: u32) -> String {
    let selector = format!("ipproto udp dport {}", setting.port);
    earlier_rule(&selector, rule.priority, setting.local.is_ipv4(), local)
}

/// Formats the mark, with its mask if it is partial.
fn shown(rule: &Rule, mark: u32) -> String {
    match rule.mark {
        Some((_, mask)) if mask != u32::MAX => format!("{mark:#x}/{mask:#x}"),
        _ => format!("{mark:#x}"),
    }
}
