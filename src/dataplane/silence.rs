//! Why no packets arrive from a peer: evaluates packets captured at this host's interfaces.
//!
//! A path's state says that packets are lost, but not where. The capture shows it: whether packets left this
//! host, and whether, by which interface and from which address packets arrive. The kernel's trace shows what
//! nftables did with them. Pure: the agent captures the packets, and only while a peer does not answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    captured::{PACKET_HOST, PACKET_OUTGOING, Packet},
    dropping_chain::DroppedBy,
};
use crate::{
    frames::{ADVERTISEMENT, ARP, ICMPV6, IPV6},
    model::{Mac, NodeId, Problem},
};

pub use self::{
    cause::{Cause, Diverted, Elsewhere, MAY_NOT_SEND, Pinned, Place},
    kept::Kept,
};

mod cause;
mod kept;
#[cfg(test)]
mod tests;
mod texts;

/// EtherType of IPv4 (IANA).
const IPV4: u16 = 0x0800;
const UDP_HEADER: usize = 8;
/// The I flag of a VXLAN header: the VNI is valid (RFC 7348, section 5). A VXLAN device always sets it; the
/// agent's own test packets leave it clear.
const VNI_IS_VALID: u8 = 0x08;
/// Offset of the inner frame's source MAC from the UDP header: UDP and VXLAN headers, and the destination
/// MAC.
const INNER_SOURCE_MAC: usize = UDP_HEADER + 8 + 6;
/// Maximum number of MACs stored per address.
const MAX_MACS: usize = 8;

/// A peer that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// The peer's node id.
    pub node: NodeId,
    /// The peer's name.
    pub name: String,
    /// Underlay address.
    pub address: IpAddr,
    /// UDP port of its agent.
    pub gossip: u16,
    /// MAC of its VTEP: the source of the frames inside its tunnel packets.
    pub mac: Mac,
    /// Overlay address of its VTEP: the source of packets that its host itself sends through the tunnel.
    pub vtep: IpAddr,
    /// Gossip reports it as alive.
    pub lives: bool,
    /// Packets to it are sent through a tunnel.
    pub tunnelled: bool,
}

/// The evidence that the capture gave about one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces {
    /// Interfaces by which tunnel packets to the peer left, with their source addresses. Flows of an earlier
    /// translation have another one than the rest.
    pub left: BTreeSet<(u32, IpAddr)>,
    /// Interfaces at which tunnel packets from it arrived.
    pub came: BTreeSet<u32>,
    /// Whether tunnel packets that left ([`OUT`]) or arrived ([`IN`]) came from a VXLAN device, not from an
    /// agent's test.
    pub carried: [bool; 2],
    /// A source address of its tunnel packets that differs from the peer's own.
    pub came_as: Option<IpAddr>,
    /// MACs that claim the peer's address.
    pub macs: BTreeSet<Mac>,
    /// Evidence that a machine with the peer's address is running.
    pub sign: Option<Sign>,
}

/// A packet that proves that a machine is running, although it does not answer probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// An ARP message.
    Arp,
    /// A neighbor discovery message.
    Discovery,
    /// A tunnel packet.
    Tunnel,
}

/// The result for one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The cause, with advice; `None` if unknown.
    pub cause: Option<Problem>,
    /// Tunnel packets to it left this host.
    pub leaves: bool,
    /// Evidence that a machine with its address is running.
    pub sign: Option<Sign>,
    /// A rule of this host drops its packets or those to it, whatever way they take.
    pub is_dropped_here: bool,
    /// The cause concerns single flows, so packets of pods may pass nevertheless.
    pub loses_flows: bool,
    /// The cause may drop packets again after some have passed, as a rate limit does. Any other one is
    /// refuted by packets that pass.
    pub may_recur: bool,
}

/// The state of one capture.
#[derive(Debug)]
pub struct Watch {
    /// This host's underlay address.
    local: IpAddr,
    /// UDP port of the tunnel.
    port: u16,
    /// MACs of this host.
    own: BTreeSet<Mac>,
    by_address: BTreeMap<IpAddr, NodeId>,
    by_mac: BTreeMap<Mac, NodeId>,
    /// Evidence by peer.
    pub traces: BTreeMap<NodeId, Traces>,
    /// MACs of other machines that claim this host's address.
    claims: BTreeSet<Mac>,
    /// Addresses claimed by each of `claims` and by each MAC that claims a peer's address.
    claimed: BTreeMap<Mac, BTreeSet<IpAddr>>,
    /// Answers by ARP or neighbor discovery for each next hop: the interface index and the answered MAC.
    answers: BTreeMap<IpAddr, BTreeSet<(u32, Option<Mac>)>>,
    /// The MAC in the last answer for each next hop on each interface.
    last_answers: BTreeMap<(IpAddr, u32), Mac>,
    /// Next hops for which several machines answer in turn.
    contested: BTreeSet<IpAddr>,
}

