//! Many seeds: in several threads, each failure shrunk and printed with the command that repeats it.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{
    faults::{Fault, Faults},
    run::{Plan, Verdict},
};
use crate::core::planted::{self, Mutation};

/// Every so many seeds one is run twice, and both runs must be the same to the last event.
const TWICE_EVERY: u64 = 50;
/// Campaigns of at least so many seeds must have met each situation of [`MUST_REACH`].
const ENOUGH: u64 = 1000;

/// Situations without which a campaign has proved little.
pub const MUST_REACH: [&str; 27] = [
    "partition",
    "blackout",
    "address changed",
    "garbage",
    "kernel refused an operation",
    "answer lost",
    "left",
    "died",
    "forgotten",
    "forget refused",
    "forgotten by voters",
    "expelled",
    "recreated",
    "disk lost",
    "rolled back",
    "cloned",
    "granted",
    "reclaimed",
    "rollback noticed",
    "clone noticed",
    "surplus lease given back",
    "difference found by comparison",
    "unreadable message refused",
    "a member erred",
    "a member lied",
    "entry refused",
    "forged record answered",
];

/// Which seeds, and how big.
#[derive(Clone, Debug)]
pub struct Campaign {
    pub start_seed: u64,
    pub seeds: u64,
    pub nodes: RangeInclusive<usize>,
    pub jobs: usize,
    /// Instead of those that the seed draws.
    pub faults: Option<Faults>,
    /// Seconds of the faulty phase, instead of those that the seed draws.
    pub span: Option<u64>,
}

/// How a campaign went.
#[derive(Debug, Default)]
pub struct Report {
    pub failures: Vec<Verdict>,
    pub reached: BTreeMap<String, u64>,
    /// Virtual milliseconds to heal, sorted.
    pub healed_ms: Vec<u64>,
}

impl Campaign {
    pub fn plan(&self, seed: u64) -> Plan {
        let mut plan = Plan::draw(seed, self.nodes.clone());
        if let Some(faults) = &self.faults {
            plan.faults = faults.clone();
        }
        if let Some(span) = self.span {
            plan.span = std::time::Duration::from_secs(span);
        }
        plan
    }

    /// Runs all seeds; `each` sees every verdict as it comes.
    pub fn run(&self, each: impl Fn(&Verdict) + Sync) -> Report {
        let next = AtomicU64::new(self.start_seed);
        let report = Mutex::new(Report::default());
        thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= self.start_seed + self.seeds {
                            break;
                        }
                        let verdict = self.judge(seed);
                        each(&verdict);
                        report.lock().unwrap_or_else(PoisonError::into_inner).add(verdict);
                    }
                });
            }
        });
        let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.healed_ms.sort_unstable();
        report.failures.sort_by_key(|verdict| verdict.seed);
        report
    }

    fn judge(&self, seed: u64) -> Verdict {
        let plan = self.plan(seed);
        let mut verdict = plan.run();
        if seed.is_multiple_of(TWICE_EVERY) && verdict.violation.is_none() {
            let again = plan.run();
            if again.trace != verdict.trace {
                verdict.violation = Some("R4: two runs of one seed differ".to_owned());
            }
        }
        verdict
    }

    /// Situations that were never met, if there were seeds enough to expect them.
    pub fn missed(&self, report: &Report) -> Vec<&'static str> {
        if self.seeds < ENOUGH || self.faults.is_some() {
            return Vec::new();
        }
        MUST_REACH.into_iter().filter(|what| !report.reached.contains_key(*what)).collect()
    }
}

impl Report {
    fn add(&mut self, verdict: Verdict) {
        for (what, times) in &verdict.reached {
            *self.reached.entry(what.clone()).or_default() += times;
        }
        self.healed_ms.extend(verdict.healed_ms);
        if verdict.violation.is_some() {
            self.failures.push(verdict);
        }
    }

    /// The value below which `percent` of the healing times are.
    pub fn healed_percentile(&self, percent: usize) -> u64 {
        let at = self.healed_ms.len().saturating_sub(1) * percent / 100;
        self.healed_ms.get(at).copied().unwrap_or_default()
    }
}

/// The smallest plan found that still fails: fewer kinds of faults, fewer nodes, less time.
pub fn shrink(plan: &Plan) -> Plan {
    let fails = |plan: &Plan| plan.run().violation.is_some();
    let mut smallest = plan.clone();
    for kind in plan.faults.kinds.clone() {
        let mut candidate = smallest.clone();
        candidate.faults.kinds.remove(&kind);
        if fails(&candidate) {
            smallest = candidate;
        }
    }
    for nodes in 3..smallest.nodes {
        let candidate = Plan { nodes, ..smallest.clone() };
        if fails(&candidate) {
            smallest = candidate;
            break;
        }
    }
    while smallest.span.as_secs() > 5 {
        let candidate = Plan { span: smallest.span / 2, ..smallest.clone() };
        if !fails(&candidate) {
            break;
        }
        smallest = candidate;
    }
    smallest
}

/// The command line that runs one plan again.
pub fn repeat_command(plan: &Plan) -> String {
    let faults: Vec<String> = plan.faults.kinds.iter().map(Fault::to_string).collect();
    format!(
        "gossamer-sim --seeds 1 --start-seed {} --nodes {nodes}..{nodes} --span {} --faults {}",
        plan.seed,
        plan.span.as_secs(),
        if faults.is_empty() { "none".to_owned() } else { faults.join(",") },
        nodes = plan.nodes,
    )
}

/// Seeds by which defects were caught that need many of them: they are tried first. One that is out of date
/// costs a search from the first seed on.
const CAUGHT_AT: [(Mutation, u64); 3] = [
    (Mutation::LeaveWithoutWithdrawal, 1_354),
    (Mutation::ReleaseLeaseInUse, 4_395),
    (Mutation::IgnoreVersions, 332),
];

/// A seed by which a planted bug is caught; none, if `limit` were not enough. Only what goes well
/// without the bug counts.
pub fn seeds_to_catch(bug: Mutation, limit: u64) -> Option<(u64, String)> {
    let recorded = CAUGHT_AT.iter().filter(|(of, _)| *of == bug).map(|(_, seed)| *seed);
    recorded.chain(1..=limit).find_map(|seed| {
        let plan = Plan::draw(seed, 3..=20);
        let violation = planted::with(bug, || plan.run().violation)?;
        plan.run().violation.is_none().then_some((seed, violation))
    })
}
