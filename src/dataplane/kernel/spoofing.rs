//! The table that holds pods to the addresses and the MAC that they were given, for what comes into their
//! bridge from their cables.
//!
//! What comes from a cable that is in a set is dropped if the other sets do not hold it. So a cable is in
//! the sets before its pod is answered, and its name stays until the kernel has removed it. What comes from
//! a port of another program has addresses that are not known, and is dropped if they are a pod's, the
//! gateway's, or those of the agent's own pod.
//!
//! A pod may bridge its own interfaces, or send back by one of them what comes in there. Frames would go
//! round for ever: a broadcast comes back by its own port (hairpin mode, which services need) or by another
//! one of the same container. So what leaves by such a port has to be for the pod itself, as what comes to it
//! by a service is, and what the pod sends must not be. A limit ends a loop of broadcasts through several
//! pods.
//!
//! A frame to a MAC that the bridge does not know leaves by all of its ports. Pods that send it back under
//! MACs of their own would have it go round as well, and any pod would see what is meant for another. So by a
//! cable nothing leaves but what is for its pod, or for a group. The bridge goes on learning who is where: a
//! port of another program gets what is for a machine behind it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use super::{
    pod_tables::{Alarm, Shape},
    sets::Elements,
};
use crate::{
    model::Mac,
    netlink::{
        attributes,
        nftables::{BRIDGE, Base, Rule, Side, name_bytes},
    },
    pods::{
        bridge::{Bridge, Tenant, Tenants, mac_at},
        gateway, last_addresses,
    },
};

const CHAIN: &str = "pods";
/// About ports of other programs. Frames pass it first.
const STRANGERS_CHAIN: &str = "strangers";
/// About frames that one container sends and would receive.
const RETURNING_CHAIN: &str = "returning";
/// About frames to several: what the rules for pods have let pass.
const GROUPS_CHAIN: &str = "groups";
/// About frames that leave by cables.
const RECEIVING_CHAIN: &str = "receiving";
/// `NF_BR_PRE_ROUTING`; before the bridge learns who is where, and before Docker and kube-proxy change
/// addresses (linux/netfilter_bridge.h).
const PREROUTING: u32 = 0;
/// `NF_BR_FORWARD`
const FORWARD: u32 = 2;
/// `NF_BR_POST_ROUTING`: what the bridge forwards, and what this host sends by it.
const POSTROUTING: u32 = 4;
const FIRST: i32 = -310;

/// Sets with the length of their elements and their type as the `nft` program knows it: name of the cable,
/// MAC, and address. Then names of ports of others, and what is used by pods, the gateway and the agent's own
/// pod; pairs of cables of one container, and MACs of the same container; and cables that have not sent too
/// much to groups.
const CABLES: &str = "cables";
pub(super) const MACS: &str = "macs";
const ADDRESSES4: &str = "addresses4";
const ADDRESSES6: &str = "addresses6";
const STRANGERS: &str = "strangers";
const USED_MACS: &str = "used_macs";
const USED4: &str = "used4";
const USED6: &str = "used6";
const SIBLINGS: &str = "siblings";
const SIBLING_MACS: &str = "sibling_macs";
const CALM: &str = "calm";
const SETS: [(&str, u32, u32); 11] = [
    (CABLES, 16, 41),
    (MACS, 24, 41 << 6 | 9),
    (ADDRESSES4, 28, (41 << 6 | 9) << 6 | 7),
    (ADDRESSES6, 40, (41 << 6 | 9) << 6 | 8),
    (STRANGERS, 16, 41),
    (USED_MACS, 6, 9),
    (USED4, 4, 7),
    (USED6, 16, 8),
    (SIBLINGS, 32, 41 << 6 | 41),
    (SIBLING_MACS, 24, 41 << 6 | 9),
    (CALM, 16, 41),
];

/// Broadcasts and multicasts a second by one cable. Each of them costs this host a copy for each of its pods.
const GROUP_RATE: u64 = 2_000;