/// What is known about one peer from sources other than the capture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Tunnel packets to it were sent during the capture.
    pub sent: bool,
    /// The kernel refused the agent's packets, and no rule or policy that does so was found.
    pub forbidden: bool,
    /// Packets to it entered the VXLAN device during the capture.
    pub entered: bool,
    /// The kernel cannot resolve the MAC of this next hop on this interface.
    pub unresolved: Option<(IpAddr, String)>,
    /// The router to it on the underlay interface, and the MACs that answer in turn for its address.
    pub contested: Option<(IpAddr, BTreeSet<Mac>)>,
    /// The route to it has several next hops, of which the kernel chooses one for each flow.
    pub is_shared: bool,
    /// This host drops the answers for that next hop; the inner value is the rule, if known.
    pub refused: Option<Option<DroppedBy>>,
    /// A permanent neighbor entry gives the next hop another MAC than the one that answers for it.
    pub pinned: Option<Pinned>,
    /// The VXLAN device drops packets because of their congestion marks.
    pub congested: bool,
    /// The reverse path filter of this interface drops the peer's packets.
    pub filtered: Option<String>,
    /// The rule that drops packets to it ([`OUT`]) and from it ([`IN`]).
    pub dropped: [Option<DroppedBy>; 2],
    /// The rule that drops packets of its pods because they arrive by another way than packets to them take.
    pub diverted: Option<Diverted>,
    /// Its tunnel packets leave by another interface than the one of their route.
    pub elsewhere: Option<Elsewhere>,
    /// The nftables chain that changes the source address of packets to it.
    pub translating: Option<String>,
    /// The iptables-legacy rule that does so, as part of a sentence, and the command that exempts tunnel
    /// packets.
    pub translating_legacy: Option<(String, String)>,
    /// A translation that connections of tunnel packets keep although no rule does it any more.
    pub kept: Option<Kept>,
    /// IPsec policies that refuse packets which arrive from it, as sentences with advice.
    pub ipsec: Vec<String>,
    /// An XDP program processes arriving packets before they can be captured.
    pub xdp: bool,
    /// What may consume all packets that arrive at the underlay interface, with advice, as a sentence.
    pub passthru: Option<String>,
    /// None of its tunnel packets reached the guard, which counts them.
    pub uncounted: bool,
    /// What else may drop packets that leave ([`OUT`]) and arrive ([`IN`]), with advice, as sentences.
    pub hints: [Vec<String>; 2],
    /// The same for packets that enter the VXLAN device ([`OUT`]) and come out of it ([`IN`]).
    pub device_hints: [Vec<String>; 2],
}

/// Index of outgoing packets in arrays of two.
pub const OUT: usize = 0;
/// Index of incoming packets in arrays of two.
pub const IN: usize = 1;

impl Watch {
    /// Starts the capture for these suspects.
    pub fn new(local: IpAddr, port: u16, own: BTreeSet<Mac>, suspects: &[Suspect]) -> Self {
        let of = |suspect: &Suspect| (suspect.node, Traces::default());
        Self {
            local,
            port,
            own,
            by_address: suspects.iter().map(|suspect| (suspect.address, suspect.node)).collect(),
            by_mac: suspects.iter().map(|suspect| (suspect.mac, suspect.node)).collect(),
            traces: suspects.iter().map(of).collect(),
            claims: BTreeSet::new(),
            claimed: BTreeMap::new(),
            answers: BTreeMap::new(),
            last_answers: BTreeMap::new(),
            contested: BTreeSet::new(),
        }
    }

    /// Collects the answers for these next hops from now on.
    pub fn expect_answers(&mut self, hops: impl IntoIterator<Item = IpAddr>) {
        self.answers.extend(hops.into_iter().map(|hop| (hop, BTreeSet::new())));
    }

    /// Returns the indices of the interfaces at which answers for a next hop arrived.
    pub fn answered_at(&self, hop: IpAddr) -> impl Iterator<Item = u32> {
        self.answers.get(&hop).into_iter().flatten().map(|(link, _)| *link)
    }

    /// Returns the MACs that answer for a next hop.
    pub fn answering(&self, hop: IpAddr) -> BTreeSet<Mac> {
        self.answers.get(&hop).into_iter().flatten().filter_map(|(_, mac)| *mac).collect()
    }

    /// Returns the MACs of the machines that answer in turn for an address. A machine that has taken it over
    /// from another one, such as a router of a pair (VRRP), is the only one that answers afterwards.
    pub fn contestants(&self, address: IpAddr) -> BTreeSet<Mac> {
        match self.contested.contains(&address) {
            true => self.answering(address),
            false => BTreeSet::new(),
        }
    }

