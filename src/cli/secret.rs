//! `gossamer secret`: another secret for the cluster, in three steps, while everybody goes on talking.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    Client,
    output::{ask_and_print, bad, each, table, text},
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
    /// Which secrets there are, and who uses, accepts or lacks them
    List(Client),
    /// Have all members accept a new secret beside the one in use; again, for those that have missed it
    Add(AddArgs),
    /// Have all members prove themselves by this secret
    Use(ChangeArgs),
    /// Have no member accept this secret any more
    Drop(ChangeArgs),
}

#[derive(Debug, Args)]
struct AddArgs {
    /// A token with the new secret (`gossamer token --new`); without it one is made up
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Give the secrets there are to members that lack them, and make no new one
    #[arg(long, conflicts_with = "token_file")]
    again: bool,
    #[command(flatten)]
    client: Client,
}

#[derive(Debug, Args)]
struct ChangeArgs {
    /// Its name, see `gossamer secret list`
    secret: String,
    /// Go on though not all members are ready: those get in again with a new token only
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &SecretArgs) -> ExitCode {
    let done = match &args.step {
        Step::List(client) => {
            ask_and_print(client, api::get(&client.socket(), "/v1/secrets"), secrets_text)
        }
        Step::Add(args) => ask_and_print(&args.client, add(args), secrets_text),
        Step::Use(args) => ask_and_print(&args.client, change(args, "use"), secrets_text),
        Step::Drop(args) => ask_and_print(&args.client, change(args, "drop"), secrets_text),
    };
    match done {
        Ok(answer) if each(&answer["refused"]).next().is_some() => ExitCode::FAILURE,
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
    let secret = super::escaped(secret);
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
        let lacking = each(&secret["lacked_by"]).map(text).collect::<Vec<_>>().join(", ");
        let lacking = if lacking.is_empty() { "-".to_owned() } else { bad(lacking) };
        [text(&secret["secret"]), names(&secret["used_by"]), names(&secret["accepted_by"]), lacking]
    };
    let rows: Vec<_> = each(&answer["secrets"]).map(row).collect();
    let mut out = table(["SECRET", "USED BY", "ACCEPTED BY", "LACKED BY"], &rows);
    for refused in each(&answer["refused"]) {
        let _ = writeln!(out, "{}", bad(format_args!("refused by {}", text(refused))));
    }
    let silent: Vec<String> = each(&answer["silent"]).map(text).collect();
    if !silent.is_empty() {
        let _ = writeln!(out, "{}", bad(format_args!("no answer from {}", silent.join(", "))));
    }
    out
}
