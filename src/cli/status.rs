//! `gossamer status`: shows this node on one screen, problems first.

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode, time::Duration};

use clap::Args;
use ipnet::IpNet;
use serde_json::Value;

use super::{
    Client, fail, get_once_started,
    output::{
        bad, doubtful, first_names, good, problem_text, strong, without_control_chars, wrapped,
    },
};
use crate::{
    api::{
        self, AgentStatus, ApiError, ClientError, Member, MemberState, Reclaiming, SlotCounts,
        Verdict, VerdictState,
    },
    model::PathState,
    runtime::block_on,
};

/// Exit code if the condition of --wait does not hold.
const NOT_CONVERGED: u8 = 3;
/// Time limit of --wait without a value.
const DEFAULT_WAIT_SECONDS: u64 = 60;
/// Time after which --wait says what it waits for.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(500);
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
    /// Exit with 0 if the verdict is healthy or degraded, and with 3 if it is not ready (for readiness
    /// probes)
    #[arg(long, conflicts_with_all = ["wait", "members"])]
    ready: bool,
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

/// Returns the exit code of the verdict; with --ready 0 also for a degraded node; with --wait 0 if the
/// node has converged and enough members are alive, and 3 if not.
pub fn status(args: &StatusArgs) -> ExitCode {
    let (answer, status) = match block_on(query_status(args)) {
        Ok(Ok(answered)) => answered,
        Ok(Err(error)) => return failed(args, &error),
        Err(error) => return fail(error),
    };
    args.client.output.print_visible(&answer, |wide| status_text(&status, wide));
    let Some(seconds) = args.wait() else {
        return match (args.ready, status.verdict.state) {
            (true, VerdictState::Degraded) => ExitCode::SUCCESS,
            _ => ExitCode::from(status.verdict.exit_code()),
        };
    };
    match unmet(&status, args.members()) {
        None => ExitCode::SUCCESS,
        Some(why) => {
            eprintln!("gossamer: gave up after {seconds} s: {why}");
            ExitCode::from(NOT_CONVERGED)
        }
    }
}

/// Prints why there is no answer, and returns exit code 1.
fn failed(args: &StatusArgs, error: &ClientError) -> ExitCode {
    match args.wait() {
        Some(seconds) => fail(format!("gave up after {seconds} s: {error}")),
        None => fail(error),
    }
}

/// Returns what --wait still waits for; `None` if nothing.
fn unmet(status: &AgentStatus, members: usize) -> Option<String> {
    let alive = status.members_alive();
    if status.converged && alive >= members {
        return None;
    }
    Some(if status.verdict.state == VerdictState::NotReady {
        status.verdict.to_string()
    } else if alive < members {
        format!("{alive} of {members} members are alive")
    } else if !status.kernel.in_sync {
        "not converged: the kernel differs from the desired state".to_owned()
    } else if !status.settled {
        "not converged: the state differs from that of other members".to_owned()
    } else {
        "not converged".to_owned()
    })
}

/// Queries the status, as the agent sent it and as a type. With `--wait` it also waits for the socket: the
/// agent may have been started just now.
async fn query_status(args: &StatusArgs) -> Result<(Value, AgentStatus), ClientError> {
    let answer = query_answer(args).await?;
    let shown = without_control_chars(&answer);
    let status = api::typed(&args.client.socket(), "/v1/status", shown).await?;
    Ok((answer, status))
}

async fn query_answer(args: &StatusArgs) -> Result<Value, ClientError> {
    let socket = &args.client.socket();
    let Some(seconds) = args.wait() else { return api::get(socket, "/v1/status").await };
    let members = args.members();
    let target = format!("/v1/status?wait={seconds}&members={members}");
    let patience = Duration::from_secs(seconds);
    let answered = tokio::time::timeout(patience, get_once_started(socket, &target));
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
        () = announced => return Err(ClientError::NoAnswer(ApiError::unanswered())),
    };
    match answered {
        Ok(answer) => answer,
        // The agent answers by itself when the time is over; its answer may be slightly late.
        Err(_) => api::get(socket, "/v1/status").await,
    }
}

