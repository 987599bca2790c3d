//! `gossamer demo`: shows and verifies the main functions on one machine.
//!
//! The command runs itself again (`inside`) as the first process of new namespaces. When that process
//! ends, the kernel ends all others in them.

mod chaos;
mod exec;
mod node;
mod screen;
mod story;
mod window;

use std::{
    net::SocketAddr,
    process::{Command, ExitCode},
};

use clap::{Args, Subcommand};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

pub use self::exec::refuse_changes_of_files;

use super::fail;
use crate::lab;

/// Most hosts on one machine: with more of them the output is not readable.
const MAX_NODES: u16 = 30;

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Number of hosts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=i64::from(MAX_NODES)))]
    nodes: u16,
    #[command(flatten)]
    story: DemoOptions,
    #[command(subcommand)]
    command: Option<DemoCommand>,
}

/// Options of the demo's sequence of steps.
#[derive(Clone, Copy, Debug, Args)]
struct DemoOptions {
    /// Inject faults into a host's kernel while its pod sends pings, and show the packet loss
    #[arg(long)]
    chaos: bool,
    /// Keep the cluster running afterwards, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// With --keep: show the first host's dashboard at this address [default without a value:
    /// 127.0.0.1:9473]
    #[arg(long, requires = "keep", num_args = 0..=1, default_missing_value = "127.0.0.1:9473")]
    #[arg(value_name = "IP:PORT")]
    http: Option<SocketAddr>,
}

#[derive(Debug, Subcommand)]
enum DemoCommand {
    /// Run a command on a host (n1) or in a pod (n1-pod) of a demo started with --keep
    Exec(exec::ExecArgs),
    /// Run one host of a cluster of containers, as docker-compose.yml does
    Node(node::NodeArgs),
    /// Route between networks of containers until SIGTERM
    #[command(hide = true)]
    Router,
    /// Run the demo inside its namespaces
    #[command(hide = true)]
    Inside {
        nodes: u16,
        #[command(flatten)]
        story: DemoOptions,
    },
}

pub fn run(args: &DemoArgs) -> ExitCode {
    match &args.command {
        Some(DemoCommand::Exec(exec)) => exec::run(exec),
        Some(DemoCommand::Node(args)) => node::run(args),
        Some(DemoCommand::Router) => node::run_router(),
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
    if let Some(address) = args.story.http {
        match window::open(address) {
            Ok(port) => _ = command.stdin(port).args(["--http", &address.to_string()]),
            Err(error) => return fail(format_args!("demo: {address}: {error}")),
        }
    }
    match lab::enter(&mut command) {
        Ok(code) => {
            if args.story.keep {
                println!("\nThe demo has ended; nothing of it is left on this machine.");
            }
            code
        }
        Err(error) => fail(format_args!("demo: {error:#}")),
    }
}

fn inside(nodes: u16, story: DemoOptions) -> ExitCode {
    // If the outer process is killed, the kernel must end everything in here.
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return fail(error);
    }
    match story::run_demo(nodes, story) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("demo: {error:#}")),
    }
}
