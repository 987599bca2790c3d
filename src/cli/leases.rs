//! `gossamer leases`: lists the owners of subnets and of free slots.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    Client, lease,
    output::{elements, label, list, name, query_and_print, slots_text, table, text},
    status::is_present,
};
use crate::api;

#[derive(Debug, Args)]
pub struct LeasesArgs {
    /// List only the free subnets and their owners
    #[arg(long)]
    free: bool,
    /// List every change of ownership that this host has recorded, oldest first
    #[arg(long, conflicts_with = "free")]
    history: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &LeasesArgs) -> ExitCode {
    if args.history {
        return lease::history(&args.client);
    }
    let query = async {
        let mut status = api::get(&args.client.socket(), "/v1/status").await?;
        Ok(if args.free { status["free_slots"].take() } else { leases_of(&status) })
    };
    let text = if args.free { free_text } else { leases_text };
    query_and_print(&args.client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Selects the fields about addresses: subnets and free slots of each member.
fn leases_of(status: &Value) -> Value {
    let lease = |member: &Value| {
        json!({
            "node": member["node"], "name": member["name"], "label": member["label"],
            "liveness": member["liveness"], "former_self": member["former_self"],
            "subnets": member["subnets"], "free": member["free"],
        })
    };
    let owners = elements(&status["members"]).filter(|member| is_present(member));
    json!({
        "network": status["settings"]["pool"]["network"],
        "slots": status["slots"],
        "owners": owners.map(lease).collect::<Vec<_>>(),
    })
}

fn leases_text(leases: &Value, wide: bool) -> String {
    let row = |owner: &Value| {
        let [mut state, free] = ["liveness", "free"].map(|key| text(&owner[key]));
        if owner["former_self"] == true {
            state.push_str(" (former self)");
        }
        [list(&owner["subnets"], wide), label(owner, wide), state, free]
    };
    if elements(&leases["owners"]).next().is_none() {
        return "this host has not joined a cluster yet: see `gossamer status`\n".to_owned();
    }
    let mut owners: Vec<&Value> = elements(&leases["owners"]).collect();
    // Owners without a subnet come last.
    let first = |owner: &Value| owner["subnets"][0].as_str()?.parse::<IpNet>().ok();
    owners.sort_by_key(|owner| first(owner).map_or((true, None), |subnet| (false, Some(subnet))));
    let rows: Vec<_> = owners.into_iter().map(row).collect();
    let mut out = table(["SUBNET", "NODE", "STATE", "FREE"], &rows);
    let _ = writeln!(out, "\n{}: {}", text(&leases["network"]), slots_text(&leases["slots"]));
    out
}

fn free_text(free_slots: &Value, wide: bool) -> String {
    let row = |free: &Value| {
        let subnets = match (&free["first"], &free["last"]) {
            (first, last) if first == last => text(first),
            (first, last) => format!("{} to {}", text(first), text(last)),
        };
        let [count, state] = ["count", "liveness"].map(|key| text(&free[key]));
        [subnets, count, name(&free["name"], wide), state]
    };
    if elements(free_slots).next().is_none() {
        return "no subnet is free\n".to_owned();
    }
    let rows: Vec<_> = elements(free_slots).map(row).collect();
    table(["SUBNETS", "COUNT", "NODE", "STATE"], &rows)
}
