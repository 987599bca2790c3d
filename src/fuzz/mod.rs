//! Mutated inputs for every parser of bytes from outside.
//!
//! Each target has samples that it accepts. A run changes them at random, by seed, and looks that the parser
//! neither panics nor takes long, and that the process does not grow. `gossamer-sim fuzz` runs as many inputs
//! as it is told; the tests run a few of each.

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

/// No input of the length that mutation makes takes as long, on a machine under load.
const SLOW: Duration = Duration::from_secs(2);
/// How much a run may add to the memory of the process.
const GROWTH_KIB: u64 = 64 << 10;

/// A parser of foreign bytes.
struct Target {
    name: &'static str,
    samples: fn() -> Vec<Vec<u8>>,
    /// Says whether the input was accepted.
    parse: fn(&[u8]) -> bool,
}

/// What became of the inputs of one target.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub name: &'static str,
    pub inputs: u64,
    pub accepted: u64,
    pub slowest: Duration,
    /// What went wrong, and the input in hexadecimal digits.
    pub failure: Option<String>,
}

/// Runs so many inputs of each target. `is_alone` says that nothing else runs in the process, so that its
/// growth is that of the parsers.
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
            Err(_) => Some("a panic".to_owned()),
            Ok(_) if took > SLOW => Some(format!("{took:?}")),
            Ok(is_accepted) => {
                outcome.accepted += u64::from(is_accepted);
                None
            }
        };
        outcome.failure = why.map(|why| format!("{why}: {}", HEXLOWER.encode(input)));
    }
    outcome
}

fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    peak.and_then(|peak| peak.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_parser_of_foreign_bytes_panics_or_takes_long() {
        let mut failures = Vec::new();
        run(1, 2_000, false, |outcome| {
            failures.extend(outcome.failure.clone().map(|why| (outcome.name, why)));
            assert!(outcome.accepted < outcome.inputs, "{outcome:?}: no input was changed");
        });
        assert!(failures.is_empty(), "{failures:#?}");
    }

    #[test]
    fn parser_that_panics_is_caught_with_its_input() {
        fn parse(bytes: &[u8]) -> bool {
            assert!(bytes != [1], "the defect");
            bytes.len() == 2
        }
        let target = Target { name: "defect", samples: || vec![vec![1, 2]], parse };
        let failure = run_target(&target, 1, 100_000).failure.expect("a failure");
        assert_eq!(failure, "a panic: 01");
    }
}
