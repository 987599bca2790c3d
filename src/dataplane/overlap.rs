//! Networks of this host that overlap with the overlay's networks.
//!
//! The kernel uses the most specific route. An interface or a route inside the overlay's network
//! therefore diverts packets of pods, and the overlay diverts packets to hosts of a larger network
//! around it.
//!
//! Pure: `dataplane/kernel/observe` queries the kernel.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Pool, Problem, ProblemCode};

/// A network that leads to an interface outside the overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// An address with its prefix length, or a route's destination.
    pub network: IpNet,
    /// The interface that it leads to; empty if the route drops packets.
    pub interface: String,
    /// Where the network comes from.
    pub kind: ForeignKind,
}

/// The origin of a foreign network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignKind {
    /// An address of an interface.
    Address,
    /// An address of a bridge. In the host's own subnet it is taken for the bridge of the host's
    /// containers, unless another bridge is.
    Bridge,
    /// A route of another program.
    Route,
}

impl Foreign {
    /// Whether it diverts packets to a part of `network`. A route to a larger network than the
    /// overlay's, such as the default route, does not.
    pub fn takes_from(&self, network: &IpNet) -> bool {
        match self.kind {
            ForeignKind::Route => network.contains(&self.network),
            ForeignKind::Address | ForeignKind::Bridge => {
                network.contains(&self.network) || network.contains(&self.address())
            }
        }
    }

    /// Whether a cluster with this network must not be created here: one of the two networks would
    /// lose a part of its addresses to the other.
    pub fn forbids(&self, network: &IpNet) -> bool {
        let is_around = self.kind != ForeignKind::Route && self.network.contains(network);
        is_around || self.takes_from(network)
    }

    /// Whether it contains one of the pods' addresses, or lies in the subnet of one of them.
    pub fn is_among(&self, pods: &[IpAddr], pool: Option<&Pool>) -> bool {
        let slots = pool.map_or(0..0, |pool| pool.slots_in(&self.network));
        let is_in = |ip: &IpAddr| {
            let slot = pool.and_then(|pool| pool.slot_of(*ip));
            self.network.contains(ip) || slot.is_some_and(|slot| slots.contains(&slot.0))
        };
        pods.iter().any(is_in)
    }

    /// Returns the address, or the first address of the route's destination.
    pub fn address(&self) -> IpAddr {
        self.network.addr()
    }
}

/// Returns a network of the pool, and what forbids to create a cluster with it here.
pub fn find_forbidding<'a>(foreign: &'a [Foreign], pool: &Pool) -> Option<(IpNet, &'a Foreign)> {
    let networks = pool.networks();
    let mut pairs = networks.iter().flat_map(|network| foreign.iter().map(move |f| (network, f)));
    pairs.find(|(network, found)| found.forbids(network))
}

/// The overlay as far as overlaps depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// The overlay's networks.
    pub networks: &'a [IpNet],
    /// The pool, if it is known.
    pub pool: Option<&'a Pool>,
    /// This node's own subnets.
    pub own: &'a [IpNet],
    /// The pods' bridge of gossamer, if there is one.
    pub pods: Option<&'a str>,
    /// Whether each peer's subnet has a route of its own; otherwise one route covers all of them.
    pub has_all_routes: bool,
}

