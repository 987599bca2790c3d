//! Computes the difference between actual and desired state as operations in a safe order.
//!
//! Four rules:
//!
//! - Correct entries are not touched.
//! - All additions come before all removals.
//! - For one peer, an entry is added before the entry that refers to it (FDB, neighbor, route), and removed
//!   after it.
//! - Entries of other programs are never overwritten.
//!
//! So after every prefix of a plan, each peer that worked before and is still wanted works.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::desired::{Desired, Device, Hop, RouteTarget, Tables};
pub use super::op::{DeviceOp, EntryOp, Op, Plan};
use crate::model::{Mac, Slot};

/// The gossamer entries found by a dump. The kernel allows several FDB entries of one MAC and several routes
/// to one subnet, hence the sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The device with gossamer's name, if it exists and is a VXLAN device.
    pub device: Option<Found>,
    /// FDB entries: MAC and underlay address.
    pub fdb: BTreeSet<(Mac, IpAddr)>,
    /// Neighbor entries: overlay address -> MAC.
    pub neighbors: BTreeMap<IpAddr, Mac>,
    /// Routes: destination and hop.
    pub routes: BTreeSet<(IpNet, Hop)>,
}

/// The actual VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The interface is up, and no program keeps it without a carrier.
    pub up: bool,
    /// The device is a port of a bridge or bond, so decapsulated packets do not reach this host's IP stack.
    pub is_port: bool,
    /// Its attributes, as far as gossamer sets them.
    pub device: Device,
    /// MAC learning is on, or another attribute that cannot be changed on an existing device is wrong.
    pub foreign: bool,
    /// All its addresses with their prefix lengths, except link-local ones.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Those of its addresses whose route in the table `local` is missing.
    pub unreceived: BTreeSet<IpAddr>,
}

/// Returns the operations that turn `actual` into `desired`; empty if they are equal.
pub fn plan(desired: &Desired, actual: &Actual) -> Plan {
    let mut plan = Plan::default();
    let mut actual = actual.clone();
    let is_kept = plan_device(&desired.device, actual.device.as_ref(), &mut plan.device);
    if !is_kept {
        // A re-created device has lost all entries on it, including routes.
        let elsewhere = |(_, hop): &(IpNet, Hop)| {
            !matches!(hop.way, RouteTarget::Overlay(_) | RouteTarget::Device)
        };
        let routes = actual.routes.into_iter().filter(elsewhere).collect();
        actual = Actual { routes, ..Actual::default() };
    }
    if plan.device.iter().any(|op| matches!(op, DeviceOp::SetMac(_))) {
        // The kernel drops the neighbor entries of a device whose MAC changes.
        actual.neighbors.clear();
    }
    plan_entries(desired, &actual, &mut plan);
    plan
}

/// Returns the operations on entries that turn the tables of `before`, which the kernel equals, into those of
/// `desired`. Both describe the same device and pool.
pub fn plan_change(before: &Desired, desired: &Desired) -> Plan {
    let Tables { fdb, neighbors, routes } = before.tables.clone();
    let (fdb, routes) = (fdb.into_iter().collect(), routes.into_iter().collect());
    let actual = Actual { device: None, fdb, neighbors, routes };
    let mut plan = Plan::default();
    plan_entries(desired, &actual, &mut plan);
    plan
}

fn plan_entries(desired: &Desired, actual: &Actual, plan: &mut Plan) {
    plan_additions(&desired.tables, actual, &mut plan.entries);
    plan.retained = plan_removals(desired, actual, &mut plan.entries);
}

