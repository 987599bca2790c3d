//! Runs a hundred seeds, and every seed that has found a defect before, in each `cargo test`. CI runs more
//! seeds with optimization.

use super::{
    campaign::{Campaign, reproduce_command},
    run::Plan,
};

#[test]
fn campaign_of_50_seeds_finds_no_violation() {
    let campaign =
        Campaign { start_seed: 1, seeds: 50, nodes: 3..=20, jobs: 2, faults: None, span: None };
    let report = campaign.run(|_| {});
    for failure in &report.failures {
        let command = reproduce_command(&campaign.plan(failure.seed));
        println!("seed {}: {:?}\n  {command}", failure.seed, failure.violation);
    }
    assert!(report.failures.is_empty());
}

/// Each line of `tests/seeds.txt` is a seed and the defect that it found.
#[test]
fn seeds_that_found_defects_find_no_violation() {
    let seeds = include_str!("../../tests/seeds.txt");
    let seeds = seeds.lines().filter(|line| !line.starts_with('#'));
    for line in seeds {
        let seed = line.split_whitespace().next().and_then(|seed| seed.parse().ok());
        let plan = Plan::draw(seed.expect("a seed in each line"), 3..=20);
        assert_eq!(plan.run().violation, None, "{line}: {}", reproduce_command(&plan));
    }
}

#[test]
fn runs_of_one_seed_are_identical() {
    let plan = Plan::draw(7, 3..=20);
    assert_eq!(plan.run().trace, plan.run().trace);
}
