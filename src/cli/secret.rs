//! `gossamer secret`: replaces the cluster's secret in three steps, without an interruption.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{
    Client,
    confirm::Consent,
    output::{bad, list, query_and_print, table},
    token::new_token,
};
use crate::{
    api::{self, ClientError, NewSecret, SecretStatus, Secrets},
    config::read_token_file,
};

#[derive(Debug, Args)]
pub struct SecretArgs {
    #[command(subcommand)]
    step: Step,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// List all secrets, and the members that use, accept or lack them
    List(Client),
    /// Make all members accept a new secret beside the one in use
    Add(AddArgs),
    /// Make all members use this secret
    Use(ChangeArgs),
    /// Make all members stop accepting this secret
    Drop(DropArgs),
}

#[derive(Debug, Args)]
struct DropArgs {
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, Args)]
struct AddArgs {
    /// Token with the new secret (see `gossamer token --new`) [default: a random secret]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send the existing secrets to members that lack them, instead of adding a new one
    #[arg(long, conflicts_with = "token_file")]
    again: bool,
    #[command(flatten)]
    client: Client,
}

#[derive(Debug, Args)]
struct ChangeArgs {
    /// Name of the secret, see `gossamer secret list`
    secret: String,
    /// Proceed although some members are not ready; they then need a new token to return
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &SecretArgs) -> ExitCode {
    let done = match &args.step {
        Step::List(client) => {
            query_and_print(client, api::get_as(&client.socket(), "/v1/secrets"), secrets_text)
        }
        Step::Add(args) => query_and_print(&args.client, add(args), |answer, wide| {
            secrets_text(answer, wide) + &next_step(answer, "use")
        }),
        Step::Use(args) => query_and_print(&args.client, change(args, "use"), |answer, wide| {
            secrets_text(answer, wide) + &next_step(answer, "drop")
        }),
        Step::Drop(DropArgs { consent, change: args }) => {
            let costs = || {
                format!(
                    "Secret {} and all tokens with it become useless. A host that was away since before \
                     `secret add` needs a new token to return.",
                    args.secret
                )
            };
            if let Err(code) = consent.obtain(costs) {
                return code;
            }
            query_and_print(&args.client, change(args, "drop"), secrets_text)
        }
    };
    match done {
        Ok(answer) if !answer.refused.is_empty() => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

async fn add(args: &AddArgs) -> Result<Secrets, ClientError> {
    let refused = |why: String| ClientError::Refused { why, answer: Value::Null };
    let token = match &args.token_file {
        _ if args.again => None,
        Some(path) => Some(read_token_file(path).map_err(|error| refused(error.to_string()))?),
        None => Some(new_token().map_err(|error| refused(error.to_string()))?),
    };
    let body = NewSecret { token: token.map(|token| token.to_string()) };
    api::post_json_as(&args.client.socket(), "/v1/secrets/add", &body).await
}

async fn change(args: &ChangeArgs, step: &str) -> Result<Secrets, ClientError> {
    let ChangeArgs { secret, force, client } = args;
    if step == "drop" {
        // A typing error must not look like success.
        let known: Secrets = api::get_as(&client.socket(), "/v1/secrets").await?;
        if !known.secrets.iter().any(|entry| entry.secret == *secret) {
            let why = format!("no member knows secret {secret}: see `gossamer secret list`");
            return Err(ClientError::Refused { why, answer: Value::Null });
        }
    }
    let secret = super::percent_encoded(secret);
    let target = format!("/v1/secrets/{step}?secret={secret}&force={force}");
    api::post_as(&client.socket(), &target).await
}

fn secrets_text(answer: &Secrets, wide: bool) -> String {
    let names = |names: &[String]| match names {
        [] => "-".to_owned(),
        names if wide => list(names, true),
        names => names.len().to_string(),
    };
    let row = |status: &SecretStatus| {
        let SecretStatus { secret, used_by, accepted_by, lacked_by } = status;
        let lacking = match &lacked_by[..] {
            [] => "-".to_owned(),
            names => bad(names.join(", ")),
        };
        [secret.clone(), names(used_by), names(accepted_by), lacking]
    };
    let rows: Vec<_> = answer.secrets.iter().map(row).collect();
    let mut out = table(["SECRET", "USED BY", "ACCEPTED BY", "LACKED BY"], &rows);
    for refused in &answer.refused {
        let _ = writeln!(out, "{}", bad(format_args!("refused by {refused}")));
    }
    if !answer.silent.is_empty() {
        let silent = answer.silent.join(", ");
        let _ = writeln!(out, "{}", bad(format_args!("no answer from {silent}")));
    }
    out
}

/// Returns the next step of a rotation: after `add`, to use the new secret; after `use`, to drop the old one.
fn next_step(answer: &Secrets, step: &str) -> String {
    let mut unused = answer.secrets.iter().filter(|secret| secret.used_by.is_empty());
    match (unused.next(), unused.next()) {
        (Some(SecretStatus { secret, .. }), None) => {
            format!("next: gossamer secret {step} {secret}\n")
        }
        _ => String::new(),
    }
}
