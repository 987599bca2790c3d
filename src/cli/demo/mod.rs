//! `gossamer demo`: the main job, shown and verified on one machine.
//!
//! The command enters namespaces of its own and runs itself there (`inside`), as their first process:
//! when that ends, however it ends, the kernel ends everything below it.

mod exec;
mod screen;
mod story;

use std::process::{Command, ExitCode};

use clap::{Args, Subcommand};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use super::fail;
use crate::lab;

/// Hosts on one machine: beyond this the output is no longer readable.
const MAX_NODES: u16 = 30;

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How many hosts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=i64::from(MAX_NODES)))]
    nodes: u16,
    /// Leave the cluster running afterwards, until Ctrl-C
    #[arg(long)]
    keep: bool,
    #[command(subcommand)]
    command: Option<DemoCommand>,
}

#[derive(Debug, Subcommand)]
enum DemoCommand {
    /// Run a command on a host (n1) or in a pod (n1-pod) of a demo that was started with --keep
    Exec(exec::ExecArgs),
    /// What the demo runs inside its namespaces
    #[command(hide = true)]
    Inside {
        nodes: u16,
        #[arg(long)]
        keep: bool,
    },
}

pub fn run(args: &DemoArgs) -> ExitCode {
    match &args.command {
        Some(DemoCommand::Exec(exec)) => exec::run(exec),
        Some(DemoCommand::Inside { nodes, keep }) => inside(*nodes, *keep),
        None => enter(args),
    }
}

fn enter(args: &DemoArgs) -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return fail(error),
    };
    let mut command = Command::new(program);
    command.args(["demo", "inside", &args.nodes.to_string()]);
    command.args(args.keep.then_some("--keep"));
    match lab::enter(&mut command) {
        Ok(code) => code,
        Err(error) => fail(format_args!("demo: {error}")),
    }
}

fn inside(nodes: u16, keep: bool) -> ExitCode {
    // Should the outer process be killed, nothing may stay behind.
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return fail(error);
    }
    match story::tell(nodes, keep) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("demo: {error}")),
    }
}
