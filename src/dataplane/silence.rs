//! Why nothing comes from a peer: what was seen of packets at this host's interfaces, and what follows.
//!
//! A path says that packets are lost, not where. Packets at the interfaces are certain: they have left this
//! host, or have not; they arrive here, and by which card, and under which address. What nftables did with
//! them is told by the kernel. Pure: the watching is done elsewhere, and only while a peer is silent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::model::{Mac, NodeId};

pub use self::cause::{
    Cause, Culprit, Diverted, MAY_NOT_SEND, Pinned, Place, iptables_ports, open_chain,
};

mod cause;
#[cfg(test)]
mod tests;

/// Ethernet's numbers of protocols (IANA, IEEE 802).
pub const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// `ICMPv6`, and its types of neighbor discovery (RFC 4861).
const ICMPV6: u8 = 58;
pub const SOLICITATION: u8 = 135;
pub const ADVERTISEMENT: u8 = 136;
/// Kinds of packets as packet sockets tell them (linux/if_packet.h).
const TO_THIS_HOST: u8 = 0;
const LEAVING: u8 = 4;
const UDP_HEADER: usize = 8;
/// The flag of a VXLAN header that names a network (RFC 7348, 5). Packets without it are of no device.
const HAS_NETWORK: u8 = 0x08;
/// Headers of UDP and of VXLAN, and the destination's MAC before the source's.
const INNER_SOURCE: usize = UDP_HEADER + 8 + 6;
/// MACs that are remembered of one address.
const MACS: usize = 8;

/// A peer that is silent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    pub node: NodeId,
    pub name: String,
    /// In the underlay.
    pub address: IpAddr,
    /// UDP port of its agent.
    pub gossip: u16,
    /// Of its VTEP: the source of the frames inside its tunnel packets.
    pub mac: Mac,
    /// The same of the packets inside that its host sends.
    pub vtep: IpAddr,
    /// Gossip holds it as alive.
    pub lives: bool,
    /// Packets to it go through a tunnel.
    pub tunnelled: bool,
}

/// A packet as a packet socket shows it, from the network header on.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Index of the interface.
    pub link: u32,
    /// `sll_pkttype`
    pub kind: u8,
    /// Ethernet's number of its protocol.
    pub protocol: u16,
    pub bytes: &'a [u8],
}

/// What was seen of one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces {
    /// Interfaces by which tunnel packets to it left, each with their source address.
    pub left: BTreeMap<u32, IpAddr>,
    /// Interfaces at which tunnel packets from it arrived.
    pub came: BTreeSet<u32>,
    /// Some of those that left, and of those that arrived, were of a VXLAN device, not knocks of an agent.
    pub carried: [bool; 2],
    /// Another address than its own under which its tunnel packets arrive.
    pub came_as: Option<IpAddr>,
    /// Hardware addresses that claim its address.
    pub macs: BTreeSet<Mac>,
    /// What shows that there is a machine with its address.
    pub sign: Option<Sign>,
}

/// What was seen of a machine that answers nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    Arp,
    Discovery,
    Tunnel,
}

/// What was found of one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What keeps it silent, as a sentence with what helps; none if that is not known.
    pub cause: Option<String>,
    /// Tunnel packets to it were seen to leave this host.
    pub leaves: bool,
    /// What was seen of a machine with its address.
    pub sign: Option<Sign>,
}

/// What was seen during one watch.
#[derive(Debug)]
pub struct Watch {
    local: IpAddr,
    port: u16,
    /// Hardware addresses of this host.
    own: BTreeSet<Mac>,
    by_address: BTreeMap<IpAddr, NodeId>,
    by_mac: BTreeMap<Mac, NodeId>,
    pub traces: BTreeMap<NodeId, Traces>,
    /// Hardware addresses of others that claim this host's address.
    claims: BTreeSet<Mac>,
    /// Addresses that each hardware address claims, as far as they are of interest.
    claimed: BTreeMap<Mac, BTreeSet<IpAddr>>,
    /// Answers that came for each next hop, by ARP or neighbor discovery: where, and with which address.
    answers: BTreeMap<IpAddr, BTreeSet<(u32, Option<Mac>)>>,
}

