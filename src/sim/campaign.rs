//! A campaign: runs many seeds in several threads, and shrinks failing plans.

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
    mutations::{self, MUTATIONS},
    run::{Plan, RunResult},
};

/// Every seed that is a multiple of this is run twice, and both runs must have the same trace.
const DETERMINISM_CHECK_INTERVAL: u64 = 50;
/// Campaigns of at least this many seeds must reach each of [`REQUIRED_SITUATIONS`].
const MIN_SEEDS_FOR_COVERAGE: u64 = 1000;

/// Situations that a large campaign must reach at least once.
pub const REQUIRED_SITUATIONS: [&str; 27] = [
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
    "rollback detected",
    "duplicate identity detected",
    "surplus lease given back",
    "difference found by comparison",
    "malformed message refused",
    "impossible facts sent",
    "false facts sent",
    "entry refused",
    "forged record answered",
];

/// The parameters of a campaign.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// The first seed.
    pub start_seed: u64,
    /// Number of consecutive seeds.
    pub seeds: u64,
    /// Range from which each seed draws its number of nodes.
    pub nodes: RangeInclusive<usize>,
    /// Number of threads.
    pub jobs: usize,
    /// Replaces the faults that a seed draws.
    pub faults: Option<Faults>,
    /// Replaces the length of the faulty phase that a seed draws, in seconds.
    pub span: Option<u64>,
}

/// The outcome of a campaign.
#[derive(Debug, Default)]
pub struct Report {
    /// Results with a violation, by seed.
    pub failures: Vec<RunResult>,
    /// Number of occurrences of each situation.
    pub reached: BTreeMap<String, u64>,
    /// Virtual milliseconds from the end of the faults until convergence, one per converged run, sorted.
    pub healed_ms: Vec<u64>,
}

impl Campaign {
    /// Returns the plan of one seed.
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

    /// Runs all seeds, and calls `each` with every result.
    pub fn run(&self, each: impl Fn(&RunResult) + Sync) -> Report {
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
                        let result = self.run_seed(seed);
                        each(&result);
                        report.lock().unwrap_or_else(PoisonError::into_inner).add(result);
                    }
                });
            }
        });
        let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.healed_ms.sort_unstable();
        report.failures.sort_by_key(|result| result.seed);
        report
    }

    /// Runs one seed. Checks R4, determinism, for one seed in fifty.
    fn run_seed(&self, seed: u64) -> RunResult {
        let plan = self.plan(seed);
        let mut result = plan.run();
        if seed.is_multiple_of(DETERMINISM_CHECK_INTERVAL) && result.violation.is_none() {
            let again = plan.run();
            if again.trace != result.trace {
                result.violation = Some("R4: two runs of one seed differ".to_owned());
            }
        }
        result
    }

    /// Returns the required situations that did not occur. Empty for campaigns that are small or have fixed
    /// faults.
    pub fn missing_situations(&self, report: &Report) -> Vec<&'static str> {
        if self.seeds < MIN_SEEDS_FOR_COVERAGE || self.faults.is_some() {
            return Vec::new();
        }
        REQUIRED_SITUATIONS.into_iter().filter(|what| !report.reached.contains_key(*what)).collect()
    }
}

impl Report {
    /// Adds the result of one run.
    fn add(&mut self, result: RunResult) {
        for (what, times) in &result.reached {
            *self.reached.entry(what.clone()).or_default() += times;
        }
        self.healed_ms.extend(result.healed_ms);
        if result.violation.is_some() {
            self.failures.push(result);
        }
    }

    /// Returns a percentile of the convergence times, in virtual milliseconds.
    pub fn healed_percentile(&self, percent: usize) -> u64 {
        let at = self.healed_ms.len().saturating_sub(1) * percent / 100;
        self.healed_ms.get(at).copied().unwrap_or_default()
    }
}

/// Returns the smallest failing plan found by removing kinds of faults, then nodes, then time.
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

/// Returns the command line that runs one plan.
pub fn reproduce_command(plan: &Plan) -> String {
    let faults: Vec<String> = plan.faults.kinds.iter().map(Fault::to_string).collect();
    format!(
        "gossamer-sim --seeds 1 --start-seed {} --nodes {nodes}..{nodes} --span {} --faults {}",
        plan.seed,
        plan.span.as_secs(),
        if faults.is_empty() { "none".to_owned() } else { faults.join(",") },
        nodes = plan.nodes,
    )
}

/// Seeds that catch mutations which few seeds catch. They are tried first; an outdated entry costs only time.
const KNOWN_CATCHING_SEEDS: [(&str, u64); 4] = [
    ("LeaveWithoutWithdrawal", 1_354),
    ("LeaseWhileLeaving", 33),
    ("ReleaseLeaseInUse", 4_395),
    ("IgnoreVersions", 332),
];

/// Searches the seeds from 1 to `limit` for one that fails with a mutation and passes without it. Returns the
/// seed and the violation. Finds none unless this is the mutated copy of the simulator.
pub fn find_catching_seed(mutation: usize, limit: u64) -> Option<(u64, String)> {
    let name = MUTATIONS.get(mutation)?.name;
    let known = KNOWN_CATCHING_SEEDS.iter().filter(|(of, _)| *of == name).map(|(_, seed)| *seed);
    known.chain(1..=limit).find_map(|seed| {
        let plan = Plan::draw(seed, 3..=20);
        let violation = mutations::with(mutation, || plan.run().violation)?;
        plan.run().violation.is_none().then_some((seed, violation))
    })
}
