//! Causes of silence, and the sentences that tell them with what helps.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Facts, IN, OUT, Suspect, Traces};
use crate::model::Mac;

/// Peers that are named in one sentence.
const NAMED: usize = 3;
/// The same of ports: iptables takes 15 at once.
const PORTS: usize = 8;

/// Why no packet of this process leaves it, where no rule for packets of this host drops it.
pub const MAY_NOT_SEND: &str = "the kernel refuses what the agent sends (EPERM): IPAddressDeny= of its unit \
                                (systemctl show gossamer -p IPAddressDeny), or another eBPF program of its \
                                cgroup (bpftool cgroup tree), forbids it";

/// This host's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The underlay's interface: index and name.
    pub link: u32,
    pub interface: String,
    /// Name of the VXLAN device, and of the table of nftables.
    pub device: String,
    pub local: IpAddr,
    /// Source of tunnel packets.
    pub source: IpAddr,
    pub port: u16,
    /// UDP port of this host's agent.
    pub gossip: u16,
    /// Tunnel packets under addresses that are no member's are dropped here.
    pub guard: bool,
    /// The first network of the overlay.
    pub overlay: IpNet,
}

/// A chain of nftables that was seen to drop packets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Culprit {
    /// Family, table and name.
    pub chain: String,
    /// The rule; none if it was the chain's policy.
    pub handle: Option<u64>,
    /// It hands them to a program, which has not let them pass.
    pub queued: bool,
}

/// What drops packets of a peer's pods that come in by one interface, while packets to them leave by another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diverted {
    pub by: Culprit,
    pub came: String,
    pub goes: String,
}

/// An entry of the kernel's neighbor table that never changes, and who answers for its address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pinned {
    pub address: IpAddr,
    pub interface: String,
    pub mac: Mac,
    pub answering: BTreeSet<Mac>,
}

/// Why a peer is silent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Another machine has this host's address, too.
    AddressTaken {
        mac: Mac,
    },
    /// The peer's card has the hardware address of one of ours.
    SameMac {
        mac: Mac,
    },
    Filtered {
        interface: String,
    },
    Dropped {
        outgoing: bool,
        by: Culprit,
    },
    Diverted(Diverted),
    /// The kernel refuses what the agent sends.
    Forbidden,
    /// This host sends under another address than the one that peers know.
    Translated {
        seen: IpAddr,
        chain: Option<String>,
        legacy: Option<(String, String)>,
    },
    /// The peer's packets arrive under another address than the one that it advertises.
    UnknownSender {
        seen: IpAddr,
    },
    /// Several cards claim the peer's address.
    Claimed {
        macs: BTreeSet<Mac>,
    },
    Pinned(Pinned),
    /// This host drops the answers for the next hop.
    Refused {
        gateway: Option<IpAddr>,
        interface: String,
        by: Option<Culprit>,
        /// What may take all that comes in.
        passthru: Option<String>,
    },
    /// The VXLAN device drops what routers have marked as having met congestion.
    Congested,
    /// The next hop has no hardware address.
    Unresolved {
        address: IpAddr,
        interface: String,
        is_gateway: bool,
    },
    /// Packets are sent and do not reach any interface.
    NotLeaving {
        hints: Vec<String>,
    },
    /// Packets are handed to the VXLAN device, and no tunnel packets come of them.
    NotCarried {
        hints: Vec<String>,
    },
    /// Packets come out of the tunnel, and something at the VXLAN device may drop them.
    Swallowed {
        hints: Vec<String>,
    },
    /// Packets arrive at the interface and do not come as far as the guard.
    NotTaken {
        hints: Vec<String>,
    },
    /// Packets leave, none arrive, and a program may have dropped them before they could be seen.
    Unseen,
}

/// What is known of one peer.
pub(super) struct Seen<'a> {
    pub suspect: &'a Suspect,
    pub traces: &'a Traces,
    pub facts: &'a Facts,
    pub claim: Option<Mac>,
    pub own: &'a BTreeSet<Mac>,
}

