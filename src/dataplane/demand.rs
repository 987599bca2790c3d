//! Packets for which the kernel misses an entry: what it asks, and what it is told.
//!
//! The kernel reports two kinds of misses: nobody's MAC is known for an address (`RTM_GETNEIGH` with an
//! address, as `app_solicit` makes it), and no tunnel for a MAC (the same with a MAC, as `l2miss` makes it).
//! With all peers programmed a miss means that an entry is gone. With `program = "on-demand"` it is how a
//! peer gets its entries at all: one route catches the packets for the whole pool, the first of them asks
//! for its peer, and a peer to which nothing was sent for long loses its entries again. So the kernel's
//! state grows with the peers in use, and not with the cluster.
//!
//! Pure. Who is a peer is not decided here, and nothing that was not asked for is answered.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{
    desired::{Desired, Hop, Way},
    plan::Op,
};
use crate::model::{Mac, Slot};

/// Metric of the route for the whole pool: worse than any peer's own.
const POOL_METRIC: u32 = 1_000;

/// What the kernel did not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// No neighbour entry for this address on our device.
    Address(IpAddr),
    /// No FDB entry for this MAC.
    Tunnel(Mac),
}

/// How entries get into the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[cfg_attr(feature = "agent", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// Those of all peers, always.
    #[default]
    All,
    /// Those of a peer from the first packet to it on, until it is not used any more.
    OnDemand,
}

/// Which peers are in use, and what was answered.
#[derive(Debug, Default)]
pub struct Demand {
    program: Program,
    in_use: BTreeSet<Mac>,
    /// Misses that were answered from the view.
    pub answered: u64,
    /// Misses about addresses and MACs of nobody.
    pub unknown: u64,
}

impl Demand {
    pub fn new(program: Program) -> Self {
        Self { program, ..Self::default() }
    }

    /// By their MACs; none where all peers are programmed.
    pub fn in_use(&self) -> Option<&BTreeSet<Mac>> {
        (self.program == Program::OnDemand).then_some(&self.in_use)
    }

    /// The part of `all` that is to be in the kernel now.
    pub fn part_of(&self, all: &Desired) -> Desired {
        let mut part = all.clone();
        if self.program == Program::All {
            return part;
        }
        let tables = &mut part.tables;
        tables.fdb.retain(|mac, _| self.in_use.contains(mac));
        tables.neighbours.retain(|_, mac| self.in_use.contains(mac));
        let used = |address: IpAddr| tables.neighbours.contains_key(&address);
        tables.routes.retain(|subnet, hop| used(subnet.network()) || *hop == Hop::REFUSE);
        let whole = Hop::new(Way::Device, POOL_METRIC);
        tables.routes.extend(all.pool.networks().iter().map(|network| (network, whole)));
        part
    }

    /// Peers with entries in the kernel are in use until the opposite is known: a restart cuts nobody off.
    pub fn adopt(&mut self, present: impl Iterator<Item = Mac>) {
        self.in_use.extend(present);
    }

    /// What answers a miss; nothing, if it is about nobody.
    pub fn answer(&mut self, all: &Desired, miss: Miss) -> Vec<Op> {
        let ops = match miss {
            Miss::Tunnel(mac) => all.tables.fdb.get(&mac).map(|underlay| {
                self.use_it(mac);
                vec![Op::SetFdb(mac, *underlay)]
            }),
            Miss::Address(address) => self.introduce(all, address),
        };
        match ops {
            Some(_) => self.answered += 1,
            None => self.unknown += 1,
        }
        ops.unwrap_or_default()
    }

    /// To these MACs nothing was sent for long: their entries are to go.
    pub fn age(&mut self, idle: impl Iterator<Item = Mac>) {
        idle.for_each(|mac| _ = self.in_use.remove(&mac));
    }

    /// Who is no peer any more is not in use.
    pub fn keep_peers(&mut self, all: &Desired) {
        self.in_use.retain(|mac| all.tables.fdb.contains_key(mac));
    }

    fn use_it(&mut self, mac: Mac) {
        if self.program == Program::OnDemand {
            self.in_use.insert(mac);
        }
    }

