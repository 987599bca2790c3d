//! `gossamer demo`: the main job, shown and verified on one machine.
//!
//! The command enters namespaces of its own and runs itself there (`inside`), as their first process:
//! when that ends, however it ends, the kernel ends everything below it.

mod chaos;
mod exec;
mod node;
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
    #[command(flatten)]
    story: StoryArgs,
    #[command(subcommand)]
    command: Option<DemoCommand>,
}

/// What is shown.
#[derive(Clone, Copy, Debug, Args)]
struct StoryArgs {
    /// Lay hands on a host's kernel while its pod talks, and show what that costs
    #[arg(long)]
    chaos: bool,
    /// Leave the cluster running afterwards, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Subcommand)]
enum DemoCommand {
    /// Run a command on a host (n1) or in a pod (n1-pod) of a demo that was started with --keep
    Exec(exec::ExecArgs),
    /// Be one host of a cluster of containers: what docker-compose.yml runs
    Node(node::NodeArgs),
    /// Be a router between networks of containers: wait until told to end
    #[command(hide = true)]
    Router,
    /// What the demo runs inside its namespaces
    #[command(hide = true)]
    Inside {
        nodes: u16,
        #[command(flatten)]
        story: StoryArgs,
    },
}

pub fn run(args: &DemoArgs) -> ExitCode {
    match &args.command {
        Some(DemoCommand::Exec(exec)) => exec::run(exec),
        Some(DemoCommand::Node(args)) => node::run(args),
        Some(DemoCommand::Router) => node::route(),
        Some(DemoCommand::Inside { nodes, story }) => inside(*nodes, *story),
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
    command.args(args.story.chaos.then_some("--chaos"));
    command.args(args.story.keep.then_some("--keep"));
    match lab::enter(&mut command) {
        Ok(code) => code,
        Err(error) => fail(format_args!("demo: {error:#}")),
    }
}

fn inside(nodes: u16, story: StoryArgs) -> ExitCode {
    // Should the outer process be killed, nothing may stay behind.
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return fail(error);
    }
    match story::tell(nodes, story) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("demo: {error:#}")),
    }
}
