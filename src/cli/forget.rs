//! `gossamer forget`: removes a member that is gone for good and reclaims its subnets.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{Client, percent_encoded, query_and_print};
use crate::api;

#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// Name or id of the member
    node: String,
    /// Reclaim without waiting for all other members, even if the member looks alive. If it still runs,
    /// or if it granted a subnet to a node that this node does not know, two nodes may get the same
    /// subnet
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &ForgetArgs) -> ExitCode {
    let name = percent_encoded(&args.node);
    let target = format!("/v1/forget?node={name}&force={}", args.force);
    query_and_print(&args.client, api::post(&args.client.socket(), &target), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(answer: &Value, _: bool) -> String {
    let node = answer["name"].as_str().unwrap_or("?");
    let waits: Vec<&str> =
        answer["waits_for"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match (answer["slots"].as_u64(), waits.len()) {
        (Some(0) | None, _) => format!("{node} is forgotten; it owned no subnets\n"),
        (Some(slots), 0) => {
            format!("{node} is forgotten; this node reclaims its {slots} subnets now\n")
        }
        (Some(slots), _) => format!(
            "{node} is forgotten; this node reclaims its {slots} subnets when all other members have \
             acknowledged that. Asked: {}. `gossamer status` shows who has not acknowledged\n",
            waits.join(", ")
        ),
    }
}
