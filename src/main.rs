//! The `gossamer` program: parse, run one subcommand, exit with a code that scripts can use.

use std::process::ExitCode;

use clap::Parser as _;
use gossamer::cli::{Cli, run};

fn main() -> ExitCode {
    run(Cli::parse())
}
