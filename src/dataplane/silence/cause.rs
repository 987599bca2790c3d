//! Causes of missing packets.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Facts, IN, OUT, Suspect, Traces, kept::Kept};
use crate::{dataplane::dropping_chain::DroppedBy, model::Mac};

/// Why the kernel refuses all packets of this process, if no firewall rule of this host drops them.
pub const MAY_NOT_SEND: &str = "the kernel refuses packets that the agent sends (EPERM): IPAddressDeny= of \
                                its unit (systemctl show gossamer -p IPAddressDeny), or another eBPF program \
                                of its cgroup (bpftool cgroup tree), forbids it";

/// This host's end of the tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the underlay interface.
    pub link: u32,
    /// Name of the underlay interface.
    pub interface: String,
    /// Name of the VXLAN device, and of gossamer's nftables table.
    pub device: String,
    /// This host's underlay address.
    pub local: IpAddr,
    /// Source address of tunnel packets.
    pub source: IpAddr,
    /// UDP port of the tunnel.
    pub port: u16,
    /// UDP port of this host's agent.
    pub gossip: u16,
    /// The guard is on: this host drops tunnel packets from addresses of non-members.
    pub guard: bool,
    /// The first network of the overlay.
    pub overlay: IpNet,
}

/// Packets of a peer's pods that arrive by one interface while packets to them leave by another, and are
/// dropped for that.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diverted {
    /// The rule that drops them.
    pub by: DroppedBy,
    /// Name of the interface at which they arrive.
    pub came: String,
    /// Name of the interface by which packets to them leave.
    pub goes: String,
}

/// Tunnel packets that leave by another interface than the one of their route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Elsewhere {
    /// Name of the interface by which they leave.
    pub interface: String,
    /// Name of the interface of their route.
    pub usual: String,
    /// The policy rule that sends packets with a mark there, as a sentence, and the command against it.
    pub rule: Option<(String, String)>,
}

/// A permanent neighbor entry that contradicts the answers for its address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pinned {
    /// The address of the entry.
    pub address: IpAddr,
    /// Name of the interface of the entry.
    pub interface: String,
    /// The MAC of the entry.
    pub mac: Mac,
    /// MACs that answer for the address.
    pub answering: BTreeSet<Mac>,
    /// The interface resolves no address (flag `NOARP`): the kernel makes the entry itself.
    pub no_arp: bool,
}

/// Why no packets arrive from a peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Another machine has this host's address.
    AddressTaken {
        /// The other machine's MAC.
        mac: Mac,
    },
    /// The peer's network card has a MAC of this host.
    SameMac {
        /// The MAC of both.
        mac: Mac,
    },
    /// The reverse path filter drops the peer's packets.
    Filtered {
        /// Name of the interface at which they arrive.
        interface: String,
    },
    /// An nftables rule drops tunnel packets.
    Dropped {
        /// Drops packets to the peer, otherwise those from it.
        outgoing: bool,
        /// The rule.
        by: DroppedBy,
    },
    /// A rule drops packets that arrive by another way than packets to their source take.
    Diverted(Diverted),
    /// Tunnel packets leave by another interface than their route.
    Elsewhere(Elsewhere),
    /// The kernel refuses the agent's packets.
    Forbidden,
    /// Tunnel packets leave with another source address than the one that peers know.
    Translated {
        /// The source address of the packets that leave.
        seen: IpAddr,
        /// The nftables chain that changes it.
        chain: Option<String>,
        /// The iptables-legacy rule that changes it, as part of a sentence, and the command against it.
        legacy: Option<(String, String)>,
    },
    /// Connections keep a translation of tunnel packets.
    Kept(Kept),
    /// The peer's tunnel packets arrive from another address than the advertised one.
    UnknownSender {
        /// The source address of the packets that arrive.
        seen: IpAddr,
    },
    /// Several MACs claim the peer's address.
    Claimed {
        /// The MACs.
        macs: BTreeSet<Mac>,
    },
    /// Several machines answer in turn for the address of a router.
    GatewayClaimed {
        /// The router's address.
        gateway: IpAddr,
        /// The MACs.
        macs: BTreeSet<Mac>,
    },
    /// A permanent neighbor entry has the wrong MAC.
    Pinned(Pinned),
    /// This host drops the answers for the next hop.
    Refused {
        /// The next hop, if it is not the peer itself.
        gateway: Option<IpAddr>,
        /// Name of the interface at which the answers arrive.
        interface: String,
        /// The rule that drops them, if known.
        by: Option<DroppedBy>,
        /// What may consume all packets that arrive, with advice, as a sentence.
        passthru: Option<String>,
    },
    /// The VXLAN device drops packets that routers marked as having met congestion (RFC 6040).
    Congested,
    /// The MAC of the next hop cannot be resolved.
    Unresolved {
        /// Address of the next hop.
        address: IpAddr,
        /// Name of the interface to it.
        interface: String,
        /// The next hop is not the peer itself.
        is_gateway: bool,
        /// It is one of several, and only the flows that the kernel gives it are lost.
        is_one_of_several: bool,
    },
    /// Tunnel packets are sent but do not leave by any interface.
    NotLeaving {
        /// What may drop the packets, with advice, as sentences.
        hints: Vec<String>,
    },
    /// Packets enter the VXLAN device, but no tunnel packets leave.
    NotEncapsulated {
        /// What may drop the packets, with advice, as sentences.
        hints: Vec<String>,
    },
    /// Tunnel packets arrive, but something attached to the VXLAN device may drop the packets inside them.
    LostInDevice {
        /// What may drop the packets, with advice, as sentences.
        hints: Vec<String>,
    },
    /// Tunnel packets arrive at the interface but do not reach the guard.
    LostBeforeGuard {
        /// What may drop the packets, with advice, as sentences.
        hints: Vec<String>,
    },
    /// Tunnel packets pass the guard, and IPsec policies refuse them.
    RefusedByIpsec {
        /// The policies with advice, as sentences.
        policies: Vec<String>,
    },
    /// Packets leave and none arrive; an XDP program may drop them before they can be captured.
    LostToXdp,
}

