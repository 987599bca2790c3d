//! One run from seed to result.
//!
//! The faulty phase injects faults while the oracle checks safety at every event. The recovery phase injects
//! none; the cluster must then converge within a limit.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use super::{
    faults::{Fault, Faults},
    host::{DISK_LATENCY, Host, KERNEL_LATENCY},
    rest::{broken, find_disagreement},
    world::World,
};
use crate::core::MemberStatus;
use crate::model::{ClusterSettings, Pool, PoolSpec};

/// Longest virtual time from the end of the faults until the cluster has converged. Runs with many dead
/// members take longest: gossip must call each of them down before an operator can forget it.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(90);
/// The limit for runs that break a precondition. A duplicate identity blocks grants for two minutes.
pub const LENIENT_RECOVERY_LIMIT: Duration = Duration::from_secs(400);
/// How long the voters of a [`crate::model::Quorum`] may take before the operator forgets dead members in
/// their place: most voters may be dead.
const VOTERS_HEAD_START: Duration = Duration::from_secs(150);
/// How long a converged cluster must stay correct.
const STABLE_FOR: Duration = Duration::from_secs(15);
/// Virtual time between two checks of the recovery phase.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// The parameters of one run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of all randomness.
    pub seed: u64,
    /// Number of initial hosts; faults may add more.
    pub nodes: usize,
    /// Kinds of faults to inject.
    pub faults: Faults,
    /// Length of the faulty phase, in virtual time.
    pub span: Duration,
}

/// The outcome of one run.
#[derive(Clone, Debug, Serialize)]
pub struct RunResult {
    /// [`Plan::seed`].
    pub seed: u64,
    /// [`Plan::nodes`].
    pub nodes: usize,
    /// Names of the kinds of faults.
    pub faults: Vec<String>,
    /// Length of the faulty phase, in virtual seconds.
    pub span_s: u64,
    /// The first rule that was broken, with its details.
    pub violation: Option<String>,
    /// Virtual milliseconds from the end of the faults until the cluster converged.
    pub healed_ms: Option<u64>,
    /// Hash over all events: equal for two identical runs.
    pub trace: u64,
    /// Situations that occurred, each with the number of times.
    pub reached: Vec<(String, u64)>,
}

impl Plan {
    /// Draws nodes, faults and the length of the faulty phase from the seed.
    pub fn draw(seed: u64, nodes: std::ops::RangeInclusive<usize>) -> Self {
        let nodes = StdRng::seed_from_u64(seed ^ 0x5eed_0de5).random_range(nodes);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut faults = Faults::draw(&mut rng);
        faults.add_byzantine(&mut StdRng::seed_from_u64(seed ^ 0x5eed_11e5));
        let span = Duration::from_secs(rng.random_range(20..120));
        Self { seed, nodes, faults, span }
    }

    /// Executes the run.
    pub fn run(&self) -> RunResult {
        // A separate generator, so that a shrunk plan with fewer nodes or faults changes little else in the
        // run.
        let mut rng = StdRng::seed_from_u64(self.seed ^ 0x5eed_0fa1);
        let mut world = World::new(self.seed, settings(self.nodes, &mut rng));
        let mut byzantine_rng = StdRng::seed_from_u64(self.seed ^ 0x5eed_11e6);
        self.faulty_phase(&mut world, &mut rng, &mut byzantine_rng);
        let healed = self.recovery_phase(&mut world, &mut byzantine_rng);
        record_counters(&mut world);
        let reached = world.oracle.reached.iter();
        RunResult {
            seed: self.seed,
            nodes: self.nodes,
            faults: self.faults.kinds.iter().map(Fault::to_string).collect(),
            span_s: self.span.as_secs(),
            violation: world.oracle.violation.clone(),
            healed_ms: healed.map(|span| span.as_millis() as u64),
            trace: world.trace(),
            reached: reached.map(|(what, times)| ((*what).to_owned(), *times)).collect(),
        }
    }

    /// Starts the hosts one by one while injecting faults, until the span is over or a rule is broken.
    fn faulty_phase(&self, world: &mut World, rng: &mut StdRng, byzantine_rng: &mut StdRng) {
        let creator = world.add_creator();
        for index in 1..self.nodes {
            let seeds: Vec<usize> =
                (0..rng.random_range(1..=3)).map(|_| rng.random_range(0..index)).collect();
            world.add_joiner(&seeds);
        }
        self.faults.apply_constant_faults(world, rng);
        world.start(creator);
        world.run_for(Duration::from_secs(1));
        // Some hosts start now, the others during the faults.
        let at_once = rng.random_range(1..=self.nodes);
        (1..at_once).for_each(|index| world.start(index));
        let end = world.now + self.span;
        let mut next = at_once;
        while world.now < end && world.oracle.violation.is_none() {
            world.run_for(Duration::from_millis(rng.random_range(50..3000)));
            if next < self.nodes && rng.random_bool(0.3) {
                world.start(next);
                next += 1;
            }
            self.faults.inject_one(world, rng);
            self.faults.send_byzantine_facts(world, byzantine_rng);
        }
    }

