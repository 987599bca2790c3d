//! Checks of the cluster as the agent sees it; without an agent, whether its members could be joined.

use std::{collections::BTreeMap, path::Path};

use super::{Agent, Examination, Finding, seeds::check_seeds};
use crate::{
    api::{
        AgentStatus, EntryVerdict, Event, KernelEntry, KernelStatus, Member, MemberState,
        PathStatus, VerdictState,
    },
    model::{CallError, PathState, own_address_problem, seed_failure},
    runtime::block_on,
    store::{StateDir, read_keyring, read_token},
    underlay::is_own_address,
    wire::{Keyring, Token, visible},
};

/// A member with this many "down" events among the stored ones is reported as flapping.
const DOWNS_UNTIL_FLAPPING: usize = 3;

/// Why a check of members finds nothing to check.
const NO_CLUSTER: &str = "this host has not joined a cluster yet";
/// Why a check of paths finds nothing to check.
const NO_PEER: &str = "no other member has a subnet yet";

/// Runs the checks of the cluster.
pub fn examine(examination: &Examination, findings: &mut Vec<Finding>) {
    let Some(agent) = &examination.agent else {
        findings.push(no_agent(examination));
        findings.extend(seeds(examination));
        return;
    };
    let Agent { status, routes, events, .. } = agent;
    if !examination.has_report("seeds") {
        findings.push(connections(status));
    }
    let has_peers = !status.paths.is_empty();
    let is_told = ["agent", "seeds"].iter().any(|check| examination.has_problem(check));
    let mut of_agent = state_of_agent(status, is_told, &examination.instance().directory());
    if of_agent.is_empty() && !examination.has_problem("agent") {
        of_agent.push(match status.subnet {
            Some(subnet) => Finding::ok("agent", format!("converged, with {subnet}")),
            None => Finding::skipped("agent", format!("it is {}", status.phase.name())),
        });
    }
    findings.extend(of_agent);
    let flapping = flapping(events);
    if flapping.is_empty() && !examination.has_problem("members") {
        findings.push(match status.members_alive() {
            0 => Finding::skipped("members", NO_CLUSTER),
            alive => Finding::ok("members", format!("{alive} alive")),
        });
    }
    findings.extend(flapping);
    if !examination.has_problem("paths") {
        findings.push(paths(status));
    }
    findings.extend(addresses(status));
    if !examination.has_report("identity") {
        findings.push(Finding::ok("identity", format!("this node alone is {}", status.node)));
    }
    findings.push(match has_peers {
        true => offload(&status.kernel),
        false => Finding::skipped("offload", NO_PEER),
    });
    findings.push(tables(routes.as_deref()));
}

fn no_agent(examination: &Examination) -> Finding {
    if !examination.is_set_up() {
        return Finding::skipped("agent", "none was set up on this host");
    }
    let has_run =
        examination.config.as_ref().map_or(true, |config| StateDir::is_known(&config.state_dir));
    Finding::problem(
        "agent",
        examination.agent_error.clone().unwrap_or_else(|| "no agent answers".to_owned()),
        match has_run {
            true => {
                "its kernel entries keep working, but nothing is repaired and new members are not reached"
            }
            false => {
                "this host has no subnet until an agent has started, so no pod can be connected"
            }
        },
        format!(
            "start it: systemctl start {}, or gossamer agent{}",
            examination.instance().directory(),
            examination.instance().option()
        ),
    )
    .refused_if(examination.is_agent_refused)
}

/// Says how many members this host is connected to. Why no seed admits it is a problem of the agent.
fn connections(status: &AgentStatus) -> Finding {
    match status.cluster {
        Some(_) => Finding::ok("seeds", format!("{} connections to members", status.connections)),
        None => Finding::skipped("seeds", "no member has admitted this host yet"),
    }
}

/// Returns what is wrong with the agent as a whole. `is_told`: it reports why it has not converged.
fn state_of_agent(status: &AgentStatus, is_told: bool, unit: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !status.converged && !is_told {
        let is_ready = status.verdict.state != VerdictState::NotReady;
        // After a change, the agent of a ready node converges within a moment.
        let unfinished = if is_ready { Finding::notice } else { Finding::problem };
        findings.push(unfinished(
            "agent",
            &format!("it has not converged (it is {})", status.phase.name()),
            "until then some members cannot reach its pods",
            "run gossamer status --wait; then check its log",
        ));
    }
    if status.version != env!("CARGO_PKG_VERSION") {
        findings.push(Finding::notice(
            "agent",
            format!("it runs version {}, this is {}", status.version, env!("CARGO_PKG_VERSION")),
            "the program was replaced, and the agent still runs the old one",
            format!("restart it, which interrupts no traffic: systemctl restart {unit}"),
        ));
    }
    findings
}