impl Cause {
    /// The first that applies, the most certain ones before others.
    pub(super) fn of(seen: &Seen<'_>, place: &Place) -> Option<Self> {
        let Seen { suspect, traces, facts, claim, own } = seen;
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
            // What is seen to leave is not dropped, whatever a rule does with some other packet.
            let applies = !(outgoing && has_left);
            if let Some(by) = facts.dropped[way].clone().filter(|_| applies) {
                return Some(Self::Dropped { outgoing, by });
            }
        }
        if facts.forbidden && facts.dropped[OUT].is_none() {
            return Some(Self::Forbidden);
        }
        if let Some(diverted) = facts.diverted.clone() {
            return Some(Self::Diverted(diverted));
        }
        if let Some(seen) = traces.left.values().find(|from| **from != place.source) {
            let (chain, legacy) = (facts.translating.clone(), facts.translating_legacy.clone());
            return Some(Self::Translated { seen: *seen, chain, legacy });
        }
        if let (Some(seen), true) = (traces.came_as, traces.came.is_empty()) {
            return Some(Self::UnknownSender { seen });
        }
        if traces.macs.len() > 1 {
            return Some(Self::Claimed { macs: traces.macs.clone() });
        }
        if let Some((address, interface)) = facts.unresolved.clone() {
            let is_gateway = address != suspect.address;
            return Some(Self::Unresolved { address, interface, is_gateway });
        }
        if facts.sent && !has_left {
            return Some(Self::NotLeaving { hints: facts.hints[OUT].clone() });
        }
        if facts.entered && !traces.carried[OUT] {
            return Some(Self::NotCarried { hints: facts.device_hints[OUT].clone() });
        }
        let is_lost_here = facts.uncounted && traces.came.contains(&place.link);
        if is_lost_here {
            return Some(Self::NotTaken { hints: facts.hints[IN].clone() });
        }
        if facts.congested && traces.came.contains(&place.link) {
            return Some(Self::Congested);
        }
        if traces.carried[IN] && !facts.device_hints[IN].is_empty() {
            return Some(Self::Swallowed { hints: facts.device_hints[IN].clone() });
        }
        (has_left && traces.came.is_empty() && facts.xdp).then_some(Self::Unseen)
    }

    /// What is wrong and what helps.
    pub fn sentence(&self, whom: &[&Suspect], place: &Place) -> String {
        let Place { interface: underlay, device, local, source, port, .. } = place;
        let peers = named(whom);
        match self {
            Self::AddressTaken { mac } => format!(
                "another machine has the address {local} of this host, too: a card with MAC {mac} claims it \
                 on {underlay}, and packets for {local} go to the one or the other; give one of the two \
                 another address"
            ),
            Self::SameMac { mac } => format!(
                "{peers} and this host have the same MAC address {mac} on {underlay}, so the network \
                 delivers packets for the one to the other: give one of them another (ip link set {underlay} \
                 address MAC, or in the settings of the virtual machine; cloned machines have the same)"
            ),
            Self::Filtered { interface } => {
                let other = match interface == underlay {
                    true => String::new(),
                    false => format!(
                        ", not on {underlay}, which has its address (two cards in one network: sysctl -w \
                         net.ipv4.conf.all.arp_ignore=1 and net.ipv4.conf.all.arp_announce=2 make each \
                         answer for its own)"
                    ),
                };
                format!(
                    "rp_filter of {interface} drops the packets of {peers}, which arrive on {interface}\
                     {other}: sysctl -w net.ipv4.conf.{}.rp_filter=2 (and a file in /etc/sysctl.d)",
                    interface.replace('.', "/")
                )
            }
            Self::Dropped { outgoing, by } => {
                let packets = if *outgoing { "to" } else { "from" };
                // What drops the one usually drops the other as well, and a member needs both.
                let mut ports = vec![*port];
                match outgoing {
                    true => ports.extend(whom.iter().map(|suspect| suspect.gossip)),
                    false => ports.push(place.gossip),
                }
                ports.sort_unstable();
                ports.dedup();
                ports.truncate(PORTS);
                let does = by.does();
                format!(
                    "{by} {does} on this host, UDP {port} {packets} {peers}: {}",
                    open_chain(&by.chain, &ports)
                )
            }
            Self::Diverted(Diverted { by, came, goes }) => format!(
                "{by} drops packets of {peers} and of pods there on this host: they come in by {came}, and \
                 packets to them leave by {goes}, as where two hosts have different modes; rules about the \
                 reverse path (rpfilter, fib) drop that. Set the same mode on all nodes, or: {}",
                open_for_pods(&by.chain, place.overlay)
            ),
            Self::Forbidden => format!(
                "packets of the agent to {peers} do not leave this host, though those of pods may: \
                 {MAY_NOT_SEND}"
            ),
            Self::Translated { seen, chain, legacy } => {
                let (by, fix) = match (chain, legacy) {
                    (Some(chain), _) => (format!("chain {chain}"), open_chain(chain, &[*port])),
                    (None, Some(legacy)) => legacy.clone(),
                    (None, None) => (
                        "an address translation of this host".to_owned(),
                        format!("iptables -t nat -I POSTROUTING -p udp --dport {port} -j ACCEPT"),
                    ),
                };
                format!(
                    "tunnel packets to {peers} leave this host under the address {seen}, not {source}, and \
                     the guard of each member drops them: {by} changes it; exempt UDP {port}: {fix}"
                )
            }
            Self::UnknownSender { seen } => {
                let dropped =
                    if place.guard { ", so the guard of this host drops them" } else { "" };
                let address =
                    whom.first().map_or_else(String::new, |suspect| suspect.address.to_string());
                format!(
                    "tunnel packets of {peers} arrive under the address {seen}{dropped}: an address \
                     translation there or on the way changes {address}; exempt UDP {port} from it (there: \
                     iptables -t nat -I POSTROUTING -p udp --dport {port} -j ACCEPT), or set advertise = \
                     \"{seen}\" there"
                )
            }
            Self::Claimed { macs } => {
                let macs: Vec<String> = macs.iter().map(ToString::to_string).collect();
                format!(
                    "several cards answer for the address of {peers} on {underlay}: {}; either another \
                     machine has that address, too, or that host has two cards in this network (there: \
                     sysctl -w net.ipv4.conf.all.arp_ignore=1)",
                    macs.join(", ")
                )
            }
            Self::Pinned(Pinned { address, interface, mac, answering }) => {
                let answering: Vec<String> = answering.iter().map(ToString::to_string).collect();
                format!(
                    "this host sends packets to {peers} to the hardware address {mac}, which a permanent \
                     entry has for {address} on {interface}, and {} answers for that address: ip neigh del \
                     {address} dev {interface} (and where it is set: a script, /etc/ethers, [Neighbor] of \
                     systemd-networkd)",
                    answering.join(", ")
                )
            }
            Self::Refused { gateway, interface, by, passthru } => {
                let ipv4 = local.is_ipv4();
                let asked = if ipv4 { "ARP" } else { "neighbor discovery" };
                let (of, hops) = match gateway {
                    Some(gateway) => (format!("the gateway {gateway}"), vec![*gateway]),
                    None => (peers.clone(), whom.iter().map(|suspect| suspect.address).collect()),
                };
                let why = match (by, passthru) {
                    (Some(by), _) => format!("{by} does: {}", open_for_answers(&by.chain, &hops)),
                    (None, Some(passthru)) => passthru.clone(),
                    (None, None) => format!(
                        "no rule of nftables was seen to do so: look at {}, and tc filter show dev \
                         {interface} ingress",
                        if ipv4 {
                            "arptables-legacy -S INPUT"
                        } else {
                            "ip6tables-legacy -S INPUT"
                        }
                    ),
                };
                format!(
                    "answers of {of} to {asked} arrive on {interface}, and this host drops them, so packets \
                     to {peers} do not leave it: {why}"
                )
            }
            Self::Congested => format!(
                "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and the VXLAN device drops \
                 them, as its RX frame errors tell (ip -s -s link): they are marked as having met \
                 congestion (ECN CE) and packets inside know no such marks (RFC 6040). A switch or router \
                 on the way marks them, or a rule of one of the hosts: let it mark only packets that have \
                 ECT, or drop instead. Until then, on this host: nft 'add table inet unmark; add chain inet \
                 unmark in {{ type filter hook prerouting priority -300; }}; add rule inet unmark in udp \
                 dport {port} {} ecn set not-ect'",
                if local.is_ipv4() { "ip" } else { "ip6" }
            ),
            Self::Unresolved { address, interface, is_gateway } => {
                let asked = if address.is_ipv4() { "ARP" } else { "neighbor discovery" };
                let of = if *is_gateway { ", the gateway" } else { "" };
                format!(
                    "no machine on {interface} answers {asked} for {address}{of}, so packets to {peers} do \
                     not leave this host: is it off, or in another network segment (veth pair, VLAN, port \
                     security)? (ip neigh show {address})"
                )
            }
            Self::NotLeaving { hints } => format!(
                "tunnel packets (UDP {port}) to {peers} do not leave this host, though it sends them: {}",
                hints.join("; ")
            ),
            Self::NotCarried { hints } => format!(
                "packets to {peers} are lost on this host: they are handed to {device}, and no tunnel \
                 packets come of them, though those that the agent sends past {device} leave by \
                 {underlay}: {}",
                hints.join("; ")
            ),
            Self::Swallowed { hints } => format!(
                "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and what is inside them may be \
                 dropped by what hangs on {device}: {}",
                hints.join("; ")
            ),
            Self::Unseen => format!(
                "tunnel packets (UDP {port}) to {peers} leave this host, and none arrive: they are lost \
                 there, on the way, or to the XDP program of {underlay}, which sees packets before all else \
                 (ip -d link show dev {underlay}; bpftool net)"
            ),
            Self::NotTaken { hints } => format!(
                "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and this host drops them \
                 before its guard: {}",
                hints.join("; ")
            ),
        }
    }
}

