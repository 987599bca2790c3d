//! Tests of joining, restarting and leaving in the simulator's world, each checked by its oracle.

use std::ops::Range;

use ipnet::IpNet;

use super::*;
use crate::{
    model::{
        BootId, ClusterSettings, MemberRecord, Pool, PoolSpec, Problem, Slot, SlotRecord, SlotState,
    },
    sim::{rest, world::World},
    wire::Facts,
};

mod assigned;
mod forget;
mod hostile;
mod join;
mod leave;
mod restart;
mod vote;

/// Maximum latency of one message.
const LATENCY: Duration = Duration::from_millis(2);

fn settings(network: &str, len: u8) -> ClusterSettings {
    let pool = Pool::new(&PoolSpec {
        subnet_len: Some(len),
        ..PoolSpec::of(network.parse().expect("network"))
    });
    ClusterSettings { pool: pool.expect("pool"), vni: 1, vxlan_port: 8472 }
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Joins problems with their remedies, one a line.
fn texts(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// Hosts are identified by their index; 0 is the creator.
impl World {
    fn created(settings: ClusterSettings) -> Self {
        let mut world = Self::new(1, settings);
        let creator = world.add_creator();
        world.start(creator);
        world.run_for(Duration::from_millis(50));
        world
    }

    fn with_members(count: usize) -> Self {
        let mut world = Self::created(settings("10.42.0.0/16", 24));
        (1..count).for_each(|_| _ = world.join());
        world.run_for(seconds(4));
        world.assert_converged_and_safe();
        world
    }

    fn join(&mut self) -> usize {
        let host = self.add_joiner(&[0]);
        self.start(host);
        host
    }

    fn restart(&mut self, host: usize) {
        self.kill(host);
        self.start(host);
    }

    fn node(&self, host: usize) -> &Node {
        self.hosts[host].node().expect("runs")
    }

    fn node_mut(&mut self, host: usize) -> &mut Node {
        &mut self.hosts[host].process.as_mut().expect("runs").node
    }

    fn subnet(&self, host: usize) -> Option<IpNet> {
        self.node(host).status().subnet
    }

    fn leased(&self, host: usize) -> u32 {
        self.node(host).status().slots.leased
    }

    fn problems(&self, host: usize) -> String {
        texts(&self.node(host).status().problems)
    }

    /// Cuts each of these hosts off from all others, in both directions.
    fn isolate(&mut self, hosts: Range<usize>) {
        for host in hosts {
            let others: Vec<usize> = (0..self.hosts.len()).filter(|other| *other != host).collect();
            self.separate(&[host], &others);
        }
    }

    fn separate(&mut self, ones: &[usize], others: &[usize]) {
        for (one, other) in
            ones.iter().flat_map(|one| others.iter().map(move |other| (*one, *other)))
        {
            self.network.cut(one, other);
            self.network.cut(other, one);
        }
    }

    fn push(&mut self, from: usize, to: usize, facts: Facts) {
        let cluster = self.node(to).replica.cluster_id().expect("in a cluster");
        let bytes = Frame::Push(&Push { facts }.encode()).encode(cluster);
        let from = self.hosts[from].key;
        self.input(to, Input::Message { from, bytes });
    }

    fn running(&self) -> usize {
        self.hosts.iter().filter(|host| host.process.is_some()).count()
    }

    fn all_settled(&self) -> bool {
        self.hosts.iter().filter_map(|host| host.node()).all(|node| node.status().settled)
    }

    /// Asserts that the oracle found no violation, every host reaches every other, and no slot is lost.
    fn assert_converged_and_safe(&self) {
        assert_eq!(self.oracle.violation, None);
        assert_eq!(rest::broken(self), None);
    }
}

/// Drains a node's outputs.
fn outputs(node: &mut Node) -> impl Iterator<Item = Output> + '_ {
    std::iter::from_fn(|| node.poll_output())
}