/// Returns a notice for each member that went down repeatedly.
fn flapping(events: &[Event]) -> Vec<Finding> {
    let mut downs: BTreeMap<&str, usize> = BTreeMap::new();
    let changes = events.iter().filter_map(|event| event.member.as_ref());
    for change in changes.filter(|change| change.state == MemberState::Down) {
        *downs.entry(&change.name).or_default() += 1;
    }
    let often = downs.into_iter().filter(|(_, count)| *count >= DOWNS_UNTIL_FLAPPING);
    let finding = |(name, count)| {
        Finding::notice(
            "members",
            format!("{name} was down {count} times"),
            "likely causes are a bad link, an overloaded host, or an agent that crashes",
            format!("gossamer events; on {name}: journalctl -u gossamer; gossamer ping {name}"),
        )
    };
    often.map(finding).collect()
}

/// Returns how many paths work, if the agent reports none.
fn paths(status: &AgentStatus) -> Finding {
    // If packets of pods pass, only probes of that host are dropped, which affects no pod.
    let is_ok = |path: &&PathStatus| path.state == PathState::Ok || path.pods_answer;
    let is_bad = |path: &&PathStatus| !is_ok(path) && path.state != PathState::Unknown;
    let ok = status.paths.iter().filter(is_ok).count();
    let count = format!("{ok} of {} ok", status.paths.len());
    // Another check has reported the cause.
    if status.paths.is_empty() {
        return Finding::skipped("paths", NO_PEER);
    }
    let Some(path) = status.paths.iter().find(is_bad) else { return Finding::ok("paths", count) };
    let member = status.members.iter().find(|member| member.node == path.node);
    let name = member.map_or(&path.name, |member| &member.label);
    let state = path.state.name();
    let why = match path.state {
        // Mixed modes may be intentional.
        PathState::Asymmetric => {
            "its answers arrive through the tunnel, packets to it go without one, as with several modes in \
             one cluster. rp_filter, or a rule with rpfilter or fib, may drop that: set the same mode on \
             all nodes"
        }
        _ => "see the other checks",
    };
    Finding::skipped("paths", format!("{count}, {name} is {state}: {why}"))
}

