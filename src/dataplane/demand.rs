//! Answers the kernel's reports of missing entries.
//!
//! The kernel reports two kinds of misses: no MAC is known for an address (`RTM_GETNEIGH` with an address,
//! sent because of `app_solicit`), and no tunnel endpoint for a MAC (the same with a MAC, sent because of
//! `l2miss`). If all peers are programmed, a miss means that an entry was deleted.
//!
//! With `program = "on-demand"`, a peer gets its entries only after a miss: one route catches the packets for
//! the whole pool, the first packet to a peer causes a miss, and a peer that has been idle for long loses its
//! entries again. The kernel's state then grows with the peers in use, not with the cluster.
//!
//! Pure. The view decides who is a peer, and only reported misses are answered.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, RouteTarget},
    plan::EntryOp,
};
use crate::model::{Mac, Slot};

/// Metric of the route for the whole pool: worse than that of any peer's own route.
const POOL_METRIC: u32 = 1_000;

/// A missing entry, as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// No neighbor entry for this address on the VXLAN device.
    Address(IpAddr),
    /// No FDB entry for this MAC on the VXLAN device.
    Tunnel(Mac),
}

/// Which peers get entries in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// All peers, always.
    #[default]
    All,
    /// A peer from the first packet to it until it is idle.
    OnDemand,
}

/// The peers in use, and counts of misses.
#[derive(Debug, Default)]
pub struct Demand {
    program: Program,
    in_use: BTreeSet<Mac>,
    /// Number of misses answered from the view.
    pub answered: u64,
    /// Number of misses for addresses and MACs of no peer.
    pub unknown: u64,
}

impl Demand {
    /// Creates an empty set of peers in use.
    pub fn new(program: Program) -> Self {
        Self { program, ..Self::default() }
    }

    /// Returns the MACs of the peers in use; `None` if all peers are programmed.
    pub fn in_use(&self) -> Option<&BTreeSet<Mac>> {
        (self.program == Program::OnDemand).then_some(&self.in_use)
    }

    /// Returns the part of `all` that the kernel must hold now.
    pub fn select(&self, all: &Desired) -> Desired {
        let mut part = all.clone();
        if self.program == Program::All {
            return part;
        }
        let tables = &mut part.tables;
        tables.fdb.retain(|mac, _| self.in_use.contains(mac));
        tables.neighbors.retain(|_, mac| self.in_use.contains(mac));
        let used = |address: IpAddr| tables.neighbors.contains_key(&address);
        tables.routes.retain(|subnet, hop| used(subnet.network()) || *hop == Hop::REFUSE);
        let whole = Hop::new(RouteTarget::Device, POOL_METRIC);
        tables.routes.extend(all.pool.networks().iter().map(|network| (network, whole)));
        part
    }

    /// Marks peers whose entries are already in the kernel as in use, so that a restart of the agent
    /// interrupts no traffic.
    pub fn adopt(&mut self, present: impl Iterator<Item = Mac>) {
        self.in_use.extend(present);
    }

    /// Returns the operations that answer a miss; empty if it concerns no peer.
    pub fn answer(&mut self, all: &Desired, miss: Miss) -> Vec<EntryOp> {
        let ops = match miss {
            Miss::Tunnel(mac) => all.tables.fdb.get(&mac).map(|underlay| {
                self.mark_in_use(mac);
                vec![EntryOp::SetFdb(mac, *underlay)]
            }),
            Miss::Address(address) => self.entries_for(all, address),
        };
        match ops {
            Some(_) => self.answered += 1,
            None => self.unknown += 1,
        }
        ops.unwrap_or_default()
    }

    /// Marks peers as idle, so that their entries are removed.
    pub fn remove_idle(&mut self, idle: impl Iterator<Item = Mac>) {
        idle.for_each(|mac| _ = self.in_use.remove(&mac));
    }

    /// Drops peers that are no longer in the view.
    pub fn keep_peers(&mut self, all: &Desired) {
        self.in_use.retain(|mac| all.tables.fdb.contains_key(mac));
    }

    fn mark_in_use(&mut self, mac: Mac) {
        if self.program == Program::OnDemand {
            self.in_use.insert(mac);
        }
    }