impl Culprit {
    const fn does(&self) -> &'static str {
        if self.queued {
            "hands tunnel packets to a program that does not let them pass"
        } else {
            "drops tunnel packets"
        }
    }
}

/// The rule or policy by its chain.
impl std::fmt::Display for Culprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { chain, handle, .. } = self;
        match handle {
            Some(handle) => {
                write!(f, "a rule of chain {chain} (handle {handle}: nft -a list chain {chain})")
            }
            None => write!(f, "the policy of chain {chain}"),
        }
    }
}

/// The command that lets answers for these next hops through a chain, and what they ask.
fn open_for_answers(chain: &str, hops: &[IpAddr]) -> String {
    if hops.iter().any(IpAddr::is_ipv6) {
        let types = "{ nd-neighbor-solicit, nd-neighbor-advert }";
        return match chain {
            "ip6 filter INPUT" => ["neighbour-solicitation", "neighbour-advertisement"]
                .map(|kind| format!("ip6tables -I INPUT -p icmpv6 --icmpv6-type {kind} -j ACCEPT"))
                .join("; "),
            _ => format!("nft insert rule {chain} icmpv6 type {types} accept"),
        };
    }
    let hops: Vec<String> = hops.iter().take(PORTS).map(ToString::to_string).collect();
    match (chain, hops.as_slice()) {
        ("arp filter INPUT", _) => {
            let open = |hop: &String| format!("arptables -I INPUT -s {hop} -j ACCEPT");
            hops.iter().map(open).collect::<Vec<_>>().join("; ")
        }
        (_, [hop]) => format!("nft insert rule {chain} arp saddr ip {hop} accept"),
        _ => format!("nft insert rule {chain} arp saddr ip {{ {} }} accept", hops.join(", ")),
    }
}

