//! `gossamer status`: shows this node on one screen, problems first.

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::Value;

use super::{
    Client,
    leases::slots_text,
    output::{bad, doubtful, elements, good, problem_text, query_and_print, strong, text, wrapped},
};
use crate::api::{self, ClientError, Verdict};

/// Exit code if the condition of --wait does not hold.
const NOT_CONVERGED: u8 = 3;
/// Time limit of --wait without a value.
const DEFAULT_WAIT_SECONDS: u64 = 60;
/// Time after which --wait says what it waits for.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(500);
/// Time between two attempts to reach a socket that does not exist yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Columns before the text of each line.
const LABEL_COLUMNS: usize = 10;
/// Most names in one row.
const MAX_NAMES: usize = 5;

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Wait up to SECONDS (60 if no value is given) for the agent to start and to converge
    #[arg(long, num_args = 0..=1, default_missing_value = "60", value_name = "SECONDS")]
    wait: Option<u64>,
    /// Also wait until COUNT members are alive, including this one (implies --wait)
    #[arg(long, value_name = "COUNT")]
    members: Option<usize>,
    #[command(flatten)]
    client: Client,
}

impl StatusArgs {
    /// Returns the seconds to wait; `None` without --wait and --members.
    fn wait(&self) -> Option<u64> {
        self.wait.or(self.members.map(|_| DEFAULT_WAIT_SECONDS))
    }

    /// Returns the number of live members to wait for.
    fn members(&self) -> usize {
        self.members.unwrap_or(1)
    }
}

/// Returns the exit code of the verdict; with --wait 0 if the node has converged and enough members are
/// alive, and 3 if not.
pub fn status(args: &StatusArgs) -> ExitCode {
    match query_and_print(&args.client, query_status(args), status_text) {
        Ok(answer) => match args.wait() {
            None => exit_code(&answer),
            Some(seconds) => match unmet(&answer, args.members()) {
                None => ExitCode::SUCCESS,
                Some(why) => {
                    eprintln!("gossamer: gave up after {seconds} s: {why}");
                    ExitCode::from(NOT_CONVERGED)
                }
            },
        },
        Err(code) => {
            if let Some(seconds) = args.wait() {
                eprintln!("gossamer: gave up after {seconds} s: no agent has answered");
            }
            code
        }
    }
}

/// Returns the exit code of the verdict. Earlier agents have none.
fn exit_code(status: &Value) -> ExitCode {
    let verdict = serde_json::from_value::<Verdict>(status["verdict"].clone());
    match verdict {
        Ok(verdict) => ExitCode::from(verdict.exit_code()),
        Err(_) if status["converged"] == true => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(NOT_CONVERGED),
    }
}

/// Returns what --wait still waits for; `None` if nothing.
fn unmet(status: &Value, members: usize) -> Option<String> {
    let alive = alive(status);
    if alive < members {
        return Some(format!("{alive} of {members} members are alive"));
    }
    if status["converged"] == true {
        return None;
    }
    let verdict = &status["verdict"];
    Some(if verdict["state"] == "not-ready" {
        text(&verdict["text"])
    } else if status["kernel"]["in_sync"] != true {
        "not converged: the kernel does not equal this node's view".to_owned()
    } else if status["settled"] != true {
        "not converged: the state differs from that of other members".to_owned()
    } else {
        "not converged".to_owned()
    })
}

