//! `gossamer lab -- COMMAND`: runs a command in private namespaces, for tests and benchmarks.

use std::process::{Command, ExitCode};

use clap::Args;

use super::fail;
use crate::lab;

#[derive(Debug, Args)]
pub struct LabArgs {
    /// Command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command and returns its exit code.
pub fn run(args: &LabArgs) -> ExitCode {
    let [program, arguments @ ..] = args.command.as_slice() else {
        return fail("lab: no command");
    };
    match lab::enter(Command::new(program).args(arguments)) {
        Ok(code) => code,
        Err(error) => fail(error),
    }
}
