//! Notices about rules that affect only some packets of pods, so that no trial detects them.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{TrialInput, marks, setting::Peer};
use crate::{
    agent::diagnosis::iptables_legacy,
    dataplane::{
        foreign::{Act, ForeignRules, ForeignTables, Interfaces, Partial, Traffic},
        remedies::{accept_to, accept_within, open_chain},
    },
    model::{PacketSelector, Problem, ProblemCode},
    netlink::{Netlink, link::Link, route::Query},
};

/// The way of packets that arrive from other hosts, as a bit of [`Traffic::untested`].
const ARRIVING: u8 = 2;

/// Returns a notice for each such rule.
pub fn notices(netlink: &mut Netlink, setting: &TrialInput) -> Vec<Problem> {
    all_notices(netlink, setting, true, |_| true)
}

/// Returns the same if no trial can be made, and includes rules that affect all packets of pods. Rules of
/// chains that `known` notices name as closed are omitted.
pub fn untested(netlink: &mut Netlink, setting: &TrialInput, known: &[Problem]) -> Vec<Problem> {
    let is_known = |partial: &Partial| {
        let chain = format!("chain {} (", partial.base);
        partial.what.is_empty() && known.iter().any(|notice| notice.what.starts_with(&chain))
    };
    all_notices(netlink, setting, false, |partial| !is_known(partial))
}

/// Returns the notices about rules that lower the TTL too far; used after packets were lost.
pub fn shortening(netlink: &mut Netlink, setting: &TrialInput) -> Vec<Problem> {
    all_notices(netlink, setting, true, |partial| matches!(partial.act, Act::Shortens(_)))
}

fn all_notices(
    netlink: &mut Netlink,
    setting: &TrialInput,
    is_tested: bool,
    is_wanted: impl Fn(&Partial) -> bool,
) -> Vec<Problem> {
    let Ok(mut tables) = ForeignTables::open() else { return Vec::new() };
    let addresses = setting.networks.iter().map(|network| network.addr());
    let families: BTreeSet<bool> =
        addresses.chain([setting.local]).map(|address| address.is_ipv4()).collect();
    let legacy = families.into_iter().flat_map(iptables_legacy::all_tables).collect();
    let Ok(mut rules) = tables.rules(legacy) else { return Vec::new() };
    let links = netlink.links().unwrap_or_default();
    let bridge = links.iter().find(|link| link.name == setting.bridge);
    let named = |link: &Link| (link.index, link.name.clone());
    let inside = bridge.map(named);
    let ways_by = |outside: (u32, String)| {
        let outside = Some(outside);
        let out = Interfaces { input: inside.clone(), output: outside.clone() };
        [out, Interfaces { input: outside, output: inside.clone() }]
    };
    let by_tunnel = ways_by((setting.device, setting.device_name.clone()));
    let underlay = links.iter().find(|link| link.index == setting.underlay);
    let without_tunnel = underlay.map(|link| ways_by(named(link)));
    let is_port =
        |link: &&Link| bridge.is_some_and(|bridge| link.controller() == Some(bridge.index));
    let ports: Vec<String> = links.iter().filter(is_port).map(|link| link.name.clone()).collect();
    let mut notices = Vec::new();
    let mut known = Vec::new();
    for network in setting.networks.iter() {
        let is_ipv4 = network.addr().is_ipv4();
        let of_family = |leasable: &&IpNet| leasable.addr().is_ipv4() == is_ipv4;
        let networks: Vec<IpNet> = setting.leasable.iter().filter(of_family).copied().collect();
        // IPv6 cannot be routed over an IPv4 underlay.
        let is_routable = |peer: &&Peer| peer.underlay.is_ipv6() || is_ipv4;
        let is_direct = setting.peers.iter().filter(is_routable).any(|peer| peer.direct);
        let without_tunnel = without_tunnel.as_ref().filter(|_| is_direct);
        // A trial cannot send packets that arrive by the underlay.
        let directly = without_tunnel.map(|ways| (ways, ARRIVING));
        for (ways, untested) in [(&by_tunnel, 0)].into_iter().chain(directly) {
            let untested = if is_tested { untested } else { u8::MAX };
            let traffic = Traffic {
                sources: &networks,
                destinations: &networks,
                ways,
                untested,
                ports: &ports,
                tunnel: None,
            };
            let found = tables.partial_rules(&mut rules, &traffic).into_iter();
            for partial in found.filter(&is_wanted) {
                let rule = (network, partial.chain.clone(), partial.rule.clone());
                if !known.contains(&rule) {
                    notices.extend(notice(netlink, setting, &partial, network));
                    known.push(rule);
                }
            }
        }
    }
    let found = of_tunnels(netlink, setting, (&mut tables, &mut rules), &links);
    for partial in found.into_iter().filter(is_wanted) {
        let is_same = |(_, chain, rule): &(IpNet, String, Option<String>)| {
            (chain, rule) == (&partial.chain, &partial.rule)
        };
        if !known.iter().any(is_same) {
            notices.extend(notice_of_tunnels(setting, &partial));
        }
    }
    notices
}