/// Queries the status. With `--wait` it also waits for the socket: the agent may have been started just
/// now.
async fn query_status(args: &StatusArgs) -> Result<Value, ClientError> {
    let socket = &args.client.socket();
    let Some(seconds) = args.wait() else { return api::get(socket, "/v1/status").await };
    let members = args.members();
    let target = format!("/v1/status?wait={seconds}&members={members}");
    let patience = Duration::from_secs(seconds);
    let answered = tokio::time::timeout(patience, async {
        loop {
            match api::get(socket, &target).await {
                // `NoAnswer`: the agent restarts its work, as after reset-identity.
                Err(ClientError::NoAgent { .. } | ClientError::NoAnswer) => {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
                answer => return answer,
            }
        }
    });
    // A wait that ends immediately needs no message.
    let announced = async {
        tokio::time::sleep(ANNOUNCE_AFTER).await;
        let socket = socket.display();
        let more =
            if members > 1 { format!(" with {members} members alive") } else { String::new() };
        eprintln!(
            "gossamer: waiting up to {seconds} s for the agent at {socket} to converge{more}"
        );
        std::future::pending::<()>().await;
    };
    let answered = tokio::select! {
        answered = answered => answered,
        () = announced => return Err(ClientError::NoAnswer),
    };
    match answered {
        Ok(answer) => answer,
        // The agent answers by itself when the time is over; its answer may be slightly late.
        Err(_) => api::get(socket, "/v1/status").await,
    }
}

fn status_text(status: &Value, wide: bool) -> String {
    let mut out = String::new();
    for problem in elements(&status["problems"]) {
        let words = wrapped(&problem_text(problem), LABEL_COLUMNS);
        let _ = writeln!(out, "{}   {words}", bad("problem"));
    }
    for notice in elements(&status["notices"]) {
        let words = wrapped(&problem_text(notice), LABEL_COLUMNS);
        let _ = writeln!(out, "{}    {words}", doubtful("notice"));
    }
    let (alive, known) = (alive(status), count(status, |_| true));
    let verdict = &status["verdict"];
    let state = match verdict["state"].as_str() {
        Some("healthy") => good(text(&verdict["text"])),
        Some("degraded") => doubtful(text(&verdict["text"])),
        _ => bad(text(&verdict["text"])),
    };
    let kernel = &status["kernel"];
    let in_sync = if kernel["in_sync"] == true { "in sync" } else { "not in sync" };
    let pool = &status["settings"]["pool"];
    let of_network = |subnet: &Value, network: &Value| match subnet {
        Value::Null => String::new(),
        subnet => format!("{} of {}", text(subnet), text(network)),
    };
    let node = strong(text(&status["name"]));
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:<9} {value}");
        }
    };
    row("node", format!("{node} ({})", text(&status["node"])));
    row("state", state);
    row("cluster", text(&status["cluster"]));
    row("subnet", of_network(&status["subnet"], &pool["network"]));
    row("", of_network(&status["subnet6"], &pool["network6"]));
    row("members", format!("{alive} alive of {known}{}", members_not_alive(status)));
    row("paths", paths(status));
    row("slots", slots_text(&status["slots"]));
    for node in elements(&status["reclaiming"]) {
        row("reclaims", reclaims(node));
    }
    let interface = text(&kernel["underlay_interface"]);
    row(
        "underlay",
        match interface.as_str() {
            "" => "none".to_owned(),
            interface => format!("{} on {interface}", text(&kernel["underlay_address"])),
        },
    );
    row("kernel", format!("{}, mtu {}, {in_sync}", text(&kernel["device"]), kernel["mtu"]));
    row("repairs", repairs(kernel));
    row("pods", text(&status["pods"]));
    if wide {
        row("version", text(&status["version"]));
        row("converged", text(&status["converged"]));
        row("links", format!("{} connections to members", status["connections"]));
    }
    out
}

/// Lists members that are not alive, grouped by state.
fn members_not_alive(status: &Value) -> String {
    let mut by_state: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for member in elements(&status["members"]) {
        if is_present(member) && member["liveness"] != "alive" {
            let state = member["liveness"].as_str().unwrap_or("unknown");
            by_state.entry(state.to_owned()).or_default().push(text(&member["name"]));
        }
    }
    let texts = by_state.iter().map(|(state, names)| format!(", {state}: {}", first_names(names)));
    texts.map(doubtful).collect()
}

fn paths(status: &Value) -> String {
    let mut by_state: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in elements(&status["paths"]) {
        by_state.entry(text(&path["state"])).or_default().push(text(&path["name"]));
    }
    let ok = by_state.remove("ok").unwrap_or_default().len();
    let unknown = by_state.remove("unknown").unwrap_or_default().len();
    if ok + unknown + by_state.len() == 0 {
        return String::new();
    }
    let mut line = format!("{ok} ok");
    if unknown > 0 {
        let _ = write!(line, ", {unknown} not known yet");
    }
    for (state, names) in by_state {
        let _ = write!(line, ", {}", bad(format_args!("{state}: {}", first_names(&names))));
    }
    line
}

fn reclaims(node: &Value) -> String {
    let waits = match &node["waits_for"] {
        Value::Array(missing) if missing.is_empty() => "all have acknowledged".to_owned(),
        Value::Array(missing) => {
            let names: Vec<String> = missing.iter().map(text).collect();
            format!("waits for {}", first_names(&names))
        }
        _ => format!("by {}", text(&node["successor"])),
    };
    format!("{} subnets of {}, forgotten: {waits}", node["slots"], text(&node["name"]))
}

fn repairs(kernel: &Value) -> String {
    let kinds = kernel["repairs"].as_object().into_iter().flatten();
    let kinds: Vec<String> = kinds.map(|(kind, count)| format!("{count} x {kind}")).collect();
    kinds.join(", ")
}

/// Formats the first names and the number of the others.
fn first_names(names: &[String]) -> String {
    let shown = names.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_NAMES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn alive(status: &Value) -> usize {
    count(status, |member| member["liveness"] == "alive")
}

fn count(status: &Value, which: impl Fn(&Value) -> bool) -> usize {
    elements(&status["members"]).filter(|member| is_present(member) && which(member)).count()
}

/// Returns whether a member has neither left nor been forgotten.
pub fn is_present(member: &Value) -> bool {
    member["left"] == false && member["forgotten"] == false
}
