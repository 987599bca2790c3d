//! The anti-spoofing table: restricts pods to their assigned addresses and MACs, at the ports of
//! the pods' bridge.
//!
//! Packets from a veth pair in the set of veth pairs are dropped unless the other sets contain
//! their source. A veth pair is therefore added to the sets before ADD is answered, and its name
//! stays in the set until the kernel has removed the interface. The source addresses behind a port
//! of another program are unknown. Packets from there are dropped if they use an address of a pod,
//! of the gateway or of the agent's own pod, or if they would give pods routes.
//!
//! A pod may bridge its own interfaces, or send back what it receives. Frames would then circulate:
//! a broadcast returns by its own port (hairpin mode, which services need) or by another port of
//! the same container. Therefore a pod must not send frames to a MAC of its own container, and a frame
//! that returns to the container that sent it passes only if it is for a MAC of the container, as
//! packets to the pod through a service are. A rate limit ends loops of broadcasts through several
//! pods.
//!
//! The bridge floods a frame to an unknown MAC to all ports. Pods that send it back with a MAC of
//! their own would make it circulate as well, and each pod would see frames for others. A frame
//! therefore leaves by a veth pair only if it is for its pod or for a group. The bridge still
//! learns the location of MACs, so a port of another program gets the frames for machines behind
//! it.

mod icmp_errors;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;

use super::shape::{Alarm, Shape};
use crate::{
    model::{Mac, Problem, ProblemCode},
    netlink::{
        attributes,
        nftables::{BRIDGE, Base, Field, Rule, Side, name_bytes, sets::Elements},
    },
    pods::{
        desired::{Bridge, Tenant, Tenants},
        gateway, last_addresses, mac_at,
    },
};

/// For frames from veth pairs.
const CHAIN: &str = "pods";
/// For ports of other programs. Frames pass it first.
const FOREIGN_PORTS_CHAIN: &str = "foreign-ports";
/// For frames that one container would both send and receive.
const RETURNING_CHAIN: &str = "returning";
/// For broadcasts and multicasts that the rules for pods have accepted.
const GROUPS_CHAIN: &str = "groups";
/// For frames that leave by veth pairs.
const RECEIVING_CHAIN: &str = "receiving";
/// `NF_BR_PRE_ROUTING`, with a priority before the bridge learns MACs and before Docker and
/// kube-proxy change addresses (`linux/netfilter_bridge.h`).
const PREROUTING: u32 = 0;
/// `NF_BR_FORWARD`.
const FORWARD: u32 = 2;
/// `NF_BR_POST_ROUTING`: frames that the bridge forwards, and frames that this host sends by it.
const POSTROUTING: u32 = 4;
const FIRST: i32 = -310;

/// Sets with the length of their elements in bytes and their type as the `nft` program encodes it. Keys
/// of the first four sets start with the name of a veth pair.
const VETHS: &str = "veths";
pub(super) const MACS: &str = "macs";
const ADDRESSES4: &str = "addresses4";
const ADDRESSES6: &str = "addresses6";
/// Names of foreign ports.
const FOREIGN_PORTS: &str = "foreign-ports";
/// MACs and addresses of pods, the gateway and the agent's own pod.
const USED_MACS: &str = "used_macs";
const USED4: &str = "used4";
const USED6: &str = "used6";
/// Pairs of veth pairs of one container.
const SIBLINGS: &str = "siblings";
/// Veth pairs with the MACs of their container.
const SIBLING_MACS: &str = "sibling_macs";
/// Veth pairs, each of which matches only up to [`GROUP_RATE`] times per second.
const BELOW_GROUP_RATE: &str = "below_rate";
const SETS: [(&str, u32, u32); 11] = [
    (VETHS, 16, 41),
    (MACS, 24, 41 << 6 | 9),
    (ADDRESSES4, 28, (41 << 6 | 9) << 6 | 7),
    (ADDRESSES6, 40, (41 << 6 | 9) << 6 | 8),
    (FOREIGN_PORTS, 16, 41),
    (USED_MACS, 6, 9),
    (USED4, 4, 7),
    (USED6, 16, 8),
    (SIBLINGS, 32, 41 << 6 | 41),
    (SIBLING_MACS, 24, 41 << 6 | 9),
    (BELOW_GROUP_RATE, 16, 41),
];

/// Upper limit of broadcasts and multicasts per second by one veth pair. Each costs this host one
/// copy per pod.
const GROUP_RATE: u64 = 2_000;

