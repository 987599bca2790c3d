//! `gossamer leave`: makes this node leave its cluster for good.

use std::process::ExitCode;

use super::{Client, query_and_print};
use crate::api;

pub fn run(client: &Client) -> ExitCode {
    let text = |answer: &serde_json::Value, _: bool| match answer["successor"].as_str() {
        Some(successor) => {
            format!("left the cluster: {successor} owns all subnets of this node now\n")
        }
        None => "left the cluster: this was its last member, so it no longer exists\n".to_owned(),
    };
    query_and_print(client, api::post(&client.socket(), "/v1/leave"), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}
