//! What the chains and sets of our table hold.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{append, create};
use crate::{
    dataplane::{
        firewall::{Firewall, Guard, Leases},
        kernel::sets::Elements,
    },
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            Base, Field, IFNAMSIZ, Kind, Rule, SET_EXPRESSION, Side, Step, base_chain, counter,
            name_bytes,
        },
    },
    pods::{bridge::PREFIX, wiring::LINK_NAME},
};

/// Of tunnel packets that the agent sends to its own host, to try whether they are forwarded.
pub const TRIAL_MARK: u32 = u32::from_be_bytes(*b"gsmP");
const GUARD_CHAIN: &str = "guard";
const ROUTERS_CHAIN: &str = "routers";
const MASQUERADE_CHAIN: &str = "masquerade";
/// What users send; what of it goes into a tunnel; and what has come out of one, on its way to another host.
const USERS_CHAIN: &str = "users";
const INTO_TUNNEL_CHAIN: &str = "into_tunnel";
const OUT_OF_TUNNEL_CHAIN: &str = "tunnelled";
/// What this host forwards, and what it sends itself, to subnets without a lease: chains with their hooks.
const UNLEASED_CHAINS: [(&str, u32); 2] = [("unleased", 2), ("unleased_here", 3)];
/// Hooks and priorities of linux/netfilter.h and linux/netfilter_ipv4.h: what is for this host, before all
/// other rules about that (what it only forwards is none of our business), and where source addresses are
/// rewritten.
const INPUT: u32 = 1;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
const FIRST: i32 = i32::MIN;
const LAST: i32 = i32::MAX;
const RAW: i32 = -300;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;
/// Where the VNI stands, counted from the UDP header (RFC 7348, 5).
const VNI_OFFSET: u32 = 12;
const PORT_OFFSET: u32 = 2;
/// A bit of a packet's priority that says that the packet goes into a tunnel. No user can set it
/// (`SO_PRIORITY` takes 0 to 6 of them, and what follows from `IP_TOS` is not larger).
const INTO_TUNNEL: u32 = 0x8000;
/// The part of a priority that names a queueing discipline. Where it is not 0, root's rules have given the
/// packet a class (`CLASSIFY`), by all of the bits, and its priority is left alone.
const CLASSIFIED: u32 = 0xffff_0000;
/// What gives a host routes: protocol and type of ICMPv6's router advertisement and redirect, and of ICMP's
/// redirect.
const ROUTE_GIVERS: [(u8, u8); 3] = [(58, 134), (58, 137), (1, 5)];
/// Errors that say how a packet was lost: protocol and type of ICMP's "destination unreachable", and of
/// ICMPv6's "destination unreachable" and "packet too big"; and where the destination of that packet stands.
const ERRORS: [(u8, u8, u32); 3] = [(1, 3, 24), (58, 1, 32), (58, 2, 32)];
pub(super) const MEMBERS: [&str; 2] = ["members4", "members6"];
/// The same addresses: the elements of the others count packets from members.
const UNDERLAY: [&str; 2] = ["underlay4", "underlay6"];
const LEASES: [&str; 2] = ["leases4", "leases6"];
/// Names of interfaces by which packets come into tunnels.
const TUNNELS: &str = "tunnels";

/// What the sets hold, each of them that there is to be.
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
        fill(UNDERLAY, &mut members.iter().copied());
    }
    if let Some(leases) = &wanted.leases {
        fill(LEASES, &mut leases.subnets.iter().map(IpNet::network));
    }
    if let Some(guard) = &wanted.guard {
        let names = guard.tunnels.iter().map(|name| name_bytes(name).to_vec());
        elements.insert(TUNNELS, names.collect());
    }
    elements
}