    fn note_answer(&mut self, hop: IpAddr, link: u32, mac: Option<Mac>) {
        let known = self.answers.get(&hop);
        if let Some((mac, known)) = mac.zip(known) {
            let last = self.last_answers.insert((hop, link), mac);
            let is_back = known.contains(&(link, Some(mac))) && last != Some(mac);
            let is_balanced = is_of_glbp(mac) && last.is_some_and(is_of_glbp);
            if is_back && !is_balanced {
                self.contested.insert(hop);
            }
        }
        if let Some(answers) = self.answers.get_mut(&hop).filter(|answers| answers.len() < MAX_MACS)
        {
            answers.insert((link, mac));
        }
    }

    /// Evaluates a captured packet. Its content may be forged and is only used to explain the loss.
    pub fn on_packet(&mut self, packet: &Packet<'_>) {
        match packet.protocol {
            ARP if packet.kind != PACKET_OUTGOING => self.on_arp(packet),
            IPV6 if packet.bytes.get(6) == Some(&ICMPV6) => self.on_discovery(packet),
            IPV4 | IPV6 => self.on_tunnel_packet(packet),
            _ => None,
        };
    }

    fn note_sign(&mut self, address: IpAddr, sign: Sign) {
        let node = self.by_address.get(&address);
        if let Some(traces) = node.and_then(|node| self.traces.get_mut(node)) {
            traces.sign = Some(sign);
        }
    }

    fn on_discovery(&mut self, packet: &Packet<'_>) -> Option<()> {
        let message = packet.bytes.get(40..)?;
        if packet.kind != PACKET_OUTGOING {
            let source = IpAddr::from(*packet.bytes.get(8..)?.first_chunk::<16>()?);
            self.note_sign(source, Sign::Discovery);
        }
        if packet.kind != PACKET_HOST || *message.first()? != ADVERTISEMENT {
            return None;
        }
        let target = IpAddr::from(*message.get(8..)?.first_chunk::<16>()?);
        // The first option: the target's link-layer address, with a length of one unit of eight bytes.
        let mac = message.get(24..).and_then(|option| option.strip_prefix(&[2, 1]));
        let mac = mac.and_then(|bytes| bytes.first_chunk().copied()).map(Mac::from_bytes);
        self.note_answer(target, packet.link, mac);
        self.note_sign(target, Sign::Discovery);
        Some(())
    }

    fn on_arp(&mut self, packet: &Packet<'_>) -> Option<()> {
        let bytes = packet.bytes;
        // Ethernet and IPv4 (RFC 826).
        if bytes.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let mac = Mac::from_bytes(*bytes.get(8..)?.first_chunk()?);
        let mut address = IpAddr::from(*bytes.get(14..)?.first_chunk::<4>()?);
        if address.is_unspecified() {
            // An ARP probe (RFC 5227). Switches send probes for other hosts' addresses, with MACs of their
            // own.
            address = IpAddr::from(*bytes.get(24..)?.first_chunk::<4>()?);
            if !self.own.contains(&mac) {
                return None;
            }
        }
        if packet.kind == PACKET_HOST && bytes.get(6..8)? == [0, 2] {
            self.note_answer(address, packet.link, Some(mac));
        }
        if address == self.local {
            if !self.own.contains(&mac) && self.claims.len() < MAX_MACS {
                self.claims.insert(mac);
            }
        } else {
            let is_own = self.own.contains(&mac);
            let traces = self.traces.get_mut(self.by_address.get(&address)?)?;
            if !is_own {
                traces.sign = Some(Sign::Arp);
            }
            if traces.macs.len() < MAX_MACS {
                traces.macs.insert(mac);
            }
        }
        if self.claims.contains(&mac) || self.by_address.contains_key(&address) {
            self.claimed.entry(mac).or_default().insert(address);
        }
        Some(())
    }

    fn on_tunnel_packet(&mut self, packet: &Packet<'_>) -> Option<()> {
        let (from, to, udp) = datagram(packet.protocol, packet.bytes)?;
        if *udp.get(2..)?.first_chunk()? != self.port.to_be_bytes() {
            return None;
        }
        let is_carried = udp.get(UDP_HEADER).is_some_and(|flags| flags & VNI_IS_VALID != 0);
        if packet.kind == PACKET_OUTGOING {
            let traces = self.traces.get_mut(self.by_address.get(&to)?)?;
            if traces.left.len() < MAX_MACS {
                traces.left.insert((packet.link, from));
            }
            traces.carried[OUT] |= is_carried;
            return Some(());
        }
        if packet.kind != PACKET_HOST || to != self.local {
            return None;
        }
        if let Some(node) = self.by_address.get(&from) {
            let traces = self.traces.get_mut(node)?;
            traces.came.insert(packet.link);
            traces.carried[IN] |= is_carried;
            self.note_sign(from, Sign::Tunnel);
            return Some(());
        }
        // The forwarding trial sends tunnel packets to its own host, with a peer's MAC as inner source.
        if from == self.local {
            return None;
        }
        let inner = Mac::from_bytes(*udp.get(INNER_SOURCE_MAC..)?.first_chunk()?);
        self.traces.get_mut(self.by_mac.get(&inner)?)?.came_as = Some(from);
        Some(())
    }

