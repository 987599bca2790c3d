//! The `gossamer` program: parse, run one subcommand, exit with a code that scripts can use.

use std::process::ExitCode;

use clap::Parser as _;
use gossamer::{
    cli::{Cli, run},
    cni,
};

fn main() -> ExitCode {
    // A container runtime calls by this, without arguments.
    if std::env::var_os(cni::COMMAND).is_some() && std::env::args_os().len() == 1 {
        return cni::run();
    }
    run(Cli::parse())
}
