//! What the kernel should hold for a view: the device, and per peer exactly what flannel programs.
//!
//! For a lease 10.42.7.0/24 of a peer with VTEP (MAC m, underlay u):
//!
//! - FDB entry: `m dev gossamer.1 dst u self permanent` (where frames for m go)
//! - neighbour: `10.42.7.0 lladdr m dev gossamer.1 nud permanent` (who the gateway is)
//! - route: `10.42.7.0/24 via 10.42.7.0 dev gossamer.1 onlink` (what goes to that gateway)
//!
//! In a dual-stack overlay the second and third exist once per family; the tunnel may be of either. A peer
//! that is routed to directly has only a route, over the underlay to its host.
//!
//! This node's own subnets have an `unreachable` route each, worse than any other: a packet for an address
//! that no pod has must not leave by the default route. The bridge of whatever makes pods outranks it.
//!
//! Pure: equal views give equal results, and no clock or kernel is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Range,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    core::View,
    model::{Mac, NodeId, Pool, Slot, Vtep},
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

/// The smallest MTU with which a kernel lets an interface have IPv6 (RFC 8200, section 5).
pub const IPV6_MTU_MIN: u32 = 1_280;

/// The VXLAN device as it should be. All of it is compared with what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub vni: u32,
    pub port: u16,
    pub mac: Mac,
    pub mtu: u32,
    /// Tells operators, and other overlays on this host, which networks are in it.
    pub alias: String,
    /// Source address of the tunnel packets: an address of this host.
    pub local: IpAddr,
    /// Index of the interface by which tunnel packets have to leave; 0 if they follow the routes, so that the
    /// device outlives its interface and uses all of several uplinks.
    pub link: u32,
    /// The VTEP's overlay addresses: the first of each of this node's subnets, as a /32 or /128.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether checksums of what is sent are left to hardware; none: as it is, or not known.
    pub checksum_offload: Option<bool>,
}

/// The entries of the three tables that belong to us, each by its kernel key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// MAC -> underlay address.
    pub fdb: BTreeMap<Mac, IpAddr>,
    /// Overlay address -> MAC.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Destination -> gateway and metric.
    pub routes: BTreeMap<IpNet, Hop>,
}

/// The value of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    pub way: Way,
    pub metric: u32,
    /// MTU of the packets that take it, in bytes; none: that of the device.
    pub mtu: Option<u32>,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Over our device, to the VTEP with this overlay address.
    Overlay(IpAddr),
    /// Over the underlay interface with this index, to the host with this underlay address.
    Direct { gateway: IpAddr, link: u32 },
    /// Over our device, to whoever has the address itself.
    Device,
    /// Nowhere: whoever sends there is told at once.
    Unreachable,
}

/// Everything that should be in the kernel on our account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    pub device: Device,
    pub tables: Tables,
    /// Routes with our protocol number into its networks are ours, wherever they lead.
    pub pool: Pool,
    /// Slots of nobody whose entries stay although they are not in `tables`: see [`View::unconfirmed`].
    pub unconfirmed: Vec<Range<u32>>,
}

/// How packets get to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "agent", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Always through a tunnel.
    #[default]
    Vxlan,
    /// Without a tunnel where the peer is on the same underlay network.
    Direct,
    /// Never through a tunnel: peers on other networks are unreachable.
    HostGw,
}

/// What the view does not know: this host's end of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    pub link: u32,
    /// Tunnel packets have to leave by `link`, whatever the main table says.
    pub pinned: bool,
    /// The source address of tunnel packets; behind NAT not the one that peers are told.
    pub local: IpAddr,
    /// Networks of the interface: their hosts are reached without a router.
    pub networks: Vec<IpNet>,
    /// MTU of the overlay device.
    pub tunnel_mtu: u32,
    /// MTU of the packets to each peer whose path carries less than the overlay device.
    pub narrow: BTreeMap<NodeId, u32>,
    pub mode: Mode,
}

impl Underlay {
    /// Where nothing goes without a tunnel.
    pub const fn of_tunnels(link: u32, local: IpAddr, tunnel_mtu: u32) -> Self {
        Self {
            link,
            pinned: false,
            local,
            networks: Vec::new(),
            tunnel_mtu,
            narrow: BTreeMap::new(),
            mode: Mode::Vxlan,
        }
    }

    /// Whether the tunnel device can carry this family at all: where it cannot, the other one goes on.
    pub const fn carries(&self, subnet: IpNet) -> bool {
        matches!(subnet, IpNet::V4(_)) || self.tunnel_mtu >= IPV6_MTU_MIN
    }

