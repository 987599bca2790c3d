//! Networks that this host uses for something else and that are also the overlay's.
//!
//! The kernel takes the most specific route, so an interface or a route inside the overlay's network takes
//! packets away from pods, and the overlay takes them away from hosts of a network around it. Pure: the
//! kernel is asked elsewhere.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::Pool;

/// A network that leads somewhere else on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// An address with its prefix length, or a route's destination.
    pub network: IpNet,
    /// The interface that it leads to; empty if it leads nowhere.
    pub interface: String,
    pub kind: ForeignKind,
}

/// The origin of a network of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignKind {
    /// An address of an interface.
    Address,
    /// An address of a bridge: the home of containers of this host, if it is in the host's own subnet and
    /// no other bridge is that.
    Bridge,
    /// A route of another program.
    Route,
}

impl Foreign {
    /// Whether a part of `network` leads elsewhere because of it. A route around the whole overlay, such as
    /// the default route, does no harm.
    pub fn takes_from(&self, network: &IpNet) -> bool {
        match self.kind {
            ForeignKind::Route => network.contains(&self.network),
            ForeignKind::Address | ForeignKind::Bridge => {
                network.contains(&self.network) || network.contains(&self.address())
            }
        }
    }

    /// Whether a cluster with this network must not be created here: a part of one would be cut off by the
    /// other.
    pub fn forbids(&self, network: &IpNet) -> bool {
        let is_around = self.kind != ForeignKind::Route && self.network.contains(network);
        is_around || self.takes_from(network)
    }

    /// Whether it has some of these addresses of pods, or others of their subnets.
    pub fn is_among(&self, pods: &[IpAddr], pool: Option<&Pool>) -> bool {
        let slots = pool.map_or(0..0, |pool| pool.slots_in(&self.network));
        let is_in = |ip: &IpAddr| {
            let slot = pool.and_then(|pool| pool.slot_of(*ip));
            self.network.contains(ip) || slot.is_some_and(|slot| slots.contains(&slot.0))
        };
        pods.iter().any(is_in)
    }

    pub fn address(&self) -> IpAddr {
        self.network.addr()
    }
}

/// The overlay on this host.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    pub networks: &'a [IpNet],
    /// This node's own subnets.
    pub own: &'a [IpNet],
    /// The bridge that gossamer has made for pods, if it has.
    pub pods: Option<&'a str>,
    /// Each peer's subnet has a route; otherwise one route is for all of them.
    pub has_all_routes: bool,
}

/// A sentence about each address of this host that takes packets away from pods.
pub fn problems(foreign: &[Foreign], overlay: &Overlay<'_>) -> Vec<String> {
    let Overlay { networks, own, pods, has_all_routes } = *overlay;
    // Routes to subnets of nodes are more specific.
    let is_outranked = |found: &Foreign| {
        let is_ipv4 = found.network.addr().is_ipv4();
        let mut own = own.iter().filter(|own| own.addr().is_ipv4() == is_ipv4);
        has_all_routes && own.any(|own| found.network.prefix_len() < own.prefix_len())
    };
    let home_of = |subnet: &IpNet| {
        let mut bridges = foreign
            .iter()
            .filter(|found| found.kind == ForeignKind::Bridge && subnet.contains(&found.address()));
        pods.or_else(|| bridges.next().map(|found| found.interface.as_str()))
    };
    let named = foreign.iter().filter(|found| found.kind != ForeignKind::Route);
    named
        .filter_map(|found| {
            let subnet = own.iter().find(|own| own.contains(&found.address()));
            if let Some((subnet, home)) = subnet.and_then(|subnet| Some((subnet, home_of(subnet)?)))
            {
                if found.interface == home {
                    return None;
                }
                if !is_outranked(found) {
                    return Some(rival(found, *subnet, home));
                }
            }
            let network = networks.iter().find(|network| found.takes_from(network))?;
            let Foreign { network: around, interface, .. } = found;
            let (address, around) = (found.address(), around.trunc());
            let what = match is_outranked(found) {
                true => format!(
                    "subnets of nodes come before {around}, so the overlay takes the packets to machines \
                     behind {interface} that have addresses in these, and packets to a pod with the address \
                     {address} stay on this host"
                ),
                false => format!("packets for pods in {around} leave by that interface"),
            };
            Some(format!(
                "{address} on {interface} is in the overlay's network {network}: {what}; give it \
                 another network, or create the cluster with another one (--network)"
            ))
        })
        .collect()
}

