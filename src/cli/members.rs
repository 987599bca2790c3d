//! `gossamer members` and `gossamer peers`: list all members, and show one in detail.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    process::ExitCode,
};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Client,
    output::{
        bad, doubtful, good, list, name, or_dash, problem_text, query_and_print, table, wrapped,
        write_stdout,
    },
    percent_encoded,
    ping::has_pods,
};
use crate::{
    api::{
        self, AgentStatus, ClientError, EntryVerdict, KernelEntry, MatrixRow, Member, MemberState,
        PingReport, Reach, Routes,
    },
    model::{NodeId, PathState},
};

#[derive(Debug, Args)]
pub struct MembersArgs {
    /// Also show members that have left or were forgotten, and former selves of living hosts
    #[arg(long)]
    all: bool,
    /// Print only what commands accept as the name of another member, one a line, for shell completion
    #[arg(long, hide = true, conflicts_with = "all")]
    names: bool,
    #[command(flatten)]
    client: Client,
}

#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Name, id, beginning of the id, or address of a member [default: list the other members]
    node: Option<String>,
    #[command(flatten)]
    client: Client,
}

/// A member, and the path to it.
#[derive(Clone, Serialize, Deserialize)]
struct Listed {
    #[serde(flatten)]
    member: Member,
    /// `None` for this node, for members that are gone, and for members without a subnet.
    path: Option<Path>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Path {
    state: PathState,
    round_trip_ms: Option<f64>,
}

/// All that is known of one member.
#[derive(Serialize, Deserialize)]
struct Details {
    member: Listed,
    ping: PingReport,
    entries: Vec<KernelEntry>,
    report: Option<MatrixRow>,
}

pub fn members(args: &MembersArgs) -> ExitCode {
    let query = async { Ok(listed(status(&args.client).await?)) };
    let done = if args.names {
        super::block_on(query).map_err(super::fail).and_then(|members| {
            let members = members.map_err(super::fail)?;
            let others = members.iter().map(|listed| &listed.member);
            let others = others.filter(|member| member.is_present() && !member.me);
            write_stdout(&others.map(|member| format!("{}\n", member.label)).collect::<String>());
            Ok(members)
        })
    } else {
        query_and_print(&args.client, query, |all, wide| members_text(all, wide, args.all))
    };
    done.map_or_else(|code| code, |_| ExitCode::SUCCESS)
}

/// Shows gossip state, path, kernel entries, three pings, and the member's own report.
pub fn peers(PeersArgs { node, client }: &PeersArgs) -> ExitCode {
    let done = match node {
        Some(node) => {
            query_and_print(client, details(client, node), |peer, _| peer_text(peer)).map(drop)
        }
        None => {
            let query = async {
                let mut members = listed(status(client).await?);
                members.retain(|listed| !listed.member.me);
                Ok(members)
            };
            query_and_print(client, query, |peers, wide| members_text(peers, wide, false)).map(drop)
        }
    };
    done.map_or_else(|code| code, |()| ExitCode::SUCCESS)
}

async fn status(client: &Client) -> Result<AgentStatus, ClientError> {
    api::get_as(&client.socket(), "/v1/status").await
}

async fn details(client: &Client, node: &str) -> Result<Details, ClientError> {
    let socket = client.socket();
    let target = format!("/v1/ping?node={}", percent_encoded(node));
    let ping: PingReport = api::get_as(&socket, &target).await?;
    // From here on by id: names need not be unique.
    let report = api::get_as(&socket, &format!("/v1/peer?node={}", ping.node)).await?;
    let routes = api::get_as(&socket, "/v1/routes").await?;
    Details::of(ping, report, routes, status(client).await?)
}

impl Details {
    /// Selects what concerns the member that was pinged.
    ///
    /// # Errors
    /// Fails if the status does not contain that member.
    fn of(
        ping: PingReport,
        report: Option<MatrixRow>,
        routes: Routes,
        status: AgentStatus,
    ) -> Result<Self, ClientError> {
        let member = listed(status).into_iter().find(|listed| listed.member.node == ping.node);
        let member = member.ok_or_else(|| {
            let why = format!("{} ({}) is no member any more", ping.name, ping.node);
            ClientError::Refused { why, answer: Value::Null }
        })?;
        let mut entries = routes.entries;
        entries.retain(|entry| entry.node == Some(ping.node));
        Ok(Self { member, ping, entries, report })
    }
}

/// Adds to each member the state of the path to it.
fn listed(status: AgentStatus) -> Vec<Listed> {
    let paths = status.paths.iter();
    let path =
        |path: &api::PathStatus| Path { state: path.state, round_trip_ms: path.round_trip_ms };
    let paths: BTreeMap<NodeId, Path> = paths.map(|found| (found.node, path(found))).collect();
    let listed = |member: Member| {
        let path = paths.get(&member.node).filter(|_| member.is_present()).copied();
        Listed { member, path }
    };
    status.members.into_iter().map(listed).collect()
}

fn members_text(members: &[Listed], wide: bool, all: bool) -> String {
    if members.is_empty() {
        return "this host has not joined a cluster yet: see `gossamer status`\n".to_owned();
    }
    let is_shown = |listed: &&Listed| all || listed.member.is_current();
    let shown: Vec<&Listed> = members.iter().filter(is_shown).collect();
    let row = |Listed { member, path }: &&Listed| {
        let [state, path] = [state_text(member), path_text(*path)];
        let subnets = list(&member.subnets, wide);
        [name(&member.label, wide), state, path, subnets, member.address.to_string()]
    };
    let mut out = if wide {
        let wide_row = |listed: &&Listed| {
            let [name, state, path, subnets, address] = row(listed);
            let Member { node, free, vtep_mac, .. } = &listed.member;
            let [node, free, mac] = [node.to_string(), free.to_string(), vtep_mac.to_string()];
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
fn footnotes(members: &[Listed], shown: &[&Listed]) -> String {
    let has = |state| shown.iter().any(|listed| listed.member.state() == state);
    let mut out = String::new();
    if has(MemberState::Suspect) {
        out.push_str("suspect: it has not answered, and counts as down unless it answers soon\n");
    }
    if has(MemberState::Down) {
        out.push_str(
            "down: its agent does not answer; start it, or `gossamer forget NAME` if it is gone for good\n",
        );
    }
    // What to do about members that are down is said above.
    let is_bad = |listed: &&&Listed| {
        let is_up = listed.member.state() != MemberState::Down;
        is_up && listed.path.is_some_and(|path| path.state.is_problem())
    };
    if let Some(Listed { member, .. }) = shown.iter().find(is_bad) {
        let name = &member.label;
        let _ = writeln!(out, "PATH: for the broken direction, run `gossamer ping {name}`");
    }
    let hidden = members.len() - shown.len();
    let former = members.iter().filter(|listed| listed.member.former_self).count();
    if hidden > 0 {
        let gone = hidden - former.min(hidden);
        let parts = [
            (gone, "that left or were forgotten"),
            (former, if former == 1 { "former self of a host" } else { "former selves of hosts" }),
        ];
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

fn state_text(member: &Member) -> String {
    match member.state() {
        state if state.is_gone() => state.to_string(),
        _ if member.former_self => doubtful("former self"),
        _ if member.me => good("alive (me)"),
        state @ MemberState::Alive => good(state),
        MemberState::Unknown => "-".to_owned(),
        state => doubtful(state),
    }
}

fn path_text(path: Option<Path>) -> String {
    match path {
        None => "-".to_owned(),
        Some(Path { state: PathState::Ok, round_trip_ms: Some(span) }) => format!("{span:.1} ms"),
        Some(Path { state, .. }) if state.is_problem() => bad(state.name()),
        Some(Path { state, .. }) => state.name().to_owned(),
    }
}

fn peer_text(Details { member: listed, ping, entries, report }: &Details) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| _ = writeln!(out, "{name:<10} {value}");
    if let Some(problem) = &ping.problem {
        row(&bad("problem   "), wrapped(&problem_text(problem), 11));
    }
    let Listed { member, path } = listed;
    row("member", format!("{} ({})", member.name, member.node));
    let awaited =
        if member.awaited { ", kernel entries wait for a comparison with it" } else { "" };
    row("gossip", format!("{}{awaited}", state_text(member)));
    row("subnets", format!("{}, and {} free", list(&member.subnets, true), member.free));
    row("vtep", format!("{} at {}", member.vtep_mac, member.underlay));
    row("agent", reach_text(&ping.underlay));
    row("overlay", format!("{}, path {}", reach_text(&ping.overlay), path_text(*path)));
    // The gateway has its address from the first pod on.
    row("pods", if has_pods(ping) { reach_text(&ping.pods) } else { "no pods yet".to_owned() });
    for KernelEntry { table, key, wanted, verdict, .. } in entries {
        let verdict = match verdict {
            EntryVerdict::Same => good("in the kernel"),
            other => bad(other),
        };
        row(table, format!("{key} {}, {verdict}", or_dash(wanted.as_deref())));
    }
    let report = report.as_ref();
    match report.and_then(|report| Some((report, report.version.as_ref()?))) {
        None => row("reports", "nothing".to_owned()),
        Some((report, version)) => {
            let paths = report.paths.as_deref().unwrap_or_default();
            let ok = paths.iter().filter(|path| path.state == PathState::Ok).count();
            let (problems, all) = (or_dash(report.problems), paths.len());
            row(
                "reports",
                format!("version {version}, {problems} problems, {ok} of {all} paths ok"),
            );
        }
    }
    out
}

fn reach_text<A: Display>(Reach { to, round_trip_ms }: &Reach<A>) -> String {
    let Some(to) = to else { return "-".to_owned() };
    match round_trip_ms {
        Some(span) => format!("{to} {span:.2} ms"),
        None => format!("{to} {}", bad("no answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        core::NodeStatus,
        model::{Liveness, Problem, ProblemCode},
    };

    fn id(number: u64) -> NodeId {
        format!("{number:016x}").parse().expect("an id")
    }

    fn member(number: u64, liveness: Liveness) -> Member {
        Member {
            node: id(number),
            name: "twin".to_owned(),
            label: format!("twin~{number:04x}"),
            former_self: false,
            me: false,
            liveness: Some(liveness),
            left: false,
            forgotten: false,
            awaited: false,
            address: "192.0.2.1:8473".parse().expect("an address"),
            underlay: [192, 0, 2, 1].into(),
            vtep_mac: "02:00:00:00:00:01".parse().expect("a MAC"),
            subnets: vec![format!("10.42.{number}.0/24").parse().expect("a network")],
            free: 0,
        }
    }

    fn status(members: Vec<Member>) -> AgentStatus {
        let waits = Problem::new(ProblemCode::MemberDown, "n1", "waits", "");
        let node = NodeStatus::waiting(NodeId::UNKNOWN, "n1".parse().expect("a name"), waits);
        AgentStatus { members, ..AgentStatus::of(node) }
    }

    #[test]
    fn details_of_two_members_with_one_name_do_not_mix() {
        let status = status(vec![member(1, Liveness::Down), member(2, Liveness::Alive)]);
        let ping = PingReport {
            node: id(2),
            name: "twin".to_owned(),
            underlay: Reach::unanswered(None),
            overlay: Reach::unanswered(None),
            pods: Reach::unanswered(None),
            path: None,
            problem: None,
        };
        let entry = |number: u64| KernelEntry {
            table: "route".to_owned(),
            key: format!("10.42.{number}.0/24"),
            node: Some(id(number)),
            peer: Some("twin".to_owned()),
            wanted: None,
            found: Vec::new(),
            verdict: EntryVerdict::Missing,
        };
        let routes = Routes { entries: vec![entry(1), entry(2)] };
        let details = Details::of(ping, None, routes, status).expect("a member");
        let text = peer_text(&details);
        assert!(text.contains("twin (0000000000000002)"), "{text}");
        assert!(text.contains("10.42.2.0/24") && !text.contains("10.42.1.0/24"), "{text}");
        let json = serde_json::to_value(&details).expect("JSON");
        assert_eq!(json["member"]["node"], "0000000000000002");
        assert!(json["member"]["path"].is_null());
    }
}