/// The command that lets UDP to these ports through a chain, at its beginning.
pub fn open_chain(chain: &str, ports: &[u16]) -> String {
    match (by_iptables(chain), ports) {
        (Some(insert), _) => format!("{insert} {} -j ACCEPT", iptables_ports(ports)),
        (None, [port]) => format!("nft insert rule {chain} udp dport {port} accept"),
        _ => format!("nft insert rule {chain} udp dport {{ {} }} accept", list(ports, ", ")),
    }
}

/// The same for packets of pods.
fn open_for_pods(chain: &str, overlay: IpNet) -> String {
    let family = if overlay.addr().is_ipv4() { "ip" } else { "ip6" };
    match by_iptables(chain) {
        Some(insert) => format!("{insert} -s {overlay} -j ACCEPT"),
        None => format!("nft insert rule {chain} {family} saddr {overlay} accept"),
    }
}

/// The command that puts a rule at the beginning of a chain which iptables has made of its own accord.
fn by_iptables(chain: &str) -> Option<String> {
    let [family @ ("ip" | "ip6"), table @ ("filter" | "nat" | "mangle" | "raw"), name] =
        chain.split(' ').collect::<Vec<_>>()[..]
    else {
        return None;
    };
    let program = if family == "ip" { "iptables" } else { "ip6tables" };
    let table = if table == "filter" { String::new() } else { format!(" -t {table}") };
    let is_built_in = name.bytes().all(|byte| byte.is_ascii_uppercase());
    is_built_in.then(|| format!("{program}{table} -I {name}"))
}

/// UDP to these ports, as iptables has it.
pub fn iptables_ports(ports: &[u16]) -> String {
    match ports {
        [port] => format!("-p udp --dport {port}"),
        _ => format!("-p udp -m multiport --dports {}", list(ports, ",")),
    }
}

fn list(ports: &[u16], between: &str) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

fn named(whom: &[&Suspect]) -> String {
    let some = whom.iter().take(NAMED);
    let mut names: Vec<String> =
        some.map(|suspect| format!("{} ({})", suspect.name, suspect.address)).collect();
    if whom.len() > NAMED {
        names.push(format!("{} more", whom.len() - NAMED));
    }
    names.join(", ")
}
