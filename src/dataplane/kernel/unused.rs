//! The table that rejects packets to addresses of this host's subnet that no pod has.
//!
//! Without it, each such packet makes the kernel resolve a neighbor on the pods' bridge. The number
//! of unresolved neighbors is limited for all interfaces and namespaces together
//! (`net.ipv6.neigh.default.gc_thresh3`), so any host that can send to the subnet could prevent the
//! resolution of pods and next hops. The sender gets the same answer as without the table: host
//! unreachable.
//!
//! The table requires that all addresses on the bridge are known, that is, anti-spoofing and no
//! foreign ports.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::shape::Shape;
use crate::{
    dataplane::desired::pods_table_name,
    model::Addresses,
    netlink::{
        attributes,
        nftables::{Field, INET, Rule, sets::Elements},
    },
    pods::{
        desired::{Bridge, Tenant, Tenants},
        last_addresses, last_but_one,
    },
};

/// `NF_INET_FORWARD` and `NF_INET_LOCAL_OUT`, at the priority of filters, where other programs have
/// already translated destinations.
const CHAINS: [(&str, u32, i32); 2] = [("forward", 2, 0), ("output", 3, 0)];
const SET4: &str = "pods4";
const SET6: &str = "pods6";
/// Length of the elements in bytes, and their type as the `nft` program encodes it.
const SETS: [(&str, u32, u32); 2] = [(SET4, 4, 7), (SET6, 16, 8)];

/// The table's shape.
pub(super) static SHAPE: Shape = Shape {
    family: INET,
    name: pods_table_name,
    sets: &SETS,
    limited: None,
    alarm: None,
    chains: &CHAINS,
    rules,
    elements,
    leaving,
    veths: None,
    stale: Some("pods that start now are not reached"),
    requirement: (
        "packets to unused addresses of this host's subnet can fill the kernel's neighbor table",
        "reject of nf_tables (CONFIG_NFT_REJECT_INET)",
    ),
};

fn rules(bridge: &Bridge) -> Vec<(&'static str, Rule)> {
    let mut rules = Vec::new();
    for (chain, ..) in CHAINS {
        for subnet in bridge.subnets.iter() {
            let to_subnet = Rule::new()
                .to_interface(&bridge.name)
                .family_of(subnet.addr())
                .address(Field::Destination, subnet, true);
            let to_unused = to_subnet.destination_outside(set_of(subnet.addr()), subnet.addr());
            rules.push((chain, to_unused.count().refuse()));
        }
    }
    rules
}

fn elements(bridge: &Bridge, tenants: &Tenants, _: &BTreeSet<String>) -> Elements {
    let mut elements: Elements = SETS.map(|(set, ..)| (set, BTreeSet::new())).into();
    let of_pods = tenants.values().flat_map(|tenant| tenant.addresses.iter());
    for ip in of_pods.chain(always_used(bridge)) {
        elements.entry(set_of(ip)).or_default().insert(attributes::octets(ip));
    }
    elements
}

/// Returns the pod's addresses, except those that are always used.
fn leaving(bridge: &Bridge, _: &str, tenant: &Tenant, _: &Elements) -> Elements {
    let stay: Vec<IpAddr> = always_used(bridge).collect();
    let mut leaving = Elements::new();
    for ip in tenant.addresses.iter().filter(|ip| !stay.contains(ip)) {
        leaving.entry(set_of(ip)).or_default().insert(attributes::octets(ip));
    }
    leaving
}

/// Returns the addresses of the agent's own pods, and the broadcast addresses.
fn always_used(bridge: &Bridge) -> impl Iterator<Item = IpAddr> {
    let own = [Some(last_addresses(bridge.subnets)), last_but_one(bridge.subnets)];
    let broadcasts = bridge.subnets.iter().filter_map(|subnet| match subnet {
        IpNet::V4(subnet) => Some(IpAddr::V4(subnet.broadcast())),
        IpNet::V6(_) => None,
    });
    own.into_iter().flatten().flat_map(Addresses::iter).chain(broadcasts)
}

const fn set_of(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { SET4 } else { SET6 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Subnets;

    fn bridge() -> Bridge {
        let subnets = Subnets {
            first: "10.42.7.0/24".parse().expect("a subnet"),
            second: Some("fd42:0:0:7::/64".parse().expect("a subnet")),
        };
        Bridge {
            name: "gsm0".to_owned(),
            subnets,
            networks: subnets,
            mtu: 1450,
            table: "gossamer.1".to_owned(),
            anti_spoofing: true,
        }
    }

    fn tenant(addresses: [&str; 2]) -> Tenant {
        let [first, second] = addresses.map(|ip| ip.parse().expect("an address"));
        Tenant {
            container: "c".to_owned(),
            addresses: Addresses { first, second: Some(second) },
            mac: None,
            netns: String::new(),
        }
    }

    #[test]
    fn addresses_of_the_agents_pods_and_broadcasts_stay_when_a_pod_with_them_leaves() {
        let bridge = bridge();
        let has = |elements: &Elements, ip: &str| {
            let ip: IpAddr = ip.parse().expect("an address");
            elements.get(set_of(ip)).is_some_and(|keys| keys.contains(&attributes::octets(ip)))
        };
        let pod = tenant(["10.42.7.2", "fd42:0:0:7::2"]);
        let tenants = Tenants::from([("gsm1".to_owned(), pod.clone())]);
        let all = elements(&bridge, &tenants, &BTreeSet::new());
        let used = ["10.42.7.2", "fd42:0:0:7::2", "10.42.7.254", "10.42.7.253", "10.42.7.255"];
        for ip in used {
            assert!(has(&all, ip), "{ip}");
        }
        assert!(!has(&all, "10.42.7.3"));
        let gone = leaving(&bridge, "gsm1", &pod, &all);
        assert!(has(&gone, "10.42.7.2") && has(&gone, "fd42:0:0:7::2"));
        let last = last_addresses(bridge.subnets);
        let last = Tenant { addresses: last, ..pod };
        assert!(leaving(&bridge, "gsm1", &last, &all).is_empty());
    }
}