/// What the kernel was asked about one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Tunnel packets to it were sent while the watch lasted.
    pub sent: bool,
    /// The kernel has refused those of the agent, and no rule or policy was found that does so.
    pub forbidden: bool,
    /// Packets to it were handed to the VXLAN device meanwhile.
    pub entered: bool,
    /// The kernel does not find the hardware address of this next hop, at this interface.
    pub unresolved: Option<(IpAddr, String)>,
    /// Answers for that next hop come in, so this host drops them: the rule, if it was seen.
    pub refused: Option<Option<Culprit>>,
    /// The next hop has another hardware address here for good than those that answer for it.
    pub pinned: Option<Pinned>,
    /// The VXLAN device has dropped packets for their congestion marks.
    pub congested: bool,
    /// The reverse path filter of this interface drops its packets.
    pub filtered: Option<String>,
    /// What nftables drops of packets to it, and from it.
    pub dropped: [Option<Culprit>; 2],
    /// What nftables drops of the packets of its pods that come by another way than those to them go.
    pub diverted: Option<Diverted>,
    /// The chain that changes the source of packets to it.
    pub translating: Option<String>,
    /// The same for a rule of iptables-legacy, and the command that exempts tunnel packets from it.
    pub translating_legacy: Option<(String, String)>,
    /// A program sees packets that come in before they can be watched.
    pub xdp: bool,
    /// What may take all that comes in at the underlay's interface: a sentence with what helps.
    pub passthru: Option<String>,
    /// None of its tunnel packets came as far as the guard, which counts them.
    pub uncounted: bool,
    /// What else may drop packets on their way out, and on their way in: sentences with what helps.
    pub hints: [Vec<String>; 2],
    /// The same of packets on their way into the VXLAN device, and out of it.
    pub device_hints: [Vec<String>; 2],
}

/// Index of what is about packets that leave, and that come, in pairs.
pub const OUT: usize = 0;
pub const IN: usize = 1;

