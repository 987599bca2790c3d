//! The difference between what is and what should be, as operations in a safe order.
//!
//! Four rules: what is right is not touched; everything is added before anything is removed; for one peer
//! an entry is written before the entry that leads to it (FDB, neighbour, route) and removed after it; and
//! what is not ours is never overwritten. So after every prefix of a plan each peer that worked before, and
//! is still wanted, works.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::desired::{Desired, Device, Hop, Tables, Way};
use crate::{
    core::planted::{Mutation, has_mutation},
    model::Mac,
};

/// What a dump found on our account. The kernel allows several FDB entries of one MAC and several routes
/// to one subnet, so these are sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The device of our name, if there is one and it is a VXLAN.
    pub device: Option<Found>,
    pub fdb: BTreeSet<(Mac, IpAddr)>,
    pub neighbours: BTreeMap<IpAddr, Mac>,
    pub routes: BTreeSet<(IpNet, Hop)>,
}

/// Our device as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub up: bool,
    /// It is a port of a bridge or of a bond: what comes out of it does not come to this host then.
    pub is_port: bool,
    pub device: Device,
    /// MAC learning is on, or another attribute that cannot be changed on a live device is wrong.
    pub foreign: bool,
    /// All its addresses with their prefix lengths, but for link-local ones.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// One change to the kernel. All are idempotent: "exists already" and "gone already" are success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    DeleteDevice,
    CreateDevice(Box<Device>),
    SetMac(Mac),
    SetMtu(u32),
    SetAlias(String),
    SetChecksumOffload(bool),
    /// Take it out of the bridge or bond that it is a port of.
    Release,
    SetUp,
    AddAddress(IpAddr),
    RemoveAddress(IpAddr, u8),
    /// Add or replace.
    SetFdb(Mac, IpAddr),
    SetNeighbour(IpAddr, Mac),
    /// A neighbour that is not permanent: it lets a packet go that waits for it.
    Resolve(IpAddr, Mac),
    /// Add, unless another program has a route to the same subnet with the same metric.
    AddRoute(IpNet, Hop),
    /// Replace a route of ours with the same metric.
    ReplaceRoute(IpNet, Hop),
    RemoveRoute(IpNet, Hop),
    RemoveNeighbour(IpAddr),
    RemoveFdb(Mac, IpAddr),
}

impl Op {
    /// What it changes, for counts.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::DeleteDevice | Self::CreateDevice(_) => "device",
            Self::SetMac(_)
            | Self::SetMtu(_)
            | Self::SetAlias(_)
            | Self::SetChecksumOffload(_)
            | Self::Release
            | Self::SetUp => "device attribute",
            Self::AddAddress(_) | Self::RemoveAddress(..) => "address",
            Self::SetFdb(..) | Self::RemoveFdb(..) => "FDB entry",
            Self::SetNeighbour(..) | Self::Resolve(..) | Self::RemoveNeighbour(_) => "neighbour",
            Self::AddRoute(..) | Self::ReplaceRoute(..) | Self::RemoveRoute(..) => "route",
        }
    }
}

/// The operations that turn `actual` into `desired`; none, if they agree.
pub fn plan(desired: &Desired, actual: &Actual) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut actual = actual.clone();
    let kept = plan_device(&desired.device, actual.device.as_ref(), &mut ops);
    if !kept {
        // A device that is re-created has lost all entries on it, routes included.
        let elsewhere = |(_, hop): &(IpNet, Hop)| !matches!(hop.way, Way::Overlay(_) | Way::Device);
        let routes = actual.routes.into_iter().filter(elsewhere).collect();
        actual = Actual { routes, ..Actual::default() };
    }
    if ops.iter().any(|op| matches!(op, Op::SetMac(_))) {
        // The kernel forgets the neighbours of a device whose address changes.
        actual.neighbours.clear();
    }
    if has_mutation(Mutation::RemoveBeforeAdd) {
        ops.extend(actual.routes.iter().map(|(subnet, hop)| Op::RemoveRoute(*subnet, *hop)));
        actual.routes.clear();
    }
    plan_additions(&desired.tables, &actual, &mut ops);
    plan_removals(desired, &actual, &mut ops);
    ops
}

