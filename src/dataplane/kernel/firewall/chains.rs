//! What the chains and sets of our table hold.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{add_elements, append, create};
use crate::{
    dataplane::firewall::{Firewall, Guard},
    netlink::{
        attributes::Attributes,
        nftables::{Base, Field, Kind, Rule, Step, base_chain, counter},
    },
    pods::{bridge::PREFIX, wiring::LINK_NAME},
};

/// Of tunnel packets that the agent sends to its own host, to try whether they are forwarded.
pub const TRIAL_MARK: u32 = u32::from_be_bytes(*b"gsmP");
const GUARD_CHAIN: &str = "guard";
const ROUTERS_CHAIN: &str = "routers";
const MASQUERADE_CHAIN: &str = "masquerade";
/// Hooks and priorities of linux/netfilter.h and linux/netfilter_ipv4.h: what is for this host, before all
/// other rules about that (what it only forwards is none of our business), and where source addresses are
/// rewritten.
const INPUT: u32 = 1;
const POSTROUTING: u32 = 4;
const RAW: i32 = -300;
const SOURCE_NAT: i32 = 100;
/// Where the VNI stands, counted from the UDP header (RFC 7348, 5).
const VNI_OFFSET: u32 = 12;
const PORT_OFFSET: u32 = 2;
/// What gives a host routes: protocol and type of ICMPv6's router advertisement and redirect, and of ICMP's
/// redirect.
const ROUTE_GIVERS: [(u8, u8); 3] = [(58, 134), (58, 137), (1, 5)];
/// `NFTA_SET_EXPR`: what each element of a set does when it is found.
const SET_EXPRESSION: u16 = 17;
pub(super) const SET4: &str = "members4";
pub(super) const SET6: &str = "members6";

/// Addresses of multicast groups, of both families.
fn groups() -> [IpNet; 2] {
    [
        IpNet::new_assert([224, 0, 0, 0].into(), 4),
        IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    ]
}

pub(super) fn add_guard(
    table: &str,
    guard: &Guard,
    members: &BTreeSet<IpAddr>,
    steps: &mut Vec<Step>,
) {
    let families = [
        // Type and length of the elements as the `nft` program knows them.
        (SET4, 7, 4, IpAddr::from([0; 4])),
        (SET6, 8, 16, IpAddr::from([0; 16])),
    ];
    for (id, (set, kind, length, _)) in (1..).zip(families) {
        let named = Attributes::new().text(1, table).text(2, set);
        let of_addresses = named.be32(3, 0).be32(4, kind).be32(5, length).be32(10, id);
        // Each element counts the packets that it was found for; kernels before 5.7 pass over that.
        let counting = of_addresses.nest(SET_EXPRESSION, &counter());
        steps.push(create(Kind::NewSet, counting));
    }
    let all: Vec<IpAddr> = members.iter().copied().collect();
    add_elements(table, Kind::NewElements, &all, steps);
    steps.push(create(Kind::NewChain, base_chain(table, GUARD_CHAIN, "filter", INPUT, RAW)));
    let to_port =
        || Rule::new().udp().holds(Base::Transport, PORT_OFFSET, &guard.port.to_be_bytes());
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
    for (set, _, _, like) in families {
        let of_member = to_port().family_of(like).source_inside(set, like);
        steps.push(append(table, GUARD_CHAIN, &of_member.leave_chain()));
    }
    // Networks of others at the same port. What is too short to tell is none of them.
    let of_others = to_port().lacks(Base::Transport, VNI_OFFSET, vni);
    steps.push(append(table, GUARD_CHAIN, &of_others.leave_chain()));
    steps.push(append(table, GUARD_CHAIN, &to_port().count().drop()));
}

/// What comes in from pods, and through the tunnel. Counted are only tunnel packets.
pub(super) fn refuse_routers(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    let chain = base_chain(table, ROUTERS_CHAIN, "filter", INPUT, RAW);
    steps.push(create(Kind::NewChain, chain));
    for (protocol, kind) in ROUTE_GIVERS {
        let such = || Rule::new().transport(protocol).holds(Base::Transport, 0, &[kind]);
        for interface in &guard.interfaces {
            steps.push(append(table, ROUTERS_CHAIN, &such().from_interface(interface).drop()));
        }
        // Cables that another program has pulled out of the bridge. Their names are longer than those of
        // other interfaces that begin alike: GSM modems are called gsm0.
        let of_cables = such().from_interfaces(PREFIX, LINK_NAME).drop();
        steps.push(append(table, ROUTERS_CHAIN, &of_cables));
    }
}

pub(super) fn add_masquerade(wanted: &Firewall, steps: &mut Vec<Step>) {
    let Firewall { table, port, masquerade, .. } = wanted;
    let chain = base_chain(table, MASQUERADE_CHAIN, "nat", POSTROUTING, SOURCE_NAT);
    steps.push(create(Kind::NewChain, chain));
    // Under this host's address it would pass the guards of all members.
    let to_port = Rule::new().udp().holds(Base::Transport, PORT_OFFSET, &port.to_be_bytes());
    steps.push(append(table, MASQUERADE_CHAIN, &to_port.leave_chain()));
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