/// Places in a frame: offset and length.
const ETHER_DESTINATION: (Base, u32, u32) = (Base::Link, 0, 6);
const ETHER_SOURCE: (Base, u32, u32) = (Base::Link, 6, 6);
const ARP_KIND: u32 = 0;
const ARP_MAC: (Base, u32, u32) = (Base::Network, 8, 6);
const ARP_ADDRESS: (Base, u32, u32) = (Base::Network, 14, 4);
const SOURCE4: (Base, u32, u32) = (Base::Network, 12, 4);
const SOURCE6: (Base, u32, u32) = (Base::Network, 8, 16);
/// Of a neighbour solicitation or advertisement.
const TARGET: (Base, u32, u32) = (Base::Transport, 8, 16);

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
/// Tags of IEEE 802.1Q.
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
const ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

pub(super) static SHAPE: Shape = Shape {
    family: BRIDGE,
    name: str::to_owned,
    sets: &SETS,
    chains: &[
        (STRANGERS_CHAIN, PREROUTING, FIRST - 1),
        (CHAIN, PREROUTING, FIRST),
        (GROUPS_CHAIN, PREROUTING, FIRST + 1),
        (RETURNING_CHAIN, FORWARD, FIRST),
        (RECEIVING_CHAIN, POSTROUTING, FIRST),
    ],
    limited: Some((CALM, GROUP_RATE)),
    alarm: Some(Alarm { chain: GROUPS_CHAIN, words: flooded }),
    rules: |_| {
        let of_strangers = rules_for_strangers().into_iter().map(|rule| (STRANGERS_CHAIN, rule));
        let of_pods = rules().into_iter().map(|rule| (CHAIN, rule));
        let to_groups = rules_for_groups().into_iter().map(|rule| (GROUPS_CHAIN, rule));
        let to_itself = Rule::new()
            .named_with(SIBLINGS, &[Side::Input, Side::Output], &[], true)
            .named_with(SIBLING_MACS, &[Side::Output], &[ETHER_DESTINATION], false);
        let returning = std::iter::once((RETURNING_CHAIN, to_itself.count().drop()));
        let to_pods = rules_for_receivers().into_iter().map(|rule| (RECEIVING_CHAIN, rule));
        of_strangers.chain(of_pods).chain(to_groups).chain(returning).chain(to_pods).collect()
    },
    elements: elements_of,
    leaving: of_cable,
    cables: Some(CABLES),
    without: (
        "pods can use addresses that they were not given",
        "nf_tables for bridges (CONFIG_NF_TABLES_BRIDGE)",
    ),
};

fn icmpv6(kind: u8) -> Rule {
    Rule::new().ether_type(IPV6).transport(ICMPV6).holds(Base::Transport, 0, &[kind])
}

/// Ethernet and IPv4, with addresses of their lengths.
fn arp() -> Rule {
    let kind = [0, 1, 8, 0, 6, 4];
    Rule::new().ether_type(ARP).holds(Base::Network, ARP_KIND, &kind)
}

/// By a question without a source the kernel finds out whether its new address is another's. One that hears
/// such a question about the address that it asks about itself gives that up (RFC 4862, 5.4.3).
fn looks_for_duplicates() -> Rule {
    let (base, offset, _) = SOURCE6;
    icmpv6(NEIGHBOUR_SOLICITATION).holds(base, offset, &[0; 16])
}

fn flooded(bridge: &Bridge) -> String {
    let (name, table) = (&bridge.name, &bridge.table);
    format!(
        "a pod sends more than {GROUP_RATE} broadcasts and multicasts a second to the pods' bridge {name}: \
         the rest of them is dropped, and counted by nft list chain bridge {table} {GROUPS_CHAIN}; which one \
         it is shows in tcpdump -eni {name} multicast (a pod that bridges its interfaces makes a loop)"
    )
}