/// Returns a problem for each address of this host that diverts packets of pods, or whose network
/// the overlay takes packets from.
pub fn problems(foreign: &[Foreign], overlay: &Overlay<'_>) -> Vec<Problem> {
    let Overlay { networks, pool, own, pods, has_all_routes } = *overlay;
    // A part of the pool that is never leased contains no pods.
    let is_leasable = |found: &&Foreign| {
        pool.is_none_or(|pool| !pool.slots_in(&found.network.trunc()).is_empty())
    };
    // Routes to nodes' subnets are more specific.
    let overlay_outranks = |found: &Foreign| {
        let is_ipv4 = found.network.addr().is_ipv4();
        let mut own = own.iter().filter(|own| own.addr().is_ipv4() == is_ipv4);
        has_all_routes && own.any(|own| found.network.prefix_len() < own.prefix_len())
    };
    let bridge_of = |subnet: &IpNet| {
        let mut bridges = foreign
            .iter()
            .filter(|found| found.kind == ForeignKind::Bridge && subnet.contains(&found.address()));
        pods.or_else(|| bridges.next().map(|found| found.interface.as_str()))
    };
    let named = foreign.iter().filter(|found| found.kind != ForeignKind::Route);
    named
        .filter(is_leasable)
        .filter_map(|found| {
            let subnet = own.iter().find(|own| own.contains(&found.address()));
            if let Some((subnet, bridge)) = subnet.and_then(|subnet| Some((subnet, bridge_of(subnet)?)))
            {
                if found.interface == bridge {
                    return None;
                }
                if !overlay_outranks(found) {
                    return Some(second_interface_problem(found, *subnet, bridge));
                }
            }
            let network = networks.iter().find(|network| found.takes_from(network))?;
            let Foreign { network: around, interface, .. } = found;
            let (address, around) = (found.address(), around.trunc());
            let what = match overlay_outranks(found) {
                true => format!(
                    "routes to nodes' subnets are more specific than {around}. Packets to machines \
                     behind {interface} in these subnets go into the overlay, and packets to a pod with \
                     the address {address} stay on this host"
                ),
                false => format!("packets for pods in {around} leave by that interface"),
            };
            Some(Problem::new(
                ProblemCode::Overlap,
                interface,
                format!("{address} on {interface} is in the overlay's network {network}: {what}"),
                "give it another network, or create the cluster with another one (--network)",
            ))
        })
        .collect()
}