/// The evidence about one peer.
pub(super) struct Evidence<'a> {
    pub suspect: &'a Suspect,
    pub traces: &'a Traces,
    pub facts: &'a Facts,
    pub claim: Option<Mac>,
    pub own: &'a BTreeSet<Mac>,
}

impl Cause {
    /// Returns the first cause that applies; the most certain ones are tried first.
    pub(super) fn of(seen: &Evidence<'_>, place: &Place) -> Option<Self> {
        let Evidence { suspect, traces, facts, claim, own } = seen;
        let has_left = !traces.left.is_empty();
        if let Some(mac) = *claim {
            return Some(Self::AddressTaken { mac });
        }
        if let Some(mac) = traces.macs.intersection(own).next() {
            return Some(Self::SameMac { mac: *mac });
        }
        if let Some(pinned) = facts.pinned.clone() {
            return Some(Self::Pinned(pinned));
        }
        if let (Some(by), Some((hop, interface))) = (&facts.refused, &facts.unresolved) {
            let gateway = Some(*hop).filter(|hop| *hop != suspect.address);
            let (interface, by, passthru) = (interface.clone(), by.clone(), facts.passthru.clone());
            return Some(Self::Refused { gateway, interface, by, passthru });
        }
        if let Some(interface) = facts.filtered.clone() {
            return Some(Self::Filtered { interface });
        }
        for (way, outgoing) in [(OUT, true), (IN, false)] {
            // Tunnel packets that left were not dropped, even if a rule drops other packets.
            let applies = !(outgoing && has_left);
            if let Some(by) = facts.dropped[way].clone().filter(|_| applies) {
                return Some(Self::Dropped { outgoing, by });
            }
        }
        if facts.forbidden && facts.dropped[OUT].is_none() {
            return Some(Self::Forbidden);
        }
        let elsewhere = || facts.elsewhere.clone().map(Self::Elsewhere);
        if let Some(cause) = facts.diverted.clone().map(Self::Diverted).or_else(elsewhere) {
            return Some(cause);
        }
        if let Some(kept) = facts.kept {
            return Some(Self::Kept(kept));
        }
        if let Some((_, seen)) = traces.left.iter().find(|(_, from)| *from != place.source) {
            let (chain, legacy) = (facts.translating.clone(), facts.translating_legacy.clone());
            return Some(Self::Translated { seen: *seen, chain, legacy });
        }
        if let (Some(seen), true) = (traces.came_as, traces.came.is_empty()) {
            return Some(Self::UnknownSender { seen });
        }
        if let Some(cause) = Self::of_claims(traces, facts) {
            return Some(cause);
        }
        if let Some((address, interface)) = facts.unresolved.clone() {
            let is_gateway = address != suspect.address;
            let is_one_of_several = facts.is_shared;
            return Some(Self::Unresolved { address, interface, is_gateway, is_one_of_several });
        }
        if facts.sent && !has_left {
            return Some(Self::NotLeaving { hints: facts.hints[OUT].clone() });
        }
        if facts.entered && !traces.carried[OUT] {
            return Some(Self::NotEncapsulated { hints: facts.device_hints[OUT].clone() });
        }
        let is_lost_here = facts.uncounted && traces.came.contains(&place.link);
        if is_lost_here {
            return Some(Self::LostBeforeGuard { hints: facts.hints[IN].clone() });
        }
        if !facts.ipsec.is_empty() && traces.came.contains(&place.link) {
            return Some(Self::RefusedByIpsec { policies: facts.ipsec.clone() });
        }
        if facts.congested && traces.came.contains(&place.link) {
            return Some(Self::Congested);
        }
        if traces.carried[IN] && !facts.device_hints[IN].is_empty() {
            return Some(Self::LostInDevice { hints: facts.device_hints[IN].clone() });
        }
        (has_left && traces.came.is_empty() && facts.xdp).then_some(Self::LostToXdp)
    }

    /// Returns the cause that several machines have the address of the peer or of the router to it.
    fn of_claims(traces: &Traces, facts: &Facts) -> Option<Self> {
        if traces.macs.len() > 1 {
            return Some(Self::Claimed { macs: traces.macs.clone() });
        }
        let (gateway, macs) = facts.contested.clone()?;
        Some(Self::GatewayClaimed { gateway, macs })
    }

    /// Returns whether the cause may drop packets again after some have passed, as a rule with a rate limit
    /// does. A next hop that was off or cut off answers once packets pass.
    pub(super) const fn may_recur(&self) -> bool {
        !matches!(self, Self::Unresolved { is_one_of_several: false, .. })
    }

    /// Returns whether the cause concerns single flows, so that others may pass: connections that began while
    /// a translation was in force.
    pub(super) const fn loses_flows(&self) -> bool {
        matches!(
            self,
            Self::Kept(_)
                | Self::Translated { chain: None, legacy: None, .. }
                | Self::Unresolved { is_one_of_several: true, .. }
        )
    }
}
