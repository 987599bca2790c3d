//! What operators do to hosts: copy a disk, reset an identity, forget a node.

use std::collections::BTreeSet;

use super::{host::Host, world::World};
use crate::model::NodeId;

impl World {
    /// Starts a second machine from a copy of this host's disk, unless there is one already.
    pub fn copy_host(&mut self, index: usize) {
        if self.hosts.iter().any(|host| host.is_copy) || self.hosts[index].saved_cluster.is_none() {
            return;
        }
        let copy = self.add_host();
        let original = &self.hosts[index];
        let (key, disk, cluster) = (original.key, original.disk.clone(), original.saved_cluster);
        let seeds = original.seeds.clone();
        let saved_seeds = original.saved_seeds.clone();
        let host = &mut self.hosts[copy];
        (host.key, host.disk, host.saved_cluster) = (key, disk, cluster);
        (host.seeds, host.saved_seeds, host.is_copy) = (seeds, saved_seeds, true);
        host.disk.discard_queued();
        self.oracle.record_situation("cloned");
        self.start(copy);
    }

    /// Executes `gossamer reset-identity` on a host whose agent does not run.
    pub fn reset_identity(&mut self, index: usize) {
        self.change_kernel(index, |host| host.kernel = Default::default());
        let members =
            self.hosts.iter().filter(|host| host.is_powered && host.saved_cluster.is_some());
        let members = members.map(|host| host.index).filter(|member| *member != index).collect();
        let host = &mut self.hosts[index];
        if host.seed_count() == 0 {
            // A copy of the creator from before the first join knows no seed: the operator adds some.
            host.seeds = members;
        }
        host.new_identity();
        // The former identity belongs to the original host.
        host.former_ids.clear();
        host.is_copy = false;
    }

    /// Executes `gossamer forget` at one host.
    pub fn forget(&mut self, index: usize, victim: NodeId, force: bool) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let local = host.clock.local(now);
        let Some(process) = host.process.as_mut().filter(|process| process.paused.is_none()) else {
            return;
        };
        // The operator's statement stands in for the contact: all known peers may be gone.
        process.awaited_peers.clear();
        let done = process.node.forget(local, &victim.to_string(), force);
        match done {
            Ok(_) => self.oracle.record_situation("forgotten"),
            Err(_) => self.oracle.record_situation("forget refused"),
        }
        self.drain_outputs(index);
        self.arm_timer(index);
    }

    /// Whether the preconditions of a forget hold: each host that owns or uses a subnet is known to the
    /// issuer, to a member that the issuer knows, and so on. A host that only the victim has met breaks them.
    pub fn is_forgettable(&self, victim: NodeId, issuer: usize) -> bool {
        let roster = Host::members_on_disk;
        let mut known = roster(&self.hosts[issuer]);
        known.remove(&victim);
        loop {
            let hosts =
                self.hosts.iter().filter(|host| host.is_powered && known.contains(&host.key));
            let reachable: BTreeSet<NodeId> = hosts.flat_map(roster).collect();
            let before = known.len();
            known.extend(reachable);
            if known.len() == before {
                break;
            }
        }
        let pool = self.settings.pool;
        let holds_slots =
            |host: &&Host| host.subnet_in_use(&pool).is_some() || host.owns_by_its_disk();
        let remaining = self.hosts.iter().filter(|host| host.is_powered && host.key != victim);
        remaining.filter(holds_slots).all(|host| known.contains(&host.key))
    }
}
