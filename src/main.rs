//! The `gossamer` program: parse, run one subcommand, exit with a code that scripts can use.

use std::process::ExitCode;

use clap::Parser as _;
use gossamer::{
    cli::{Cli, run},
    cni, netavark,
};

fn main() -> ExitCode {
    // A container runtime calls by this, without arguments.
    if std::env::var_os(cni::COMMAND).is_some() && std::env::args_os().len() == 1 {
        return cni::run();
    }
    if let Some(call) = netavark::Call::new(std::env::args_os()) {
        return netavark::run(&call);
    }
    run(Cli::parse())
}
