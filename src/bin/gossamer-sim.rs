//! `gossamer-sim`: the seeded simulator from the command line.
//!
//! Exit codes: 0 no promise was broken and every situation was met, 1 otherwise, 2 wrong usage.

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
use gossamer::{
    core::planted::Mutation,
    sim::{
        campaign::{Campaign, MUST_REACH, Report, repeat_command, seeds_to_catch, shrink},
        faults::Faults,
        figures,
        run::Verdict,
    },
};

/// Runs the production core of many nodes in a simulated world, by seeds
#[derive(Debug, Parser)]
#[command(name = "gossamer-sim", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// How many seeds to run
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    start_seed: u64,
    /// How many nodes, drawn from the seed
    #[arg(long, default_value = "3..20", value_parser = nodes, value_name = "A..B")]
    nodes: RangeInclusive<usize>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Kinds of faults, instead of those that the seed draws ("none" for none)
    #[arg(long, value_parser = faults, value_name = "KIND,KIND")]
    faults: Option<Faults>,
    /// Seconds of the faulty phase, instead of those that the seed draws
    #[arg(long, value_name = "SECONDS")]
    span: Option<u64>,
    /// One line of JSON for each seed
    #[arg(long)]
    json: bool,
    /// What the nodes log, for one seed
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Plant defects one by one, and look for a seed by which each is caught
    Planted {
        /// Give up after so many seeds
        #[arg(long, default_value_t = 10_000)]
        limit: u64,
    },
    /// Give every parser of bytes from outside so many mutated inputs
    #[cfg(feature = "agent")]
    Fuzz {
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Inputs of each parser
        #[arg(long, default_value_t = 1_000_000)]
        inputs: u64,
    },
    /// Measure convergence against its ceilings, in virtual time
    Figures {
        /// Nodes of the clusters that are measured; 1,000 take minutes
        #[arg(long, value_delimiter = ',', default_values_t = [100, 500])]
        sizes: Vec<usize>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(filter) = &cli.log {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        tracing_subscriber::fmt().without_time().with_target(false).with_env_filter(filter).init();
    }
    match &cli.command {
        None => campaign(&cli),
        Some(Command::Planted { limit }) => planted(*limit),
        #[cfg(feature = "agent")]
        Some(Command::Fuzz { seed, inputs }) => fuzz(*seed, *inputs),
        Some(Command::Figures { sizes }) => match figures::print_all(sizes) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        },
    }
}

#[cfg(feature = "agent")]
fn fuzz(seed: u64, inputs: u64) -> ExitCode {
    let begun = Instant::now();
    // A panic is an outcome, with its input.
    std::panic::set_hook(Box::new(|_| {}));
    let mut all = 0;
    let is_sound = gossamer::fuzz::run(seed, inputs, true, |outcome| {
        all += outcome.inputs;
        let failure = outcome.failure.as_deref().unwrap_or("sound");
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
    let print = |verdict: &Verdict| {
        if cli.json
            && let Ok(line) = serde_json::to_string(verdict)
        {
            println!("{line}");
        }
    };
    let report = campaign.run(print);
    for failure in &report.failures {
        // What is logged should be of the run itself.
        if cli.log.is_none() {
            explain(&campaign, failure);
        }
    }
    let missed = campaign.missed(&report);
    if !missed.is_empty() {
        println!("never met: {}", missed.join(", "));
    }
    println!("{}", summary(cli, &report, begun.elapsed().as_secs_f64()));
    if report.failures.is_empty() && missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn explain(campaign: &Campaign, failure: &Verdict) {
    println!("seed {}: {}", failure.seed, failure.violation.as_deref().unwrap_or_default());
    let smallest = shrink(&campaign.plan(failure.seed));
    println!("  repeat with: {}", repeat_command(&smallest));
}

fn summary(cli: &Cli, report: &Report, seconds: f64) -> String {
    let met = MUST_REACH.iter().filter(|what| report.reached.contains_key(**what)).count();
    format!(
        "{} seeds of {} to {} nodes, {} violations, {met} of {} situations met, healed in {:.2} s (median) \
         {:.2} s (99 %) {:.2} s (most), {seconds:.0} s",
        cli.seeds,
        cli.nodes.start(),
        cli.nodes.end(),
        report.failures.len(),
        MUST_REACH.len(),
        report.healed_percentile(50) as f64 / 1000.0,
        report.healed_percentile(99) as f64 / 1000.0,
        report.healed_percentile(100) as f64 / 1000.0,
    )
}

fn planted(limit: u64) -> ExitCode {
    let (next, escaped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let hunt = || {
        while let Some(bug) = Mutation::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
            match seeds_to_catch(*bug, limit) {
                Some((seeds, why)) => println!("{bug:<32?} seed {seeds:>5}  {why:.100}"),
                None => {
                    escaped.fetch_add(1, Ordering::Relaxed);
                    println!("{bug:<32?} not caught in {limit} seeds");
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(hunt);
        }
    });
    let escaped = escaped.into_inner();
    println!("{} of {} planted bugs caught", Mutation::ALL.len() - escaped, Mutation::ALL.len());
    if escaped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn nodes(text: &str) -> Result<RangeInclusive<usize>, String> {
    let parse = |text: &str| text.parse::<usize>().map_err(|error| format!("{text:?}: {error}"));
    let (first, last) = text.split_once("..").ok_or("write A..B, as in 3..20")?;
    let (first, last) = (parse(first)?, parse(last.trim_start_matches('='))?);
    if first < 2 || last < first {
        return Err("A must be at least 2, and B at least A".to_owned());
    }
    Ok(first..=last)
}

fn faults(text: &str) -> Result<Faults, String> {
    let kinds = text.split(',').filter(|kind| *kind != "none").map(str::parse);
    Ok(Faults { kinds: kinds.collect::<Result<BTreeSet<_>, _>>()? })
}
