//! What must hold after the faults: every packet arrives, and all nodes hold the same facts.
//!
//! The checks compare the nodes with each other and with the kernels; they never query a node's own judgment.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{host::Host, world::World};
use crate::core::{Node, Phase};

/// Returns the first deviation from a converged cluster, or `None`.
pub fn find_disagreement(world: &World) -> Option<String> {
    broken(world).or_else(|| {
        let live = world.hosts.iter().filter_map(Host::node);
        let states: BTreeSet<_> = live.map(Node::roots).collect();
        (states.len() > 1).then(|| format!("{} different states", states.len()))
    })
}

/// Returns the first deviation, without comparing the nodes' facts: these continue to change while gossip
/// calls dead members down.
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
            // With more hosts than subnets, some hosts have none.
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
    unknown_gossip_member(&live)
        .or_else(|| undelivered_packet(world, &live, &subnets))
        .or_else(|| unowned_slot(world, &live))
}

/// Checks I19: gossip knows only nodes with a member record.
fn unknown_gossip_member(live: &[&Host]) -> Option<String> {
    live.iter().find_map(|host| {
        let node = host.node()?;
        let non_member = node.opinions().into_keys().find(|id| node.address_of(*id).is_none())?;
        Some(format!("I19: gossip of host {} knows {non_member}, which has no record", host.index))
    })
}

/// Follows route, neighbor and FDB entry from each host to each other one.
fn undelivered_packet(
    world: &World,
    live: &[&Host],
    subnets: &BTreeMap<usize, IpNet>,
) -> Option<String> {
    // A host whose agent does not run is still a member.
    let members = world.hosts.iter().filter(|host| host.is_powered);
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
            let expected = end.tunnel_end();
            let wrong = all_of(*subnet).find(|subnet| host.kernel.forward(*subnet) != expected);
            if let Some(subnet) = wrong.filter(|_| subnets.contains_key(&host.index)) {
                let (from, hop) = (host.index, host.kernel.forward(subnet));
                return Some(format!("{subnet}: host {from} sends to {hop:?}, not {expected:?}"));
            }
        }
        // A route to a peer's gateway alone is inside the peer's subnet.
        let used = |subnet: &IpNet| known.iter().any(|known| known.contains(subnet));
        let stale = host.kernel.routes.keys().find(|(subnet, _)| !used(subnet));
        if let Some((subnet, _)) = stale {
            return Some(format!(
                "host {} has a route to {subnet}, which no host uses",
                host.index
            ));
        }
    }
    None
}

/// Checks that each slot belongs to a powered host.
fn unowned_slot(world: &World, live: &[&Host]) -> Option<String> {
    let owners: BTreeSet<_> =
        world.hosts.iter().filter(|host| host.is_powered).map(|host| host.key).collect();
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
