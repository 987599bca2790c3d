//! Tunnel packets that this host passes on between two other members, as a router or by a bridge, and its
//! rules that drop them.
//!
//! Such rules concern no packet of this host. The other members see only that their packets are lost. Rules
//! alone prove nothing here, because the members may reach each other another way: a problem is reported if
//! such packets come in and do not leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::{ForwarderEvent, READ_SHARE, TrialInput, TrialRunner, explain, partial, setting::Peer};
use crate::{
    agent::diagnosis::{iptables_legacy, tap::Tap},
    dataplane::{
        captured::{PACKET_HOST, PACKET_OUTGOING},
        foreign::{Act, ForeignTables, Interfaces, Partial, Traffic},
        remedies::open_chain,
        silence::datagram,
    },
    model::{Problem, ProblemCode},
    netlink::{Netlink, link::Link, route::Query},
    sysctl,
};

/// Shortest time between two readings of unchanged rules.
const READ_INTERVAL: Duration = Duration::from_secs(60);
/// Time between two captures.
const CAPTURE_INTERVAL: Duration = Duration::from_secs(15);
/// Duration of a capture. Members without an answer of each other send a probe every second.
const CAPTURE_TIME: Duration = Duration::from_millis(3_500);
/// Number of packets in a capture that count as lost if none of them leaves.
const MIN_LOST: u32 = 2;
/// Time without a packet after which a loss is forgotten.
const LOSS_VALIDITY: Duration = Duration::from_secs(300);
/// Upper limit of packets per capture.
const MAX_PACKETS: u32 = 20_000;
/// Upper limit of the pairs of members that one sentence names.
const MAX_NAMED: usize = 2;

/// Addresses of the sending and of the receiving host.
type Pair = (IpAddr, IpAddr);

/// Rules that drop tunnel packets between other members, and the losses that were seen.
#[derive(Default)]
pub struct Transit {
    closed: Vec<Closed>,
    /// The members for which the rules were read.
    members: BTreeSet<IpAddr>,
    next_reading: Option<Instant>,
    next_capture: Option<Instant>,
    /// When each pair of members last lost a packet here.
    lost: BTreeMap<Pair, Instant>,
}

/// A rule or policy that drops tunnel packets between hosts.
struct Closed {
    by: Partial,
    sources: Vec<IpNet>,
    destinations: Vec<IpNet>,
}

/// The packets of one pair of hosts in a capture.
#[derive(Debug, Default)]
struct Seen {
    /// Number of packets that came in to be routed: in frames to this host.
    routed: u32,
    /// Number of packets that came in otherwise: a bridge passes them on, or discards them.
    bridged: u32,
    /// Interfaces by which the latter came.
    ports: BTreeSet<u32>,
    /// Number of packets that left.
    left: u32,
}

impl Seen {
    fn note(&mut self, link: u32, kind: u8) {
        match kind {
            PACKET_OUTGOING => self.left += 1,
            PACKET_HOST => self.routed += 1,
            _ => {
                self.bridged += 1;
                self.ports.insert(link);
            }
        }
    }

    /// Whether this host drops the packets, given those of the opposite direction. A switch floods packets
    /// between two hosts that are both behind one port of a bridge.
    fn is_lost(&self, opposite: Option<&Self>) -> bool {
        let is_between_ports =
            opposite.is_some_and(|other| other.bridged > 0 && other.ports.is_disjoint(&self.ports));
        self.left == 0 && (self.routed >= MIN_LOST || self.bridged >= MIN_LOST && is_between_ports)
    }
}

impl Transit {
    /// Makes the next call read the rules again.
    pub const fn on_changed_rules(&mut self) {
        (self.next_reading, self.next_capture) = (None, None);
    }

    /// Returns a problem for each rule or policy.
    pub fn problems(&self, setting: &TrialInput) -> Vec<Problem> {
        let mut losses: Vec<(&Partial, BTreeSet<&Pair>)> = Vec::new();
        for closed in &self.closed {
            let pairs = self.lost.keys().filter(|pair| closed.takes(pair));
            let by = &closed.by;
            match losses.iter_mut().find(|(known, _)| *known == by) {
                Some((_, known)) => known.extend(pairs),
                None => losses.push((by, pairs.collect())),
            }
        }
        losses.retain(|(_, pairs)| !pairs.is_empty());
        losses.iter().map(|(by, pairs)| problem(by, pairs, setting)).collect()
    }