/// Frames to a group, or to none.
fn to_group(is_one: bool) -> Rule {
    let (base, offset, _) = ETHER_DESTINATION;
    Rule::new().masked(base, offset, &[1], &[1], is_one)
}

/// From top to bottom; most frames need the first alone.
fn rules_for_receivers() -> Vec<Rule> {
    let leaving = |set, places: &[_], found| {
        Rule::new().named_with(set, &[Side::Output], places, found).accept()
    };
    vec![
        leaving(MACS, &[ETHER_DESTINATION], true),
        to_group(true).accept(),
        leaving(CABLES, &[], false),
        Rule::new().count().drop(),
    ]
}

/// Without the limit, which the kernel knows since 5.7, all cables are calm.
fn rules_for_groups() -> Vec<Rule> {
    vec![
        to_group(false).accept(),
        Rule::new().input_with(CABLES, &[], false).accept(),
        Rule::new().input_with(CALM, &[], true).accept(),
        Rule::new().count().drop(),
    ]
}

/// From top to bottom; what none of them drops goes on.
fn rules_for_strangers() -> Vec<Rule> {
    let used = [
        Rule::new().inside(USED_MACS, ETHER_SOURCE),
        arp().inside(USED4, ARP_ADDRESS),
        Rule::new().ether_type(IPV4).inside(USED4, SOURCE4),
        Rule::new().ether_type(IPV6).inside(USED6, SOURCE6),
        icmpv6(NEIGHBOUR_ADVERTISEMENT).inside(USED6, TARGET),
        looks_for_duplicates().inside(USED6, TARGET),
        // The kernel has taken the outer tag off. It would take this one off as well before a pod looks at
        // what is behind it.
        Rule::new().ether_type(VLAN),
        Rule::new().ether_type(SERVICE_VLAN),
    ];
    let of_others = Rule::new().input_with(STRANGERS, &[], false).accept();
    std::iter::once(of_others).chain(used.map(|rule| rule.count().drop())).collect()
}

/// From top to bottom; the first that matches decides.
fn rules() -> Vec<Rule> {
    let link_local = |place: (Base, u32, u32), rule: Rule, same| {
        let (mask, value) = ([0xff, 0xc0], [0xfe, 0x80]);
        rule.masked(place.0, place.1, &mask, &value, same)
    };
    let advertised = link_local(TARGET, icmpv6(NEIGHBOUR_ADVERTISEMENT), false);
    vec![
        Rule::new().input_with(CABLES, &[], false).accept(),
        Rule::new().input_with(MACS, &[ETHER_SOURCE], false).count().drop(),
        Rule::new().input_with(SIBLING_MACS, &[ETHER_DESTINATION], true).count().drop(),
        arp().input_with(ADDRESSES4, &[ARP_MAC, ARP_ADDRESS], true).accept(),
        // Who asks whether an address is free has none yet (RFC 5227).
        arp()
            .holds(ARP_ADDRESS.0, ARP_ADDRESS.1, &[0; 4])
            .input_with(MACS, &[ARP_MAC], true)
            .accept(),
        Rule::new()
            .ether_type(IPV4)
            .input_with(ADDRESSES4, &[ETHER_SOURCE, SOURCE4], true)
            .accept(),
        icmpv6(ROUTER_ADVERTISEMENT).count().drop(),
        icmpv6(REDIRECT).count().drop(),
        icmpv6(NEIGHBOUR_ADVERTISEMENT)
            .inside(USED6, TARGET)
            .input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false)
            .count()
            .drop(),
        advertised.input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false).count().drop(),
        Rule::new()
            .ether_type(IPV6)
            .input_with(ADDRESSES6, &[ETHER_SOURCE, SOURCE6], true)
            .accept(),
        Rule::new().ether_type(IPV6).inside(USED6, SOURCE6).count().drop(),
        link_local(SOURCE6, Rule::new().ether_type(IPV6), true).accept(),
        looks_for_duplicates()
            .input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false)
            .count()
            .drop(),
        // Whether its own address is free, and what groups it is in.
        Rule::new()
            .ether_type(IPV6)
            .transport(ICMPV6)
            .holds(SOURCE6.0, SOURCE6.1, &[0; 16])
            .accept(),
        Rule::new().count().drop(),
    ]
}

