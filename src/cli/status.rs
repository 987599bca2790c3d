//! `gossamer status`, `members` and `leases`: three looks at one answer of the agent.

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::Value;

use super::{Client, ask_and_print, table::table};
use crate::api::{self, ClientError};

const NOT_CONVERGED: u8 = 3;
/// Between looks for a socket that is not there yet.
const RETRY: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Wait until the node has converged (or until there is an agent at all), at most so many seconds
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "60")]
    #[arg(value_name = "SECONDS")]
    wait: Option<u64>,
    /// With --wait: until so many members are alive, this one included
    #[arg(long, requires = "wait", default_value_t = 1, value_name = "COUNT")]
    members: usize,
    #[command(flatten)]
    client: Client,
}

/// Exit code 0 if converged (with as many members as were asked for), 3 if not.
pub fn status(args: &StatusArgs) -> ExitCode {
    match ask_and_print(&args.client, ask(args), status_text) {
        Ok(answer) if answer["converged"] == true && alive(&answer) >= args.members => {
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::from(NOT_CONVERGED),
        Err(code) => code,
    }
}

/// Who waits for an agent may have started it a moment ago: its socket is waited for as well.
async fn ask(args: &StatusArgs) -> Result<Value, ClientError> {
    let socket = &args.client.socket();
    let Some(seconds) = args.wait else { return api::get(socket, "/v1/status").await };
    let target = format!("/v1/status?wait={seconds}&members={}", args.members);
    let patience = Duration::from_secs(seconds);
    let answered = tokio::time::timeout(patience, async {
        loop {
            match api::get(socket, &target).await {
                Err(ClientError::NoAgent { .. }) => tokio::time::sleep(RETRY).await,
                answer => return answer,
            }
        }
    });
    match answered.await {
        Ok(answer) => answer,
        // The agent itself answers when the time is over; it may be a moment late.
        Err(_) => api::get(socket, "/v1/status").await,
    }
}

pub fn members(client: &Client) -> ExitCode {
    show(client, "members", members_text)
}

#[derive(Debug, Args)]
pub struct LeasesArgs {
    /// Only the spare subnets, and who can give them
    #[arg(long)]
    free: bool,
    #[command(flatten)]
    client: Client,
}

pub fn leases(args: &LeasesArgs) -> ExitCode {
    if args.free {
        show(&args.client, "free", free_text)
    } else {
        show(&args.client, "leases", leases_text)
    }
}

fn show(client: &Client, what: &str, text: fn(&Value) -> String) -> ExitCode {
    let ask = async {
        let status = api::get(&client.socket(), "/v1/status").await?;
        Ok(match what {
            "leases" => leases_of(&status),
            "free" => status["spares"].clone(),
            _ => members_of(&status),
        })
    };
    ask_and_print(client, ask, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Each member, with what is known of the way to it.
fn members_of(status: &Value) -> Value {
    let path = |node: &Value| {
        let mut paths = status["paths"].as_array().into_iter().flatten();
        let path = paths.find(|path| path["node"] == *node);
        path.map(|path| serde_json::json!({"state": path["state"], "round_trip_ms": path["round_trip_ms"]}))
    };
    let members = status["members"].as_array().into_iter().flatten().cloned();
    let with_path = members.map(|mut member| {
        member["path"] = path(&member["node"]).unwrap_or(Value::Null);
        member
    });
    with_path.collect()
}

/// Only what concerns addresses: who holds which subnet and how many spares.
fn leases_of(status: &Value) -> Value {
    let lease = |member: &Value| {
        serde_json::json!({
            "node": member["node"], "name": member["name"], "liveness": member["liveness"],
            "subnets": member["subnets"], "spare": member["spare"],
        })
    };
    let owners = status["members"].as_array().into_iter().flatten().filter(|m| m["left"] == false);
    serde_json::json!({
        "network": status["settings"]["pool"]["network"],
        "slots": status["slots"],
        "owners": owners.map(lease).collect::<Vec<_>>(),
    })
}

fn of_network(subnet: &Value, network: &Value) -> String {
    format!("{} of {}", text(subnet), text(network))
}

fn status_text(status: &Value) -> String {
    let kernel = &status["kernel"];
    let alive = alive(status);
    let known = count(status, |_| true);
    let state = match (status["converged"].as_bool(), text(&status["phase"])) {
        (Some(true), _) => "converged".to_owned(),
        (_, phase) => format!("not converged ({phase})"),
    };
    let rows = [
        ("node", format!("{} ({})", text(&status["name"]), text(&status["node"]))),
        ("state", state),
        ("cluster", text(&status["cluster"])),
        ("subnet", of_network(&status["subnet"], &status["settings"]["pool"]["network"])),
        (
            "",
            match &status["subnet6"] {
                Value::Null => String::new(),
                subnet6 => of_network(subnet6, &status["settings"]["pool"]["network6"]),
            },
        ),
        ("members", format!("{alive} alive of {known}")),
        ("slots", slots_text(&status["slots"])),
        (
            "underlay",
            format!(
                "{} on {}",
                text(&kernel["underlay_address"]),
                text(&kernel["underlay_interface"])
            ),
        ),
        (
            "kernel",
            format!(
                "{}, mtu {}, {}",
                text(&kernel["device"]),
                kernel["mtu"],
                if kernel["in_sync"] == true { "in sync" } else { "not in sync" }
            ),
        ),
    ];
    let mut out = String::new();
    for (name, value) in rows.into_iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(out, "{name:<9} {value}");
    }
    for node in status["reclaiming"].as_array().into_iter().flatten() {
        let waits = match &node["waits_for"] {
            Value::Array(missing) if missing.is_empty() => "all have acknowledged".to_owned(),
            missing @ Value::Array(_) => format!("waits for {}", list(missing)),
            _ => format!("by {}", text(&node["heir"])),
        };
        let name = text(&node["name"]);
        let _ = writeln!(out, "reclaims  {} subnets of {name}, forgotten: {waits}", node["slots"]);
    }
    for problem in status["problems"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "problem   {}", text(problem));
    }
    out
}

fn members_text(members: &Value) -> String {
    let path = |path: &Value| match (text(&path["state"]), path["round_trip_ms"].as_f64()) {
        (state, Some(span)) if state == "ok" => format!("{span:.1} ms"),
        (state, _) => state,
    };
    let rows: Vec<[String; 7]> = members
        .as_array()
        .into_iter()
        .flatten()
        .map(|member| {
            let liveness = match (&member["left"], &member["forgotten"], &member["me"]) {
                (Value::Bool(true), _, _) => "left".to_owned(),
                (_, Value::Bool(true), _) => "forgotten".to_owned(),
                (_, _, Value::Bool(true)) => "alive (me)".to_owned(),
                _ => text(&member["liveness"]),
            };
            [
                text(&member["name"]),
                text(&member["node"]),
                liveness,
                path(&member["path"]),
                list(&member["subnets"]),
                text(&member["address"]),
                text(&member["vtep_mac"]),
            ]
        })
        .collect();
    table(["NAME", "NODE", "STATE", "PATH", "SUBNET", "ADDRESS", "VTEP MAC"], &rows)
}

fn leases_text(leases: &Value) -> String {
    let rows: Vec<[String; 4]> = leases["owners"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|owner| {
            [
                list(&owner["subnets"]),
                text(&owner["name"]),
                text(&owner["liveness"]),
                text(&owner["spare"]),
            ]
        })
        .collect();
    let mut out = table(["SUBNET", "NODE", "STATE", "SPARE"], &rows);
    let _ = writeln!(out, "\n{}: {}", text(&leases["network"]), slots_text(&leases["slots"]));
    out
}

fn free_text(spares: &Value) -> String {
    let rows: Vec<[String; 4]> = spares
        .as_array()
        .into_iter()
        .flatten()
        .map(|spare| {
            let subnets = match (&spare["first"], &spare["last"]) {
                (first, last) if first == last => text(first),
                (first, last) => format!("{} to {}", text(first), text(last)),
            };
            [subnets, text(&spare["count"]), text(&spare["name"]), text(&spare["liveness"])]
        })
        .collect();
    table(["SUBNETS", "COUNT", "NODE", "STATE"], &rows)
}

fn slots_text(slots: &Value) -> String {
    format!("{} leased, {} spare of {}", slots["leased"], slots["spare"], slots["total"])
}

fn alive(status: &Value) -> usize {
    count(status, |member| member["liveness"] == "alive")
}

fn count(status: &Value, which: impl Fn(&Value) -> bool) -> usize {
    let members = status["members"].as_array().into_iter().flatten();
    members
        .filter(|member| member["left"] == false && member["forgotten"] == false && which(member))
        .count()
}

fn list(values: &Value) -> String {
    let texts: Vec<String> = values.as_array().into_iter().flatten().map(text).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(",") }
}

/// A value without quotes; "-" for none.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
