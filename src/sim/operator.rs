//! What people do to hosts: copying a disk, giving a host another identity, saying that one is gone.

use std::collections::BTreeSet;

use super::{host::Host, world::World};
use crate::model::NodeId;

impl World {
    /// A second machine from the disk of a first.
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
        host.disk.kill_process();
        self.oracle.reach("cloned");
        self.start(copy);
    }

    /// `gossamer reset-identity` on a host whose agent does not run.
    pub fn reset_identity(&mut self, index: usize) {
        self.change_kernel(index, |host| host.kernel = Default::default());
        let members = self.hosts.iter().filter(|host| host.power && host.saved_cluster.is_some());
        let members = members.map(|host| host.index).filter(|member| *member != index).collect();
        let host = &mut self.hosts[index];
        if host.seed_count() == 0 {
            // A copy of the creator's state from when it was alone: the operator names somebody to join.
            host.seeds = members;
        }
        host.new_identity();
        // What it was before is another host.
        host.former.clear();
        host.is_copy = false;
    }

    /// An operator's word at one host that another is gone.
    pub fn forget(&mut self, index: usize, victim: NodeId, force: bool) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let local = host.clock.local(now);
        let Some(process) = host.process.as_mut().filter(|process| process.paused.is_none()) else {
            return;
        };
        // If all it knew are gone by the operator's word, there is nobody left to meet.
        process.unmet.clear();
        let done = process.node.forget(local, &victim.to_string(), force);
        match done {
            Ok(_) => self.oracle.reach("forgotten"),
            Err(_) => self.oracle.reach("forget refused"),
        }
        self.settle(index);
        self.arm(index);
    }

    /// Whether everybody who owns or uses a subnet is known to the issuer, or to somebody it will ask, and
    /// so on: whoever was met by nobody but the victim is outside the promise.
    pub fn is_forgettable(&self, victim: NodeId, issuer: usize) -> bool {
        let roster = Host::members_on_disk;
        let mut known = roster(&self.hosts[issuer]);
        known.remove(&victim);
        loop {
            let hosts = self.hosts.iter().filter(|host| host.power && known.contains(&host.key));
            let met: BTreeSet<NodeId> = hosts.flat_map(roster).collect();
            let before = known.len();
            known.extend(met);
            if known.len() == before {
                break;
            }
        }
        let pool = self.settings.pool;
        let holds = |host: &&Host| host.subnet_in_use(&pool).is_some() || host.owns_by_its_disk();
        let there = self.hosts.iter().filter(|host| host.power && host.key != victim);
        there.filter(holds).all(|host| known.contains(&host.key))
    }
}