/// Says whether the present device is kept.
fn plan_device(wanted: &Device, found: Option<&Found>, ops: &mut Vec<Op>) -> bool {
    let Some(found) = found else {
        create_device(wanted, ops);
        return false;
    };
    let is = &found.device;
    let fixed = |device: &Device| (device.vni, device.port, device.local, device.link);
    if found.foreign || fixed(is) != fixed(wanted) {
        ops.push(Op::DeleteDevice);
        create_device(wanted, ops);
        return false;
    }
    if is.mac != wanted.mac {
        ops.push(Op::SetMac(wanted.mac));
    }
    if is.mtu != wanted.mtu {
        ops.push(Op::SetMtu(wanted.mtu));
    }
    if is.alias != wanted.alias {
        ops.push(Op::SetAlias(wanted.alias.clone()));
    }
    if is.checksum_offload != wanted.checksum_offload {
        ops.extend(wanted.checksum_offload.map(Op::SetChecksumOffload));
    }
    if found.is_port {
        ops.push(Op::Release);
    }
    if !found.up {
        ops.push(Op::SetUp);
    }
    let there = |wanted: &&IpAddr| found.addresses.contains(&(**wanted, full_len(**wanted)));
    let missing = wanted.addresses.iter().filter(|address| !there(address));
    ops.extend(missing.map(|address| Op::AddAddress(*address)));
    let ours = |(ip, len): &(IpAddr, u8)| wanted.addresses.contains(ip) && *len == full_len(*ip);
    let others = found.addresses.iter().filter(|address| !ours(address));
    ops.extend(others.map(|(address, len)| Op::RemoveAddress(*address, *len)));
    true
}

fn create_device(wanted: &Device, ops: &mut Vec<Op>) {
    let alias = Op::SetAlias(wanted.alias.clone());
    ops.extend([Op::CreateDevice(Box::new(wanted.clone())), alias]);
    ops.extend(wanted.checksum_offload.map(Op::SetChecksumOffload));
    ops.push(Op::SetUp);
    ops.extend(wanted.addresses.iter().map(|address| Op::AddAddress(*address)));
}