impl Watch {
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
        }
    }

    /// Takes note of answers that come for these next hops.
    pub fn expect(&mut self, hops: impl IntoIterator<Item = IpAddr>) {
        self.answers.extend(hops.into_iter().map(|hop| (hop, BTreeSet::new())));
    }

    /// Interfaces at which answers for a next hop came in.
    pub fn answered_at(&self, hop: IpAddr) -> impl Iterator<Item = u32> {
        self.answers.get(&hop).into_iter().flatten().map(|(link, _)| *link)
    }

    /// Hardware addresses that answer for a next hop.
    pub fn answering(&self, hop: IpAddr) -> BTreeSet<Mac> {
        self.answers.get(&hop).into_iter().flatten().filter_map(|(_, mac)| *mac).collect()
    }

    fn note_answer(&mut self, hop: IpAddr, link: u32, mac: Option<Mac>) {
        if let Some(answers) = self.answers.get_mut(&hop).filter(|answers| answers.len() < MACS) {
            answers.insert((link, mac));
        }
    }

    /// Takes note of a packet. Whatever it holds, nothing of it is trusted but for an explanation.
    pub fn see(&mut self, packet: &Packet<'_>) {
        match packet.protocol {
            ARP if packet.kind != LEAVING => self.see_arp(packet),
            IPV6 if packet.bytes.get(6) == Some(&ICMPV6) => self.see_discovery(packet),
            IPV4 | IPV6 => self.see_tunnel(packet),
            _ => None,
        };
    }

    fn note_sign(&mut self, address: IpAddr, sign: Sign) {
        let node = self.by_address.get(&address);
        if let Some(traces) = node.and_then(|node| self.traces.get_mut(node)) {
            traces.sign = Some(sign);
        }
    }

    fn see_discovery(&mut self, packet: &Packet<'_>) -> Option<()> {
        let message = packet.bytes.get(40..)?;
        if packet.kind != LEAVING {
            let source = IpAddr::from(*packet.bytes.get(8..)?.first_chunk::<16>()?);
            self.note_sign(source, Sign::Discovery);
        }
        if packet.kind != TO_THIS_HOST || *message.first()? != ADVERTISEMENT {
            return None;
        }
        let target = IpAddr::from(*message.get(8..)?.first_chunk::<16>()?);
        // The first option: the target's hardware address, in one unit of eight bytes.
        let mac = message.get(24..).and_then(|option| option.strip_prefix(&[2, 1]));
        let mac = mac.and_then(|bytes| bytes.first_chunk().copied()).map(Mac::from_bytes);
        self.note_answer(target, packet.link, mac);
        self.note_sign(target, Sign::Discovery);
        Some(())
    }

    fn see_arp(&mut self, packet: &Packet<'_>) -> Option<()> {
        let bytes = packet.bytes;
        // Ethernet and IPv4 (RFC 826).
        if bytes.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let mac = Mac::from_bytes(*bytes.get(8..)?.first_chunk()?);
        let mut address = IpAddr::from(*bytes.get(14..)?.first_chunk::<4>()?);
        if address.is_unspecified() {
            // A probe (RFC 5227). Switches send them for addresses of others, under MACs of their own.
            address = IpAddr::from(*bytes.get(24..)?.first_chunk::<4>()?);
            if !self.own.contains(&mac) {
                return None;
            }
        }
        if packet.kind == TO_THIS_HOST && bytes.get(6..8)? == [0, 2] {
            self.note_answer(address, packet.link, Some(mac));
        }
        if address == self.local {
            if !self.own.contains(&mac) && self.claims.len() < MACS {
                self.claims.insert(mac);
            }
        } else {
            let is_own = self.own.contains(&mac);
            let traces = self.traces.get_mut(self.by_address.get(&address)?)?;
            if !is_own {
                traces.sign = Some(Sign::Arp);
            }
            if traces.macs.len() < MACS {
                traces.macs.insert(mac);
            }
        }
        if self.claims.contains(&mac) || self.by_address.contains_key(&address) {
            self.claimed.entry(mac).or_default().insert(address);
        }
        Some(())
    }

    fn see_tunnel(&mut self, packet: &Packet<'_>) -> Option<()> {
        let (from, to, udp) = datagram(packet.protocol, packet.bytes)?;
        if *udp.get(2..)?.first_chunk()? != self.port.to_be_bytes() {
            return None;
        }
        let is_carried = udp.get(UDP_HEADER).is_some_and(|flags| flags & HAS_NETWORK != 0);
        if packet.kind == LEAVING {
            let traces = self.traces.get_mut(self.by_address.get(&to)?)?;
            traces.left.insert(packet.link, from);
            traces.carried[OUT] |= is_carried;
            return Some(());
        }
        if packet.kind != TO_THIS_HOST || to != self.local {
            return None;
        }
        if let Some(node) = self.by_address.get(&from) {
            let traces = self.traces.get_mut(node)?;
            traces.came.insert(packet.link);
            traces.carried[IN] |= is_carried;
            self.note_sign(from, Sign::Tunnel);
            return Some(());
        }
        // The forwarding trial sends tunnel packets to its own host, under the MAC of a peer.
        if from == self.local {
            return None;
        }
        let inner = Mac::from_bytes(*udp.get(INNER_SOURCE..)?.first_chunk()?);
        self.traces.get_mut(self.by_mac.get(&inner)?)?.came_as = Some(from);
        Some(())
    }

    /// Peers that had a hardware address of this host, when they were seen at some time.
    pub fn duplicates(&self) -> BTreeMap<NodeId, Mac> {
        let duplicates = self.traces.iter().filter_map(|(node, traces)| {
            Some((*node, *traces.macs.intersection(&self.own).next()?))
        });
        duplicates.collect()
    }

    /// Takes note of what was seen of such peers before: they are seldom seen, as nothing reaches them.
    pub fn recall(&mut self, duplicates: &BTreeMap<NodeId, Mac>) {
        for (node, mac) in duplicates.iter().filter(|(_, mac)| self.own.contains(mac)) {
            if let Some(traces) = self.traces.get_mut(node) {
                traces.macs.insert(*mac);
            }
        }
    }

    /// The hardware address of another machine that has this host's address. One that answers for other
    /// addresses as well is a router's that does so for all of a network.
    pub fn claim(&self) -> Option<Mac> {
        let is_single = |mac: &&Mac| self.claimed.get(mac).is_none_or(|of| of.len() == 1);
        self.claims.iter().find(is_single).copied()
    }

    /// What was found of each of these peers. The same cause of several is one sentence that names them.
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
            verdicts.insert(suspect.node, Verdict { cause: None, leaves, sign });
            let seen = cause::Seen { suspect, traces, facts, claim: self.claim(), own: &self.own };
            if let Some(cause) = Cause::of(&seen, place) {
                by_cause.entry(cause).or_default().push(suspect);
            }
        }
        for (cause, whom) in by_cause {
            let sentence = cause.sentence(&whom, place);
            for suspect in whom {
                let verdict = verdicts.entry(suspect.node).or_default();
                verdict.cause = Some(sentence.clone());
            }
        }
        verdicts
    }
}

/// What was seen, as the reason for saying that there is a machine.
impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Arp => "its ARP was seen here",
            Self::Discovery => "its neighbor discovery was seen here",
            Self::Tunnel => "its tunnel packets were seen here",
        })
    }
}

/// Source, destination and what follows the IP header of a datagram that is not a fragment.
fn datagram(protocol: u16, bytes: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
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
