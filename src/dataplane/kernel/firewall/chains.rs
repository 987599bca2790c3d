//! The contents of the table's chains and sets.

mod reports;

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use crate::{
    dataplane::firewall::{Firewall, Guard, Leases},
    netlink::{
        attributes,
        nftables::{
            Base, Field, IFNAMSIZ, Kind, Rule, Side, Step, base_chain, counter, name_bytes, nfta,
            sets::{self, Elements},
            steps::{append, create},
        },
    },
    pods::{names::PREFIX, wiring::LINK_NAME_LEN},
};

/// Mark of tunnel packets that the agent sends to its own host, to test whether they are forwarded.
pub const TRIAL_MARK: u32 = u32::from_be_bytes(*b"gsmP");
const GUARD_CHAIN: &str = "guard";
const ROUTERS_CHAIN: &str = "routers";
const MASQUERADE_CHAIN: &str = "masquerade";
/// For packets that users send, for those of them that enter a tunnel, and for tunnel packets on
/// their way to another host.
const USERS_CHAIN: &str = "users";
const INTO_TUNNEL_CHAIN: &str = "into_tunnel";
const OUT_OF_TUNNEL_CHAIN: &str = "tunnelled";
/// Chains with their hooks, for packets to subnets without a lease that this host forwards or
/// sends.
const UNLEASED_CHAINS: [(&str, u32); 2] = [("unleased", 2), ("unleased_here", 3)];
/// Hooks and priorities of linux/netfilter.h and `linux/netfilter_ipv4.h`. The guard sees packets for
/// this host before all other input rules; it does not see packets that this host only forwards.
/// Masquerading runs where source addresses are rewritten.
const INPUT_HOOK: u32 = 1;
const OUTPUT_HOOK: u32 = 3;
const POSTROUTING_HOOK: u32 = 4;
const FIRST_PRIORITY: i32 = i32::MIN;
const LAST_PRIORITY: i32 = i32::MAX;
const RAW_PRIORITY: i32 = -300;
const FILTER_PRIORITY: i32 = 0;
const SOURCE_NAT_PRIORITY: i32 = 100;
/// Offset of the VNI from the UDP header (RFC 7348, 5), in bytes.
const VNI_OFFSET: u32 = 12;
/// Offset of the destination port in the UDP header, in bytes.
const PORT_OFFSET: u32 = 2;
/// Bit of a packet's priority that marks a packet on its way into a tunnel. Users cannot set it:
/// without privileges `SO_PRIORITY` accepts 0 to 6, and priorities that follow from `IP_TOS` are
/// not larger.
const INTO_TUNNEL_BIT: u32 = 0x8000;
/// The bits of a priority that name a queueing discipline. If they are not 0, a rule of root has
/// assigned a traffic class (`CLASSIFY`), for which all bits count, so gossamer leaves the priority
/// unchanged.
const TRAFFIC_CLASS_BITS: u32 = 0xffff_0000;
/// Packets that give a host routes: protocol and type of `ICMPv6` router advertisement, `ICMPv6`
/// redirect, and ICMP redirect.
const ROUTE_GIVERS: [(u8, u8); 3] = [(58, 134), (58, 137), (1, 5)];
/// ICMP errors that report a lost packet: protocol, type, and the offset of the lost packet's
/// destination address. ICMP "destination unreachable", `ICMPv6` "destination unreachable" and
/// "packet too big".
const ICMP_ERRORS: [(u8, u8, u32); 3] = [(1, 3, 24), (58, 1, 32), (58, 2, 32)];
pub(super) const MEMBERS: [&str; 2] = ["members4", "members6"];
/// The same addresses without counters: the elements of [`MEMBERS`] count packets from members.
const UNDERLAY_SETS: [&str; 2] = ["underlay4", "underlay6"];
const LEASE_SETS: [&str; 2] = ["leases4", "leases6"];
/// Names of interfaces by which packets enter tunnels.
const TUNNEL_INTERFACES: &str = "tunnels";

/// Returns the elements of all sets that the table needs.
pub(super) fn elements(wanted: &Firewall, members: &BTreeSet<IpAddr>) -> Elements {
    let mut elements = Elements::new();
    let mut fill = |sets: [&'static str; 2], addresses: &mut dyn Iterator<Item = IpAddr>| {
        elements.extend(sets.map(|set| (set, BTreeSet::new())));
        for address in addresses {
            let set = set_of(sets, address);
            elements.entry(set).or_default().insert(attributes::octets(address));
        }
    };
    if wanted.guard.is_some() {
        fill(MEMBERS, &mut members.iter().copied());
        fill(UNDERLAY_SETS, &mut members.iter().copied());
    }
    if let Some(leases) = &wanted.leases {
        fill(LEASE_SETS, &mut leases.subnets.iter().map(IpNet::network));
    }
    if let Some(guard) = &wanted.guard {
        let names = guard.tunnels.iter().map(|name| name_bytes(name).to_vec());
        elements.insert(TUNNEL_INTERFACES, names.collect());
    }
    elements
}

