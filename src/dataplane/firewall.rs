//! The desired state of gossamer's nftables table, computed from the view.
//!
//! - Guard: accepts tunnel packets only from members' underlay addresses. VXLAN has no
//!   authentication, so any host that can send to the port could inject packets to every pod. The
//!   guard also drops router advertisements and redirects of pods, because sysctls cannot disable
//!   them where /proc/sys is read-only.
//! - Leases, with entries on demand: reject packets to subnets without a lease. The kernel would
//!   otherwise try to resolve each of their addresses, and the number of pending resolutions is
//!   limited for all interfaces together.
//! - Masquerade, if enabled: packets of pods to other networks get this host's address, and packets
//!   of this host's processes to remote pods get its overlay address, so that the answers return.
//!
//! Pure. This module neither reads nor changes rules of other programs.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::desired::device_name;
use crate::model::View;

/// The settings of this host that determine the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether the guard is on.
    pub guard: bool,
    /// Whether packets of pods to other networks are masqueraded.
    pub masquerade: bool,
    /// Whether peers are programmed on demand: one route leads the whole pool to the device.
    pub on_demand: bool,
}

/// The desired table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firewall {
    /// Name of the table: that of the device, so that each overlay on a host has a table of its
    /// own.
    pub table: String,
    /// The guard, if it is on.
    pub guard: Option<Guard>,
    /// UDP port of the tunnels. Packets of pods to it are never masqueraded, because they would
    /// then pass for this member's tunnel packets.
    pub port: u16,
    /// Per family, the overlay's network and this host's subnet in it; empty without masquerade.
    pub masquerade: Vec<(IpNet, IpNet)>,
    /// The accepted destinations behind the device; `None` if routes decide that.
    pub leases: Option<Leases>,
}

/// Subnets with a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leases {
    /// Name of the VXLAN device.
    pub device: String,
    /// Per family, the overlay's network and the prefix length of its subnets.
    pub networks: Vec<(IpNet, u8)>,
    /// The subnets with a lease.
    pub subnets: BTreeSet<IpNet>,
}

/// Rules about packets to the VXLAN port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// UDP port of the tunnels.
    pub port: u16,
    /// VNI of the overlay.
    pub vni: u32,
    /// Underlay addresses of the members.
    pub members: BTreeSet<IpAddr>,
    /// Whether addresses stay accepted although no known member has them, because an unconfirmed
    /// slot's owner may know such a member.
    pub lenient: bool,
    /// The device and the bridge. The host accepts no router advertisements and redirects from
    /// them.
    pub interfaces: [String; 2],
    /// The overlay's networks: pods have their addresses, also on bridges of other programs.
    pub networks: Vec<IpNet>,
    /// Interfaces by which this host sends tunnel packets to the port, including those of other
    /// programs.
    pub tunnels: BTreeSet<String>,
}

impl Firewall {
    /// Computes the table from the view. `bridge` is the name of the pods' bridge.
    pub fn new(view: &View, policy: &Policy, bridge: &str) -> Self {
        let guard = policy.guard.then(|| Guard {
            port: view.settings.vxlan_port,
            vni: view.settings.vni,
            members: view.peers.values().map(|peer| peer.vtep.underlay).collect(),
            lenient: !view.unconfirmed.is_empty(),
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

    /// Whether the table would hold no rules.
    pub fn is_empty(&self) -> bool {
        self.guard.is_none() && self.masquerade.is_empty() && self.leases.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::plan::tests::dual_stack_view;

    #[test]
    fn table_accepts_members_and_masquerades_each_family() {
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
