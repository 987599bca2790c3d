//! `gossamer forget`: a member is gone for good, and its subnets go back into the pool.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{Client, ask_and_print, escaped};
use crate::api;

#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// Name or id of the member that is gone
    node: String,
    /// Reclaim without asking all other members, and even if it looks alive. If it granted a subnet to
    /// somebody whom this node has never met, or still runs itself, that subnet may be given to two nodes
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &ForgetArgs) -> ExitCode {
    let name = escaped(&args.node);
    let target = format!("/v1/forget?node={name}&force={}", args.force);
    ask_and_print(&args.client, api::post(&args.client.socket(), &target), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    let node = answer["name"].as_str().unwrap_or("?");
    let waits: Vec<&str> =
        answer["waits_for"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match (answer["slots"].as_u64(), waits.len()) {
        (Some(0) | None, _) => format!("{node} is forgotten; it owned nothing any more\n"),
        (Some(slots), 0) => {
            format!("{node} is forgotten; its {slots} subnets come to this node now\n")
        }
        (Some(slots), _) => format!(
            "{node} is forgotten; its {slots} subnets come to this node as soon as all others have \
             acknowledged that. Asked: {}. `gossamer status` shows who is missing\n",
            waits.join(", ")
        ),
    }
}
