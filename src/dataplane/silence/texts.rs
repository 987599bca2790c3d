//! Describes causes of missing packets as problems with advice.

use std::collections::BTreeSet;

use super::{Cause, Diverted, Elsewhere, MAY_NOT_SEND, Pinned, Place, Suspect};
use crate::{
    dataplane::remedies::{
        MAX_PORTS, accept_from, forget_connections, open_chain, open_for_answers,
    },
    model::{Mac, Problem, ProblemCode, list_at_most, resolution_name, rule_family},
};

/// Maximum number of peers named in one sentence.
const MAX_NAMED_PEERS: usize = 3;

impl Cause {
    /// Returns the problem with advice. `suspects` are all peers that it concerns.
    pub fn problem(&self, suspects: &[&Suspect], place: &Place) -> Problem {
        let names: Vec<&str> = suspects.iter().map(|suspect| suspect.name.as_str()).collect();
        let (what, fix) = self.texts(suspects, place);
        let (code, subject) = match self {
            Self::AddressTaken { .. } => (ProblemCode::AddressTaken, place.interface.clone()),
            Self::GatewayClaimed { gateway, .. } => {
                (ProblemCode::AddressTaken, gateway.to_string())
            }
            _ => (ProblemCode::PathLost, names.join(", ")),
        };
        Problem::new(code, subject, what, fix)
    }

