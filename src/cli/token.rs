//! `gossamer token`: prints the token of the running cluster, or a new one for a future cluster.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{Client, fail, query_and_print};
use crate::{
    api,
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
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &TokenArgs) -> ExitCode {
    if args.new {
        return match new_token() {
            Ok(token) => {
                args.client.output.print(&json!({ "token": token.to_string() }), text);
                ExitCode::SUCCESS
            }
            Err(error) => fail(error),
        };
    }
    let socket = args.client.socket();
    let query = api::get(&socket, "/v1/token");
    query_and_print(&args.client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    format!("{}\n", answer["token"].as_str().unwrap_or_default())
}

/// Generates a token with a random secret, without cluster id and seeds.
///
/// # Errors
/// Fails if the kernel provides no random bytes.
pub fn new_token() -> anyhow::Result<Token> {
    let secret = Secret::new(random::<32>()?.to_vec())?;
    Ok(Token { cluster: ClusterId::UNKNOWN, secret, seeds: Vec::new() })
}
