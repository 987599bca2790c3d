//! Fuzzer for every parser of external bytes.
//!
//! Each target has samples that its parser accepts. A run mutates them at random, from a seed, and checks
//! that the parser neither panics nor takes long, and that the process's memory does not grow. `gossamer-sim
//! fuzz` runs as many inputs as requested; the unit test runs 2,000 per target.

mod mutation;
mod targets;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use data_encoding::HEXLOWER;
use rand::{SeedableRng as _, rngs::StdRng};

use mutation::Mutator;
use targets::TARGETS;

/// An input fails if its parser takes longer. Far above what any mutated input takes on a loaded machine.
const SLOW: Duration = Duration::from_secs(2);
/// Limit of the growth of the process's peak memory during one target, in KiB.
const GROWTH_KIB: u64 = 64 << 10;

/// A parser of external bytes.
struct Target {
    name: &'static str,
    /// Returns inputs that the parser accepts.
    samples: fn() -> Vec<Vec<u8>>,
    /// Runs the parser; returns whether it accepted the input.
    parse: fn(&[u8]) -> bool,
}

/// The outcome of fuzzing one target.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Name of the target.
    pub name: &'static str,
    /// Number of inputs parsed.
    pub inputs: u64,
    /// Number of inputs that the parser accepted.
    pub accepted: u64,
    /// Time of the slowest input.
    pub slowest: Duration,
    /// The first failure, with its input in hexadecimal digits.
    pub failure: Option<String>,
}

/// Parses `inputs` inputs for each target and calls `report` with each outcome. Returns whether no target
/// failed.
///
/// `is_alone` states that nothing else runs in the process. Growth of its memory is then a failure of the
/// parser.
pub fn run(seed: u64, inputs: u64, is_alone: bool, mut report: impl FnMut(&Outcome)) -> bool {
    let mut is_sound = true;
    for target in TARGETS {
        let memory = peak_memory_kib();
        let mut outcome = run_target(target, seed, inputs);
        let growth = peak_memory_kib().saturating_sub(memory);
        if is_alone && growth > GROWTH_KIB && outcome.failure.is_none() {
            outcome.failure = Some(format!("the process grew by {growth} KiB"));
        }
        is_sound &= outcome.failure.is_none();
        report(&outcome);
    }
    is_sound
}

/// Parses `inputs` inputs for one target, up to the first failure.
fn run_target(target: &Target, seed: u64, inputs: u64) -> Outcome {
    let samples = (target.samples)();
    let mut outcome = Outcome {
        name: target.name,
        inputs: 0,
        accepted: 0,
        slowest: Duration::ZERO,
        failure: samples
            .iter()
            .find(|sample| !(target.parse)(sample))
            .map(|sample| format!("a sample is not accepted: {}", HEXLOWER.encode(sample))),
    };
    let mut mutator = Mutator::new(StdRng::seed_from_u64(seed), samples);
    while outcome.failure.is_none() && outcome.inputs < inputs {
        let input = mutator.next();
        let begun = Instant::now();
        let parsed = catch_unwind(AssertUnwindSafe(|| (target.parse)(input)));
        let took = begun.elapsed();
        outcome.inputs += 1;
        outcome.slowest = outcome.slowest.max(took);
        let why = match parsed {
            Err(_) => Some("panic".to_owned()),
            Ok(_) if took > SLOW => Some(format!("took {took:?}")),
            Ok(is_accepted) => {
                outcome.accepted += u64::from(is_accepted);
                None
            }
        };
        outcome.failure = why.map(|why| format!("{why}: {}", HEXLOWER.encode(input)));
    }
    outcome
}

/// Returns the peak resident memory of the process, or 0 if it is unknown.
fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    peak.and_then(|peak| peak.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_of_external_bytes_neither_panic_nor_take_long() {
        let mut failures = Vec::new();
        run(1, 2_000, false, |outcome| {
            failures.extend(outcome.failure.clone().map(|why| (outcome.name, why)));
            assert!(outcome.accepted < outcome.inputs, "{outcome:?}: no input was rejected");
        });
        assert!(failures.is_empty(), "{failures:#?}");
    }

    #[test]
    fn parser_that_panics_is_reported_with_its_input() {
        fn parse(bytes: &[u8]) -> bool {
            assert!(bytes != [1], "the defect");
            bytes.len() == 2
        }
        let target = Target { name: "defect", samples: || vec![vec![1, 2]], parse };
        let failure = run_target(&target, 1, 100_000).failure.expect("a failure");
        assert_eq!(failure, "panic: 01");
    }
}