    /// The way to a subnet of the peer with this underlay address.
    pub fn way(&self, peer: IpAddr, subnet: IpNet) -> Way {
        let near = self.networks.iter().any(|network| network.contains(&peer));
        // No kernel routes IPv6 by an IPv4 gateway; the reverse is fine.
        let routable = peer.is_ipv6() || subnet.addr().is_ipv4();
        match self.mode {
            _ if self.unusable(peer, near).is_some() => Way::Unreachable,
            Mode::Direct | Mode::HostGw if near && routable => {
                Way::Direct { gateway: peer, link: self.link }
            }
            Mode::Vxlan | Mode::Direct => Way::Overlay(subnet.network()),
            Mode::HostGw => Way::Unreachable,
        }
    }
}

impl Underlay {
    /// Why nothing can be sent to a peer with this underlay address from here, though other hosts may.
    /// `near`: it is in a network of this host.
    fn unusable(&self, peer: IpAddr, near: bool) -> Option<&'static str> {
        let is_broadcast = |network: &IpNet| match network {
            IpNet::V4(network) => network.prefix_len() < 31 && network.broadcast() == peer,
            IpNet::V6(_) => false,
        };
        if peer == self.local {
            Some("which is this host's own")
        } else if self.networks.iter().any(is_broadcast) {
            Some("which is the broadcast address of a network of this host")
        } else if peer.is_ipv4() != self.local.is_ipv4() && (self.mode == Mode::Vxlan || !near) {
            Some("which is of another family than this node's tunnels")
        } else {
            None
        }
    }

    /// The same, as a part of a sentence.
    pub fn unusable_peer(&self, peer: IpAddr) -> Option<&'static str> {
        self.unusable(peer, self.networks.iter().any(|network| network.contains(&peer)))
    }
}

impl Hop {
    /// Refuses what nothing on this host takes.
    pub const REFUSE: Self = Self::new(Way::Unreachable, u32::MAX);

    /// A route for packets as large as the device takes them.
    pub const fn new(way: Way, metric: u32) -> Self {
        Self { way, metric, mtu: None }
    }
}

impl Desired {
    /// Subnets of `withdrawn` peers are unreachable, but for the address at which their kernel would answer.
    pub fn new(view: &View, underlay: &Underlay, withdrawn: &BTreeSet<NodeId>) -> Self {
        let mut tables = Tables::default();
        for (node, peer) in &view.peers {
            let withdrawn = withdrawn.contains(node);
            let narrow = underlay.narrow.get(node).copied();
            for (slot, subnets) in &peer.leases {
                subnets.iter().filter(|subnet| underlay.carries(*subnet)).for_each(|subnet| {
                    // IPv6 knows no smaller one: a packet of this size has to be carried.
                    let mtu = narrow.filter(|mtu| subnet.addr().is_ipv4() || *mtu >= IPV6_MTU_MIN);
                    let way = underlay.way(peer.vtep.underlay, subnet);
                    let hop = Hop { mtu, ..Hop::new(way, metric(*slot)) };
                    tables.add(&peer.vtep, subnet, hop, withdrawn);
                });
            }
        }
        let own = || view.own.subnets.iter().filter(|subnet| underlay.carries(*subnet));
        tables.routes.extend(own().map(|subnet| (subnet, Hop::REFUSE)));
        let device = Device {
            name: device_name(view.settings.vni),
            vni: view.settings.vni,
            port: view.settings.vxlan_port,
            mac: view.own.vtep.mac,
            mtu: underlay.tunnel_mtu,
            alias: device_alias(&view.settings.pool),
            local: underlay.local,
            link: if underlay.pinned { underlay.link } else { 0 },
            addresses: own().map(|subnet| subnet.network()).collect(),
            checksum_offload: None,
        };
        Self {
            device,
            tables,
            pool: view.settings.pool,
            unconfirmed: unconfirmed_without_peers(view),
        }
    }

    /// Underlay addresses of the hosts to which packets go, with a tunnel or without.
    pub fn underlays(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let gateway = |hop: &Hop| match hop.way {
            Way::Direct { gateway, .. } => Some(gateway),
            Way::Overlay(_) | Way::Device | Way::Unreachable => None,
        };
        self.tables.fdb.values().copied().chain(self.tables.routes.values().filter_map(gateway))
    }

    /// Whether any packets leave without a tunnel, by the interface with this index.
    pub fn has_direct_by(&self, index: u32) -> bool {
        let by = |hop: &Hop| matches!(hop.way, Way::Direct { link, .. } if link == index);
        self.tables.routes.values().any(by)
    }

