//! One seed from start to verdict: first faults, with safety judged at every event; then calm, in which
//! everything must come right within a span.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use super::{
    faults::{Fault, Faults},
    host::{DISK_LATENCY, Host, KERNEL_LATENCY},
    rest::{broken, unsettled},
    world::World,
};
use crate::core::MemberStatus;
use crate::model::{ClusterSettings, Pool, PoolSpec};

/// How long everything may take to come right once the faults are over. Longest where most members are
/// dead: each must be called down, and then be forgotten by an operator.
pub const CALM_CEILING: Duration = Duration::from_secs(90);
/// The same where a proviso was broken: of a copied identity nothing is granted for two minutes.
pub const LENIENT_CEILING: Duration = Duration::from_secs(400);
/// Where voters forget, the operator steps in when they should long have done so: most may be dead.
const OPERATOR_AFTER_VOTERS: Duration = Duration::from_secs(150);
/// How long it must then stay right.
const STAY: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    pub faults: Faults,
    pub span: Duration,
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub seed: u64,
    pub nodes: usize,
    pub faults: Vec<String>,
    pub span_s: u64,
    pub violation: Option<String>,
    /// Virtual milliseconds from the end of the faults until everything was right.
    pub healed_ms: Option<u64>,
    pub trace: u64,
    pub reached: Vec<(String, u64)>,
}

impl Plan {
    /// Draws nodes and faults from the seed.
    pub fn draw(seed: u64, nodes: std::ops::RangeInclusive<usize>) -> Self {
        let nodes = StdRng::seed_from_u64(seed ^ 0x5eed_0de5).random_range(nodes);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut faults = Faults::draw(&mut rng);
        faults.add_byzantine(&mut StdRng::seed_from_u64(seed ^ 0x5eed_11e5));
        let span = Duration::from_secs(rng.random_range(20..120));
        Self { seed, nodes, faults, span }
    }

    pub fn run(&self) -> Verdict {
        // A stream of its own, so that fewer nodes or faults keep the rest of the run alike.
        let mut rng = StdRng::seed_from_u64(self.seed ^ 0x5eed_0fa1);
        let mut world = World::new(self.seed, settings(self.nodes, &mut rng));
        let mut lies = StdRng::seed_from_u64(self.seed ^ 0x5eed_11e6);
        self.faulty_phase(&mut world, &mut rng, &mut lies);
        let healed = self.calm_phase(&mut world, &mut lies);
        note_counters(&mut world);
        let reached = world.oracle.reached.iter();
        Verdict {
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

    fn faulty_phase(&self, world: &mut World, rng: &mut StdRng, lies: &mut StdRng) {
        let creator = world.add_creator();
        for index in 1..self.nodes {
            let seeds: Vec<usize> =
                (0..rng.random_range(1..=3)).map(|_| rng.random_range(0..index)).collect();
            world.add_joiner(&seeds);
        }
        self.faults.begin(world, rng);
        world.start(creator);
        world.run_for(Duration::from_secs(1));
        // Some come at once, the others while things go wrong.
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
            self.faults.strike(world, rng);
            self.faults.speak(world, lies);
        }
    }

    /// Everything is mended and everybody is there. Says how long it took to come right.
    fn calm_phase(&self, world: &mut World, lies: &mut StdRng) -> Option<Duration> {
        world.network.heal();
        for index in 0..world.hosts.len() {
            let host = &mut world.hosts[index];
            host.kernel_refuses = 0;
            host.disk_latency = DISK_LATENCY;
            host.kernel_latency = KERNEL_LATENCY;
            if host.is_copy {
                // The operator heeds the status, which names both.
                world.kill(index);
                world.reset_identity(index);
            }
            world.resume(index);
            world.start(index);
        }
        correct_seeds(world);
        let begun = world.now;
        let ceiling = if world.oracle.lenient { LENIENT_CEILING } else { CALM_CEILING };
        let mut missing = Some("nothing was looked at".to_owned());
        while missing.is_some() && world.now.since(begun) < ceiling {
            self.faults.speak(world, lies);
            for _ in 0..4 {
                world.run_for(LOOK_EVERY);
                missing = unsettled(world);
                if missing.is_none() {
                    break;
                }
            }
            if world.quorum.is_none() || world.now.since(begun) > OPERATOR_AFTER_VOTERS {
                forget_the_dead(world);
            }
            correct_seeds(world);
            if world.oracle.violation.is_some() {
                return None;
            }
        }
        if let Some(missing) = missing {
            world.oracle.accuse(|| format!("not at rest after {ceiling:?}: {missing}"));
            return None;
        }
        let healed = world.now.since(begun);
        world.run_for(STAY);
        if let Some(broken) = broken(world) {
            world
                .oracle
                .accuse(|| format!("came right after {healed:?}, and did not stay: {broken}"));
        }
        Some(healed)
    }
}

/// Small pools now and then, for scarcity has bugs of its own, and some of two families.
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

/// The operator corrects seeds that lead nowhere any more.
fn correct_seeds(world: &mut World) {
    let is_member = |host: &&Host| host.power && host.saved_cluster.is_some();
    let members: Vec<_> = world.hosts.iter().filter(is_member).map(|host| host.index).collect();
    for index in 0..world.hosts.len() {
        let host = &world.hosts[index];
        let diverted = !host.seeds.iter().any(|seed| *seed != index && members.contains(seed));
        if diverted && host.power && members.iter().any(|member| *member != index) {
            world.kill(index);
            world.hosts[index].seeds.clone_from(&members);
            world.start(index);
        }
    }
}

/// The operator goes through the members that are gone; one that gossip still holds as alive is tried again,
/// and so is one that left when nobody who heard of that is there any more.
fn forget_the_dead(world: &mut World) {
    let gone = |host: &Host| {
        let dead = (!host.power && host.stopped.is_none()).then_some(host.key);
        host.former.iter().copied().chain(dead).collect::<Vec<_>>()
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

/// What the nodes themselves have counted, as situations met.
fn note_counters(world: &mut World) {
    let counters: Vec<_> =
        world.hosts.iter().filter_map(|host| Some(host.node()?.status().counters)).collect();
    for counters in counters {
        for (what, times) in [
            ("granted", counters.grants),
            ("reclaimed", counters.reclaims),
            ("forgotten by voters", counters.voted_gone),
            ("rollback noticed", counters.rollbacks),
            ("clone noticed", counters.duplicates),
            ("two owners settled", counters.ownership_conflicts),
            ("surplus lease given back", counters.surplus),
            ("late grant declined", counters.declined),
            ("difference found by comparison", counters.syncs_different),
            ("unreadable message refused", counters.malformed),
            ("entry refused", counters.refused),
            ("forged record answered", counters.forged),
        ] {
            if times > 0 {
                world.oracle.reach(what);
            }
        }
    }
}