/// What members must not share: its name, and its value.
type SharedField = (&'static str, fn(&Member) -> String);

fn addresses(status: &AgentStatus) -> Vec<Finding> {
    let mut findings = Vec::new();
    let keys: [SharedField; 3] = [
        ("address", |member| member.address.to_string()),
        ("underlay address", |member| member.underlay.to_string()),
        ("name", |member| member.name.clone()),
    ];
    for (what, key) in keys {
        let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
        // A notice of the agent is about former selves.
        for member in status.members.iter().filter(|member| member.is_current()) {
            holders.entry(key(member)).or_default().push(member.label.clone());
        }
        for (value, holders) in holders.into_iter().filter(|(_, holders)| holders.len() > 1) {
            let who = holders.join(", ");
            let gone = "if one of them is gone for good: gossamer forget, with the name shown here";
            findings.push(match what {
                "name" => Finding::notice(
                    "addresses",
                    format!("{} members are called {value}: {who}", holders.len()),
                    "commands that take a name cannot tell them apart",
                    format!("{gone}; otherwise set node_name"),
                ),
                _ => Finding::problem(
                    "addresses",
                    format!("{} members have the {what} {value}: {who}", holders.len()),
                    "packets for one reach the other",
                    format!("{gone}; otherwise set advertise on each"),
                ),
            });
        }
        if what == "underlay address" && !findings.is_empty() {
            // The gossip address contains the same address, which is already reported.
            findings.dedup_by_key(|finding| finding.verdict);
        }
    }
    if status.members.is_empty() {
        findings.push(Finding::skipped("addresses", NO_CLUSTER));
    } else if findings.is_empty() {
        findings.push(Finding::ok("addresses", "each member has its own address and name"));
    }
    findings
}

fn offload(kernel: &KernelStatus) -> Finding {
    if kernel.checksum_offload_fails {
        return Finding::notice(
            "offload",
            "packets whose checksums were left to the network card did not arrive",
            "the kernel computes them since then, which costs some throughput",
            format!(
                "update the driver or firmware of {}, then restart the agent",
                kernel.underlay_interface
            ),
        );
    }
    Finding::ok("offload", "checksums arrive correctly")
}

fn tables(routes: Option<&[KernelEntry]>) -> Finding {
    let Some(routes) = routes else {
        return Finding::skipped("tables", "the agent did not list its kernel entries");
    };
    let differ: Vec<&KernelEntry> =
        routes.iter().filter(|entry| entry.verdict != EntryVerdict::Same).collect();
    match differ.first() {
        None if routes.is_empty() => Finding::skipped("tables", NO_PEER),
        None => Finding::ok("tables", format!("{} entries, all correct", routes.len())),
        Some(first) => Finding::problem(
            "tables",
            format!(
                "{} entries of the kernel differ, the first: {} {} is {}",
                differ.len(),
                first.table,
                first.key,
                first.verdict
            ),
            "another program changes them faster than the agent repairs them, or the kernel refuses them",
            "gossamer routes --differences; see what else manages routes here (NetworkManager, FRR)",
        ),
    }
}

/// Checks whether the configured or saved seeds can be joined.
fn seeds(examination: &Examination) -> Vec<Finding> {
    let Ok(config) = &examination.config else { return Vec::new() };
    // The agent falls back on the saved token, too.
    let saved = read_token(&config.state_dir).ok().flatten();
    let mut seeds = config.seeds.clone();
    if seeds.is_empty() {
        seeds.extend(saved.iter().flat_map(|token| token.seeds.clone()));
    }
    if seeds.is_empty() {
        return vec![Finding::skipped("seeds", "none configured, none known")];
    }
    let Some(token) = config.token.as_ref().or(saved.as_ref()) else {
        return vec![Finding::skipped("seeds", "without a token none of them answers")];
    };
    let secrets = secrets(&config.state_dir, token);
    let answers = match block_on(check_seeds(&seeds, secrets.accepted())) {
        Ok(Ok(answers)) => answers,
        Ok(Err(error)) => return vec![Finding::skipped("seeds", error.to_string())],
        Err(error) => return vec![Finding::skipped("seeds", error.to_string())],
    };
    let mut findings = Vec::new();
    let reached = answers.iter().filter(|(_, answer)| answer.is_ok()).count();
    for (seed, answer) in answers {
        let Err(error) = answer else { continue };
        let (why, fix) = match error {
            CallError::OtherSecret(_) => {
                ("it does not admit this host", "copy the token again: on a member, gossamer token")
            }
            CallError::Rejected(_) => {
                ("it does not admit this host", "install the same version of gossamer on both")
            }
            CallError::Unresolved { .. } => (
                "a host needs one reachable member to join",
                "check DNS or /etc/hosts (getent ahosts NAME), or name a member by its address",
            ),
            CallError::NoRoute { .. } => (
                "a host needs one reachable member to join",
                "give this host an address of that family, or join by an address of its own family",
            ),
            CallError::Unreachable(_) | CallError::Myself => (
                "a host needs one reachable member to join",
                "see that its agent runs and that UDP is open there: allow the port in both firewalls",
            ),
        };
        if is_own_address(&seed) {
            let of_token = token.seeds.contains(&seed);
            findings.push(Finding::of("seeds", &own_address_problem(&[&seed], of_token)));
            continue;
        }
        let seen = visible(&seed_failure(&seed, &error.to_string()));
        // One reachable seed is enough.
        findings.push(match reached {
            0 => Finding::problem("seeds", seen, why, fix),
            _ => Finding::notice("seeds", seen, why, fix),
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok("seeds", format!("{reached} answered and accepted the secret")));
    }
    findings
}

/// Returns the secrets with which the agent would start: the saved ones, which a rotation changes, and the
/// token's unless it is outdated.
fn secrets(state_dir: &Path, token: &Token) -> Keyring {
    Keyring::with_token(read_keyring(state_dir).ok().flatten(), &token.secret)
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};
    use crate::{
        api::{EventKind, EventLevel, MemberChange},
        core::NodeStatus,
        model::{ClusterId, Liveness, NodeId, Problem, ProblemCode},
        wire::{Secret, SecretOrder},
    };

    fn member(name: &str, address: &str) -> Member {
        let address: std::net::SocketAddr = address.parse().expect("an address");
        Member {
            node: NodeId::UNKNOWN,
            name: name.to_owned(),
            label: name.to_owned(),
            former_self: false,
            me: false,
            liveness: Some(Liveness::Alive),
            left: false,
            forgotten: false,
            awaited: false,
            address,
            underlay: address.ip(),
            vtep_mac: "02:00:00:00:00:01".parse().expect("a MAC"),
            subnets: Vec::new(),
            free: 0,
        }
    }

    fn status(members: Vec<Member>) -> AgentStatus {
        let problem = Problem::new(ProblemCode::Starting, Problem::HOST, "starting", "");
        let node = NodeStatus::waiting(NodeId::UNKNOWN, "n1".parse().expect("a name"), problem);
        AgentStatus { members, problems: Vec::new(), converged: true, ..AgentStatus::of(node) }
    }

    fn is_bad(finding: &Finding, words: &str) -> bool {
        finding.verdict > Verdict::Skipped && finding.seen.contains(words)
    }

    #[test]
    fn secrets_are_those_of_the_state_directory_after_a_rotation() {
        let directory = tempfile::tempdir().expect("tempdir");
        let of = |byte| Secret::new(vec![byte; 32]).expect("long enough");
        let token = Token { cluster: ClusterId::UNKNOWN, secret: of(1), seeds: Vec::new() };
        let used = |token| secrets(directory.path(), token).in_use().id();
        assert_eq!(used(&token), of(1).id());
        let mut rotated = Keyring::new(of(1));
        rotated.apply(&SecretOrder::Add(of(2))).expect("added");
        rotated.apply(&SecretOrder::Use(of(2).id())).expect("used");
        let path = directory.path().join("secrets");
        std::fs::write(path, rotated.to_string()).expect("written");
        assert_eq!(used(&token), of(2).id(), "the token file is older");
    }

    #[test]
    fn shared_address_or_name_is_reported_once() {
        let of = |first, second| addresses(&status(vec![first, second]));
        let found = of(member("a", "192.0.2.1:8473"), member("b", "192.0.2.1:8473"));
        assert!(found.len() == 1 && is_bad(&found[0], "the address 192.0.2.1:8473"), "{found:?}");
        // Two members behind one address with two ports.
        let found = of(member("a", "192.0.2.1:1"), member("b", "192.0.2.1:2"));
        assert!(found.len() == 1 && is_bad(&found[0], "the underlay address"), "{found:?}");
        let found = of(member("a", "192.0.2.1:8473"), member("a", "192.0.2.2:8473"));
        assert!(found.len() == 1 && is_bad(&found[0], "are called a"), "{found:?}");
        let found = of(member("a", "192.0.2.1:8473"), member("b", "192.0.2.2:8473"));
        assert_eq!(found[0].verdict, Verdict::Ok);
    }

    #[test]
    fn flapping_member_is_reported() {
        let (name, state) = ("a".to_owned(), MemberState::Down);
        let down = Event {
            number: 1,
            at: 0.0,
            kind: EventKind::Member,
            level: EventLevel::Warn,
            text: String::new(),
            member: Some(MemberChange { node: NodeId::UNKNOWN, name, state }),
        };
        let found = |count| flapping(&vec![down.clone(); count]);
        assert_eq!(found(DOWNS_UNTIL_FLAPPING - 1), []);
        assert!(is_bad(&found(DOWNS_UNTIL_FLAPPING)[0], "a was down 3 times"));
    }

    #[test]
    fn bad_offload_and_wrong_entries_are_reported() {
        let kernel = KernelStatus { checksum_offload_fails: true, ..KernelStatus::default() };
        assert!(is_bad(&offload(&kernel), "checksums"));
        let [table, key] = ["fdb", "aa"].map(str::to_owned);
        let (node, peer, wanted, found) = (None, None, None, Vec::new());
        let verdict = EntryVerdict::Missing;
        let entry = KernelEntry { table, key, node, peer, wanted, found, verdict };
        assert!(is_bad(&tables(Some(&[entry])), "fdb aa is missing"));
        assert!(matches!(tables(None).verdict, Verdict::Skipped));
    }
}
