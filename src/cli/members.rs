//! `gossamer members` and `gossamer peers`: list all members, and show one in detail.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use serde_json::{Value, json};

use super::{
    Client,
    output::{
        bad, doubtful, elements, good, list, name, problem_in, query_and_print, table, text,
        wrapped,
    },
    percent_encoded,
    status::is_present,
};
use crate::api::{self, ClientError};

#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Name or id of a member
    node: String,
    #[command(flatten)]
    client: Client,
}

pub fn members(client: &Client) -> ExitCode {
    let query =
        async { Ok(members_of(&api::get(&client.socket(), "/v1/status").await?).collect()) };
    query_and_print(client, query, members_text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Shows gossip state, path, kernel entries, three pings, and the member's own report.
pub fn peers(args: &PeersArgs) -> ExitCode {
    let query = peer_details(&args.client, &args.node);
    query_and_print(&args.client, query, |peer, _| peer_text(peer))
        .map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

async fn peer_details(client: &Client, node: &str) -> Result<Value, ClientError> {
    let (socket, name) = (client.socket(), percent_encoded(node));
    let ping = api::get(&socket, &format!("/v1/ping?node={name}")).await?;
    let report = api::get(&socket, &format!("/v1/peer?node={name}")).await?;
    let routes = api::get(&socket, "/v1/routes").await?;
    let status = api::get(&socket, "/v1/status").await?;
    let member = members_of(&status).find(|member| member["node"] == ping["node"]);
    let member = member.unwrap_or_default();
    let concerns_member = |entry: &&Value| entry["peer"] == member["name"];
    let entries: Vec<&Value> = elements(&routes["entries"]).filter(concerns_member).collect();
    Ok(json!({ "member": member, "ping": ping, "entries": entries, "report": report }))
}

/// Adds to each member the state of the path to it.
fn members_of(status: &Value) -> impl Iterator<Item = Value> {
    let path = |node: &Value| {
        let path = elements(&status["paths"]).find(|path| path["node"] == *node)?;
        Some(json!({ "state": path["state"], "round_trip_ms": path["round_trip_ms"] }))
    };
    elements(&status["members"]).cloned().map(move |mut member| {
        let path = path(&member["node"]).filter(|_| is_present(&member));
        member["path"] = path.unwrap_or(Value::Null);
        member
    })
}

fn members_text(members: &Value, wide: bool) -> String {
    let row = |member: &Value| {
        let [state, path] = [state(member), path(&member["path"])];
        let subnets = list(&member["subnets"], wide);
        [name(&member["name"], wide), state, path, subnets, text(&member["address"])]
    };
    if !wide {
        let rows: Vec<_> = elements(members).map(row).collect();
        return table(["NAME", "STATE", "PATH", "SUBNET", "ADDRESS"], &rows);
    }
    let wide_row = |member: &Value| {
        let [name, state, path, subnets, address] = row(member);
        let [node, free, mac] = ["node", "free", "vtep_mac"].map(|key| text(&member[key]));
        [name, node, state, path, subnets, free, address, mac]
    };
    let rows: Vec<_> = elements(members).map(wide_row).collect();
    table(["NAME", "NODE", "STATE", "PATH", "SUBNET", "FREE", "ADDRESS", "VTEP MAC"], &rows)
}

fn state(member: &Value) -> String {
    match (&member["left"], &member["forgotten"], member["liveness"].as_str()) {
        (Value::Bool(true), _, _) => "left".to_owned(),
        (_, Value::Bool(true), _) => "forgotten".to_owned(),
        _ if member["me"] == true => good("alive (me)"),
        (_, _, Some("alive")) => good("alive"),
        (_, _, Some(other)) => doubtful(other),
        (_, _, None) => "-".to_owned(),
    }
}

fn path(path: &Value) -> String {
    match (path["state"].as_str(), path["round_trip_ms"].as_f64()) {
        (Some("ok"), Some(span)) => format!("{span:.1} ms"),
        (Some("ok" | "unknown") | None, _) => text(&path["state"]),
        (Some(state), _) => bad(state),
    }
}

fn peer_text(peer: &Value) -> String {
    let (member, ping, report) = (&peer["member"], &peer["ping"], &peer["report"]);
    let mut out = String::new();
    let mut row = |name: &str, value: String| _ = writeln!(out, "{name:<10} {value}");
    if let Some(problem) = problem_in(ping) {
        row(&bad("problem   "), wrapped(&problem, 11));
    }
    row("member", format!("{} ({})", text(&member["name"]), text(&member["node"])));
    let compared = if member["heard"] == true { "compared with" } else { "not compared with yet" };
    row("gossip", format!("{}, {compared}", state(member)));
    row("subnets", format!("{}, and {} free", list(&member["subnets"], true), member["free"]));
    let vtep = format!("{} at {}", text(&member["vtep_mac"]), text(&member["underlay"]));
    row("vtep", vtep);
    let reach = |way: &str| {
        let (to, span) = (&ping[way]["to"], ping[way]["round_trip_ms"].as_f64());
        let took = span.map_or_else(|| bad("no answer"), |span| format!("{span:.2} ms"));
        if to.is_null() { "-".to_owned() } else { format!("{} {took}", text(to)) }
    };
    row("agent", reach("underlay"));
    row("overlay", format!("{}, path {}", reach("overlay"), path(&member["path"])));
    row("pods", reach("pods"));
    for entry in elements(&peer["entries"]) {
        let [table, key, wanted, verdict] =
            ["table", "key", "wanted", "verdict"].map(|field| text(&entry[field]));
        let verdict = if verdict == "same" { good("in the kernel") } else { bad(verdict) };
        row(&table, format!("{key} {wanted}, {verdict}"));
    }
    match &report["version"] {
        Value::Null => row("itself", "sent no report".to_owned()),
        version => {
            let failing = elements(&report["paths"]).filter(|path| path["state"] != "ok").count();
            let all = elements(&report["paths"]).count();
            let problems =
                format!("{} problems, {} of {all} paths ok", report["problems"], all - failing);
            row("itself", format!("version {}, {problems}", text(version)));
        }
    }
    out
}
