//! `gossamer lab -- COMMAND`: how tests and benchmarks get namespaces of their own.

use std::process::{Command, ExitCode};

use clap::Args;

use super::fail;
use crate::lab;

#[derive(Debug, Args)]
pub struct LabArgs {
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The exit code is that of the command.
pub fn run(args: &LabArgs) -> ExitCode {
    let [program, arguments @ ..] = args.command.as_slice() else {
        return fail("lab: no command");
    };
    match lab::enter(Command::new(program).args(arguments)) {
        Ok(code) => code,
        Err(error) => fail(error),
    }
}