/// Returns rules that affect some incoming or outgoing tunnel packets.
fn of_tunnels(
    netlink: &mut Netlink,
    setting: &TrialInput,
    (tables, rules): (&mut ForeignTables, &mut ForeignRules),
    links: &[Link],
) -> Vec<Partial> {
    let peers = setting.peers.iter().filter(|peer| peer.tunnelled);
    let peers: Vec<IpNet> = peers.map(|peer| IpNet::from(peer.underlay)).collect();
    if peers.is_empty() {
        return Vec::new();
    }
    let underlay = links.iter().find(|link| link.index == setting.underlay);
    let underlay = underlay.map(|link| (link.index, link.name.clone()));
    let local = [IpNet::from(setting.local)];
    let inwards = [Interfaces { input: underlay.clone(), output: None }];
    let outwards = [Interfaces { input: None, output: underlay }];
    let tunnel = Some(setting.port);
    let is_shortening = |partial: &Partial| matches!(partial.act, Act::Shortens(_));
    let of = |sources, destinations, ways| Traffic {
        sources,
        destinations,
        ways,
        untested: 0,
        ports: &[],
        tunnel,
    };
    let mut found = tables.partial_rules(rules, &of(&peers, &local, &inwards));
    let mut leaving = tables.partial_rules(rules, &of(&local, &peers, &outwards));
    // A peer on the same link needs one hop only.
    let shortens = leaving.iter().any(is_shortening);
    leaving.retain(|partial| !is_shortening(partial));
    found.append(&mut leaving);
    let routed = peers.iter().filter(|_| shortens).copied();
    let routed: Vec<IpNet> = routed.filter(|peer| has_router(netlink, setting, *peer)).collect();
    if !routed.is_empty() {
        let leaving = tables.partial_rules(rules, &of(&local, &routed, &outwards));
        found.extend(leaving.into_iter().filter(is_shortening));
    }
    found
}

/// Returns whether tunnel packets to the peer pass a router.
fn has_router(netlink: &mut Netlink, setting: &TrialInput, peer: IpNet) -> bool {
    let query = Query {
        from: Some(setting.local),
        output: setting.pinned,
        transport: Some(PacketSelector::udp_to(setting.port)),
        ..Query::to(peer.addr())
    };
    netlink.route(&query).is_ok_and(|found| found.gateway.is_some())
}

fn notice(
    netlink: &mut Netlink,
    setting: &TrialInput,
    partial: &Partial,
    network: IpNet,
) -> Option<Problem> {
    let Partial { act, base, chain, is_early, .. } = partial;
    let packets = match partial.what.as_str() {
        "" => "packets between pods",
        _ => "some packets between pods",
    };
    if let Act::Redirects(port) = act {
        let packets =
            port.map_or("some packets".to_owned(), |port| format!("packets to port {port}"));
        let what = format!(
            "chain {chain} sends {packets} between pods of different hosts to another address or to this \
             host itself (redirect or DNAT, as for a transparent proxy), because no rule leaves out the \
             overlay"
        );
        return Some(of_rule(partial, what, accept_to(base, network)));
    }
    let what = affected_packets(partial);
    let done = match act {
        Act::Shortens(ttl) => {
            let what = format!(
                "chain {chain} lowers the TTL or hop limit of packets between pods to {ttl}, so they do not \
                 arrive: {what}"
            );
            return Some(of_rule(partial, what, accept_within(base, network)));
        }
        Act::Marks(mark) => {
            let elsewhere = marks::leads(netlink, setting, network, (*mark, *is_early))?;
            format!("gives {packets} the mark {mark:#x}: {what}; with it they {elsewhere}")
        }
        Act::Translates => {
            format!("gives {packets} another source address (SNAT or masquerading): {what}")
        }
        act => format!("{}: {what}", fate(*act, packets)?),
    };
    let fix = format!("if that is not intended: {}", accept_within(base, network));
    Some(of_rule(partial, format!("chain {chain} {done}"), fix))
}

/// Returns the notice about a rule.
fn of_rule(Partial { chain, rule, .. }: &Partial, what: String, fix: String) -> Problem {
    let subject = format!("{chain} {}", rule.as_deref().unwrap_or("policy"));
    Problem::new(ProblemCode::PartialRule, subject, what, fix).notice()
}

fn notice_of_tunnels(setting: &TrialInput, partial: &Partial) -> Option<Problem> {
    let Partial { act, base, chain, .. } = partial;
    let port = setting.port;
    let fate = match act {
        Act::Shortens(ttl) => format!(
            "lowers the TTL or hop limit of tunnel packets to {ttl}, so they do not arrive at hosts behind a \
             router"
        ),
        act => fate(*act, "some tunnel packets")?,
    };
    let fix = open_chain(base, &[port]);
    let what = format!("chain {chain} {fate}: {}", affected_packets(partial));
    Some(of_rule(partial, what, format!("if that is not intended: {fix}")))
}

/// Describes what happens to the affected packets.
fn fate(act: Act, packets: &str) -> Option<String> {
    match act {
        Act::Drops => Some(format!("drops {packets}")),
        Act::Rejects => Some(format!("rejects {packets}")),
        Act::Queues => {
            Some(format!("sends {packets} to an NFQUEUE that no program reads, so they are lost"))
        }
        Act::Redirects(_) | Act::Marks(_) | Act::Translates | Act::Shortens(_) => None,
    }
}

/// Describes which packets the rule affects, and identifies the rule.
pub fn affected_packets(Partial { rule, what, more, counted, .. }: &Partial) -> String {
    let match_count =
        counted.map_or_else(String::new, |count| format!(", which has matched {count} packets"));
    let more = match more {
        0 => String::new(),
        1 => ", and 1 more rule does the same".to_owned(),
        more => format!(", and {more} more rules do the same"),
    };
    let what = if what.is_empty() { "all".to_owned() } else { format!("those {what}") };
    match rule {
        Some(rule) => format!("{what} (rule {rule}{match_count}{more})"),
        None => format!("{what} (by its policy{more})"),
    }
}
