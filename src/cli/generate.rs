//! `gossamer completions` and `gossamer man`: made from the command line's own description.

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, fail};

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Where the pages go, one for each command
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// To standard output: `gossamer completions bash > /etc/bash_completion.d/gossamer`.
pub fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut page = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "gossamer", &mut page);
    // Who reads only the beginning has what it wanted.
    let _ = io::Write::write_all(&mut io::stdout(), &page);
    ExitCode::SUCCESS
}

pub fn man(args: &ManArgs) -> ExitCode {
    let made = fs::create_dir_all(&args.directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &args.directory));
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(format_args!("man: {}: {error}", args.directory.display())),
    }
}