/// Returns the set of the address's family.
const fn set_of(sets: [&'static str; 2], like: IpAddr) -> &'static str {
    sets[like.is_ipv6() as usize]
}

/// The multicast networks of both families.
fn groups() -> [IpNet; 2] {
    [
        IpNet::new_assert([224, 0, 0, 0].into(), 4),
        IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    ]
}

/// Appends steps that create the empty sets.
pub(super) fn add_sets(table: &str, elements: &Elements, steps: &mut Vec<Step>) {
    for (id, set) in (1..).zip(elements.keys()) {
        // Type and length of the elements, as the `nft` program encodes them.
        let (kind, length) = match *set {
            TUNNEL_INTERFACES => (41, IFNAMSIZ as u32),
            set if set.ends_with('4') => (7, 4),
            _ => (8, 16),
        };
        let of_keys = sets::definition(table, set, (kind, length), id);
        let set = match MEMBERS.contains(set) {
            // Each element counts the packets that match it; kernels before 5.7 ignore the counter.
            true => of_keys.nest(nfta::SET_EXPR, &counter()),
            false => of_keys,
        };
        steps.push(create(Kind::NewSet, set));
    }
}

/// A rule for UDP packets to the port.
fn to_port(port: u16) -> Rule {
    Rule::new().udp().holds(Base::Transport, PORT_OFFSET, &port.to_be_bytes())
}

/// Appends the chain that accepts tunnel packets from members only.
pub(super) fn add_guard(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    steps.push(create(
        Kind::NewChain,
        base_chain(table, GUARD_CHAIN, "filter", INPUT_HOOK, RAW_PRIORITY),
    ));
    let to_port = || to_port(guard.port);
    let vni = &guard.vni.to_be_bytes()[1..];
    // A trial of this host: a packet that looks like one of a member. Inside the tunnel it is
    // treated like any other.
    let of_trial = to_port().from_loopback().marked(TRIAL_MARK).unmark();
    steps.push(append(table, GUARD_CHAIN, &of_trial.leave_chain()));
    // A tunnel leads to one host. A user other than root could send a group or broadcast packet
    // with this host's address whatever the policy rules say, because the kernel looks up no route
    // for those.
    let to_overlay_port = || to_port().holds(Base::Transport, VNI_OFFSET, vni);
    steps.push(append(table, GUARD_CHAIN, &to_overlay_port().to_others().count().drop()));
    for group in groups() {
        let to_group = to_overlay_port().family_of(group.addr());
        let to_group = to_group.address(Field::Destination, group, true);
        steps.push(append(table, GUARD_CHAIN, &to_group.count().drop()));
    }
    for group in groups() {
        let like = group.addr();
        let of_member = to_port().family_of(like).source_inside(set_of(MEMBERS, like), like);
        steps.push(append(table, GUARD_CHAIN, &of_member.leave_chain()));
    }
    // Packets of other networks at the same port. A packet that is too short for a VNI is none of
    // them.
    let of_others = to_port().lacks(Base::Transport, VNI_OFFSET, vni);
    steps.push(append(table, GUARD_CHAIN, &of_others.leave_chain()));
    steps.push(append(table, GUARD_CHAIN, &to_port().count().drop()));
}

/// Appends the chains that drop packets which users other than root send to the port. They have
/// this host's address, so guards of other hosts would accept them as tunnel packets.
///
/// A tunnel packet that the kernel makes from a process's packet still belongs to the process's
/// socket. A packet that enters a tunnel therefore gets a bit in its priority, which the tunnel
/// packet inherits, unless it has a traffic class. A packet to the port with neither was made by a
/// user. Policy rules ([`super::super::users`]) refuse these packets as well, but only when the
/// kernel looks up a route with the packet's user and port, and not when a socket has cached a
/// route.
///
/// The rules check nothing in the packet itself: with `UDP_SEGMENT`, only the first segment is
/// visible here, and data in a user's pages (`splice`) may still change. The second chain at the
/// output hook clears the bit, after the chains of all overlays on this host have checked it.
pub(super) fn refuse_users(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    for (chain, hook, priority) in [
        (USERS_CHAIN, OUTPUT_HOOK, FIRST_PRIORITY),
        (OUT_OF_TUNNEL_CHAIN, OUTPUT_HOOK, FIRST_PRIORITY + 1),
        (INTO_TUNNEL_CHAIN, POSTROUTING_HOOK, LAST_PRIORITY),
    ] {
        let based = base_chain(table, chain, "filter", hook, priority);
        steps.push(create(Kind::NewChain, based));
    }
    let either = TRAFFIC_CLASS_BITS | INTO_TUNNEL_BIT;
    let of_user = to_port(guard.port).of_user().prioritized(either, 0);
    steps.push(append(table, USERS_CHAIN, &of_user.count().drop()));
    let from_tunnel =
        Rule::new().prioritized(either, INTO_TUNNEL_BIT).prioritize(INTO_TUNNEL_BIT, false);
    steps.push(append(table, OUT_OF_TUNNEL_CHAIN, &from_tunnel));
    let to_tunnel = Rule::new().named_with(TUNNEL_INTERFACES, &[Side::Output], &[], true).of_user();
    let into_tunnel =
        to_tunnel.prioritized(TRAFFIC_CLASS_BITS, 0).prioritize(INTO_TUNNEL_BIT, true);
    steps.push(append(table, INTO_TUNNEL_CHAIN, &into_tunnel));
}

/// Appends the chain that drops router advertisements, redirects and forged ICMP errors from pods
/// and from the tunnel. These drops are not counted; the counters are for tunnel packets.
pub(super) fn refuse_routers(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    let chain = base_chain(table, ROUTERS_CHAIN, "filter", INPUT_HOOK, RAW_PRIORITY);
    steps.push(create(Kind::NewChain, chain));
    for interface in &guard.interfaces {
        for (protocol, kind) in ROUTE_GIVERS {
            let route_giver = Rule::new().transport(protocol).holds(Base::Transport, 0, &[kind]);
            let rule = route_giver.from_interface(interface).drop();
            steps.push(append(table, ROUTERS_CHAIN, &rule));
        }
    }
    // Pods never send packets to members' underlay addresses through the overlay, so an error of
    // theirs about such a packet is forged. An accepted report that a packet was too long would
    // shrink the path MTU of all tunnels to that member.
    let from_interfaces = guard.interfaces.iter().map(|name| Rule::new().from_interface(name));
    let of_pods = guard.networks.iter().map(|network| {
        Rule::new().family_of(network.addr()).address(Field::Source, *network, true)
    });
    for of_pods in from_interfaces.chain(of_pods) {
        for ((protocol, kind, at), length) in ICMP_ERRORS.into_iter().zip([4, 16, 16]) {
            let set = UNDERLAY_SETS[usize::from(length == 16)];
            let report = of_pods.clone().transport(protocol).holds(Base::Transport, 0, &[kind]);
            let about_member = report.inside(set, (Base::Transport, at, length));
            steps.push(append(table, ROUTERS_CHAIN, &about_member.drop()));
        }
    }
    // The bridge passes frames to link-local groups (IEEE 802.1D, 7.12.6) to the host as if its
    // port were no port, which bypasses the anti-spoofing rules. Also, another program may have
    // removed a veth pair from the bridge. Names of veth pairs are longer than other names with
    // this prefix: GSM modems are called gsm0.
    let of_veths = Rule::new().from_interfaces(PREFIX, LINK_NAME_LEN).drop();
    steps.push(append(table, ROUTERS_CHAIN, &of_veths));
    reports::refuse_route_messages(table, guard, steps);
}

/// Appends the chains that reject packets to subnets without a lease. Without them, the kernel
/// would try to resolve each address, and its neighbor table is shared by all interfaces.
pub(super) fn refuse_unleased(table: &str, leases: &Leases, steps: &mut Vec<Step>) {
    for (chain, hook) in UNLEASED_CHAINS {
        steps.push(create(
            Kind::NewChain,
            base_chain(table, chain, "filter", hook, FILTER_PRIORITY),
        ));
        for &(network, length) in &leases.networks {
            let like = network.addr();
            let to_overlay = Rule::new().to_interface(&leases.device).family_of(like).address(
                Field::Destination,
                network,
                true,
            );
            let to_unleased =
                to_overlay.destination_network_outside(set_of(LEASE_SETS, like), length, like);
            steps.push(append(table, chain, &to_unleased.refuse()));
        }
    }
}

/// Appends the chain that masquerades packets of pods to other networks.
pub(super) fn add_masquerade(wanted: &Firewall, steps: &mut Vec<Step>) {
    let Firewall { table, port, masquerade, .. } = wanted;
    let chain = base_chain(table, MASQUERADE_CHAIN, "nat", POSTROUTING_HOOK, SOURCE_NAT_PRIORITY);
    steps.push(create(Kind::NewChain, chain));
    // With this host's address, the packet would pass the guards of all members.
    steps.push(append(table, MASQUERADE_CHAIN, &to_port(*port).leave_chain()));
    for (network, own) in masquerade {
        let [group4, group6] = groups();
        let multicast = if network.addr().is_ipv4() { group4 } else { group6 };
        let of_family = || Rule::new().family_of(network.addr());
        let from = |inside| of_family().address(Field::Source, *network, inside);
        for rule in [
            // Between pods, and from hosts with their overlay address.
            from(true).address(Field::Destination, *network, true).leave_chain(),
            // To pods of this host from outside: the pod may need the client's address.
            of_family().address(Field::Destination, *own, true).leave_chain(),
            from(true).address(Field::Destination, multicast, false).masquerade(),
            // From this host, with an address to which the remote pod would answer by another way.
            from(false).address(Field::Destination, *network, true).masquerade(),
        ] {
            steps.push(append(table, MASQUERADE_CHAIN, &rule));
        }
    }
}