    /// All entries of the peer that has an address, and an answer for the packet that waits for it.
    fn introduce(&mut self, all: &Desired, address: IpAddr) -> Option<Vec<Op>> {
        let tables = &all.tables;
        let slot: Slot = all.pool.slot_of(address)?;
        let mut ops = Vec::new();
        let mut answer = None;
        for subnet in all.pool.subnets(slot).iter() {
            let vtep = subnet.network();
            let (Some(mac), Some(hop)) = (tables.neighbours.get(&vtep), tables.routes.get(&subnet))
            else {
                continue;
            };
            let underlay = tables.fdb.get(mac)?;
            ops.extend([Op::SetFdb(*mac, *underlay), Op::SetNeighbour(vtep, *mac)]);
            if self.program == Program::OnDemand {
                let to_gateway = tables.routes.get_key_value(&IpNet::from(vtep));
                let routes = to_gateway.into_iter().chain([(&subnet, hop)]);
                ops.extend(routes.map(|(to, hop)| Op::AddRoute(*to, *hop)));
            }
            self.use_it(*mac);
            if subnet.contains(&address) && vtep != address && hop.way == Way::Overlay(vtep) {
                answer = Some(Op::Resolve(address, *mac));
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
            plan,
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
    fn with_all_peers_programmed_a_miss_gets_the_entry_that_is_gone() {
        let (all, mut demand) = (all(), Demand::new(Program::All));
        assert_eq!(demand.part_of(&all), all);
        let vtep = address("10.42.8.0");
        let mac = all.tables.neighbours[&vtep];
        let fdb = Op::SetFdb(mac, all.tables.fdb[&mac]);
        assert_eq!(demand.answer(&all, Miss::Tunnel(mac)), std::slice::from_ref(&fdb));
        let both = [fdb, Op::SetNeighbour(vtep, mac)];
        assert_eq!(demand.answer(&all, Miss::Address(vtep)), both);
        let nobody = [Miss::Address(address("10.42.200.5")), Miss::Tunnel(Mac::from_bytes([2; 6]))];
        assert!(nobody.iter().all(|miss| demand.answer(&all, *miss).is_empty()));
        assert_eq!((demand.answered, demand.unknown), (2, 2));
    }

    #[test]
    fn on_demand_the_kernel_holds_the_peers_in_use_and_a_route_for_all() {
        let (all, mut demand) = (all(), Demand::new(Program::OnDemand));
        let mut kernel = FakeKernel::default();
        kernel.settle(&demand.part_of(&all));
        assert_eq!(
            (kernel.routes.len(), kernel.fdb.len()),
            (2, 0),
            "the pool's and the own subnet's"
        );
        let pod = address("10.42.8.17");
        for op in demand.answer(&all, Miss::Address(pod)) {
            kernel.apply(&op).expect("possible");
        }
        assert!(kernel.neighbours.contains_key(&pod), "the packet that asked can go");
        assert!(kernel.forward("10.42.8.0/24".parse().expect("subnet")).is_some());
        // The next packets go by the peer's own entries.
        kernel.apply(&Op::RemoveNeighbour(pod)).expect("possible");
        assert_eq!(plan(&demand.part_of(&all), &kernel.dump()), [], "nothing else to do");

        // A new process finds it in use, and only silence ends that.
        demand = Demand::new(Program::OnDemand);
        demand.adopt(kernel.dump().fdb.iter().map(|(mac, _)| *mac));
        kernel.settle(&demand.part_of(&all));
        assert_eq!(kernel.fdb.len(), 1);
        let idle: Vec<Mac> = demand.in_use().expect("on demand").iter().copied().collect();
        demand.age(idle.into_iter());
        kernel.settle(&demand.part_of(&all));
        assert_eq!((kernel.routes.len(), kernel.fdb.len(), kernel.neighbours.len()), (2, 0, 0));

        // A neighbour that outlived the peer's other entries asks for the tunnel alone.
        let mac = all.tables.neighbours[&address("10.42.8.0")];
        assert_eq!(demand.answer(&all, Miss::Tunnel(mac)).len(), 1);
        assert!(demand.part_of(&all).tables.fdb.contains_key(&mac), "and keeps it");
        demand.keep_peers(&Desired { tables: Tables::default(), ..all });
        assert_eq!(demand.in_use().map(BTreeSet::len), Some(0));
    }
}