/// One subnet cannot be behind two interfaces: the kernel takes the route that was there first.
fn rival(found: &Foreign, subnet: IpNet, home: &str) -> String {
    let Foreign { network, interface, kind, .. } = found;
    let whole = match kind {
        ForeignKind::Bridge => {
            format!(
                "; a bridge that is left over from another network goes as a whole: ip link del {interface}"
            )
        }
        ForeignKind::Address | ForeignKind::Route => String::new(),
    };
    format!(
        "{} on {interface} is in this node's own subnet {subnet}, of which {home} is the bridge: packets for \
         pods leave by {interface} instead; remove it (ip addr del {network} dev {interface}){whole}",
        found.address()
    )
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
        Overlay { networks, own, pods, has_all_routes: true }
    }

    /// As libvirt and others have it: the routes to subnets are more specific.
    #[test]
    fn network_around_subnets_takes_nothing_from_them_and_that_is_not_said_of_it() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        for network in ["10.42.0.1/16", "10.42.1.7/16", "10.42.7.1/8"] {
            let found = [foreign(network, ForeignKind::Bridge)];
            let overlay = overlay(&pool, &own, Some("gsm0"));
            let said = problems(&found, &overlay);
            let words = ["machines behind eth1", "stay on this host", "give it another network"];
            assert!(said.len() == 1 && words.iter().all(|word| said[0].contains(word)), "{said:?}");
            assert!(!said[0].contains("leave by"), "{said:?}");
            // One route for all of the pool loses to it.
            let said = problems(&found, &Overlay { has_all_routes: false, ..overlay });
            assert!(said.len() == 1 && said[0].contains("leave by"), "{said:?}");
        }
    }

    #[test]
    fn networks_inside_and_around_the_overlays_forbid_it() {
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
    fn network_in_the_subnet_of_pods_is_among_them_also_where_it_has_none() {
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
        // Of a cluster that is not known, only addresses are.
        assert!(!foreign("10.42.2.64/26", ForeignKind::Route).is_among(&pod, None));
        assert!(foreign("10.42.2.0/26", ForeignKind::Route).is_among(&pod, None));
    }

    #[test]
    fn bridge_in_the_own_subnet_is_the_home_of_pods_and_others_are_named() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        let said = |network, kind| problems(&[foreign(network, kind)], &overlay(&pool, &own, None));
        assert!(said("10.42.1.1/24", ForeignKind::Bridge).is_empty());
        assert!(said("10.42.1.7/24", ForeignKind::Address)[0].contains("10.42.1.7 on eth1"));
        assert!(said("10.42.5.1/24", ForeignKind::Bridge)[0].contains("10.42.5.0/24"));
        assert!(said("192.0.2.1/24", ForeignKind::Address).is_empty());
    }

    #[test]
    fn second_bridge_in_the_own_subnet_is_named_with_the_command_that_removes_it() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        let of = |interface: &str| Foreign {
            interface: interface.to_owned(),
            ..foreign("10.42.1.1/24", ForeignKind::Bridge)
        };
        let said = problems(&[of("cni0")], &overlay(&pool, &own, Some("gsm0")));
        assert_eq!(said.len(), 1, "{said:?}");
        for words in ["10.42.1.1 on cni0", "gsm0 is the bridge", "ip link del cni0"] {
            assert!(said[0].contains(words), "{words}: {said:?}");
        }
        let said = problems(&[of("pods"), of("cni0")], &overlay(&pool, &own, None));
        assert!(said.len() == 1 && said[0].contains("pods is the bridge"), "{said:?}");
        // An address that is no bridge's, beside one.
        let card = foreign("10.42.1.7/32", ForeignKind::Address);
        let said = problems(&[of("pods"), card], &overlay(&pool, &own, None));
        assert!(
            said.len() == 1 && said[0].contains("ip addr del 10.42.1.7/32 dev eth1"),
            "{said:?}"
        );
    }
}
