//! Networks that this host uses for something else and that are also the overlay's.
//!
//! The kernel takes the most specific route, so an interface or a route inside the overlay's network takes
//! packets away from pods, and the overlay takes them away from hosts of a network around it. Pure: the
//! kernel is asked elsewhere.

use std::net::IpAddr;

use ipnet::IpNet;

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
    /// An address of a bridge: the home of containers of this host, if it is in the host's own subnet.
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

    pub fn address(&self) -> IpAddr {
        self.network.addr()
    }
}

/// A sentence about each address of this host that takes packets away from pods, given the overlay's
/// networks and this node's own subnets.
pub fn problems(foreign: &[Foreign], networks: &[IpNet], own: &[IpNet]) -> Vec<String> {
    let is_home = |found: &Foreign| {
        found.kind == ForeignKind::Bridge && own.iter().any(|own| own.contains(&found.address()))
    };
    let named = foreign.iter().filter(|found| found.kind != ForeignKind::Route && !is_home(found));
    named
        .filter_map(|found| {
            let network = networks.iter().find(|network| found.takes_from(network))?;
            Some(format!(
                "{} on {} is in the overlay's network {network}: packets for pods in {} leave by that \
                 interface; give it another network, or create the cluster with another one (--network)",
                found.address(),
                found.interface,
                found.network.trunc(),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foreign(network: &str, kind: ForeignKind) -> Foreign {
        let network = network.parse().expect("a network");
        Foreign { network, interface: "eth1".to_owned(), kind }
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
    fn bridge_in_the_own_subnet_is_the_home_of_pods_and_others_are_named() {
        let pool = ["10.42.0.0/16".parse().expect("a network")];
        let own = ["10.42.1.0/24".parse().expect("a network")];
        let said = |network, kind| problems(&[foreign(network, kind)], &pool, &own);
        assert!(said("10.42.1.1/24", ForeignKind::Bridge).is_empty());
        assert!(said("10.42.1.7/24", ForeignKind::Address)[0].contains("10.42.1.7 on eth1"));
        assert!(said("10.42.5.1/24", ForeignKind::Bridge)[0].contains("10.42.5.0/24"));
        assert!(said("192.0.2.1/24", ForeignKind::Address).is_empty());
    }
}
