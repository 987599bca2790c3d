//! `gossamer leave`.

use std::process::ExitCode;

use super::{Client, ask_and_print};
use crate::api;

pub fn run(client: &Client) -> ExitCode {
    let text = |answer: &serde_json::Value, _: bool| match answer["successor"].as_str() {
        Some(successor) => format!("left: all subnets of this node belong to {successor} now\n"),
        None => "left: this was the last member, the cluster is gone\n".to_owned(),
    };
    ask_and_print(client, api::post(&client.socket(), "/v1/leave"), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}
