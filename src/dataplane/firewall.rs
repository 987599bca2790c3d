//! What nftables should hold for a view: one table of our own, and nothing outside it.
//!
//! - the guard: tunnel packets are taken from members' underlay addresses alone, for VXLAN has no secret of
//!   its own and any host that may send to its port could speak into every pod; and this host takes no routes
//!   from pods, for where /proc/sys is read-only its sysctls cannot see to that;
//! - with peers programmed on demand, a refusal of packets to subnets without a lease: the kernel would ask
//!   for each of their addresses, and keeps a bounded number of questions for all interfaces together;
//! - masquerade, if wanted: pods speak to the outside under this host's address, and processes of this host
//!   to remote pods under its overlay address, so that the answers come back.
//!
//! Pure. Rules of others are neither read nor touched here.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::desired::device_name;
use crate::core::View;

/// What this host's operator wants of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub guard: bool,
    pub masquerade: bool,
    /// One route leads the whole pool to the device.
    pub on_demand: bool,
}

/// The table as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firewall {
    /// Called like the device, so that overlays on one host have one each.
    pub table: String,
    pub guard: Option<Guard>,
    /// UDP port of the tunnels: what pods send there is never masqueraded, or it would pass for a member's.
    pub port: u16,
    /// Per family the overlay's network and this host's subnet in it; empty without masquerade.
    pub masquerade: Vec<(IpNet, IpNet)>,
    /// What may go out by the device, if that is not left to routes.
    pub leases: Option<Leases>,
}

/// Subnets with a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leases {
    /// The overlay's.
    pub device: String,
    /// Per family the overlay's network, and the length of the prefix of each subnet in it.
    pub networks: Vec<(IpNet, u8)>,
    pub subnets: BTreeSet<IpNet>,
}

/// Who may send to the VXLAN port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    pub port: u16,
    pub vni: u32,
    pub members: BTreeSet<IpAddr>,
    /// Addresses that were let in before stay: not everybody was heard who may know a member.
    pub lenient: bool,
    /// The device and the bridge: a host takes no router advertisements and no redirects from them.
    pub interfaces: [String; 2],
    /// Where pods have their addresses, also on bridges of other programs.
    pub networks: Vec<IpNet>,
    /// Interfaces by which this host sends into tunnels at the port, of other programs as well.
    pub tunnels: BTreeSet<String>,
}

impl Firewall {
    pub fn new(view: &View, policy: &Policy, bridge: &str) -> Self {
        let guard = policy.guard.then(|| Guard {
            port: view.settings.vxlan_port,
            vni: view.settings.vni,
            members: view.peers.values().map(|peer| peer.vtep.underlay).collect(),
            lenient: !view.unheard.is_empty(),
            interfaces: [device_name(view.settings.vni), bridge.to_owned()],
            networks: view.settings.pool.networks().iter().collect(),
            tunnels: BTreeSet::from([device_name(view.settings.vni)]),
        });
        let networks = || view.settings.pool.networks().iter().zip(view.own.subnets.iter());
        let leases = policy.on_demand.then(|| Leases {
            device: device_name(view.settings.vni),
            networks: networks().map(|(network, own)| (network, own.prefix_len())).collect(),
            subnets: view
                .peers
                .values()
                .flat_map(|peer| peer.leases.iter().flat_map(|(_, subnets)| subnets.iter()))
                .collect(),
        });
        Self {
            table: device_name(view.settings.vni),
            guard,
            port: view.settings.vxlan_port,
            masquerade: networks().filter(|_| policy.masquerade).collect(),
            leases,
        }
    }

    /// Whether there is anything to put into a table.
    pub fn is_empty(&self) -> bool {
        self.guard.is_none() && self.masquerade.is_empty() && self.leases.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::plan::tests::dual_stack_view;

    #[test]
    fn members_of_the_view_are_let_in_and_each_family_is_masqueraded() {
        let view = dual_stack_view(&[(1, 9), (2, 7)]);
        let policy = Policy { guard: true, masquerade: true, on_demand: true };
        let firewall = Firewall::new(&view, &policy, "gsm0");
        let guard = firewall.guard.as_ref().expect("a guard");
        assert_eq!(guard.members, BTreeSet::from([[192, 0, 2, 2].into()]));
        assert!(!guard.lenient);
        assert_eq!(guard.interfaces, ["gossamer.1", "gsm0"]);
        let own: Vec<String> =
            firewall.masquerade.iter().map(|(_, subnet)| subnet.to_string()).collect();
        assert_eq!(own, ["10.42.9.0/24", "fd42:0:0:9::/64"]);
        let leases = firewall.leases.as_ref().expect("peers come on demand");
        let leased: Vec<String> = leases.subnets.iter().map(IpNet::to_string).collect();
        assert_eq!(leased, ["10.42.7.0/24", "fd42:0:0:7::/64"]);
        let lengths: Vec<u8> = leases.networks.iter().map(|(_, length)| *length).collect();
        assert_eq!(lengths, [24, 64]);
        let nothing = Policy { guard: false, masquerade: false, on_demand: false };
        assert!(Firewall::new(&view, &nothing, "gsm0").is_empty());
    }
}
