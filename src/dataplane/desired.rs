//! What the kernel should hold for a view: the device, and per peer exactly what flannel programs.
//!
//! For a lease 10.42.7.0/24 of a peer with VTEP (MAC m, underlay u):
//!
//! - FDB entry: `m dev gossamer.1 dst u self permanent` (where frames for m go)
//! - neighbour: `10.42.7.0 lladdr m dev gossamer.1 nud permanent` (who the gateway is)
//! - route: `10.42.7.0/24 via 10.42.7.0 dev gossamer.1 onlink` (what goes to that gateway)
//!
//! Pure: equal views give equal results, and no clock or kernel is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use ipnet::Ipv4Net;

use crate::{
    core::View,
    model::{Mac, NodeId, Slot},
};

/// `rtm_protocol` of every route of ours: how they are recognised without any memory.
pub const ROUTE_PROTOCOL: u8 = 73;

/// Bytes that VXLAN over IPv4 (outer Ethernet, IPv4, UDP, VXLAN) and over IPv6 adds to a packet.
pub const fn overhead(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 50,
        IpAddr::V6(_) => 70,
    }
}

/// The VXLAN device as it should be. All of it is compared with what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub vni: u32,
    pub port: u16,
    pub mac: Mac,
    pub mtu: u32,
    /// Source address of the tunnel packets: an address of this host.
    pub local: IpAddr,
    /// Index of the underlay interface.
    pub link: u32,
    /// The VTEP's overlay address: the first of this node's subnet, as a /32.
    pub address: Ipv4Addr,
}

/// The entries of the three tables that belong to us, each by its kernel key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// MAC -> underlay address.
    pub fdb: BTreeMap<Mac, IpAddr>,
    /// Overlay address -> MAC.
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    /// Destination -> gateway and metric.
    pub routes: BTreeMap<Ipv4Net, Hop>,
}

/// The value of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    pub way: Way,
    pub metric: u32,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Over our device, to the VTEP with this overlay address.
    Overlay(Ipv4Addr),
    /// Nowhere: whoever sends there is told at once.
    Unreachable,
}

/// Everything that should be in the kernel on our account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    pub device: Device,
    pub tables: Tables,
    /// The pool's network: routes of ours into it are ours wherever they lead.
    pub network: Ipv4Net,
    /// Addresses whose entries stay although they are not in `tables`: see [`View::unheard`].
    pub unheard: Vec<RangeInclusive<Ipv4Addr>>,
}

/// What the view does not know: this host's end of the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    pub link: u32,
    /// The source address of tunnel packets; behind NAT not the one that peers are told.
    pub local: IpAddr,
    /// MTU of the overlay device.
    pub mtu: u32,
}

impl Desired {
    /// Subnets of `withdrawn` peers are unreachable, but for the address at which their kernel would answer.
    pub fn new(view: &View, underlay: &Underlay, withdrawn: &BTreeSet<NodeId>) -> Self {
        let mut tables = Tables::default();
        for (node, peer) in &view.peers {
            for &(slot, subnet) in &peer.leases {
                let vtep = subnet.network();
                let (overlay, metric) = (Way::Overlay(vtep), metric(slot));
                tables.fdb.insert(peer.vtep.mac, peer.vtep.underlay);
                tables.neighbours.insert(vtep, peer.vtep.mac);
                if withdrawn.contains(node) {
                    tables.routes.insert(vtep.into(), Hop { way: overlay, metric });
                    tables.routes.insert(subnet, Hop { way: Way::Unreachable, metric });
                } else {
                    tables.routes.insert(subnet, Hop { way: overlay, metric });
                }
            }
        }
        let device = Device {
            name: device_name(view.settings.vni),
            vni: view.settings.vni,
            port: view.settings.vxlan_port,
            mac: view.own.vtep.mac,
            mtu: underlay.mtu,
            local: underlay.local,
            link: underlay.link,
            address: view.own.subnet.network(),
        };
        let network = view.settings.pool.network();
        Self { device, tables, network, unheard: view.unheard.clone() }
    }
}

/// `gossamer.<VNI>`, shortened where that would exceed the kernel's 15 characters.
pub fn device_name(vni: u32) -> String {
    let name = format!("gossamer.{vni}");
    if name.len() <= 15 { name } else { format!("gossam.{vni}") }
}

/// Spreads routes over 255 metrics: the kernel keeps routes of one device, protocol and metric in one
/// hash chain, and 10,000 in one chain take seconds (measured: 1.4 s against 0.04 s).
const fn metric(slot: Slot) -> u32 {
    1 + slot.0 % 255
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::plan::tests::{underlay, view};

    #[test]
    fn a_peer_is_three_entries_as_flannel_writes_them() {
        let view = view(&[(1, 9), (2, 7)]);
        let desired = Desired::new(&view, &underlay(), &BTreeSet::new());
        let peer = view.peers.values().next().expect("one peer");
        let gateway: Ipv4Addr = "10.42.7.0".parse().expect("address");
        assert_eq!(desired.tables.fdb[&peer.vtep.mac], peer.vtep.underlay);
        assert_eq!(desired.tables.neighbours[&gateway], peer.vtep.mac);
        let subnet = "10.42.7.0/24".parse().expect("subnet");
        assert_eq!(desired.tables.routes[&subnet], Hop { way: Way::Overlay(gateway), metric: 8 });
        assert_eq!(desired.device.address.to_string(), "10.42.9.0");
        assert_eq!(desired.device.mac, view.own.vtep.mac);
        let subnet_of_own = "10.42.9.0/24".parse().expect("subnet");
        assert!(!desired.tables.routes.contains_key(&subnet_of_own), "no route to ourselves");
    }

    #[test]
    fn a_withdrawn_peers_subnet_is_unreachable_and_its_kernel_can_still_be_asked() {
        let view = view(&[(1, 9), (2, 7)]);
        let desired = Desired::new(&view, &underlay(), &view.peers.keys().copied().collect());
        let way = |subnet: &str| desired.tables.routes[&subnet.parse().expect("subnet")].way;
        assert_eq!(way("10.42.7.0/24"), Way::Unreachable);
        assert_eq!(way("10.42.7.0/32"), Way::Overlay([10, 42, 7, 0].into()));
        assert_eq!((desired.tables.fdb.len(), desired.tables.neighbours.len()), (1, 1));
    }

    #[test]
    fn device_names_fit_the_kernel() {
        for vni in [1, 999_999, 1_000_000, 16_777_215] {
            let name = device_name(vni);
            assert!(name.len() <= 15 && name.ends_with(&vni.to_string()), "{name}");
        }
    }
}