/// Prefix length of a single address.
pub const fn full_len(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn plan_additions(wanted: &Tables, is: &Actual, ops: &mut Vec<Op>) {
    for (mac, underlay) in &wanted.fdb {
        if !is.fdb.contains(&(*mac, *underlay)) {
            ops.push(Op::SetFdb(*mac, *underlay));
        }
    }
    for (address, mac) in &wanted.neighbours {
        if is.neighbours.get(address) != Some(mac) {
            ops.push(Op::SetNeighbour(*address, *mac));
        }
    }
    // What leads to a gateway comes before what leads over it.
    let mut routes: Vec<_> = wanted.routes.iter().collect();
    routes.sort_by_key(|(subnet, _)| Reverse(subnet.prefix_len()));
    let metrics: BTreeSet<_> =
        is.routes.iter().map(|(subnet, hop)| (*subnet, hop.metric)).collect();
    for (subnet, hop) in routes {
        if is.routes.contains(&(*subnet, *hop)) {
            continue;
        }
        ops.push(match metrics.contains(&(*subnet, hop.metric)) {
            true => Op::ReplaceRoute(*subnet, *hop),
            false => Op::AddRoute(*subnet, *hop),
        });
    }
}

fn plan_removals(desired: &Desired, is: &Actual, ops: &mut Vec<Op>) {
    let wanted = &desired.tables;
    let mut routes: Vec<_> = is.routes.iter().collect();
    routes.sort_by_key(|(subnet, _)| subnet.prefix_len());
    for (subnet, hop) in routes {
        if desired.stays(subnet.network()) && *hop != Hop::REFUSE {
            continue;
        }
        // One with the metric of the wanted one has been replaced by it.
        if wanted.routes.get(subnet).is_none_or(|new| new.metric != hop.metric) {
            ops.push(Op::RemoveRoute(*subnet, *hop));
        }
    }
    let unwanted = |address: &IpAddr| !wanted.neighbours.contains_key(address);
    let (stay, gone): (Vec<_>, Vec<_>) = is
        .neighbours
        .iter()
        .filter(|(address, _)| unwanted(address))
        .partition(|(address, _)| desired.stays(**address));
    ops.extend(gone.into_iter().map(|(address, _)| Op::RemoveNeighbour(*address)));
    // Of a wanted MAC the first wrong entry has been replaced already; removing it again is no error.
    let gone = is.fdb.iter().filter(|(mac, underlay)| match wanted.fdb.get(mac) {
        Some(wanted) => wanted != underlay,
        None => !stay.iter().any(|(_, stays)| *stays == mac),
    });
    ops.extend(gone.map(|(mac, underlay)| Op::RemoveFdb(*mac, *underlay)));
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::{
        super::{desired::Underlay, fake::FakeKernel},
        *,
    };
    use crate::{
        core::{Own, Peer, View},
        model::{ClusterSettings, NodeId, Pool, PoolSpec, Slot, Vtep},
    };

    /// A view from (node, slot) pairs; the first is this node.
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
    fn peer_to_whose_address_nothing_can_be_sent_is_unreachable_and_the_others_are_not() {
        for address in ["2001:db8::7", "192.0.2.1", "192.0.2.255"] {
            let mut view = view(&[(1, 9), (2, 7), (3, 8)]);
            let peer = NodeId::of_public_key(&[2; 32]);
            let peer = view.peers.get_mut(&peer).expect("a peer");
            peer.vtep.underlay = address.parse().expect("an address");
            let tables = Desired::new(&view, &underlay(), &BTreeSet::new()).tables;
            let way = |subnet: &str| tables.routes[&subnet.parse().expect("a subnet")].way;
            assert_eq!(way("10.42.7.0/24"), Way::Unreachable, "{address}");
            assert!(matches!(way("10.42.8.0/24"), Way::Overlay(_)), "{address}");
            assert_eq!(tables.fdb.len(), 1, "{address}");
        }
    }

    /// Each route that was to be replaced was looked for in all that there are.
    #[test]
    fn plan_for_many_changed_routes_is_one_pass_over_them() {
        let mut wanted = desired(&[(1, 9)]);
        let mut actual = Actual::default();
        for number in 0..60_000_u32 {
            let address = std::net::Ipv4Addr::from(0x0b00_0000 + (number << 8));
            let subnet = IpNet::new(address.into(), 24).expect("a subnet");
            wanted.tables.routes.insert(subnet, Hop::new(Way::Overlay(address.into()), 8));
            actual.routes.insert((subnet, Hop::new(Way::Unreachable, 8)));
        }
        let ops = plan(&wanted, &actual);
        let replaced = ops.iter().filter(|op| matches!(op, Op::ReplaceRoute(..)));
        assert_eq!(replaced.count(), 60_000);
    }

    #[test]
    fn an_empty_kernel_gets_device_first_and_each_peer_from_its_end() {
        let ops = plan(&desired(&[(1, 9), (2, 7)]), &Actual::default());
        let kinds: Vec<String> = ops
            .iter()
            .map(|op| format!("{op:?}").split(['(', '{', ' ']).next().expect("name").to_owned())
            .collect();
        assert_eq!(
            kinds,
            [
                "CreateDevice",
                "SetAlias",
                "SetUp",
                "AddAddress",
                "SetFdb",
                "SetNeighbour",
                "AddRoute",
                "AddRoute"
            ]
        );
    }

    #[test]
    fn nothing_is_removed_of_slots_about_which_nobody_was_heard() {
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7), (3, 8)]));
        let timid = Desired { unconfirmed: vec![8..9, 50..60], ..desired(&[(1, 9), (2, 7)]) };
        assert_eq!(plan(&timid, &kernel.dump()), []);
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        assert_eq!(kernel.routes.len(), 2, "a peer's and this node's own");
    }

    #[test]
    fn a_peer_is_withdrawn_and_restored_by_one_change_of_its_route() {
        let view = view(&[(1, 9), (2, 7)]);
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        let withdrawn = Desired::new(&view, &underlay(), &view.peers.keys().copied().collect());
        let subnet: IpNet = "10.42.7.0/24".parse().expect("subnet");
        let replaced = |ops: &[Op]| {
            ops.iter().any(|op| matches!(op, Op::ReplaceRoute(to, _) if *to == subnet))
        };
        assert!(replaced(&plan(&withdrawn, &kernel.dump())));
        kernel.settle(&withdrawn);
        assert_eq!(kernel.forward(subnet), None);
        // A new device finds the route that is on none.
        kernel.apply(&Op::DeleteDevice).expect("there is one");
        kernel.settle(&withdrawn);
        assert!(kernel.holds(&withdrawn.tables));
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        assert!(kernel.holds(&desired(&[(1, 9), (2, 7)]).tables));
    }

    #[test]
    fn a_device_with_other_fixed_attributes_is_replaced_with_all_its_entries() {
        let mut kernel = FakeKernel::default();
        kernel.settle(&desired(&[(1, 9), (2, 7)]));
        let mut moved = desired(&[(1, 9), (2, 7)]);
        moved.device.local = [192, 0, 2, 99].into();
        let ops = plan(&moved, &kernel.dump());
        assert!(matches!(ops[..2], [Op::DeleteDevice, Op::CreateDevice(_)]));
        kernel.settle(&moved);
        assert_eq!(plan(&moved, &kernel.dump()), []);
        assert!(kernel.forward("10.42.7.0/24".parse().expect("subnet")).is_some());
    }

    #[test]
    fn strange_addresses_and_changed_attributes_are_put_right_in_place() {
        let wanted = desired(&[(1, 9), (2, 7)]);
        let mut kernel = FakeKernel::default();
        kernel.settle(&wanted);
        let found = kernel.device.as_mut().expect("the device exists");
        found.device.mtu = 1400;
        found.device.mac = Mac::from_bytes([2; 6]);
        found.addresses.push(([169, 254, 1, 1].into(), 16));
        kernel.settle(&wanted);
        assert_eq!(plan(&wanted, &kernel.dump()), []);
        assert!(kernel.holds(&wanted.tables), "the neighbours that went with the MAC are back");
    }

    #[test]
    fn doubles_of_a_wanted_entry_go_and_the_wanted_one_stays() {
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
        let ops = plan(&wanted, &kernel.dump());
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
        fn applying_a_plan_gives_the_desired_state_and_then_there_is_nothing_to_do(
            before in any_members(), after in any_members(),
        ) {
            let mut kernel = FakeKernel::default();
            kernel.settle(&desired(&before));
            let wanted = desired(&after);
            kernel.settle(&wanted);
            prop_assert!(kernel.holds(&wanted.tables));
            prop_assert_eq!(plan(&wanted, &kernel.dump()), []);
        }

        #[test]
        fn every_prefix_of_a_plan_keeps_working_peers_working(
            before in any_members(), after in any_members(),
        ) {
            let (before, after) = (desired(&before), desired(&after));
            let mut kernel = FakeKernel::default();
            kernel.settle(&before);
            let ends = |tables: &Tables, subnet: &IpNet| {
                let Way::Overlay(vtep) = tables.routes.get(subnet)?.way else { return None };
                let mac = tables.neighbours.get(&vtep)?;
                tables.fdb.get(mac).copied()
            };
            for op in plan(&after, &kernel.dump()) {
                kernel.apply(&op).expect("nothing in its way");
                for subnet in before.tables.routes.keys() {
                    let (old, new) = (ends(&before.tables, subnet), ends(&after.tables, subnet));
                    if new.is_some() {
                        let now = kernel.forward(*subnet).map(|(_, underlay)| underlay);
                        prop_assert!(now.is_some(), "{subnet} is cut off by {op:?}");
                        prop_assert!(now == old || now == new, "{subnet} leads diverted");
                    }
                }
            }
        }
    }
}