fn status_text(status: &AgentStatus, wide: bool) -> String {
    let mut out = String::new();
    for problem in &status.problems {
        let words = wrapped(&problem_text(problem), LABEL_COLUMNS);
        let _ = writeln!(out, "{}   {words}", bad("problem"));
    }
    for notice in &status.notices {
        let words = wrapped(&problem_text(notice), LABEL_COLUMNS);
        let _ = writeln!(out, "{}    {words}", doubtful("notice"));
    }
    let AgentStatus { verdict, kernel, settings, .. } = status;
    let in_sync = if kernel.in_sync { "in sync" } else { "not in sync" };
    let networks = settings.iter().flat_map(|settings| settings.pool.networks().iter());
    let networks: Vec<IpNet> = networks.collect();
    let of_network = |subnet: Option<IpNet>| match subnet {
        None => String::new(),
        Some(subnet) => {
            let is_around = |network: &&IpNet| network.contains(&subnet);
            let network = networks.iter().find(is_around).map_or("-".to_owned(), IpNet::to_string);
            format!("{subnet} of {network}")
        }
    };
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:<9} {value}");
        }
    };
    row("node", format!("{} ({})", strong(&status.name), status.node));
    row("state", painted_verdict(verdict, LABEL_COLUMNS));
    row("cluster", status.cluster.map_or("-".to_owned(), |cluster| cluster.to_string()));
    row("subnet", of_network(status.subnet));
    row("", of_network(status.subnet6));
    let (alive, known) = (status.members_alive(), present(status).count());
    row("members", format!("{alive} alive of {known}{}", members_not_alive(status)));
    row("paths", paths(status));
    let SlotCounts { leased, free, total, .. } = status.slots;
    row("slots", format!("{leased} leased, {free} free of {total}"));
    for node in &status.reclaiming {
        row("reclaims", reclaims(node, status));
    }
    let underlay = kernel.underlay_address.filter(|_| !kernel.underlay_interface.is_empty());
    row(
        "underlay",
        underlay.map_or("none".to_owned(), |address| {
            format!("{address} on {}", kernel.underlay_interface)
        }),
    );
    let device = kernel.device.as_deref().unwrap_or("-");
    row("kernel", format!("{device}, mtu {}, {in_sync}", kernel.mtu));
    let repairs = kernel.repairs.iter().map(|(kind, count)| format!("{count} x {kind}"));
    row("repairs", repairs.collect::<Vec<_>>().join(", "));
    row("pods", status.pods.to_string());
    if wide {
        row("version", status.version.clone());
        row("phase", status.phase.name().to_owned());
        row("converged", if status.converged { "yes" } else { "no" }.to_owned());
        row("connected", format!("to {} of the members", status.connections));
    }
    out
}

/// Formats a verdict in the color of its state. Every line but the first is indented.
pub fn painted_verdict(verdict: &Verdict, indent: usize) -> String {
    let words = wrapped(&verdict.text, indent);
    match verdict.state {
        VerdictState::Healthy => good(words),
        VerdictState::Degraded => doubtful(words),
        VerdictState::NotReady => bad(words),
    }
}

fn present(status: &AgentStatus) -> impl Iterator<Item = &Member> {
    status.members.iter().filter(|member| member.is_current())
}

/// Lists members that are not alive, grouped by state.
fn members_not_alive(status: &AgentStatus) -> String {
    let mut by_state: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for member in present(status).filter(|member| member.state() != MemberState::Alive) {
        by_state.entry(member.state().to_string()).or_default().push(member.label.clone());
    }
    let texts = by_state
        .iter()
        .map(|(state, names)| format!(", {state}: {}", first_names(names, MAX_NAMES)));
    texts.map(doubtful).collect()
}

fn paths(status: &AgentStatus) -> String {
    let mut by_state: BTreeMap<PathState, Vec<String>> = BTreeMap::new();
    for path in &status.paths {
        let member = status.members.iter().find(|member| member.node == path.node);
        // A notice is about former selves.
        if member.is_none_or(|member| !member.former_self) {
            let name = member.map_or(&path.name, |member| &member.label);
            by_state.entry(path.state).or_default().push(name.clone());
        }
    }
    let ok = by_state.remove(&PathState::Ok).unwrap_or_default().len();
    let unknown = by_state.remove(&PathState::Unknown).unwrap_or_default().len();
    if ok + unknown + by_state.len() == 0 {
        return String::new();
    }
    let mut line = format!("{ok} ok");
    if unknown > 0 {
        let _ = write!(line, ", {unknown} not known yet");
    }
    for (state, names) in by_state {
        let state = state.name();
        let _ =
            write!(line, ", {}", bad(format_args!("{state}: {}", first_names(&names, MAX_NAMES))));
    }
    line
}

fn reclaims(node: &Reclaiming, status: &AgentStatus) -> String {
    let waits = match &node.waits_for {
        Some(missing) if missing.is_empty() => "all have acknowledged".to_owned(),
        Some(missing) => format!("waits for {}", first_names(missing, MAX_NAMES)),
        None => {
            let successor = status.members.iter().find(|member| member.node == node.successor);
            successor.map_or_else(
                || format!("by {}", node.successor),
                |successor| format!("by {}", successor.name),
            )
        }
    };
    format!("{} subnets of {}, forgotten: {waits}", node.slots, node.name)
}
