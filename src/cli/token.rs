//! `gossamer token`: prints the token of the running cluster, or a new one for a future cluster.

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;

use super::{Client, block_on, fail, output::write_stdout};
use crate::{
    api::{self, ClusterToken},
    files::{PRIVATE, replace},
    model::ClusterId,
    random::random,
    wire::{Secret, Token},
};

#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Generate a token for a cluster that does not exist yet; give it to the first node and to all
    /// others
    #[arg(long)]
    new: bool,
    /// Write the token to this file (mode 0600) instead of printing it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &TokenArgs) -> ExitCode {
    let answer = match args.new {
        true => new_token().map(|token| ClusterToken { token: token.to_string() }),
        false => block_on(api::get_as(&args.client.socket(), "/v1/token"))
            .map_err(anyhow::Error::from)
            .and_then(|answer| Ok(answer?)),
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return fail(error),
    };
    let token = &answer.token;
    if let Some(path) = &args.out {
        return match replace(path, &format!("{token}\n"), PRIVATE) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(format_args!("{}: {error}", path.display())),
        };
    }
    if args.client.output.is_text() && io::stdout().is_terminal() {
        return print_for_people(token, args.new);
    }
    args.client.output.print(&answer, |answer, _| format!("{}\n", answer.token));
    ExitCode::SUCCESS
}

/// Prints the command to type on the next host. Files and pipes get the token alone.
fn print_for_people(token: &str, new: bool) -> ExitCode {
    if new {
        eprintln!("On the first host, run as root: gossamer init --token-file FILE");
    }
    eprintln!("On each new host, run as root:\n");
    write_stdout(&format!("gossamer join {token}\n"));
    eprintln!(
        "\nThe token admits every host that has it, and does not expire. `gossamer secret` replaces it."
    );
    ExitCode::SUCCESS
}

/// Generates a token with a random secret, without cluster id and seeds.
///
/// # Errors
/// Fails if the kernel provides no random bytes.
pub fn new_token() -> anyhow::Result<Token> {
    let secret = Secret::new(random::<32>()?.to_vec())?;
    Ok(Token { cluster: ClusterId::UNKNOWN, secret, seeds: Vec::new() })
}
