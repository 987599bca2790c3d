//! `gossamer secret`: replaces the cluster's secret in three steps, without an interruption.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    Client,
    confirm::Consent,
    output::{bad, elements, query_and_print, table, text},
    token::new_token,
};
use crate::{
    api::{self, ClientError},
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
    /// Proceed although not all members are ready; those can return only with a new token
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &SecretArgs) -> ExitCode {
    let done = match &args.step {
        Step::List(client) => {
            query_and_print(client, api::get(&client.socket(), "/v1/secrets"), secrets_text)
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
        Ok(answer) if elements(&answer["refused"]).next().is_some() => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

async fn add(args: &AddArgs) -> Result<Value, ClientError> {
    let refused = |why: String| ClientError::Refused { why, answer: Value::Null };
    let token = match &args.token_file {
        _ if args.again => None,
        Some(path) => Some(read_token_file(path).map_err(|error| refused(error.to_string()))?),
        None => Some(new_token().map_err(|error| refused(error.to_string()))?),
    };
    let body = json!({ "token": token.map(|token| token.to_string()) });
    api::post_json(&args.client.socket(), "/v1/secrets/add", &body).await
}

async fn change(args: &ChangeArgs, step: &str) -> Result<Value, ClientError> {
    let ChangeArgs { secret, force, client } = args;
    if step == "drop" {
        // A typing error must not look like success.
        let known = api::get(&client.socket(), "/v1/secrets").await?;
        if !elements(&known["secrets"]).any(|entry| entry["secret"] == secret.as_str()) {
            let why = format!("no member knows secret {secret}: see `gossamer secret list`");
            return Err(ClientError::Refused { why, answer: Value::Null });
        }
    }
    let secret = super::percent_encoded(secret);
    let target = format!("/v1/secrets/{step}?secret={secret}&force={force}");
    api::post(&client.socket(), &target).await
}

fn secrets_text(answer: &Value, wide: bool) -> String {
    let names = |value: &Value| match value.as_array().map(Vec::as_slice).unwrap_or_default() {
        [] => "-".to_owned(),
        names if wide => names.iter().map(text).collect::<Vec<_>>().join(","),
        names => names.len().to_string(),
    };
    let row = |secret: &Value| {
        let lacking = elements(&secret["lacked_by"]).map(text).collect::<Vec<_>>().join(", ");
        let lacking = if lacking.is_empty() { "-".to_owned() } else { bad(lacking) };
        [text(&secret["secret"]), names(&secret["used_by"]), names(&secret["accepted_by"]), lacking]
    };
    let rows: Vec<_> = elements(&answer["secrets"]).map(row).collect();
    let mut out = table(["SECRET", "USED BY", "ACCEPTED BY", "LACKED BY"], &rows);
    for refused in elements(&answer["refused"]) {
        let _ = writeln!(out, "{}", bad(format_args!("refused by {}", text(refused))));
    }
    let silent: Vec<String> = elements(&answer["silent"]).map(text).collect();
    if !silent.is_empty() {
        let _ = writeln!(out, "{}", bad(format_args!("no answer from {}", silent.join(", "))));
    }
    out
}

/// Returns the next step of a rotation: after `add`, to use the new secret; after `use`, to drop the old one.
fn next_step(answer: &Value, step: &str) -> String {
    let is_used = |secret: &&Value| elements(&secret["used_by"]).next().is_some();
    let mut unused = elements(&answer["secrets"]).filter(|secret| !is_used(secret));
    match (unused.next(), unused.next()) {
        (Some(secret), None) => {
            format!("next: gossamer secret {step} {}\n", text(&secret["secret"]))
        }
        _ => String::new(),
    }
}
