//! `gossamer doctor`: checks everything that may make a host's pods unreachable.
//!
//! Works with and without a running agent, and changes nothing on the host. Each finding says what was
//! seen; problems and notices also say why it matters and what to do. What only the agent knows is
//! queried over its control socket.

mod agent_problems;
mod bundle;
mod cluster;
mod firewall;
mod host;
mod routing;
mod seeds;
mod state;

use std::{collections::BTreeSet, io, path::PathBuf};

use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::{
    api::{self, AgentStatus, Event, KernelEntry, VerdictState},
    config::{Config, ConfigError, DEFAULT_VXLAN_PORT, Instance, default_network},
    model::{Problem, ProblemCode, Severity},
    store::StateDir,
};

pub use bundle::write as write_bundle;

/// The checks with their descriptions, in output order.
pub const CHECKS: [(&str, &str); 23] = [
    ("configuration", "settings that contradict each other or cannot be read"),
    ("privileges", "capabilities that the agent needs"),
    ("kernel", "VXLAN, veth, bridges and nftables, tried in a separate namespace"),
    ("underlay", "the interface that carries the tunnels, and its address"),
    ("sysctls", "forwarding and reverse path filters"),
    ("ports", "other programs at the UDP ports of gossip and VXLAN"),
    ("firewall", "rules and policies that drop packets to those ports"),
    ("forwarding", "whether packets of pods pass this host, and the chain that drops them"),
    ("routing", "where the kernel sends packets to peers, and what diverts them"),
    ("docker", "Docker 28's rule against direct access to containers"),
    ("overlays", "other overlays and routes in the way"),
    ("mtu", "the chain of MTUs from the underlay to the pods"),
    ("clock", "a clock that was set back, or never set"),
    ("state", "the state directory: rights, space, the database's health"),
    ("token", "a token that is missing, damaged or of another cluster"),
    ("seeds", "members to join through: names, reachability, and whether they accept the secret"),
    ("agent", "whether it runs and has converged, and its problems"),
    ("members", "those that are down, or go down repeatedly"),
    ("paths", "peers that packets do not reach, and why"),
    ("addresses", "members with the same address or the same name"),
    ("identity", "a copied state directory"),
    ("offload", "checksums that the network card gets wrong"),
    ("tables", "kernel entries that differ from the desired ones"),
];

/// What a check says that was skipped because this process is not root.
const NEEDS_ROOT: &str = "needs root";

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check, one of [`CHECKS`].
    pub check: &'static str,
    /// How serious it is.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// Why it matters; `None` for results without a problem, and for problems whose text already contains the
    /// reason.
    pub why: Option<String>,
    /// The remedy: a command or a setting; `None` as above.
    pub fix: Option<String>,
    /// The code of the agent's problem; `None` if the doctor has found it itself.
    pub code: Option<ProblemCode>,
    /// What the agent's problem is about.
    pub subject: Option<String>,
    /// The system refused to show something to this user.
    #[serde(skip)]
    is_refused: bool,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Nothing is wrong.
    Ok,
    /// The check was not possible.
    Skipped,
    /// Pods may be affected later, or under load.
    Notice,
    /// Pods are unreachable, or will be.
    Problem,
}

