//! `gossamer lease history`: shows which node granted which subnet to which other node.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{
    Client,
    output::{elements, table, text as cell},
    query_and_print,
};
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
    history(client)
}

pub fn history(client: &Client) -> ExitCode {
    query_and_print(client, api::get(&client.socket(), "/v1/history"), text)
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

fn text(lines: &Value, wide: bool) -> String {
    if elements(lines).next().is_none() {
        return "no change of ownership was recorded\n".to_owned();
    }
    let time = |line: &Value| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(line["at"].as_u64().unwrap_or(0));
        humantime::format_rfc3339_seconds(at).to_string()
    };
    if wide {
        let row = |line: &Value| {
            let [subnets, from, to, state, by] =
                ["subnets", "from", "to", "state", "by"].map(|key| cell(&line[key]));
            [time(line), subnets, from, to, state, by]
        };
        let rows: Vec<_> = elements(lines).map(row).collect();
        return table(["TIME", "SUBNETS", "FROM", "TO", "STATE", "BY"], &rows);
    }
    // Names without their ids.
    let short = |value: &Value| {
        let name = cell(value);
        name.split_once(" (").map_or(name.clone(), |(name, _)| name.to_owned())
    };
    let row = |line: &Value| {
        let [from, to] = ["from", "to"].map(|key| short(&line[key]));
        [time(line), cell(&line["subnets"]), from, to, cell(&line["state"])]
    };
    let rows: Vec<_> = elements(lines).map(row).collect();
    table(["TIME", "SUBNETS", "FROM", "TO", "STATE"], &rows)
}