    /// Returns the peers that use a MAC of this host, with the MAC.
    pub fn duplicates(&self) -> BTreeMap<NodeId, Mac> {
        let duplicates = self.traces.iter().filter_map(|(node, traces)| {
            Some((*node, *traces.macs.intersection(&self.own).next()?))
        });
        duplicates.collect()
    }

    /// Adds the peers with a MAC of this host from an earlier capture. Their packets are rarely captured,
    /// because they do not receive any.
    pub fn add_known_duplicates(&mut self, duplicates: &BTreeMap<NodeId, Mac>) {
        for (node, mac) in duplicates.iter().filter(|(_, mac)| self.own.contains(mac)) {
            if let Some(traces) = self.traces.get_mut(node) {
                traces.macs.insert(*mac);
            }
        }
    }

    /// Returns the MAC of another machine that has this host's address. A MAC that claims other addresses as
    /// well is not returned: it belongs to a router that answers for a whole network (proxy ARP). A machine
    /// answers for one other address, its own.
    pub fn claim(&self) -> Option<Mac> {
        let is_single = |mac: &&Mac| self.claimed.get(mac).is_none_or(|of| of.len() == 1);
        let others = || self.answers.iter().filter(|(hop, _)| **hop != self.local);
        let is_router = |mac: &Mac| {
            let is_by_it = |(_, answer): &(u32, Option<Mac>)| answer.as_ref() == Some(mac);
            others().filter(|(_, answers)| answers.iter().any(is_by_it)).count() > 1
        };
        self.claims.iter().filter(is_single).find(|mac| !is_router(mac)).copied()
    }

    /// Returns the result for each of these peers. Peers with the same cause share one sentence that names
    /// them.
    pub fn conclude(
        &self,
        suspects: &[Suspect],
        facts: &BTreeMap<NodeId, Facts>,
        place: &Place,
    ) -> BTreeMap<NodeId, Verdict> {
        let (mut verdicts, mut by_cause) = (BTreeMap::new(), BTreeMap::<Cause, Vec<_>>::new());
        for suspect in suspects {
            let (Some(traces), Some(facts)) =
                (self.traces.get(&suspect.node), facts.get(&suspect.node))
            else {
                continue;
            };
            let leaves = !traces.left.is_empty();
            let sign = traces.sign;
            let verdict = Verdict { leaves, sign, ..Verdict::default() };
            verdicts.insert(suspect.node, verdict);
            let seen =
                cause::Evidence { suspect, traces, facts, claim: self.claim(), own: &self.own };
            if let Some(cause) = Cause::of(&seen, place) {
                by_cause.entry(cause).or_default().push(suspect);
            }
        }
        for (cause, suspects) in by_cause {
            let problem = cause.problem(&suspects, place);
            for suspect in suspects {
                let verdict = verdicts.entry(suspect.node).or_default();
                verdict.is_dropped_here = matches!(cause, Cause::Dropped { .. });
                verdict.loses_flows = cause.loses_flows();
                verdict.may_recur = cause.may_recur();
                verdict.cause = Some(problem.clone());
            }
        }
        verdicts
    }
}

/// The evidence as an independent clause.
impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Arp => "its ARP was seen here",
            Self::Discovery => "its neighbor discovery was seen here",
            Self::Tunnel => "its tunnel packets were seen here",
        })
    }
}

/// Whether a MAC is of routers that share one address on purpose, and answer for it in turn (GLBP of Cisco).
fn is_of_glbp(mac: Mac) -> bool {
    mac.as_bytes().starts_with(&[0x00, 0x07, 0xb4, 0x00])
}

/// Parses a UDP datagram: source, destination, and UDP header with payload. Fragments are not recognized.
pub fn datagram(protocol: u16, bytes: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    const UDP: u8 = 17;
    if protocol == IPV4 {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let from = IpAddr::from(*bytes.get(12..)?.first_chunk::<4>()?);
        let to = IpAddr::from(*bytes.get(16..)?.first_chunk::<4>()?);
        (*bytes.get(9)? == UDP).then_some((from, to, bytes.get(header..)?))
    } else {
        let from = IpAddr::from(*bytes.get(8..)?.first_chunk::<16>()?);
        let to = IpAddr::from(*bytes.get(24..)?.first_chunk::<16>()?);
        (*bytes.get(6)? == UDP).then_some((from, to, bytes.get(40..)?))
    }
}