/// Fields of a frame: base, offset and length.
const ETHER_DESTINATION: (Base, u32, u32) = (Base::Link, 0, 6);
const ETHER_SOURCE: (Base, u32, u32) = (Base::Link, 6, 6);
const ARP_KIND: u32 = 0;
const ARP_MAC: (Base, u32, u32) = (Base::Network, 8, 6);
const ARP_ADDRESS: (Base, u32, u32) = (Base::Network, 14, 4);
const SOURCE4: (Base, u32, u32) = (Base::Network, 12, 4);
const SOURCE6: (Base, u32, u32) = (Base::Network, 8, 16);
/// The target of a neighbor solicitation or advertisement.
const TARGET: (Base, u32, u32) = (Base::Transport, 8, 16);

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
/// Tags of IEEE 802.1Q and 802.1ad.
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// The table's shape.
pub(super) static SHAPE: Shape = Shape {
    family: BRIDGE,
    name: str::to_owned,
    sets: &SETS,
    chains: &[
        (FOREIGN_PORTS_CHAIN, PREROUTING, FIRST - 1),
        (CHAIN, PREROUTING, FIRST),
        (GROUPS_CHAIN, PREROUTING, FIRST + 1),
        (RETURNING_CHAIN, FORWARD, FIRST),
        (RECEIVING_CHAIN, POSTROUTING, FIRST),
    ],
    limited: Some((BELOW_GROUP_RATE, GROUP_RATE)),
    alarm: Some(Alarm { chain: GROUPS_CHAIN, problem: group_rate_alarm }),
    rules: |bridge| {
        let at_foreign_ports =
            foreign_port_rules().into_iter().map(|rule| (FOREIGN_PORTS_CHAIN, rule));
        let of_pods = rules().into_iter().map(|rule| (CHAIN, rule));
        let to_groups = group_rules().into_iter().map(|rule| (GROUPS_CHAIN, rule));
        let to_itself = Rule::new()
            .named_with(SIBLINGS, &[Side::Input, Side::Output], &[], true)
            .named_with(SIBLING_MACS, &[Side::Output], &[ETHER_DESTINATION], false);
        let returning = std::iter::once((RETURNING_CHAIN, to_itself.count().drop()));
        let to_pods = receiving_rules(bridge).into_iter().map(|rule| (RECEIVING_CHAIN, rule));
        at_foreign_ports.chain(of_pods).chain(to_groups).chain(returning).chain(to_pods).collect()
    },
    elements: elements_of,
    leaving: leaving_elements,
    veths: Some(VETHS),
    stale: None,
    requirement: (
        "pods can use addresses that they were not given",
        "nf_tables for bridges (CONFIG_NF_TABLES_BRIDGE)",
    ),
};

/// A rule for `ICMPv6` of one type.
fn icmpv6(kind: u8) -> Rule {
    Rule::new().ether_type(IPV6).transport(ICMPV6).holds(Base::Transport, 0, &[kind])
}

/// A rule for ARP of Ethernet and IPv4, with addresses of their lengths.
fn arp() -> Rule {
    let kind = [0, 1, 8, 0, 6, 4];
    Rule::new().ether_type(ARP).holds(Base::Network, ARP_KIND, &kind)
}

/// A rule for duplicate address detection. A host abandons an address if it receives a solicitation
/// for it without a source while it checks the address itself (RFC 4862, 5.4.3).
fn duplicate_address_detection() -> Rule {
    let (base, offset, _) = SOURCE6;
    icmpv6(NEIGHBOR_SOLICITATION).holds(base, offset, &[0; 16])
}

/// Returns the problem for the alarm of [`GROUPS_CHAIN`].
fn group_rate_alarm(bridge: &Bridge) -> Problem {
    let (name, table) = (&bridge.name, &bridge.table);
    let what = format!(
        "a pod sends more than {GROUP_RATE} broadcasts and multicasts a second to the pods' bridge {name}, \
         and the excess is dropped and counted by nft list chain bridge {table} {GROUPS_CHAIN}"
    );
    let fix = format!(
        "find the pod with tcpdump -eni {name} multicast (a pod that bridges its interfaces makes a loop)"
    );
    Problem::new(ProblemCode::AntiSpoofing, name, what, fix)
}

/// Restricts a rule to frames with an IPv4 address of their pod in this field.
fn own4(rule: Rule, field: (Base, u32, u32)) -> Rule {
    rule.input_with(ADDRESSES4, &[ETHER_SOURCE, field], true)
}

/// The same for IPv6.
fn own6(rule: Rule, field: (Base, u32, u32)) -> Rule {
    rule.input_with(ADDRESSES6, &[ETHER_SOURCE, field], true)
}

/// A rule for frames to a group, or for all others.
fn to_group(is_one: bool) -> Rule {
    let (base, offset, _) = ETHER_DESTINATION;
    Rule::new().masked(base, offset, &[1], &[1], is_one)
}

