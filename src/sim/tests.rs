//! A hundred seeds with every `cargo test`, and every seed that ever found something. CI runs more of them,
//! optimized.

use super::{
    campaign::{Campaign, repeat_command, seeds_to_catch},
    run::Plan,
};
use crate::core::planted::Mutation;

#[test]
fn no_seed_breaks_a_promise() {
    let campaign =
        Campaign { start_seed: 1, seeds: 100, nodes: 3..=20, jobs: 2, faults: None, span: None };
    let report = campaign.run(|_| {});
    for failure in &report.failures {
        let command = repeat_command(&campaign.plan(failure.seed));
        println!("seed {}: {:?}\n  {command}", failure.seed, failure.violation);
    }
    assert!(report.failures.is_empty());
}

/// Seeds that once failed stay here; each line is a seed and what it found.
#[test]
fn seeds_that_once_found_something_find_nothing_any_more() {
    let seeds = include_str!("../../tests/seeds.txt");
    let seeds = seeds.lines().filter(|line| !line.starts_with('#'));
    for line in seeds {
        let seed = line.split_whitespace().next().and_then(|seed| seed.parse().ok());
        let plan = Plan::draw(seed.expect("a seed in each line"), 3..=20);
        assert_eq!(plan.run().violation, None, "{line}: {}", repeat_command(&plan));
    }
}

#[test]
fn one_seed_is_one_run() {
    let plan = Plan::draw(7, 3..=20);
    assert_eq!(plan.run().trace, plan.run().trace);
}

/// The judge must see at once what breaks the rules grossly; `gossamer-sim planted` tries all defects.
#[test]
fn planted_bugs_are_caught() {
    for bug in [
        Mutation::AnswerBeforeFlush,
        Mutation::SameEpoch,
        Mutation::RemoveBeforeAdd,
        Mutation::GrantBeforeSync,
    ] {
        assert!(seeds_to_catch(bug, 20).is_some(), "{bug:?} escaped");
    }
}