/// Plans the changes to the device. Returns whether the existing device is kept.
fn plan_device(wanted: &Device, found: Option<&Found>, ops: &mut Vec<DeviceOp>) -> bool {
    let Some(found) = found else {
        create_device(wanted, ops);
        return false;
    };
    let is = &found.device;
    let fixed = |device: &Device| (device.vni, device.port, device.local, device.link);
    if found.foreign || fixed(is) != fixed(wanted) {
        ops.push(DeviceOp::DeleteDevice);
        create_device(wanted, ops);
        return false;
    }
    if is.mac != wanted.mac {
        ops.push(DeviceOp::SetMac(wanted.mac));
    }
    if is.mtu != wanted.mtu {
        ops.push(DeviceOp::SetMtu(wanted.mtu));
    }
    if is.alias != wanted.alias {
        ops.push(DeviceOp::SetAlias(wanted.alias.clone()));
    }
    if is.checksum_offload != wanted.checksum_offload {
        ops.extend(wanted.checksum_offload.map(DeviceOp::SetChecksumOffload));
    }
    if found.is_port {
        ops.push(DeviceOp::Release);
    }
    if !found.up {
        ops.push(DeviceOp::SetUp);
    }
    let there = |wanted: &&IpAddr| found.addresses.contains(&(**wanted, full_len(**wanted)));
    let missing = wanted.addresses.iter().filter(|address| !there(address));
    ops.extend(missing.map(|address| DeviceOp::AddAddress(*address)));
    let present = wanted.addresses.iter().filter(there);
    let unreceived = present.filter(|address| found.unreceived.contains(address));
    ops.extend(unreceived.map(|address| DeviceOp::AddLocalRoute(*address)));
    let ours = |(ip, len): &(IpAddr, u8)| wanted.addresses.contains(ip) && *len == full_len(*ip);
    let others = found.addresses.iter().filter(|address| !ours(address));
    ops.extend(others.map(|(address, len)| DeviceOp::RemoveAddress(*address, *len)));
    true
}

fn create_device(wanted: &Device, ops: &mut Vec<DeviceOp>) {
    let alias = DeviceOp::SetAlias(wanted.alias.clone());
    ops.extend([DeviceOp::CreateDevice(Box::new(wanted.clone())), alias]);
    ops.extend(wanted.checksum_offload.map(DeviceOp::SetChecksumOffload));
    ops.push(DeviceOp::SetUp);
    ops.extend(wanted.addresses.iter().map(|address| DeviceOp::AddAddress(*address)));
}