/// Rules from top to bottom; most frames need only the first.
fn receiving_rules(bridge: &Bridge) -> Vec<Rule> {
    let leaving = |set, places: &[_], found| {
        Rule::new().named_with(set, &[Side::Output], places, found).accept()
    };
    let mut rules = vec![leaving(MACS, &[ETHER_DESTINATION], true), to_group(true).accept()];
    let own = last_addresses(bridge.subnets);
    let of_family = bridge.subnets.iter().zip(own.iter());
    rules.extend(of_family.filter_map(|(subnet, own)| fragments_to_own_pod(bridge, subnet, own)));
    rules.extend([leaving(VETHS, &[], false), Rule::new().count().drop()]);
    rules
}

/// Drops fragments of pods to the agent's own pod, which would fill the memory for fragments of its
/// namespace. Trials between hosts would then fail. Own pods of agents do send it fragments, and hosts may.
/// Their addresses have the same place in each subnet. An IPv6 fragment may have other headers first.
fn fragments_to_own_pod(bridge: &Bridge, subnet: IpNet, own: IpAddr) -> Option<Rule> {
    let of_family = |network: &IpNet| network.addr().is_ipv4() == subnet.addr().is_ipv4();
    let network = bridge.networks.iter().find(of_family)?;
    let to_own = |kind, destination| {
        let to_own = Rule::new().ether_type(kind);
        to_own.holds(Base::Network, destination, &attributes::octets(own))
    };
    let (source, fragments) = match subnet.addr() {
        IpAddr::V4(_) => {
            let fragment = to_own(IPV4, 16).masked(Base::Network, 6, &[0x3f, 0xff], &[0; 2], false);
            (SOURCE4, fragment)
        }
        IpAddr::V6(_) => {
            let others = |rule: Rule, header| rule.lacks(Base::Network, 6, &[header]);
            (SOURCE6, [TCP, UDP, ICMPV6].into_iter().fold(to_own(IPV6, 24), others))
        }
    };
    let mask = attributes::octets(subnet.hostmask());
    let hosts = [subnet.network(), gateway(subnet), own].map(|host| {
        let octets = attributes::octets(host).into_iter();
        octets.zip(&mask).map(|(octet, mask)| octet & mask).collect::<Vec<u8>>()
    });
    let of_pods = fragments.address(Field::Source, network, true);
    let of_pods = hosts
        .iter()
        .fold(of_pods, |rule, host| rule.masked(source.0, source.1, &mask, host, false));
    Some(of_pods.count().drop())
}

/// Before Linux 5.7, which introduced the limit, the set contains all veth pairs without one.
fn group_rules() -> Vec<Rule> {
    vec![
        to_group(false).accept(),
        Rule::new().input_with(VETHS, &[], false).accept(),
        Rule::new().input_with(BELOW_GROUP_RATE, &[], true).accept(),
        Rule::new().count().drop(),
    ]
}

/// Rules from top to bottom; a frame that none of them drops is accepted.
fn foreign_port_rules() -> Vec<Rule> {
    let dropped = [
        Rule::new().inside(USED_MACS, ETHER_SOURCE),
        // Kernels accept several hardware types on Ethernet, and only addresses of these lengths.
        Rule::new().ether_type(ARP).inside(USED4, ARP_ADDRESS),
        Rule::new().ether_type(IPV4).inside(USED4, SOURCE4),
        Rule::new().ether_type(IPV6).inside(USED6, SOURCE6),
        icmpv6(NEIGHBOR_ADVERTISEMENT).inside(USED6, TARGET),
        duplicate_address_detection().inside(USED6, TARGET),
        icmpv6(ROUTER_ADVERTISEMENT),
        icmpv6(REDIRECT),
        // The kernel has removed the outer tag, and would remove this one, too, before a pod checks
        // the content.
        Rule::new().ether_type(VLAN),
        Rule::new().ether_type(SERVICE_VLAN),
    ];
    let of_others = Rule::new().input_with(FOREIGN_PORTS, &[], false).accept();
    std::iter::once(of_others).chain(dropped.map(|rule| rule.count().drop())).collect()
}