impl Finding {
    fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        let seen = seen.into();
        let (why, fix, code, subject) = (None, None, None, None);
        Self { check, verdict: Verdict::Ok, seen, why, fix, code, subject, is_refused: false }
    }

    fn skipped(check: &'static str, seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Skipped, ..Self::ok(check, seen) }
    }

    fn problem(
        check: &'static str,
        seen: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let (why, fix) = (Some(why.into()), Some(fix.into()));
        Self { verdict: Verdict::Problem, why, fix, ..Self::ok(check, seen) }
    }

    fn notice(
        check: &'static str,
        seen: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Notice, ..Self::problem(check, seen, why, fix) }
    }

    /// Returns a problem or notice of the agent.
    fn of(check: &'static str, problem: &Problem) -> Self {
        Self {
            verdict: match problem.severity {
                Severity::Problem => Verdict::Problem,
                Severity::Notice => Verdict::Notice,
            },
            fix: (!problem.fix.is_empty()).then(|| problem.fix.clone()),
            code: Some(problem.code),
            subject: Some(problem.subject.clone()),
            ..Self::ok(check, &problem.what)
        }
    }

    /// Returns the finding with the note whether the system refuses this user something.
    fn refused_if(self, is_refused: bool) -> Self {
        Self { is_refused, ..self }
    }

    /// Returns the finding of an error of the system.
    fn refused_by(self, error: &io::Error) -> Self {
        self.refused_if(error.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Returns a problem whose text already contains the reason and the remedy.
    fn sentence(check: &'static str, sentence: &str) -> Self {
        Self { verdict: Verdict::Problem, ..Self::ok(check, sentence) }
    }
}

/// The input of the checks.
pub struct Examination {
    /// The configuration, as the agent would read it.
    pub config: Result<Config, ConfigError>,
    /// Replies of the agent; `None` if no agent answers.
    pub agent: Option<Agent>,
    /// Why no agent answers.
    pub agent_error: Option<String>,
    /// Whether this user may not ask the agent.
    pub is_agent_refused: bool,
    /// Whether it is known that no agent runs.
    pub is_agent_absent: bool,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Whether there is a settings file.
    pub has_settings_file: bool,
}

/// Replies of the agent.
pub struct Agent {
    /// The status.
    pub status: AgentStatus,
    /// The kernel entries that the agent wants, and those that exist. `None` if it did not list them.
    pub routes: Option<Vec<KernelEntry>>,
    /// The stored events.
    pub events: Vec<Event>,
    /// The same replies as the agent sent them, with the names of their files in the support archive.
    pub replies: Vec<(&'static str, Value)>,
}

/// Returns the verdict: that of the agent, and what the agent cannot see. Without an agent, the problems of
/// all checks.
pub fn verdict(examination: &Examination, findings: &[Finding]) -> api::Verdict {
    let problems = findings.iter().filter(|finding| finding.verdict == Verdict::Problem);
    match examination.status() {
        Some(status) if status.verdict.state == VerdictState::NotReady => status.verdict.clone(),
        Some(status) => {
            let found_here = problems.filter(|finding| finding.code.is_none()).count();
            api::Verdict::new(None, status.problems.len() + found_here)
        }
        None if !examination.is_set_up() => api::Verdict::not_set_up(&examination.instance()),
        None => match (problems.count(), skipped_for_root(findings)) {
            (0, skipped @ 1..) => api::Verdict::incomplete(skipped, CHECKS.len()),
            (problems, _) => api::Verdict::new(None, problems),
        },
    }
}

/// Returns the number of checks that were skipped because this process is not root.
fn skipped_for_root(findings: &[Finding]) -> usize {
    let is_skipped =
        |finding: &&Finding| finding.verdict == Verdict::Skipped && finding.seen == NEEDS_ROOT;
    let checks: BTreeSet<_> = findings.iter().filter(is_skipped).map(|found| found.check).collect();
    checks.len()
}

/// Runs all checks. Must be called outside of a runtime. Takes a few seconds if a seed does not answer.
pub fn examine(examination: &Examination) -> Vec<Finding> {
    let mut findings = agent_problems::findings(examination);
    state::configuration(examination, &mut findings);
    host::examine(examination, &mut findings);
    firewall::examine(examination, &mut findings);
    routing::examine(examination, &mut findings);
    state::examine(examination, &mut findings);
    cluster::examine(examination, &mut findings);
    if !nix::unistd::geteuid().is_root() {
        skip_what_needs_root(&mut findings, examination.agent.is_some());
    }
    let place = |finding: &Finding| CHECKS.iter().position(|(name, _)| *name == finding.check);
    findings.sort_by_key(place);
    findings
}

/// Replaces findings that only say that this process is not root, and says so once.
fn skip_what_needs_root(findings: &mut Vec<Finding>, agent_answers: bool) {
    let needs_root = |finding: &Finding| {
        // The port of an agent that may not be queried is in use.
        finding.is_refused || !agent_answers && ["privileges", "ports"].contains(&finding.check)
    };
    let mut skipped = Vec::new();
    findings.retain(|finding| {
        let keep = finding.verdict == Verdict::Ok || !needs_root(finding);
        if !keep && !skipped.contains(&finding.check) {
            skipped.push(finding.check);
        }
        keep
    });
    skipped.retain(|check| *check != "privileges");
    findings.extend(skipped.iter().map(|check| Finding::skipped(check, NEEDS_ROOT)));
    let count = skipped_for_root(findings);
    if count == 0 {
        return;
    }
    findings.push(Finding::notice(
        "privileges",
        format!("the doctor does not run as root: {count} of {} checks were skipped", CHECKS.len()),
        "faults that these checks detect are not reported",
        "sudo gossamer doctor",
    ));
}

/// Numbers and networks to check: those of the cluster if it is known, otherwise those of the settings.
struct Numbers {
    vni: u32,
    vxlan_port: u16,
    gossip_port: u16,
    networks: Vec<ipnet::IpNet>,
    /// Whether the network is neither set nor known from the cluster.
    are_networks_assumed: bool,
}

impl Examination {
    /// Returns the instance that was meant.
    fn instance(&self) -> Instance {
        Instance::of_socket(&self.socket).unwrap_or_default()
    }

    fn status(&self) -> Option<&AgentStatus> {
        self.agent.as_ref().map(|agent| &agent.status)
    }

    /// Whether an agent answers that checks this host. It does so once it has a subnet.
    fn is_host_checked(&self) -> bool {
        self.status().is_some_and(|status| status.kernel.device.is_some())
    }

    /// Whether an agent runs here, has run here, or has settings with which it can start.
    fn is_set_up(&self) -> bool {
        self.agent.is_some()
            || self.has_settings_file
            // An agent that hangs, or that may not be queried.
            || self.socket.exists()
            || self.config.as_ref().map_or(true, |config| {
                let joins = config.token.is_some() || !config.seeds.is_empty();
                joins || config.create.is_some() || StateDir::is_known(&config.state_dir)
            })
    }

    /// Returns the id of the process that owns the control socket.
    fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref()?;
        api::listener_pid(&self.socket).map(Pid::as_raw)
    }

    fn numbers(&self) -> Numbers {
        let config = self.config.as_ref().ok();
        let settings = self.status().and_then(|status| status.settings);
        let networks = settings.map(|settings| settings.pool.networks());
        let mut networks: Vec<_> =
            networks.into_iter().flat_map(|networks| networks.iter()).collect();
        if networks.is_empty() {
            networks.extend(config.and_then(|config| config.wish.network));
        }
        // A check without a network would find nothing.
        let are_networks_assumed = networks.is_empty();
        if are_networks_assumed {
            networks.push(default_network());
        }
        let members = self.status().into_iter().flat_map(|status| &status.members);
        let me = members.filter(|member| member.me).map(|me| me.address).next();
        let configured = config.map_or(Instance::default().port(), |config| {
            config.listen.map_or(config.port, |listen| listen.port())
        });
        let wish = config.and_then(|config| config.wish.vxlan_port);
        let vni = settings.map(|settings| settings.vni);
        let vxlan_port = settings.map(|settings| settings.vxlan_port);
        Numbers {
            vni: vni.unwrap_or_else(|| config.map_or(1, |c| c.vni)),
            vxlan_port: vxlan_port.or(wish).unwrap_or(DEFAULT_VXLAN_PORT),
            gossip_port: me.map_or(configured, |me| me.port()),
            networks,
            are_networks_assumed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn skip_what_needs_root_leaves_one_warning_for_a_user() {
        let refused = io::Error::from(io::ErrorKind::PermissionDenied);
        let mut findings = vec![
            Finding::problem("privileges", "CAP_NET_ADMIN is not held", "", ""),
            Finding::problem("ports", "UDP 8473: Address already in use (os error 98)", "", ""),
            Finding::problem("token", "state/token", "", "").refused_by(&refused),
            Finding::problem("agent", "gossamer.sock", "", "").refused_if(true),
            Finding::problem("sysctls", "net.ipv4.ip_forward is 0", "", ""),
            Finding::skipped("kernel", NEEDS_ROOT),
            Finding::ok("underlay", "eth0"),
        ];
        skip_what_needs_root(&mut findings, false);
        let of = |verdict| {
            let found = findings.iter().filter(|finding| finding.verdict == verdict);
            found.map(|finding| finding.check).collect::<Vec<_>>()
        };
        assert_eq!(of(Verdict::Problem), ["sysctls"]);
        assert_eq!(of(Verdict::Notice), ["privileges"]);
        assert_eq!(of(Verdict::Skipped), ["kernel", "ports", "token", "agent"]);
        let seen = findings.iter().find(|finding| finding.verdict == Verdict::Notice);
        assert!(seen.is_some_and(|finding| finding.seen.contains("4 of 23")), "{findings:?}");
    }

    #[test]
    fn checks_that_need_root_make_the_verdict_incomplete() {
        let examination = Examination {
            config: Settings::default().check(),
            agent: None,
            agent_error: None,
            is_agent_refused: false,
            is_agent_absent: true,
            socket: "/nowhere/gossamer.sock".into(),
            has_settings_file: true,
        };
        let mut findings = vec![Finding::ok("underlay", "eth0")];
        assert_eq!(verdict(&examination, &findings).text, "healthy");
        findings.extend(["agent", "token"].map(|check| Finding::skipped(check, NEEDS_ROOT)));
        let said = verdict(&examination, &findings);
        assert_eq!(
            (said.text.as_str(), said.exit_code()),
            ("incomplete: 2 of 23 checks need root", 3)
        );
        findings.push(Finding::problem("sysctls", "net.ipv4.ip_forward is 0", "", ""));
        assert_eq!(verdict(&examination, &findings).text, "degraded: 1 problem");
    }
}