/// Returns the prefix length of a single address: 32 or 128.
pub const fn full_len(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn plan_additions(wanted: &Tables, is: &Actual, ops: &mut Vec<EntryOp>) {
    for (mac, underlay) in &wanted.fdb {
        if !is.fdb.contains(&(*mac, *underlay)) {
            ops.push(EntryOp::SetFdb(*mac, *underlay));
        }
    }
    for (address, mac) in &wanted.neighbors {
        if is.neighbors.get(address) != Some(mac) {
            ops.push(EntryOp::SetNeighbor(*address, *mac));
        }
    }
    // More specific routes first: the route to a gateway precedes routes over it.
    let mut routes: Vec<_> = wanted.routes.iter().collect();
    routes.sort_by_key(|(subnet, _)| Reverse(subnet.prefix_len()));
    let metrics: BTreeSet<_> =
        is.routes.iter().map(|(subnet, hop)| (*subnet, hop.metric)).collect();
    for (subnet, hop) in routes {
        if is.routes.contains(&(*subnet, *hop)) {
            continue;
        }
        ops.push(match metrics.contains(&(*subnet, hop.metric)) {
            true => EntryOp::ReplaceRoute(*subnet, *hop),
            false => EntryOp::AddRoute(*subnet, *hop),
        });
    }
}

/// Plans the removal of entries that are not desired. Returns the slots of those that stay.
fn plan_removals(desired: &Desired, is: &Actual, ops: &mut Vec<EntryOp>) -> BTreeSet<Slot> {
    let mut retained = BTreeSet::new();
    let wanted = &desired.tables;
    let mut routes: Vec<_> = is.routes.iter().collect();
    routes.sort_by_key(|(subnet, _)| subnet.prefix_len());
    for (subnet, hop) in routes {
        // An old route with the metric of the wanted one has been replaced by it.
        if wanted.routes.get(subnet).is_some_and(|new| new.metric == hop.metric) {
            continue;
        }
        if desired.is_retained(subnet.network()) && *hop != Hop::REFUSE {
            retained.extend(desired.pool.slot_of(subnet.network()));
        } else {
            ops.push(EntryOp::RemoveRoute(*subnet, *hop));
        }
    }
    let unwanted = |address: &IpAddr| !wanted.neighbors.contains_key(address);
    let (stay, gone): (Vec<_>, Vec<_>) = is
        .neighbors
        .iter()
        .filter(|(address, _)| unwanted(address))
        .partition(|(address, _)| desired.is_retained(**address));
    ops.extend(gone.into_iter().map(|(address, _)| EntryOp::RemoveNeighbor(*address)));
    // For a wanted MAC, `SetFdb` replaced the first wrong entry; removing it again is no error.
    let gone = is.fdb.iter().filter(|(mac, underlay)| match wanted.fdb.get(mac) {
        Some(wanted) => wanted != underlay,
        None => !stay.iter().any(|(_, is_retained)| *is_retained == mac),
    });
    ops.extend(gone.map(|(mac, underlay)| EntryOp::RemoveFdb(*mac, *underlay)));
    retained.extend(stay.iter().filter_map(|(address, _)| desired.pool.slot_of(**address)));
    retained
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::{
        super::{desired::Underlay, fake::FakeKernel},
        *,
    };
    use crate::model::{ClusterSettings, NodeId, Own, Peer, Pool, PoolSpec, Slot, View, Vtep};

    /// Builds a view from (node, slot) pairs; the first is this node.
    pub fn view(members: &[(u8, u32)]) -> View {
        view_in(PoolSpec::of("10.42.0.0/16".parse().expect("network")), members)
    }

    pub fn dual_stack_view(members: &[(u8, u32)]) -> View {
        let ipv4 = PoolSpec::of("10.42.0.0/16".parse().expect("network"));
        view_in(PoolSpec { network6: "fd42::/48".parse().ok(), ..ipv4 }, members)
    }

    fn view_in(spec: PoolSpec, members: &[(u8, u32)]) -> View {
        let pool = Pool::new(&spec).expect("pool");
        let vtep = |seed: u8| Vtep {
            mac: Mac::of_node(NodeId::of_public_key(&[seed; 32])),
            underlay: [192, 0, 2, seed].into(),
        };
        let (own, peers) = members.split_first().expect("at least this node");
        let peers = peers.iter().map(|&(seed, slot)| {
            let slot = Slot(slot);
            let peer = Peer { vtep: vtep(seed), leases: vec![(slot, pool.subnets(slot))] };
            (NodeId::of_public_key(&[seed; 32]), peer)
        });
        View {
            settings: ClusterSettings { pool, vni: 1, vxlan_port: 8472 },
            own: Own { subnets: pool.subnets(Slot(own.1)), vtep: vtep(own.0) },
            peers: peers.collect(),
            unconfirmed: Vec::new(),
        }
    }

    pub fn underlay() -> Underlay {
        let networks = vec!["192.0.2.0/24".parse().expect("network")];
        Underlay { networks, ..Underlay::of_tunnels(2, [192, 0, 2, 1].into(), 1450) }
    }

    fn desired(members: &[(u8, u32)]) -> Desired {
        Desired::new(&view(members), &underlay(), &BTreeSet::new())
    }

    #[test]
    fn only_peer_with_unusable_underlay_address_is_unreachable() {
        for address in ["2001:db8::7", "192.0.2.1", "192.0.2.255"] {
            let mut view = view(&[(1, 9), (2, 7), (3, 8)]);
            let peer = NodeId::of_public_key(&[2; 32]);
            let peer = view.peers.get_mut(&peer).expect("a peer");
            peer.vtep.underlay = address.parse().expect("an address");
            let tables = Desired::new(&view, &underlay(), &BTreeSet::new()).tables;
            let way = |subnet: &str| tables.routes[&subnet.parse().expect("a subnet")].way;
            assert_eq!(way("10.42.7.0/24"), RouteTarget::Unreachable, "{address}");
            assert!(matches!(way("10.42.8.0/24"), RouteTarget::Overlay(_)), "{address}");
            assert_eq!(tables.fdb.len(), 1, "{address}");
        }
    }

    /// Guards against a search through all existing routes for each changed one.
    #[test]
    fn plan_for_many_changed_routes_takes_linear_time() {
        let mut wanted = desired(&[(1, 9)]);
        let mut actual = Actual::default();
        for number in 0..60_000_u32 {
            let address = std::net::Ipv4Addr::from(0x0b00_0000 + (number << 8));
            let subnet = IpNet::new(address.into(), 24).expect("a subnet");
            wanted.tables.routes.insert(subnet, Hop::new(RouteTarget::Overlay(address.into()), 8));
            actual.routes.insert((subnet, Hop::new(RouteTarget::Unreachable, 8)));
        }
        let ops = plan(&wanted, &actual).entries;
        let replaced = ops.iter().filter(|op| matches!(op, EntryOp::ReplaceRoute(..)));
        assert_eq!(replaced.count(), 60_000);
    }

    #[test]
    fn empty_kernel_gets_device_first_then_fdb_neighbor_and_route() {
        let Plan { device, entries, .. } = plan(&desired(&[(1, 9), (2, 7)]), &Actual::default());
        let texts = device.iter().map(|op| format!("{op:?}"));
        let texts = texts.chain(entries.iter().map(|op| format!("{op:?}")));
        let kinds: Vec<String> = texts
            .map(|text| text.split(['(', '{', ' ']).next().expect("name").to_owned())
            .collect();
        assert_eq!(
            kinds,
            [
                "CreateDevice",
                "SetAlias",
                "SetUp",
                "AddAddress",
                "SetFdb",
                "SetNeighbor",
                "AddRoute",
                "AddRoute"
            ]
        );
    }

    #[test]
    fn entries_of_unconfirmed_slots_are_not_removed() {
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7), (3, 8)]));
        let unconfirmed = Desired { unconfirmed: vec![8..9, 50..60], ..desired(&[(1, 9), (2, 7)]) };
        let retained = BTreeSet::from([Slot(8)]);
        assert_eq!(
            plan(&unconfirmed, &kernel.dump()),
            Plan { retained, ..Plan::default() },
            "the owner of slot 8 decides whether its entries stay"
        );
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        assert_eq!(kernel.routes.len(), 2, "one of the peer, one of this node");
    }

    #[test]
    fn peer_is_withdrawn_and_restored_by_replacing_its_route() {
        let view = view(&[(1, 9), (2, 7)]);
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        let withdrawn = Desired::new(&view, &underlay(), &view.peers.keys().copied().collect());
        let subnet: IpNet = "10.42.7.0/24".parse().expect("subnet");
        let replaced = |plan: &Plan| {
            plan.entries
                .iter()
                .any(|op| matches!(op, EntryOp::ReplaceRoute(to, _) if *to == subnet))
        };
        assert!(replaced(&plan(&withdrawn, &kernel.dump())));
        kernel.settle(&withdrawn);
        assert_eq!(kernel.forward(subnet), None);
        // A re-created device, while the unreachable route, which is on no device, still exists.
        kernel.apply(&Op::Device(DeviceOp::DeleteDevice)).expect("there is one");
        kernel.settle(&withdrawn);
        assert!(kernel.holds(&withdrawn.tables));
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        assert!(kernel.holds(&desired(&[(1, 9), (2, 7)]).tables));
    }

    #[test]
    fn device_with_wrong_fixed_attributes_is_re_created_with_all_entries() {
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        let mut moved = desired(&[(1, 9), (2, 7)]);
        moved.device.local = [192, 0, 2, 99].into();
        let ops = plan(&moved, &kernel.dump()).device;
        assert!(matches!(ops[..2], [DeviceOp::DeleteDevice, DeviceOp::CreateDevice(_)]));
        kernel.settle(&moved);
        assert_eq!(plan(&moved, &kernel.dump()), Plan::default());
        assert!(kernel.forward("10.42.7.0/24".parse().expect("subnet")).is_some());
    }

    #[test]
    fn foreign_addresses_and_changed_attributes_are_repaired_in_place() {
        let wanted = desired(&[(1, 9), (2, 7)]);
        let mut kernel = FakeKernel::default();
        kernel.settle(&wanted);
        let found = kernel.device.as_mut().expect("the device exists");
        found.device.mtu = 1400;
        found.device.mac = Mac::from_bytes([2; 6]);
        found.addresses.push(([169, 254, 1, 1].into(), 16));
        kernel.settle(&wanted);
        assert_eq!(plan(&wanted, &kernel.dump()), Plan::default());
        assert!(
            kernel.holds(&wanted.tables),
            "the neighbor entries dropped with the old MAC are restored"
        );
    }

    #[test]
    fn duplicates_of_wanted_entry_are_removed_and_wanted_entry_stays() {
        let wanted = desired(&[(1, 9), (2, 7)]);
        let mut kernel = FakeKernel::default();
        kernel.settle(&wanted);
        let (subnet, hop) = wanted.tables.routes.first_key_value().expect("one route");
        let (mac, _) = wanted.tables.fdb.first_key_value().expect("one entry");
        for metric in [hop.metric - 1, hop.metric + 1] {
            kernel.routes.insert((*subnet, metric), Hop { metric, ..*hop });
        }
        for last in [3, 200] {
            kernel.fdb.insert((*mac, [192, 0, 2, last].into()));
        }
        let ops = plan(&wanted, &kernel.dump()).entries;
        assert_eq!(ops.len(), 4, "{ops:?}");
        kernel.settle(&wanted);
        assert!(kernel.holds(&wanted.tables));
    }

    /// Distinct nodes with distinct slots; the first is always node 1.
    fn any_members() -> impl Strategy<Value = Vec<(u8, u32)>> {
        (prop::collection::btree_map(2_u8..12, 1_u32..40, 0..8), 41_u32..44).prop_map(
            |(peers, own)| {
                let mut taken = BTreeSet::new();
                let peers = peers.into_iter().filter(|(_, slot)| taken.insert(*slot));
                [(1, own)].into_iter().chain(peers).collect()
            },
        )
    }

    proptest! {
        #[test]
        fn applied_plan_gives_desired_state_and_next_plan_is_empty(
            before in any_members(), after in any_members(),
        ) {
            let mut kernel = FakeKernel::default();
            kernel.settle(&desired(&before));
            let wanted = desired(&after);
            kernel.settle(&wanted);
            prop_assert!(kernel.holds(&wanted.tables));
            prop_assert_eq!(plan(&wanted, &kernel.dump()), Plan::default());
        }

        #[test]
        fn change_of_an_established_state_gives_the_desired_state(
            before in any_members(), after in any_members(),
        ) {
            let mut kernel = FakeKernel::default();
            let established = desired(&before);
            kernel.settle(&established);
            let wanted = desired(&[&before[..1], &after[1..]].concat());
            for op in plan_change(&established, &wanted).into_ops() {
                kernel.apply(&op).expect("nothing in its way");
            }
            prop_assert!(kernel.holds(&wanted.tables));
            prop_assert_eq!(plan(&wanted, &kernel.dump()), Plan::default());
        }

        #[test]
        fn every_prefix_of_a_plan_keeps_working_peers_reachable(
            before in any_members(), after in any_members(),
        ) {
            let (before, after) = (desired(&before), desired(&after));
            let mut kernel = FakeKernel::default();
            kernel.settle(&before);
            let ends = |tables: &Tables, subnet: &IpNet| {
                let RouteTarget::Overlay(vtep) = tables.routes.get(subnet)?.way else { return None };
                let mac = tables.neighbors.get(&vtep)?;
                tables.fdb.get(mac).copied()
            };
            for op in plan(&after, &kernel.dump()).into_ops() {
                kernel.apply(&op).expect("nothing in its way");
                for subnet in before.tables.routes.keys() {
                    let (old, new) = (ends(&before.tables, subnet), ends(&after.tables, subnet));
                    if new.is_some() {
                        let now = kernel.forward(*subnet).map(|(_, underlay)| underlay);
                        prop_assert!(now.is_some(), "{subnet} is cut off by {op:?}");
                        prop_assert!(now == old || now == new, "{subnet} leads to another host");
                    }
                }
            }
        }
    }
}