/// Rules from top to bottom; the first match decides.
fn rules() -> Vec<Rule> {
    let link_local = |place: (Base, u32, u32), rule: Rule, same| {
        let (mask, value) = ([0xff, 0xc0], [0xfe, 0x80]);
        rule.masked(place.0, place.1, &mask, &value, same)
    };
    let advertised = link_local(TARGET, icmpv6(NEIGHBOR_ADVERTISEMENT), false);
    let not_icmp = Rule::new().ether_type(IPV4).lacks(Base::Network, 9, &[ICMP]);
    let mut rules = vec![
        Rule::new().input_with(VETHS, &[], false).accept(),
        Rule::new().input_with(MACS, &[ETHER_SOURCE], false).count().drop(),
        Rule::new().input_with(SIBLING_MACS, &[ETHER_DESTINATION], true).count().drop(),
        arp().input_with(ADDRESSES4, &[ARP_MAC, ARP_ADDRESS], true).accept(),
        // A probe for a free address has no source yet (RFC 5227).
        arp()
            .holds(ARP_ADDRESS.0, ARP_ADDRESS.1, &[0; 4])
            .input_with(MACS, &[ARP_MAC], true)
            .accept(),
        own4(not_icmp, SOURCE4).accept(),
    ];
    rules.extend(icmp_errors::rules4());
    rules.push(own4(Rule::new().ether_type(IPV4).transport(ICMP), SOURCE4).accept());
    rules.extend(icmp_errors::rules6());
    rules.extend([
        icmpv6(ROUTER_ADVERTISEMENT).count().drop(),
        icmpv6(REDIRECT).count().drop(),
        icmpv6(NEIGHBOR_ADVERTISEMENT)
            .inside(USED6, TARGET)
            .input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false)
            .count()
            .drop(),
        advertised.input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false).count().drop(),
        own6(Rule::new().ether_type(IPV6), SOURCE6).accept(),
        Rule::new().ether_type(IPV6).inside(USED6, SOURCE6).count().drop(),
        link_local(SOURCE6, Rule::new().ether_type(IPV6), true).accept(),
        duplicate_address_detection()
            .input_with(ADDRESSES6, &[ETHER_SOURCE, TARGET], false)
            .count()
            .drop(),
        // Duplicate address detection for the pod's own address, and reports of its multicast
        // groups.
        Rule::new()
            .ether_type(IPV6)
            .transport(ICMPV6)
            .holds(SOURCE6.0, SOURCE6.1, &[0; 16])
            .accept(),
        Rule::new().count().drop(),
    ]);
    rules
}

/// Returns the elements for these pods. A container with several veth pairs may send from each of
/// its addresses by any of them: its routes decide.
fn elements_of(bridge: &Bridge, tenants: &Tenants, foreign_ports: &BTreeSet<String>) -> Elements {
    let mut containers: BTreeMap<&str, Vec<(&String, &Tenant)>> = BTreeMap::new();
    for (veth, tenant) in tenants {
        containers.entry(&tenant.container).or_default().push((veth, tenant));
    }
    let mut elements: Elements = SETS.map(|(set, ..)| (set, BTreeSet::new())).into();
    let mut add = |set, key| _ = elements.entry(set).or_default().insert(key);
    foreign_ports.iter().for_each(|port| add(FOREIGN_PORTS, name_bytes(port).to_vec()));
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
    for (veth, tenant) in tenants {
        add(VETHS, name_bytes(veth).to_vec());
        add(BELOW_GROUP_RATE, name_bytes(veth).to_vec());
        let of_container = containers.get(tenant.container.as_str());
        for (other, sibling) in of_container.into_iter().flatten() {
            add(SIBLINGS, [name_bytes(veth), name_bytes(other)].concat());
            if let Some(mac) = sibling.mac {
                add(SIBLING_MACS, with_mac(veth, mac));
            }
        }
        let Some(mac) = tenant.mac else { continue };
        add(USED_MACS, mac.as_bytes().to_vec());
        let key = with_mac(veth, mac);
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

/// Returns a key of veth pair and MAC, padded to whole words.
fn with_mac(veth: &str, mac: Mac) -> Vec<u8> {
    [&name_bytes(veth)[..], mac.as_bytes(), &[0; 2]].concat()
}

/// Returns the link-local address that kernels usually derive from a MAC (RFC 4291, 2.5.6 and
/// appendix A). Others that a pod uses are unknown, and nothing else has them.
const fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = *mac.as_bytes();
    let bits = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from_bits((0xfe80 << 112) | bits as u128)
}

/// Returns the set of used addresses of the address's family.
const fn used(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { USED4 } else { USED6 }
}

/// Returns the elements that go with a veth pair. Its name stays while the interface exists. The
/// used addresses are removed at the next check, because other veth pairs of the container may have
/// the same.
fn leaving_elements(_: &Bridge, veth: &str, _: &Tenant, elements: &Elements) -> Elements {
    let is_its = |key: &&Vec<u8>| key.starts_with(&name_bytes(veth));
    let others =
        [MACS, ADDRESSES4, ADDRESSES6, SIBLINGS, SIBLING_MACS, BELOW_GROUP_RATE].into_iter();
    let kept = others.filter_map(|set| Some((set, elements.get(set)?)));
    kept.map(|(set, keys)| (set, keys.iter().filter(is_its).cloned().collect())).collect()
}