const fn set_of(sets: [&'static str; 2], like: IpAddr) -> &'static str {
    sets[like.is_ipv6() as usize]
}

/// Addresses of multicast groups, of both families.
fn groups() -> [IpNet; 2] {
    [
        IpNet::new_assert([224, 0, 0, 0].into(), 4),
        IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    ]
}

/// Makes the sets, empty.
pub(super) fn add_sets(table: &str, elements: &Elements, steps: &mut Vec<Step>) {
    for (id, set) in (1..).zip(elements.keys()) {
        // Type and length of the elements as the `nft` program knows them.
        let (kind, length) = match *set {
            TUNNELS => (41, IFNAMSIZ as u32),
            set if set.ends_with('4') => (7, 4),
            _ => (8, 16),
        };
        let named = Attributes::new().text(1, table).text(2, set);
        let of_keys = named.be32(3, 0).be32(4, kind).be32(5, length).be32(10, id);
        let set = match MEMBERS.contains(set) {
            // Each element counts the packets that it was found for; kernels before 5.7 pass over that.
            true => of_keys.nest(SET_EXPRESSION, &counter()),
            false => of_keys,
        };
        steps.push(create(Kind::NewSet, set));
    }
}

fn to_port(port: u16) -> Rule {
    Rule::new().udp().holds(Base::Transport, PORT_OFFSET, &port.to_be_bytes())
}

pub(super) fn add_guard(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    steps.push(create(Kind::NewChain, base_chain(table, GUARD_CHAIN, "filter", INPUT, RAW)));
    let to_port = || to_port(guard.port);
    let vni = &guard.vni.to_be_bytes()[1..];
    // A trial of this host's own: a packet as if it came from a member. Behind the tunnel it is like any.
    let of_trial = to_port().from_loopback().marked(TRIAL_MARK).unmark();
    steps.push(append(table, GUARD_CHAIN, &of_trial.leave_chain()));
    // A tunnel leads to one host. A user who is not root may send to a group or by broadcast, in the name of
    // the host, wherever policy rules lead its other packets: the kernel looks up no route for these.
    let to_several = || to_port().holds(Base::Transport, VNI_OFFSET, vni);
    steps.push(append(table, GUARD_CHAIN, &to_several().to_others().count().drop()));
    for group in groups() {
        let to_group = to_several().family_of(group.addr());
        let to_group = to_group.address(Field::Destination, group, true);
        steps.push(append(table, GUARD_CHAIN, &to_group.count().drop()));
    }
    for group in groups() {
        let like = group.addr();
        let of_member = to_port().family_of(like).source_inside(set_of(MEMBERS, like), like);
        steps.push(append(table, GUARD_CHAIN, &of_member.leave_chain()));
    }
    // Networks of others at the same port. What is too short to tell is none of them.
    let of_others = to_port().lacks(Base::Transport, VNI_OFFSET, vni);
    steps.push(append(table, GUARD_CHAIN, &of_others.leave_chain()));
    steps.push(append(table, GUARD_CHAIN, &to_port().count().drop()));
}

/// What users other than root send to the port leaves this host in its name, so guards of other hosts would
/// take it for tunnel packets. A tunnel packet that the kernel makes of what a process sends still belongs to
/// the socket of that process. So what goes into a tunnel is given a bit, which the tunnel packet still has,
/// unless it has a class: what has neither is a user's own. Policy rules ([`super::super::users`]) refuse
/// that as well, but hold only where the kernel looks up a route with the packet's user and port, not
/// where a socket has one already.
///
/// Nothing in the packet itself counts: what follows the first segment of several (`UDP_SEGMENT`) is not seen
/// here, and what lies in a user's pages (`splice`) may still change. The bit is cleared by the second chain
/// of this hook, when each overlay on this host has looked at it.
pub(super) fn refuse_users(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    for (chain, hook, priority) in [
        (USERS_CHAIN, OUTPUT, FIRST),
        (OUT_OF_TUNNEL_CHAIN, OUTPUT, FIRST + 1),
        (INTO_TUNNEL_CHAIN, POSTROUTING, LAST),
    ] {
        let based = base_chain(table, chain, "filter", hook, priority);
        steps.push(create(Kind::NewChain, based));
    }
    let either = CLASSIFIED | INTO_TUNNEL;
    let of_user = to_port(guard.port).of_user().prioritized(either, 0);
    steps.push(append(table, USERS_CHAIN, &of_user.count().drop()));
    let tunnelled = Rule::new().prioritized(either, INTO_TUNNEL).prioritize(INTO_TUNNEL, false);
    steps.push(append(table, OUT_OF_TUNNEL_CHAIN, &tunnelled));
    let to_tunnel = Rule::new().named_with(TUNNELS, &[Side::Output], &[], true).of_user();
    let into_tunnel = to_tunnel.prioritized(CLASSIFIED, 0).prioritize(INTO_TUNNEL, true);
    steps.push(append(table, INTO_TUNNEL_CHAIN, &into_tunnel));
}

/// What comes in from pods, and through the tunnel. Counted are only tunnel packets.
pub(super) fn refuse_routers(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    let chain = base_chain(table, ROUTERS_CHAIN, "filter", INPUT, RAW);
    steps.push(create(Kind::NewChain, chain));
    for interface in &guard.interfaces {
        for (protocol, kind) in ROUTE_GIVERS {
            let route_giver = Rule::new().transport(protocol).holds(Base::Transport, 0, &[kind]);
            let rule = route_giver.from_interface(interface).drop();
            steps.push(append(table, ROUTERS_CHAIN, &rule));
        }
    }
    // Packets to members never took the way of pods. A report that one of them was too long makes all tunnels
    // to that member narrow.
    let from_interfaces = guard.interfaces.iter().map(|name| Rule::new().from_interface(name));
    let of_pods = guard.networks.iter().map(|network| {
        Rule::new().family_of(network.addr()).address(Field::Source, *network, true)
    });
    for of_pods in from_interfaces.chain(of_pods) {
        for ((protocol, kind, at), length) in ERRORS.into_iter().zip([4, 16, 16]) {
            let set = UNDERLAY[usize::from(length == 16)];
            let report = of_pods.clone().transport(protocol).holds(Base::Transport, 0, &[kind]);
            let about_member = report.inside(set, (Base::Transport, at, length));
            steps.push(append(table, ROUTERS_CHAIN, &about_member.drop()));
        }
    }
    // A bridge hands frames to link-local groups (IEEE 802.1D, 7.12.6) to the host as if its port were no
    // port, past the rules that hold pods to their addresses; and another program may have pulled a cable out
    // of the bridge. The names of cables are longer than those of other interfaces that begin alike: GSM
    // modems are called gsm0.
    let of_cables = Rule::new().from_interfaces(PREFIX, LINK_NAME).drop();
    steps.push(append(table, ROUTERS_CHAIN, &of_cables));
}

/// Answers packets to subnets without a lease. The kernel would ask for each address, and its table of
/// neighbors is one for all interfaces.
pub(super) fn refuse_unleased(table: &str, leases: &Leases, steps: &mut Vec<Step>) {
    for (chain, hook) in UNLEASED_CHAINS {
        steps.push(create(Kind::NewChain, base_chain(table, chain, "filter", hook, FILTER)));
        for &(network, length) in &leases.networks {
            let like = network.addr();
            let to_overlay = Rule::new().to_interface(&leases.device).family_of(like).address(
                Field::Destination,
                network,
                true,
            );
            let to_unleased =
                to_overlay.destination_network_outside(set_of(LEASES, like), length, like);
            steps.push(append(table, chain, &to_unleased.refuse()));
        }
    }
}

pub(super) fn add_masquerade(wanted: &Firewall, steps: &mut Vec<Step>) {
    let Firewall { table, port, masquerade, .. } = wanted;
    let chain = base_chain(table, MASQUERADE_CHAIN, "nat", POSTROUTING, SOURCE_NAT);
    steps.push(create(Kind::NewChain, chain));
    // Under this host's address it would pass the guards of all members.
    steps.push(append(table, MASQUERADE_CHAIN, &to_port(*port).leave_chain()));
    for (network, own) in masquerade {
        let [group4, group6] = groups();
        let multicast = if network.addr().is_ipv4() { group4 } else { group6 };
        let of_family = || Rule::new().family_of(network.addr());
        let from = |inside| of_family().address(Field::Source, *network, inside);
        for rule in [
            // Between pods, and from hosts by their overlay address.
            from(true).address(Field::Destination, *network, true).leave_chain(),
            // From outside to pods here, who may want to know whom they serve.
            of_family().address(Field::Destination, *own, true).leave_chain(),
            from(true).address(Field::Destination, multicast, false).masquerade(),
            // From this host, under an address that the remote pod would answer by another way.
            from(false).address(Field::Destination, *network, true).masquerade(),
        ] {
            steps.push(append(table, MASQUERADE_CHAIN, &rule));
        }
    }
}
