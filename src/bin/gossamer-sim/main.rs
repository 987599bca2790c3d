//! `gossamer-sim`: the command line of the seeded simulator.
//!
//! Exit codes: 0 if no rule was violated and every required situation occurred, 1 otherwise, 2 for wrong
//! usage.

mod mutated;

use std::{
    collections::BTreeSet,
    num::NonZero,
    ops::RangeInclusive,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use clap::{Parser, Subcommand};
use gossamer::sim::{
    campaign::{
        Campaign, REQUIRED_SITUATIONS, Report, find_catching_seed, reproduce_command, shrink,
    },
    faults::Faults,
    figures,
    mutations::{IS_MUTATED, MUTATIONS},
    run::RunResult,
};
use tracing_subscriber::{
    Layer as _, filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// Run the production core of many nodes in a simulated world, one run per seed
#[derive(Debug, Parser)]
#[command(name = "gossamer-sim", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Number of seeds to run
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    start_seed: u64,
    /// Range from which each seed draws its number of nodes
    #[arg(long, default_value = "3..20", value_parser = parse_nodes, value_name = "A..B")]
    nodes: RangeInclusive<usize>,
    /// Number of threads
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Kinds of faults to inject, instead of those that the seed draws ("none" for no faults)
    #[arg(long, value_parser = parse_faults, value_name = "KIND,KIND")]
    faults: Option<Faults>,
    /// Length of the faulty phase in seconds, instead of the one that the seed draws
    #[arg(long, value_name = "SECONDS")]
    span: Option<u64>,
    /// Print one line of JSON for each seed
    #[arg(long)]
    json: bool,
    /// Print the nodes' log, with this filter; use it with one seed
    #[arg(long, value_name = "FILTER")]
    log: Option<Targets>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build a copy with defects, switch on one after the other, and search for a seed that catches it
    #[command(alias = "planted")]
    Mutations {
        /// Number of seeds to try for each mutation
        #[arg(long, default_value_t = 10_000)]
        limit: u64,
    },
    /// Feed mutated inputs to every parser of external bytes
    #[cfg(feature = "agent")]
    Fuzz {
        /// Seed of the mutations
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Number of inputs for each parser
        #[arg(long, default_value_t = 1_000_000)]
        inputs: u64,
    },
    /// Measure convergence against its limits, in virtual time
    Figures {
        /// Sizes of the clusters to measure, in nodes; 1,000 nodes take minutes
        #[arg(long, value_delimiter = ',', default_values_t = [100, 500])]
        sizes: Vec<usize>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(filter) = cli.log.clone() {
        let log = fmt::layer().without_time().with_target(false);
        tracing_subscriber::registry().with(log.with_filter(filter)).init();
    }
    match &cli.command {
        None => campaign(&cli),
        Some(Command::Mutations { limit }) if IS_MUTATED => catch_mutations(*limit),
        Some(Command::Mutations { limit }) => mutated::run(*limit).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }),
        #[cfg(feature = "agent")]
        Some(Command::Fuzz { seed, inputs }) => fuzz(*seed, *inputs),
        Some(Command::Figures { sizes }) => match figures::print_all(sizes) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        },
    }
}