    /// Records the packets of a capture.
    fn note(&mut self, now: Instant, seen: &BTreeMap<Pair, Seen>) {
        for ((from, to), packets) in seen {
            if packets.is_lost(seen.get(&(*to, *from))) {
                self.lost.insert((*from, *to), now);
            } else if packets.left > 0 {
                self.lost.remove(&(*from, *to));
            }
        }
        let closed = &self.closed;
        self.lost.retain(|pair, at| {
            now.duration_since(*at) < LOSS_VALIDITY
                && closed.iter().any(|closed| closed.takes(pair))
        });
    }
}

impl Closed {
    fn takes(&self, (from, to): &Pair) -> bool {
        let has = |networks: &[IpNet], host| networks.iter().any(|network| network.contains(host));
        has(&self.sources, from) && has(&self.destinations, to)
    }
}

impl<F: Fn(ForwarderEvent)> TrialRunner<F> {
    /// Looks for rules that drop tunnel packets between other members, and for such packets.
    pub(super) fn watch_transit(&mut self, setting: &TrialInput) {
        let now = Instant::now();
        let members: BTreeSet<IpAddr> = setting.peers.iter().map(|peer| peer.underlay).collect();
        let is_current = self.transit.next_reading.is_some_and(|at| at > now);
        if !is_current || self.transit.members != members {
            self.transit.closed = closed(&mut self.netlink, setting);
            self.transit.members = members;
            self.transit.next_reading = Some(now + READ_INTERVAL.max(now.elapsed() * READ_SHARE));
        }
        let is_due = self.transit.next_capture.is_none_or(|at| at <= now);
        let seen = match is_due && !self.transit.closed.is_empty() {
            true => self.capture_transit(setting).unwrap_or_else(|error| {
                tracing::debug!(%error, "tunnel packets between other members not captured");
                BTreeMap::new()
            }),
            false => BTreeMap::new(),
        };
        if is_due {
            self.transit.next_capture = Some(now + CAPTURE_INTERVAL);
        }
        self.transit.note(Instant::now(), &seen);
    }

    /// Counts tunnel packets between other members at all interfaces.
    fn capture_transit(&mut self, setting: &TrialInput) -> io::Result<BTreeMap<Pair, Seen>> {
        let tap = Tap::open(setting.port)?;
        let mut seen: BTreeMap<Pair, Seen> = BTreeMap::new();
        let (begun, mut packets) = (Instant::now(), 0);
        while packets < MAX_PACKETS {
            let remaining = CAPTURE_TIME.saturating_sub(begun.elapsed());
            if remaining.is_zero() || !self.wait(&[tap.as_fd()], remaining) {
                break;
            }
            while packets < MAX_PACKETS {
                let members = &self.transit.members;
                let next = tap.next(|packet| {
                    let (from, to, _) = datagram(packet.protocol, packet.bytes)?;
                    let is_between = members.contains(&from) && members.contains(&to);
                    is_between.then_some(((from, to), packet.link, packet.kind))
                })?;
                let Some(packet) = next else { break };
                packets += 1;
                if let Some((pair, link, kind)) = packet {
                    seen.entry(pair).or_default().note(link, kind);
                }
            }
        }
        Ok(seen)
    }
}

