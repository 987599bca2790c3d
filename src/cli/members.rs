//! `gossamer members` and `gossamer peers`: list all members, and show one in detail.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;
use serde_json::{Value, json};

use super::{
    Client,
    output::{
        bad, doubtful, elements, good, label, list, problem_in, query_and_print, table, text,
        wrapped,
    },
    percent_encoded,
    status::{is_current, is_present},
};
use crate::api::{self, ClientError};

#[derive(Debug, Args)]
pub struct MembersArgs {
    /// Also show members that have left or were forgotten, and former selves of living hosts
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    client: Client,
}

#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Name, id, beginning of the id, or address of a member; all members if left out
    node: Option<String>,
    #[command(flatten)]
    client: Client,
}

pub fn members(args: &MembersArgs) -> ExitCode {
    let query =
        async { Ok(members_of(&api::get(&args.client.socket(), "/v1/status").await?).collect()) };
    let text = |members: &Value, wide: bool| members_text(members, wide, args.all);
    query_and_print(&args.client, query, text).map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Shows gossip state, path, kernel entries, three pings, and the member's own report.
pub fn peers(PeersArgs { node, client }: &PeersArgs) -> ExitCode {
    let done = match node {
        Some(node) => {
            query_and_print(client, peer_details(client, node), |peer, _| peer_text(peer))
        }
        None => {
            let query = async {
                let status = api::get(&client.socket(), "/v1/status").await?;
                Ok(members_of(&status).filter(|member| member["me"] != true).collect())
            };
            query_and_print(client, query, |peers, wide| members_text(peers, wide, false))
        }
    };
    done.map_or_else(|code| code, |_| ExitCode::SUCCESS)
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

fn members_text(members: &Value, wide: bool, all: bool) -> String {
    let is_shown = |member: &&Value| all || is_current(member);
    let shown: Vec<&Value> = elements(members).filter(is_shown).collect();
    if elements(members).next().is_none() {
        return "this host has not joined a cluster yet: see `gossamer status`\n".to_owned();
    }
    let row = |member: &&Value| {
        let [state, path] = [state(member), path(&member["path"])];
        let subnets = list(&member["subnets"], wide);
        [label(member, wide), state, path, subnets, text(&member["address"])]
    };
    let mut out = if wide {
        let wide_row = |member: &&Value| {
            let [name, state, path, subnets, address] = row(member);
            let [node, free, mac] = ["node", "free", "vtep_mac"].map(|key| text(&member[key]));
            [name, node, state, path, subnets, free, address, mac]
        };
        let rows: Vec<_> = shown.iter().map(wide_row).collect();
        table(["NAME", "NODE", "STATE", "PATH", "SUBNET", "FREE", "ADDRESS", "VTEP MAC"], &rows)
    } else {
        let rows: Vec<_> = shown.iter().map(row).collect();
        table(["NAME", "STATE", "PATH", "SUBNET", "ADDRESS"], &rows)
    };
    out.push_str(&footnotes(members, &shown));
    out
}

/// Explains states that need an explanation, and says what is not shown.
fn footnotes(members: &Value, shown: &[&Value]) -> String {
    let has =
        |state: &str| shown.iter().any(|member| is_present(member) && member["liveness"] == state);
    let mut out = String::new();
    if has("suspect") {
        out.push_str("suspect: it has not answered, and counts as down unless it answers soon\n");
    }
    if has("down") {
        out.push_str(
            "down: its agent does not answer; start it, or `gossamer forget NAME` if it is gone for good\n",
        );
    }
    let bad = |member: &&&Value| {
        !matches!(member["path"]["state"].as_str(), None | Some("ok" | "unknown"))
    };
    if let Some(member) = shown.iter().find(bad) {
        let name = label(member, true);
        let _ = writeln!(out, "PATH: packets do not arrive; `gossamer ping {name}` says which");
    }
    let count = |which: &dyn Fn(&Value) -> bool| elements(members).filter(|m| which(m)).count();
    let hidden = elements(members).count() - shown.len();
    let former = count(&|member| member["former_self"] == true);
    if hidden > 0 {
        let gone = hidden - former.min(hidden);
        let parts = [(gone, "that left or were forgotten"), (former, "former selves of hosts")];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        let _ = writeln!(out, "not shown: {} (gossamer members --all)", parts.join(", "));
    }
    if former > 0 {
        out.push_str(
            "former selves keep their subnets: `gossamer forget --former-selves` reclaims them\n",
        );
    }
    out
}

fn state(member: &Value) -> String {
    match (&member["left"], &member["forgotten"], member["liveness"].as_str()) {
        (Value::Bool(true), _, _) => "left".to_owned(),
        (_, Value::Bool(true), _) => "forgotten".to_owned(),
        _ if member["former_self"] == true => doubtful("former self"),
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
