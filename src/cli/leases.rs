//! `gossamer leases`: who owns which subnet, and who has some to spare.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use serde_json::{Value, json};

use super::{
    Client,
    output::{ask_and_print, each, list, name, table, text},
    status::is_present,
};
use crate::api;

#[derive(Debug, Args)]
pub struct LeasesArgs {
    /// Only the spare subnets, and who can give them
    #[arg(long)]
    free: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &LeasesArgs) -> ExitCode {
    let ask = async {
        let mut status = api::get(&args.client.socket(), "/v1/status").await?;
        Ok(if args.free { status["spares"].take() } else { leases_of(&status) })
    };
    let text = if args.free { free_text } else { leases_text };
    ask_and_print(&args.client, ask, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Only what concerns addresses: who holds which subnet and how many spares.
fn leases_of(status: &Value) -> Value {
    let lease = |member: &Value| {
        json!({
            "node": member["node"], "name": member["name"], "liveness": member["liveness"],
            "subnets": member["subnets"], "spare": member["spare"],
        })
    };
    let owners = each(&status["members"]).filter(|member| is_present(member));
    json!({
        "network": status["settings"]["pool"]["network"],
        "slots": status["slots"],
        "owners": owners.map(lease).collect::<Vec<_>>(),
    })
}

fn leases_text(leases: &Value, wide: bool) -> String {
    let row = |owner: &Value| {
        let [state, spare] = ["liveness", "spare"].map(|key| text(&owner[key]));
        [list(&owner["subnets"], wide), name(&owner["name"], wide), state, spare]
    };
    let rows: Vec<_> = each(&leases["owners"]).map(row).collect();
    let mut out = table(["SUBNET", "NODE", "STATE", "SPARE"], &rows);
    let _ = writeln!(out, "\n{}: {}", text(&leases["network"]), slots_text(&leases["slots"]));
    out
}

fn free_text(spares: &Value, wide: bool) -> String {
    let row = |spare: &Value| {
        let subnets = match (&spare["first"], &spare["last"]) {
            (first, last) if first == last => text(first),
            (first, last) => format!("{} to {}", text(first), text(last)),
        };
        let [count, state] = ["count", "liveness"].map(|key| text(&spare[key]));
        [subnets, count, name(&spare["name"], wide), state]
    };
    let rows: Vec<_> = each(spares).map(row).collect();
    table(["SUBNETS", "COUNT", "NODE", "STATE"], &rows)
}

pub fn slots_text(slots: &Value) -> String {
    format!("{} leased, {} spare of {}", slots["leased"], slots["spare"], slots["total"])
}
