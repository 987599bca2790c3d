//! `gossamer completions` and `gossamer man`: generated from the definitions of the command line.

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, fail};

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell to complete commands for
    shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory for the pages
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Prints a completion script: `gossamer completions bash > /etc/bash_completion.d/gossamer`.
pub fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut page = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "gossamer", &mut page);
    // A reader that closes the pipe has read all that it wants.
    let _ = io::Write::write_all(&mut io::stdout(), &page);
    ExitCode::SUCCESS
}

/// Writes the manual pages.
pub fn man(args: &ManArgs) -> ExitCode {
    let made = fs::create_dir_all(&args.directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &args.directory));
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("man: {}: {error}", args.directory.display())),
    }
}
