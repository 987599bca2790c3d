//! `gossamer lease history`: shows which node granted which subnet to which other node.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{Client, output::table, query_and_print};
use crate::api;

#[derive(Debug, Args)]
pub struct LeaseArgs {
    #[command(subcommand)]
    command: LeaseCommand,
}

#[derive(Debug, Subcommand)]
enum LeaseCommand {
    /// List every change of ownership that this host has recorded, oldest first
    History(Client),
}

pub fn run(args: &LeaseArgs) -> ExitCode {
    let LeaseCommand::History(client) = &args.command;
    query_and_print(client, api::get(&client.socket(), "/v1/history"), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(lines: &Value, _: bool) -> String {
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let rows: Vec<[String; 6]> = lines
        .as_array()
        .into_iter()
        .flatten()
        .map(|line| {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(line["at"].as_u64().unwrap_or(0));
            [
                humantime::format_rfc3339_seconds(at).to_string(),
                cell(&line["subnets"]),
                cell(&line["from"]),
                cell(&line["to"]),
                cell(&line["state"]),
                cell(&line["by"]),
            ]
        })
        .collect();
    table(["TIME", "SUBNETS", "FROM", "TO", "STATE", "BY"], &rows)
}