/// Returns the problem of an interface in this node's own subnet besides the pods' bridge. The
/// kernel uses the older of two routes to the subnet.
fn second_interface_problem(found: &Foreign, subnet: IpNet, bridge: &str) -> Problem {
    let Foreign { network, interface, kind, .. } = found;
    let whole = match kind {
        ForeignKind::Bridge => {
            format!(
                "; if it is a bridge of a network that no longer exists, remove it: ip link del {interface}"
            )
        }
        ForeignKind::Address | ForeignKind::Route => String::new(),
    };
    let what = format!(
        "{} on {interface} is in this node's own subnet {subnet}, of which {bridge} is the bridge: packets \
         for pods leave by {interface} instead",
        found.address()
    );
    let fix = format!("remove it (ip addr del {network} dev {interface}){whole}");
    Problem::new(ProblemCode::Overlap, interface, what, fix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PoolSpec;

    fn foreign(network: &str, kind: ForeignKind) -> Foreign {
        let network = network.parse().expect("a network");
        Foreign { network, interface: "eth1".to_owned(), kind }
    }

    fn overlay<'a>(networks: &'a [IpNet], own: &'a [IpNet], pods: Option<&'a str>) -> Overlay<'a> {
        Overlay { networks, pool: None, own, pods, has_all_routes: true }
    }

    /// The routes to subnets are more specific than a route of a larger network, as libvirt may
    /// have.
    #[test]
    fn larger_network_is_not_reported_as_diverting_packets_of_subnets() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        for network in ["10.42.0.1/16", "10.42.1.7/16", "10.42.7.1/8"] {
            let found = [foreign(network, ForeignKind::Bridge)];
            let overlay = overlay(&pool, &own, Some("gsm0"));
            let sentences = problems(&found, &overlay);
            let words = ["machines behind eth1", "stay on this host", "give it another network"];
            assert!(
                sentences.len() == 1 && words.iter().all(|word| sentences[0].contains(word)),
                "{sentences:?}"
            );
            assert!(!sentences[0].contains("leave by"), "{sentences:?}");
            // The single route for the pool is less specific than that network.
            let sentences = problems(&found, &Overlay { has_all_routes: false, ..overlay });
            assert!(sentences.len() == 1 && sentences[0].contains("leave by"), "{sentences:?}");
        }
    }

    /// NetworkManager's first shared connection has 10.42.0.1/24.
    #[test]
    fn network_in_a_part_of_the_pool_that_is_never_leased_is_not_reported() {
        let spec = PoolSpec::of("10.42.0.0/16".parse().expect("a network"));
        let pool = Pool::new(&spec).expect("a pool");
        let networks: Vec<IpNet> = pool.networks().iter().collect();
        let own = ["10.42.2.0/24".parse().expect("a network")];
        let overlay = Overlay { pool: Some(&pool), ..overlay(&networks, &own, None) };
        for (network, is_reported) in [
            ("10.42.0.1/24", false),
            ("10.42.0.1/32", false),
            ("10.42.0.1/23", true),
            ("10.42.1.1/24", true),
            ("10.42.0.1/16", true),
            ("10.42.0.1/8", true),
        ] {
            let found = [foreign(network, ForeignKind::Address)];
            assert_eq!(!problems(&found, &overlay).is_empty(), is_reported, "{network}");
        }
    }

    #[test]
    fn network_inside_or_around_the_pool_forbids_the_pool() {
        let pool: IpNet = "10.42.0.0/16".parse().expect("a network");
        for (network, kind, takes, forbids) in [
            ("10.42.5.7/24", ForeignKind::Address, true, true),
            ("10.42.5.7/8", ForeignKind::Address, true, true),
            ("10.1.2.3/8", ForeignKind::Address, false, true),
            ("10.43.0.1/16", ForeignKind::Address, false, false),
            ("10.42.1.1/24", ForeignKind::Bridge, true, true),
            ("10.42.7.0/24", ForeignKind::Route, true, true),
            ("10.42.0.0/16", ForeignKind::Route, true, true),
            ("10.0.0.0/8", ForeignKind::Route, false, false),
            ("0.0.0.0/0", ForeignKind::Route, false, false),
            ("fd42::1/64", ForeignKind::Address, false, false),
        ] {
            let found = foreign(network, kind);
            assert_eq!(found.takes_from(&pool), takes, "{network} {kind:?}");
            assert_eq!(found.forbids(&pool), forbids, "{network} {kind:?}");
        }
    }

    #[test]
    fn network_in_a_subnet_with_pods_is_among_them_also_without_pods_in_it() {
        let spec = PoolSpec::of("10.42.0.0/16".parse().expect("a network"));
        let pool = Pool::new(&spec).expect("a pool");
        let pod = [IpAddr::from([10, 42, 2, 2])];
        for (network, kind, is_among) in [
            ("10.42.2.64/26", ForeignKind::Route, true),
            ("10.42.2.0/26", ForeignKind::Route, true),
            ("10.42.0.0/16", ForeignKind::Route, true),
            ("10.42.2.7/24", ForeignKind::Address, true),
            ("10.42.3.0/26", ForeignKind::Route, false),
            ("192.0.2.0/24", ForeignKind::Route, false),
        ] {
            let found = foreign(network, kind);
            assert_eq!(found.is_among(&pod, Some(&pool)), is_among, "{network}");
            assert!(!found.is_among(&[], Some(&pool)), "{network}");
        }
        // Without the pool, only addresses can be compared.
        assert!(!foreign("10.42.2.64/26", ForeignKind::Route).is_among(&pod, None));
        assert!(foreign("10.42.2.0/26", ForeignKind::Route).is_among(&pod, None));
    }

    #[test]
    fn bridge_in_own_subnet_is_the_pods_bridge_and_other_interfaces_are_reported() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        let sentences =
            |network, kind| problems(&[foreign(network, kind)], &overlay(&pool, &own, None));
        assert!(sentences("10.42.1.1/24", ForeignKind::Bridge).is_empty());
        assert!(sentences("10.42.1.7/24", ForeignKind::Address)[0].contains("10.42.1.7 on eth1"));
        assert!(sentences("10.42.5.1/24", ForeignKind::Bridge)[0].contains("10.42.5.0/24"));
        assert!(sentences("192.0.2.1/24", ForeignKind::Address).is_empty());
    }

    #[test]
    fn second_bridge_in_own_subnet_is_reported_with_the_command_that_removes_it() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        let of = |interface: &str| Foreign {
            interface: interface.to_owned(),
            ..foreign("10.42.1.1/24", ForeignKind::Bridge)
        };
        let sentences = problems(&[of("cni0")], &overlay(&pool, &own, Some("gsm0")));
        assert_eq!(sentences.len(), 1, "{sentences:?}");
        for words in ["10.42.1.1 on cni0", "gsm0 is the bridge", "ip link del cni0"] {
            assert!(sentences[0].contains(words), "{words}: {sentences:?}");
        }
        let sentences = problems(&[of("pods"), of("cni0")], &overlay(&pool, &own, None));
        assert!(
            sentences.len() == 1 && sentences[0].contains("pods is the bridge"),
            "{sentences:?}"
        );
        // An address of an interface besides the bridge.
        let card = foreign("10.42.1.7/32", ForeignKind::Address);
        let sentences = problems(&[of("pods"), card], &overlay(&pool, &own, None));
        assert!(
            sentences.len() == 1 && sentences[0].contains("ip addr del 10.42.1.7/32 dev eth1"),
            "{sentences:?}"
        );
    }
}