    /// Returns what is wrong, and the advice.
    #[expect(clippy::too_many_lines, reason = "one text for each cause")]
    fn texts(&self, suspects: &[&Suspect], place: &Place) -> (String, String) {
        let Place { interface: underlay, device, local, source, port, .. } = place;
        let peers = list_names(suspects);
        match self {
            Self::AddressTaken { mac } => (
                format!(
                    "another machine has the address {local} of this host, too: a card with MAC {mac} \
                     claims it on {underlay}, and packets to {local} reach either machine"
                ),
                "change the address of one of them".to_owned(),
            ),
            Self::SameMac { mac } => (
                format!(
                    "{peers} and this host have the same MAC address {mac} on {underlay}, so the network \
                     delivers packets to the wrong host"
                ),
                format!(
                    "change one of them (ip link set {underlay} address MAC, or the settings of the virtual \
                     machine; cloned machines have the same MAC)"
                ),
            ),
            Self::Filtered { interface } => {
                let other = match interface == underlay {
                    true => String::new(),
                    false => format!(
                        ", not on {underlay}, which has its address (two cards in one network: sysctl -w \
                         net.ipv4.conf.all.arp_ignore=1 and net.ipv4.conf.all.arp_announce=2 make each \
                         answer only for its own address)"
                    ),
                };
                (
                    format!(
                        "rp_filter of {interface} drops the packets of {peers}, which arrive on {interface}\
                         {other}"
                    ),
                    format!(
                        "sysctl -w net.ipv4.conf.{}.rp_filter=2 (and a file in /etc/sysctl.d)",
                        interface.replace('.', "/")
                    ),
                )
            }
            Self::Dropped { outgoing, by } => {
                let packets = if *outgoing { "to" } else { "from" };
                // A rule that drops tunnel packets usually drops gossip packets as well, and a member needs
                // both.
                let mut ports = vec![*port];
                match outgoing {
                    true => ports.extend(suspects.iter().map(|suspect| suspect.gossip)),
                    false => ports.push(place.gossip),
                }
                ports.sort_unstable();
                ports.dedup();
                ports.truncate(MAX_PORTS);
                let action = by.action();
                (
                    format!("{by} {action} on this host, UDP {port} {packets} {peers}"),
                    open_chain(&by.chain, &ports),
                )
            }
            Self::Diverted(Diverted { by, came, goes }) => (
                format!(
                    "{by} drops packets of {peers} and of pods there on this host, as reverse path \
                     rules (rpfilter, fib) do: they come in by {came}, and packets to them leave by \
                     {goes}. The two hosts may have different modes"
                ),
                format!(
                    "set the same mode on all nodes, or: {}",
                    accept_from(&by.chain, place.overlay)
                ),
            ),
            Self::Elsewhere(Elsewhere { interface, usual, rule }) => {
                let (why, fix) = rule.clone().unwrap_or_else(|| {
                    let why = "a rule gives them a mark, a packet filter redirects them, or a policy rule \
                               selects their source ports";
                    let fix = "see ip rule, nft list ruleset, iptables -t mangle -S OUTPUT, and tc filter \
                               show dev";
                    (why.to_owned(), format!("{fix} {usual} egress"))
                });
                (
                    format!(
                        "this host sends tunnel packets (UDP {port}) to {peers} by {interface}, not by \
                         {usual}, to which their route leads: {why}"
                    ),
                    fix,
                )
            }
            Self::Forbidden => (
                format!(
                    "packets of the agent to {peers} do not leave this host, although those of pods may"
                ),
                MAY_NOT_SEND.to_owned(),
            ),
            Self::Translated { seen, chain, legacy } => {
                let (by, fix) = match (chain, legacy) {
                    (Some(chain), _) => (format!("chain {chain}"), open_chain(chain, &[*port])),
                    (None, Some(legacy)) => legacy.clone(),
                    (None, None) => (
                        "an address translation of this host".to_owned(),
                        format!(
                            "iptables -t nat -I POSTROUTING -p udp --dport {port} -j ACCEPT; if its rule is \
                             gone, connections keep it: {}",
                            forget_connections(*port)
                        ),
                    ),
                };
                (
                    format!(
                        "tunnel packets to {peers} leave this host under the address {seen}, not {source}, \
                         and the guard of each member drops them: {by} changes it"
                    ),
                    format!("exempt UDP {port}: {fix}"),
                )
            }
            Self::Kept(kept) => kept.texts(&peers, *port),
            Self::UnknownSender { seen } => {
                let dropped =
                    if place.guard { ", so the guard of this host drops them" } else { "" };
                let address = suspects
                    .first()
                    .map_or_else(String::new, |suspect| suspect.address.to_string());
                (
                    format!(
                        "tunnel packets of {peers} arrive under the address {seen}{dropped}: an address \
                         translation there or on the way changes {address}"
                    ),
                    format!(
                        "exempt UDP {port} from it (there: iptables -t nat -I POSTROUTING -p udp --dport \
                         {port} -j ACCEPT), or set advertise = \"{seen}\" there"
                    ),
                )
            }
            Self::Claimed { macs } => (
                format!(
                    "several cards answer for the address of {peers} on {underlay}: {}",
                    list_macs(macs)
                ),
                "either another machine has that address, too, or that host has two cards in this \
                     network (there: sysctl -w net.ipv4.conf.all.arp_ignore=1)"
                    .to_owned(),
            ),
            Self::GatewayClaimed { gateway, macs } => {
                let asked = resolution_name(gateway.is_ipv4());
                (
                    format!(
                        "several machines answer {asked} for {gateway}, the gateway, on {underlay}: {}. \
                         Packets to other networks reach any of them",
                        list_macs(macs)
                    ),
                    "only one of them is the router: find the other at the switch by its MAC, and change its \
                     address (a router in its factory settings, or two routers of a pair that are both \
                     active)"
                        .to_owned(),
                )
            }
            Self::Pinned(Pinned { interface, no_arp: true, .. }) => (
                format!(
                    "{interface} resolves no addresses (it has the flag NOARP), so packets to {peers} go to \
                     this host's own hardware address"
                ),
                format!(
                    "ip link set {interface} arp on (and find what turns it off: ifconfig -arp, a script for \
                     a virtual address)"
                ),
            ),
            Self::Pinned(Pinned { address, interface, mac, answering, .. }) => (
                format!(
                    "a fixed neighbor entry on {interface} gives {address} the MAC {mac}, but {} answers \
                         for that address, so packets to {peers} go to the wrong machine",
                    list_macs(answering)
                ),
                format!(
                    "ip neigh del {address} dev {interface} (and remove it where it is set: a script, \
                         /etc/ethers, [Neighbor] of systemd-networkd)"
                ),
            ),
            Self::Refused { gateway, interface, by, passthru } => {
                let ipv4 = local.is_ipv4();
                let asked = resolution_name(ipv4);
                let (of, hops) = match gateway {
                    Some(gateway) => (format!("the gateway {gateway}"), vec![*gateway]),
                    None => {
                        (peers.clone(), suspects.iter().map(|suspect| suspect.address).collect())
                    }
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
                (
                    format!(
                        "answers of {of} to {asked} arrive on {interface}, and this host drops them, so \
                         packets to {peers} do not leave it"
                    ),
                    why,
                )
            }
            Self::Congested => (
                format!(
                    "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and the VXLAN device \
                     drops them, as its RX frame errors show (ip -s -s link). They are marked as having \
                     met congestion (ECN CE), and the packets inside do not support such marks (RFC \
                     6040)"
                ),
                format!(
                    "find the switch, router or rule that marks them: let it mark only packets with \
                     ECT, or drop packets instead. Until then, on this host: nft 'add table inet \
                     unmark; add chain inet unmark in {{ type filter hook prerouting priority -300; }}; \
                     add rule inet unmark in udp dport {port} {} ecn set not-ect'",
                    rule_family(local.is_ipv4())
                ),
            ),
            Self::Unresolved { address, interface, is_gateway, is_one_of_several } => {
                let asked = resolution_name(address.is_ipv4());
                let (of, packets) = match (is_one_of_several, is_gateway) {
                    (true, _) => {
                        (", one of several next hops", "flows that the kernel sends by it")
                    }
                    (false, true) => (", the gateway", "packets"),
                    (false, false) => ("", "packets"),
                };
                (
                    format!(
                        "no machine on {interface} answers {asked} for {address}{of}, so {packets} to \
                         {peers} do not leave this host"
                    ),
                    format!(
                        "is it off, or in another network segment (cable, VLAN, port security)? (ip neigh \
                         show {address})"
                    ),
                )
            }
            Self::NotLeaving { hints } => (
                format!(
                    "tunnel packets (UDP {port}) to {peers} do not leave this host, though it sends them"
                ),
                hints.join("; "),
            ),
            Self::NotEncapsulated { hints } => (
                format!(
                    "packets to {peers} are lost on this host: they are handed to {device}, which emits no \
                     tunnel packets for them, although tunnel packets that the agent sends itself leave by \
                     {underlay}"
                ),
                hints.join("; "),
            ),
            Self::LostInDevice { hints } => (
                format!(
                    "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and the packets inside \
                     them may be dropped by what is attached to {device}"
                ),
                hints.join("; "),
            ),
            Self::LostToXdp => (
                format!("tunnel packets (UDP {port}) to {peers} leave this host, and none arrive"),
                format!(
                    "they are lost there, on the way, or to the XDP program of {underlay}, which processes \
                     packets first (ip -d link show dev {underlay}; bpftool net)"
                ),
            ),
            Self::RefusedByIpsec { policies } => (
                format!(
                    "tunnel packets (UDP {port}) of {peers} arrive on {underlay} without IPsec, pass the \
                     guard, and this host drops them, as /proc/net/xfrm_stat shows"
                ),
                policies.join("; "),
            ),
            Self::LostBeforeGuard { hints } => (
                format!(
                    "tunnel packets (UDP {port}) of {peers} arrive on {underlay}, and this host drops them \
                     before its guard"
                ),
                hints.join("; "),
            ),
        }
    }
}

/// Lists hardware addresses.
fn list_macs(macs: &BTreeSet<Mac>) -> String {
    macs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn list_names(suspects: &[&Suspect]) -> String {
    let named = suspects.iter().map(|suspect| format!("{} ({})", suspect.name, suspect.address));
    list_at_most(named, MAX_NAMED_PEERS)
}