    /// Returns all entries of the peer that owns `address`, and a temporary neighbor entry that releases the
    /// waiting packet.
    fn entries_for(&mut self, all: &Desired, address: IpAddr) -> Option<Vec<EntryOp>> {
        let tables = &all.tables;
        let slot: Slot = all.pool.slot_of(address)?;
        let mut ops = Vec::new();
        let mut answer = None;
        for subnet in all.pool.subnets(slot).iter() {
            let vtep = subnet.network();
            let (Some(mac), Some(hop)) = (tables.neighbors.get(&vtep), tables.routes.get(&subnet))
            else {
                continue;
            };
            let underlay = tables.fdb.get(mac)?;
            ops.extend([EntryOp::SetFdb(*mac, *underlay), EntryOp::SetNeighbor(vtep, *mac)]);
            if self.program == Program::OnDemand {
                let to_gateway = tables.routes.get_key_value(&IpNet::from(vtep));
                let routes = to_gateway.into_iter().chain([(&subnet, hop)]);
                ops.extend(routes.map(|(to, hop)| EntryOp::AddRoute(*to, *hop)));
            }
            self.mark_in_use(*mac);
            if subnet.contains(&address) && vtep != address && hop.way == RouteTarget::Overlay(vtep)
            {
                answer = Some(EntryOp::Resolve(address, *mac));
            }
        }
        ops.extend(answer);
        (!ops.is_empty()).then_some(ops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{
        desired::Tables,
        fake::FakeKernel,
        plan::{
            Op, Plan, plan,
            tests::{underlay, view},
        },
    };

    fn all() -> Desired {
        let peers: Vec<(u8, u32)> = (1..=40).map(|n| (n, u32::from(n) + 6)).collect();
        Desired::new(&view(&peers), &underlay(), &BTreeSet::new())
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn miss_with_all_peers_programmed_restores_the_deleted_entry() {
        let (all, mut demand) = (all(), Demand::new(Program::All));
        assert_eq!(demand.select(&all), all);
        let vtep = address("10.42.8.0");
        let mac = all.tables.neighbors[&vtep];
        let fdb = EntryOp::SetFdb(mac, all.tables.fdb[&mac]);
        assert_eq!(demand.answer(&all, Miss::Tunnel(mac)), std::slice::from_ref(&fdb));
        let both = [fdb, EntryOp::SetNeighbor(vtep, mac)];
        assert_eq!(demand.answer(&all, Miss::Address(vtep)), both);
        let unknown =
            [Miss::Address(address("10.42.200.5")), Miss::Tunnel(Mac::from_bytes([2; 6]))];
        assert!(unknown.iter().all(|miss| demand.answer(&all, *miss).is_empty()));
        assert_eq!((demand.answered, demand.unknown), (2, 2));
    }

    #[test]
    fn on_demand_kernel_holds_peers_in_use_and_one_route_for_the_pool() {
        let (all, mut demand) = (all(), Demand::new(Program::OnDemand));
        let mut kernel = FakeKernel::default();
        kernel.settle(&demand.select(&all));
        assert_eq!(
            (kernel.routes.len(), kernel.fdb.len()),
            (2, 0),
            "the pool's and this node's subnet's"
        );
        let pod = address("10.42.8.17");
        for op in demand.answer(&all, Miss::Address(pod)) {
            kernel.apply(&Op::Entry(op)).expect("possible");
        }
        assert!(kernel.neighbors.contains_key(&pod), "the waiting packet is released");
        assert!(kernel.forward("10.42.8.0/24".parse().expect("subnet")).is_some());
        // Later packets use the peer's own entries.
        kernel.apply(&Op::Entry(EntryOp::RemoveNeighbor(pod))).expect("possible");
        assert_eq!(
            plan(&demand.select(&all), &kernel.dump()),
            Plan::default(),
            "no further operation"
        );

        // A new process adopts the peer and removes it only when it is idle.
        demand = Demand::new(Program::OnDemand);
        demand.adopt(kernel.dump().fdb.iter().map(|(mac, _)| *mac));
        kernel.settle(&demand.select(&all));
        assert_eq!(kernel.fdb.len(), 1);
        let idle: Vec<Mac> = demand.in_use().expect("on demand").iter().copied().collect();
        demand.remove_idle(idle.into_iter());
        kernel.settle(&demand.select(&all));
        assert_eq!((kernel.routes.len(), kernel.fdb.len(), kernel.neighbors.len()), (2, 0, 0));

        // A miss for the MAC alone: a neighbor entry outlived the peer's other entries.
        let mac = all.tables.neighbors[&address("10.42.8.0")];
        assert_eq!(demand.answer(&all, Miss::Tunnel(mac)).len(), 1);
        assert!(demand.select(&all).tables.fdb.contains_key(&mac), "and keeps it");
        demand.keep_peers(&Desired { tables: Tables::default(), ..all });
        assert_eq!(demand.in_use().map(BTreeSet::len), Some(0));
    }
}