    /// Whether an entry about this address is to stay although it is not wanted: its slot is in nobody's
    /// name, and who could know of it was not heard.
    pub fn stays(&self, address: IpAddr) -> bool {
        let slot = self.pool.slot_of(address);
        slot.is_some_and(|slot| self.unconfirmed.iter().any(|slots| slots.contains(&slot.0)))
    }
}

impl Tables {
    /// Adds the entries of one subnet of a peer.
    fn add(&mut self, peer: &Vtep, subnet: IpNet, hop: Hop, withdrawn: bool) {
        let vtep = subnet.network();
        let through_the_tunnel = matches!(hop.way, Way::Overlay(_));
        if through_the_tunnel {
            self.fdb.insert(peer.mac, peer.underlay);
            self.neighbours.insert(vtep, peer.mac);
        }
        if vtep.is_ipv6() && through_the_tunnel {
            // Even with `onlink` IPv6 wants to find the gateway over the device by which it is to be reached.
            self.routes.insert(vtep.into(), Hop::new(Way::Device, hop.metric));
        } else if withdrawn {
            self.routes.insert(vtep.into(), Hop { mtu: None, ..hop });
        }
        if withdrawn {
            self.routes.insert(subnet, Hop::new(Way::Unreachable, hop.metric));
        } else {
            self.routes.insert(subnet, hop);
        }
    }
}

/// Of the slots about which nobody was heard, those that no peer is known to have leased.
fn unconfirmed_without_peers(view: &View) -> Vec<Range<u32>> {
    let leases = view.peers.values().flat_map(|peer| &peer.leases);
    let leased: BTreeSet<u32> = leases.map(|(slot, _)| slot.0).collect();
    let mut rest = Vec::new();
    for range in &view.unconfirmed {
        let mut from = range.start;
        for slot in leased.range(range.clone()) {
            rest.push(from..*slot);
            from = slot + 1;
        }
        rest.push(from..range.end);
    }
    rest.retain(|range| !range.is_empty());
    rest
}

/// `gossamer.<VNI>`, shortened where that would exceed the kernel's 15 characters.
pub fn device_name(vni: u32) -> String {
    let name = format!("gossamer.{vni}");
    if name.len() <= 15 { name } else { format!("gossam.{vni}") }
}

/// The networks of an overlay, for `ip link`.
fn device_alias(pool: &Pool) -> String {
    let networks: Vec<String> = pool.networks().iter().map(|network| network.to_string()).collect();
    format!("gossamer {}", networks.join(" "))
}

/// The networks that stand in a device's alias.
pub fn networks_in_alias(alias: &str) -> impl Iterator<Item = IpNet> {
    alias.split_whitespace().filter_map(|word| word.parse().ok())
}

/// Whether a device has the name of one of ours.
pub fn is_device_name(name: &str) -> bool {
    let vni = name.strip_prefix("gossamer.").or(name.strip_prefix("gossam."));
    vni.is_some_and(|vni| vni.parse::<u32>().is_ok())
}

/// How names of tables about pods end.
const PODS_TABLE: &str = "-pods";

/// The table of nftables about the pods of the overlay with this device.
pub fn pods_table_name(device: &str) -> String {
    format!("{device}{PODS_TABLE}")
}

/// Whether a table of nftables has the name of one of ours.
pub fn is_own_table(name: &str) -> bool {
    is_device_name(name.strip_suffix(PODS_TABLE).unwrap_or(name))
}

