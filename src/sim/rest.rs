//! What must hold once the faults are over: every packet arrives, and all tables agree.
//!
//! Nodes are compared with each other and with the kernels, never asked what is right.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{host::Host, world::World};
use crate::core::{Node, Phase};

/// Says what is still missing; nothing, if the world is at rest and right.
pub fn unsettled(world: &World) -> Option<String> {
    broken(world).or_else(|| {
        let live = world.hosts.iter().filter_map(Host::node);
        let states: BTreeSet<_> = live.map(Node::roots).collect();
        (states.len() > 1).then(|| format!("{} different states", states.len()))
    })
}

/// The same without the members' opinions of each other, which go on changing: the dead go down at their
/// time.
pub fn broken(world: &World) -> Option<String> {
    let live: Vec<&Host> = world.hosts.iter().filter(|host| host.process.is_some()).collect();
    let pool = &world.settings.pool;
    let slots = world.settings.pool.slot_count() as usize;
    let mut subnets: BTreeMap<usize, IpNet> = BTreeMap::new();
    for host in &live {
        let index = host.index;
        let phase = host.node().map(|node| node.status().phase);
        let subnet = host.subnet_in_use(pool);
        match (phase, subnet) {
            (Some(Phase::Member), Some(subnet)) => _ = subnets.insert(index, subnet),
            // More hosts than subnets: some have to wait.
            (Some(Phase::Leaseless), None) if live.len() > slots => {}
            (phase, subnet) => return Some(format!("host {index} is {phase:?} with {subnet:?}")),
        }
    }
    if subnets.len() < live.len().min(slots) {
        return Some(format!("{} of {} hosts have a subnet", subnets.len(), live.len()));
    }
    if let Some((subnet, users)) = world.oracle.shared_subnets().next() {
        return Some(format!("{subnet} is used by hosts {users:?}"));
    }
    non_members(&live)
        .or_else(|| packets_arrive(world, &live, &subnets))
        .or_else(|| every_slot_has_an_owner(world, &live))
}

/// Gossip knows members only.
fn non_members(live: &[&Host]) -> Option<String> {
    live.iter().find_map(|host| {
        let node = host.node()?;
        let non_member = node.opinions().into_keys().find(|id| node.address_of(*id).is_none())?;
        Some(format!("I19: gossip of host {} knows {non_member}, which has no record", host.index))
    })
}

/// Walks route, neighbour and FDB of each host to each other one.
fn packets_arrive(
    world: &World,
    live: &[&Host],
    subnets: &BTreeMap<usize, IpNet>,
) -> Option<String> {
    // A host that is down for now is a member all the same.
    let members = world.hosts.iter().filter(|host| host.power);
    let pool = &world.settings.pool;
    let all_of = |subnet: IpNet| {
        let slot = pool.slot_of(subnet.network());
        slot.into_iter().flat_map(|slot| pool.subnets(slot).iter())
    };
    let known: BTreeSet<_> =
        members.filter_map(|host| host.subnet_in_use(pool)).flat_map(all_of).collect();
    for host in live {
        for (peer, subnet) in subnets.iter().filter(|(peer, _)| **peer != host.index) {
            let end = &world.hosts[*peer];
            let right = end.tunnel_end();
            let wrong = all_of(*subnet).find(|subnet| host.kernel.forward(*subnet) != right);
            if let Some(subnet) = wrong.filter(|_| subnets.contains_key(&host.index)) {
                let (from, hop) = (host.index, host.kernel.forward(subnet));
                return Some(format!("{subnet}: host {from} sends to {hop:?}, not {right:?}"));
            }
        }
        // Into a subnet leads also what leads to its gateway.
        let used = |subnet: &IpNet| known.iter().any(|known| known.contains(subnet));
        let stale = host.kernel.routes.keys().find(|(subnet, _)| !used(subnet));
        if let Some((subnet, _)) = stale {
            return Some(format!("host {} has a route to {subnet}, which nobody uses", host.index));
        }
    }
    None
}

/// No slot is lost: each belongs to a member that is there.
fn every_slot_has_an_owner(world: &World, live: &[&Host]) -> Option<String> {
    let owners: BTreeSet<_> =
        world.hosts.iter().filter(|host| host.power).map(|host| host.key).collect();
    let node = live.first()?.node()?;
    let mut counted = 0;
    for run in node.slots()? {
        counted += run.len;
        if !owners.contains(&run.record.owner) {
            return Some(format!("{:?} belongs to {}, which is gone", run.start, run.record.owner));
        }
    }
    let total = world.settings.pool.slot_count();
    (counted != total).then(|| format!("{counted} of {total} slots have a record"))
}