/// Fuzzes every parser and prints one line for each.
#[cfg(feature = "agent")]
fn fuzz(seed: u64, inputs: u64) -> ExitCode {
    let begun = Instant::now();
    // The outcome reports a panic together with its input.
    std::panic::set_hook(Box::new(|_| {}));
    let mut all = 0;
    let is_sound = gossamer::fuzz::run(seed, inputs, true, |outcome| {
        all += outcome.inputs;
        let failure = outcome.failure.as_deref().unwrap_or("ok");
        println!(
            "{:<14} {:>11} inputs {:>5.1} % accepted, slowest {:>9.1?}  {failure}",
            outcome.name,
            outcome.inputs,
            outcome.accepted as f64 / outcome.inputs.max(1) as f64 * 100.0,
            outcome.slowest,
        );
    });
    println!("{all} inputs, {:.0} s", begun.elapsed().as_secs_f64());
    if is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a campaign and prints its failures and a summary.
fn campaign(cli: &Cli) -> ExitCode {
    let begun = Instant::now();
    let campaign = Campaign {
        start_seed: cli.start_seed,
        seeds: cli.seeds,
        nodes: cli.nodes.clone(),
        jobs: cli.jobs,
        faults: cli.faults.clone(),
        span: cli.span,
    };
    let print_json = |result: &RunResult| {
        if cli.json
            && let Ok(line) = serde_json::to_string(result)
        {
            println!("{line}");
        }
    };
    let report = campaign.run(print_json);
    for failure in &report.failures {
        // Shrinking runs the plan many more times, which would mix their logs with the log of the failure.
        if cli.log.is_none() {
            explain(&campaign, failure);
        }
    }
    let missed = campaign.missing_situations(&report);
    if !missed.is_empty() {
        println!("situations that did not occur: {}", missed.join(", "));
    }
    println!("{}", summary(cli, &report, begun.elapsed().as_secs_f64()));
    if report.failures.is_empty() && missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Prints a failure with the command that reproduces it in the smallest plan.
fn explain(campaign: &Campaign, failure: &RunResult) {
    println!("seed {}: {}", failure.seed, failure.violation.as_deref().unwrap_or_default());
    let smallest = shrink(&campaign.plan(failure.seed));
    println!("  reproduce with: {}", reproduce_command(&smallest));
}

fn summary(cli: &Cli, report: &Report, seconds: f64) -> String {
    let reached =
        REQUIRED_SITUATIONS.iter().filter(|what| report.reached.contains_key(**what)).count();
    format!(
        "{} seeds of {} to {} nodes, {} violations, {reached} of {} situations reached, \
         converged in {:.2} s (median) {:.2} s (99 %) {:.2} s (maximum), {seconds:.0} s",
        cli.seeds,
        cli.nodes.start(),
        cli.nodes.end(),
        report.failures.len(),
        REQUIRED_SITUATIONS.len(),
        report.healed_percentile(50) as f64 / 1000.0,
        report.healed_percentile(99) as f64 / 1000.0,
        report.healed_percentile(100) as f64 / 1000.0,
    )
}

/// Searches for a seed that catches each mutation, in as many threads as there are processors.
fn catch_mutations(limit: u64) -> ExitCode {
    let (next, escaped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let catch = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(mutation) = MUTATIONS.get(index) else { return };
            let name = mutation.name;
            match find_catching_seed(index, limit) {
                Some((seed, violation)) => println!("{name:<32} seed {seed:>5}  {violation:.100}"),
                None => {
                    escaped.fetch_add(1, Ordering::Relaxed);
                    println!("{name:<32} not caught in {limit} seeds: {}", mutation.defect);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(catch);
        }
    });
    let escaped = escaped.into_inner();
    println!("{} of {} mutations caught", MUTATIONS.len() - escaped, MUTATIONS.len());
    if escaped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Parses `A..B`, an inclusive range.
fn parse_nodes(text: &str) -> Result<RangeInclusive<usize>, String> {
    let parse = |text: &str| text.parse::<usize>().map_err(|error| format!("{text:?}: {error}"));
    let (first, last) = text.split_once("..").ok_or("write A..B, as in 3..20")?;
    let (first, last) = (parse(first)?, parse(last.trim_start_matches('='))?);
    if first < 2 || last < first {
        return Err("A must be at least 2, and B at least A".to_owned());
    }
    Ok(first..=last)
}

/// Parses a list of kinds of faults.
fn parse_faults(text: &str) -> Result<Faults, String> {
    let kinds = text.split(',').filter(|kind| *kind != "none").map(str::parse);
    Ok(Faults { kinds: kinds.collect::<Result<BTreeSet<_>, _>>()? })
}
