//! `gossamer token`: the token of the running cluster, or a new one for a cluster to be.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{Client, ask_and_print, fail};
use crate::{
    agent::random,
    api,
    model::ClusterId,
    wire::{Secret, Token},
};

#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Make a token for a cluster that does not exist yet: give it to the first node and to the others
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
    let ask = api::get(&socket, "/v1/token");
    ask_and_print(&args.client, ask, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    format!("{}\n", answer["token"].as_str().unwrap_or_default())
}

pub fn new_token() -> anyhow::Result<Token> {
    let secret = Secret::new(random::<32>()?.to_vec())?;
    Ok(Token { cluster: ClusterId::UNKNOWN, secret, seeds: Vec::new() })
}