/// Returns the rules that drop tunnel packets between members that this host reaches by different interfaces,
/// or by a bridge whose packets pass the rules.
fn closed(netlink: &mut Netlink, setting: &TrialInput) -> Vec<Closed> {
    let ipv4 = setting.local.is_ipv4();
    let hosts = hosts_by_link(netlink, &setting.peers);
    let links = netlink.links().unwrap_or_default();
    let passes = |from: &Link, to: &Link| match from.index == to.index {
        true => from.kind == "bridge" && hosts[&from.index].len() > 1,
        false => !sysctl::is_forwarding_off(ipv4),
    };
    let on_the_way: Vec<&Link> =
        links.iter().filter(|link| hosts.contains_key(&link.index)).collect();
    let pairs = on_the_way.iter().flat_map(|from| on_the_way.iter().map(move |to| (*from, *to)));
    let mut pairs: Vec<(&Link, &Link)> = pairs.filter(|(from, to)| passes(from, to)).collect();
    pairs.retain(|(from, to)| {
        let is_bridged = from.index == to.index;
        !is_bridged || explain::go_through_rules(netlink, &from.name)[usize::from(!ipv4)]
    });
    if pairs.is_empty() {
        return Vec::new();
    }
    let Ok(mut tables) = ForeignTables::open() else { return Vec::new() };
    let Ok(mut rules) = tables.rules(iptables_legacy::all_tables(ipv4)) else {
        return Vec::new();
    };
    let mut closed = Vec::new();
    for (from, to) in pairs {
        let [sources, destinations] = [from, to].map(|link| hosts[&link.index].clone());
        let [input, output] = [from, to].map(|link| Some((link.index, link.name.clone())));
        let traffic = Traffic {
            sources: &sources,
            destinations: &destinations,
            ways: &[Interfaces { input, output }],
            untested: u8::MAX,
            ports: &[],
            tunnel: Some(setting.port),
        };
        let found = tables.partial_rules(&mut rules, &traffic).into_iter();
        let found = found.filter(|by| matches!(by.act, Act::Drops | Act::Rejects | Act::Queues));
        closed.extend(found.map(|by| Closed {
            by,
            sources: sources.clone(),
            destinations: destinations.clone(),
        }));
    }
    closed
}

/// Returns the underlay addresses of members by the interface that leads to them.
fn hosts_by_link(netlink: &mut Netlink, peers: &[Peer]) -> BTreeMap<u32, Vec<IpNet>> {
    let mut hosts: BTreeMap<u32, Vec<IpNet>> = BTreeMap::new();
    for peer in peers {
        let link = netlink.route(&Query::to(peer.underlay)).map_or(0, |found| found.link);
        hosts.entry(link).or_default().push(peer.underlay.into());
    }
    hosts.remove(&0);
    hosts
}

fn problem(by: &Partial, pairs: &BTreeSet<&Pair>, setting: &TrialInput) -> Problem {
    let name = |host: &IpAddr| {
        let peer = setting.peers.iter().find(|peer| peer.underlay == *host);
        peer.map_or_else(|| host.to_string(), |peer| format!("{} ({host})", peer.name))
    };
    let named = pairs.iter().take(MAX_NAMED);
    let mut named: Vec<String> =
        named.map(|(from, to)| format!("from {} to {}", name(from), name(to))).collect();
    if let more @ 1.. = pairs.len().saturating_sub(MAX_NAMED) {
        named.push(format!("between {more} more pairs"));
    }
    let (chain, port) = (&by.chain, setting.port);
    let what = format!(
        "tunnel packets of other members pass this host, which drops them, so pods there do not reach each \
         other: chain {chain} {} UDP {port} {}: {}",
        verb(by.act),
        named.join(" and "),
        partial::affected_packets(by)
    );
    Problem::new(ProblemCode::Transit, chain, what, open_chain(&by.base, &[port]))
}

const fn verb(act: Act) -> &'static str {
    match act {
        Act::Rejects => "rejects",
        Act::Queues => "hands to a program that is not running",
        _ => "drops",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PACKET_OTHERHOST`.
    const OTHER: u8 = 3;

    fn seen(packets: &[(u32, u8)]) -> Seen {
        let mut seen = Seen::default();
        packets.iter().for_each(|(link, kind)| seen.note(*link, *kind));
        seen
    }

    #[test]
    fn packets_that_come_in_and_do_not_leave_are_lost() {
        let routed = [(2, PACKET_HOST), (2, PACKET_HOST)];
        assert!(seen(&routed).is_lost(None));
        assert!(!seen(&routed[..1]).is_lost(None), "one may leave after the capture");
        assert!(!seen(&[routed[0], routed[1], (3, PACKET_OUTGOING)]).is_lost(None));
    }

    #[test]
    fn bridged_packets_are_lost_only_between_different_ports() {
        let bridged = seen(&[(2, OTHER), (2, OTHER)]);
        assert!(bridged.is_lost(Some(&seen(&[(3, OTHER)]))));
        // A switch has flooded them, or a program captures all frames.
        assert!(!bridged.is_lost(Some(&seen(&[(2, OTHER)]))) && !bridged.is_lost(None));
    }
}