    /// Ends all faults, starts every host and waits for convergence. Returns how long that took.
    fn recovery_phase(&self, world: &mut World, byzantine_rng: &mut StdRng) -> Option<Duration> {
        world.network.clear_faults();
        for index in 0..world.hosts.len() {
            let host = &mut world.hosts[index];
            host.kernel_refuses = 0;
            host.disk_latency = DISK_LATENCY;
            host.kernel_latency = KERNEL_LATENCY;
            if host.is_copy {
                // The status names both hosts; the operator resets the identity of the copy.
                world.kill(index);
                world.reset_identity(index);
            }
            world.resume(index);
            world.start(index);
        }
        replace_dead_seeds(world);
        let started_at = world.now;
        let ceiling = if world.oracle.lenient { LENIENT_RECOVERY_LIMIT } else { RECOVERY_LIMIT };
        let mut missing = Some("not checked yet".to_owned());
        while missing.is_some() && world.now.since(started_at) < ceiling {
            self.faults.send_byzantine_facts(world, byzantine_rng);
            for _ in 0..4 {
                world.run_for(CHECK_INTERVAL);
                missing = find_disagreement(world);
                if missing.is_none() {
                    break;
                }
            }
            if world.quorum.is_none() || world.now.since(started_at) > VOTERS_HEAD_START {
                forget_departed_members(world);
            }
            replace_dead_seeds(world);
            if world.oracle.violation.is_some() {
                return None;
            }
        }
        if let Some(missing) = missing {
            world.oracle.report_violation(|| format!("not converged after {ceiling:?}: {missing}"));
            return None;
        }
        let healed = world.now.since(started_at);
        world.run_for(STABLE_FOR);
        if let Some(broken) = broken(world) {
            world
                .oracle
                .report_violation(|| format!("converged after {healed:?}, then failed: {broken}"));
        }
        Some(healed)
    }
}

/// Draws the cluster settings: small pools in a quarter of the runs, because scarcity has its own bugs, and
/// dual stack in a third.
fn settings(nodes: usize, rng: &mut StdRng) -> ClusterSettings {
    let subnet_len = match rng.random_range(0..4) {
        0 => 24 - (32 - (nodes as u32 + 1).leading_zeros()) as u8 - 1,
        _ => 24,
    };
    let spec = PoolSpec {
        subnet_len: Some(subnet_len),
        network6: "fd42::/48".parse().ok().filter(|_| nodes.is_multiple_of(3)),
        ..PoolSpec::of("10.42.0.0/16".parse().unwrap_or_default())
    };
    match Pool::new(&spec) {
        Ok(pool) => ClusterSettings { pool, vni: 1, vxlan_port: 8472 },
        Err(error) => unreachable!("{error}"),
    }
}

/// Acts as an operator: replaces the seeds of a host on which none leads to a member, and restarts its agent.
fn replace_dead_seeds(world: &mut World) {
    let is_member = |host: &&Host| host.is_powered && host.saved_cluster.is_some();
    let members: Vec<_> = world.hosts.iter().filter(is_member).map(|host| host.index).collect();
    for index in 0..world.hosts.len() {
        let host = &world.hosts[index];
        let has_no_live_seed =
            !host.seeds.iter().any(|seed| *seed != index && members.contains(seed));
        if has_no_live_seed && host.is_powered && members.iter().any(|member| *member != index) {
            world.kill(index);
            world.hosts[index].seeds.clone_from(&members);
            world.start(index);
        }
    }
}

/// Acts as an operator: forgets every departed identity that the issuer does not consider left or forgotten.
///
/// A member that gossip still considers alive is retried in the next round. A member that left is included,
/// because all hosts that recorded its leave may be gone.
fn forget_departed_members(world: &mut World) {
    let gone = |host: &Host| {
        let dead = (!host.is_powered && host.stopped.is_none()).then_some(host.key);
        host.former_ids.iter().copied().chain(dead).collect::<Vec<_>>()
    };
    let gone: Vec<_> = world.hosts.iter().flat_map(gone).collect();
    let running = world.hosts.iter().find(|host| host.process.is_some());
    let Some(issuer) = running.map(|host| host.index) else { return };
    for victim in gone {
        let members = world.hosts[issuer].node().map(|node| node.status().members);
        let done =
            |member: &MemberStatus| member.node == victim && (member.forgotten || member.left);
        if !members.unwrap_or_default().iter().any(done) && world.is_forgettable(victim, issuer) {
            world.forget(issuer, victim, false);
        }
    }
}

/// Records the nodes' own counters as situations.
fn record_counters(world: &mut World) {
    let counters: Vec<_> =
        world.hosts.iter().filter_map(|host| Some(host.node()?.status().counters)).collect();
    for counters in counters {
        for (what, times) in [
            ("granted", counters.grants),
            ("reclaimed", counters.reclaims),
            ("forgotten by voters", counters.voted_gone),
            ("rollback detected", counters.rollbacks),
            ("duplicate identity detected", counters.duplicates),
            ("ownership conflict settled", counters.ownership_conflicts),
            ("surplus lease given back", counters.surplus),
            ("late grant declined", counters.declined),
            ("difference found by comparison", counters.syncs_different),
            ("malformed message refused", counters.malformed),
            ("entry refused", counters.refused),
            ("forged record answered", counters.forged),
        ] {
            if times > 0 {
                world.oracle.record_situation(what);
            }
        }
    }
}