/// Spreads routes over 255 metrics: the kernel keeps routes of one device, protocol and metric in one
/// hash chain, and 10,000 in one chain take seconds (measured: 1.4 s against 0.04 s).
const fn metric(slot: Slot) -> u32 {
    1 + slot.0 % 255
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::plan::tests::{dual_stack_view, underlay, view};

    #[test]
    fn a_peer_is_three_entries_as_flannel_writes_them() {
        let view = view(&[(1, 9), (2, 7)]);
        let desired = Desired::new(&view, &underlay(), &BTreeSet::new());
        let peer = view.peers.values().next().expect("one peer");
        let gateway: IpAddr = "10.42.7.0".parse().expect("address");
        assert_eq!(desired.tables.fdb[&peer.vtep.mac], peer.vtep.underlay);
        assert_eq!(desired.tables.neighbours[&gateway], peer.vtep.mac);
        let subnet = "10.42.7.0/24".parse().expect("subnet");
        assert_eq!(desired.tables.routes[&subnet], Hop::new(Way::Overlay(gateway), 8));
        assert_eq!(desired.device.addresses, BTreeSet::from([[10, 42, 9, 0].into()]));
        assert_eq!(desired.device.mac, view.own.vtep.mac);
        let subnet_of_own = "10.42.9.0/24".parse().expect("subnet");
        assert_eq!(desired.tables.routes[&subnet_of_own], Hop::REFUSE, "worse than any bridge's");
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
    fn a_dual_stack_peer_has_one_tunnel_and_both_families_through_it() {
        let view = dual_stack_view(&[(1, 9), (2, 7)]);
        let desired = Desired::new(&view, &underlay(), &BTreeSet::new());
        let Tables { fdb, neighbours, routes } = &desired.tables;
        // The third route leads to the IPv6 gateway itself, the others refuse what is for this node.
        assert_eq!((fdb.len(), neighbours.len(), routes.len()), (1, 2, 5));
        let vtep: IpAddr = "fd42:0:0:7::".parse().expect("address");
        let subnet = "fd42:0:0:7::/64".parse().expect("subnet");
        assert_eq!(routes[&subnet].way, Way::Overlay(vtep));
        assert_eq!(Some(&neighbours[&vtep]), fdb.keys().next());
        assert_eq!(desired.device.addresses.len(), 2);
    }

    #[test]
    fn peers_on_the_underlay_network_are_routed_to_directly_and_others_by_tunnel_or_not_at_all() {
        let mut view = dual_stack_view(&[(1, 9), (2, 7), (3, 8)]);
        let far = view.peers.values_mut().find(|peer| peer.leases[0].0 == Slot(8));
        far.expect("there is one").vtep.underlay = [198, 51, 100, 3].into();
        let ways = |mode| {
            let desired = Desired::new(&view, &Underlay { mode, ..underlay() }, &BTreeSet::new());
            let way = |subnet: &str| desired.tables.routes[&subnet.parse().expect("subnet")].way;
            let ways = ["10.42.7.0/24", "10.42.8.0/24", "fd42:0:0:7::/64"].map(way);
            (ways, desired.tables.fdb.len())
        };
        let near = Way::Direct { gateway: [192, 0, 2, 2].into(), link: 2 };
        let tunnel = Way::Overlay([10, 42, 8, 0].into());
        let tunnel6 = Way::Overlay("fd42:0:0:7::".parse().expect("address"));
        // An IPv4 gateway is none for IPv6.
        assert_eq!(ways(Mode::Direct), ([near, tunnel, tunnel6], 2));
        assert_eq!(ways(Mode::HostGw), ([near, Way::Unreachable, Way::Unreachable], 0));
    }

    #[test]
    fn an_underlay_that_is_too_small_for_ipv6_carries_ipv4_alone() {
        let view = dual_stack_view(&[(1, 9), (2, 7)]);
        let narrow = Underlay { tunnel_mtu: IPV6_MTU_MIN - 1, ..underlay() };
        let desired = Desired::new(&view, &narrow, &BTreeSet::new());
        let Tables { fdb, neighbours, routes } = &desired.tables;
        assert_eq!((fdb.len(), neighbours.len(), routes.len()), (1, 1, 2), "one of them refuses");
        assert!(desired.device.addresses.iter().all(IpAddr::is_ipv4));
    }

    #[test]
    fn path_narrower_than_the_device_limits_the_routes_of_that_peer_alone() {
        let view = dual_stack_view(&[(1, 9), (2, 7), (3, 8)]);
        let node = NodeId::of_public_key(&[2; 32]);
        let mtus = |mtu| {
            let underlay = Underlay { narrow: [(node, mtu)].into(), ..underlay() };
            let desired = Desired::new(&view, &underlay, &BTreeSet::new());
            let mtu = |subnet: &str| desired.tables.routes[&subnet.parse().expect("subnet")].mtu;
            ["10.42.7.0/24", "fd42:0:0:7::/64", "10.42.8.0/24"].map(mtu)
        };
        assert_eq!(mtus(1_350), [Some(1_350), Some(1_350), None]);
        assert_eq!(mtus(1_279), [Some(1_279), None, None], "IPv6 has no MTU below 1280");
    }

    #[test]
    fn what_a_peer_is_known_to_have_leased_is_not_in_doubt() {
        let mut view = view(&[(1, 9), (2, 7), (3, 8)]);
        view.unconfirmed = vec![0..9, 20..31];
        let desired = Desired::new(&view, &underlay(), &BTreeSet::new());
        assert_eq!(desired.unconfirmed, [0..7, 20..31]);
        assert!(desired.stays([10, 42, 6, 9].into()) && !desired.stays([10, 42, 7, 0].into()));
    }

    #[test]
    fn device_names_fit_the_kernel() {
        for vni in [1, 999_999, 1_000_000, 16_777_215] {
            let name = device_name(vni);
            assert!(name.len() <= 15 && name.ends_with(&vni.to_string()), "{name}");
        }
    }
}