/// A container with several cables may answer by any of them for each of its addresses: which way its packets
/// take is for its routes to say.
fn elements_of(bridge: &Bridge, tenants: &Tenants, strangers: &BTreeSet<String>) -> Elements {
    let mut containers: BTreeMap<&str, Vec<(&String, &Tenant)>> = BTreeMap::new();
    for (cable, tenant) in tenants {
        containers.entry(&tenant.container).or_default().push((cable, tenant));
    }
    let mut elements: Elements = SETS.map(|(set, ..)| (set, BTreeSet::new())).into();
    let mut add = |set, key| _ = elements.entry(set).or_default().insert(key);
    strangers.iter().for_each(|port| add(STRANGERS, name_bytes(port).to_vec()));
    let gateways = bridge.subnets.iter().map(gateway);
    let own = last_addresses(bridge.subnets);
    for mac in [gateway(bridge.subnets.first), own.first].map(mac_at) {
        add(USED_MACS, mac.as_bytes().to_vec());
        add(USED6, link_local(mac).octets().to_vec());
    }
    let of_pods = tenants.values().flat_map(|tenant| tenant.addresses.iter());
    for ip in gateways.chain(own.iter()).chain(of_pods) {
        add(used(ip), attributes::octets(ip));
    }
    for (cable, tenant) in tenants {
        add(CABLES, name_bytes(cable).to_vec());
        add(CALM, name_bytes(cable).to_vec());
        let of_container = containers.get(tenant.container.as_str());
        for (other, sibling) in of_container.into_iter().flatten() {
            add(SIBLINGS, [name_bytes(cable), name_bytes(other)].concat());
            if let Some(mac) = sibling.mac {
                add(SIBLING_MACS, with_mac(cable, mac));
            }
        }
        let Some(mac) = tenant.mac else { continue };
        add(USED_MACS, mac.as_bytes().to_vec());
        let key = with_mac(cable, mac);
        let own = link_local(mac).octets();
        add(USED6, own.to_vec());
        add(ADDRESSES6, [&key[..], &own].concat());
        let of_container = of_container.into_iter().flatten();
        for ip in of_container.flat_map(|(_, sibling)| sibling.addresses.iter()) {
            let set = if matches!(ip, IpAddr::V4(_)) { ADDRESSES4 } else { ADDRESSES6 };
            add(set, [&key[..], &attributes::octets(ip)].concat());
        }
        add(MACS, key);
    }
    elements
}

fn with_mac(cable: &str, mac: Mac) -> Vec<u8> {
    [&name_bytes(cable)[..], mac.as_bytes(), &[0; 2]].concat()
}

/// The address that kernels make of a MAC as a rule (RFC 4291, 2.5.6 and appendix A). Others that a pod uses
/// are not known, and nothing else has them.
const fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = *mac.as_bytes();
    let bits = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits((0xfe80 << 112) | bits as u128)
}

const fn used(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { USED4 } else { USED6 }
}

/// As long as the kernel has the cable it is looked at. What is used is taken back at the next look: other
/// cables of the container may have the same.
fn of_cable(_: &Bridge, cable: &str, _: &Tenant, elements: &Elements) -> Elements {
    let is_its = |key: &&Vec<u8>| key.starts_with(&name_bytes(cable));
    let others = [MACS, ADDRESSES4, ADDRESSES6, SIBLINGS, SIBLING_MACS, CALM].into_iter();
    let kept = others.filter_map(|set| Some((set, elements.get(set)?)));
    kept.map(|(set, keys)| (set, keys.iter().filter(is_its).cloned().collect())).collect()
}
