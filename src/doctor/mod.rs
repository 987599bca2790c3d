//! `gossamer doctor`: everything that keeps a host's pods from being reached, looked for one by one.
//!
//! Works with and without a running agent, and changes nothing on the host. Each check says what was seen;
//! one that found something also says why it matters and what helps. What only the agent can know is asked
//! over its control socket.

mod bundle;
mod cluster;
mod firewall;
mod host;
mod routing;
mod state;

use std::{os::unix::net::UnixStream, path::PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::Serialize;
use serde_json::Value;

use crate::config::{Config, ConfigError, DEFAULT_VXLAN_PORT, Instance};

pub use bundle::write as write_bundle;

/// Everything that is looked at, in this order.
pub const CHECKS: [(&str, &str); 23] = [
    ("configuration", "settings that contradict each other or cannot be read"),
    ("privileges", "capabilities that the agent needs"),
    ("kernel", "VXLAN, veth, bridges and nftables, tried in a namespace of their own"),
    ("underlay", "the interface that carries the tunnels, and its address"),
    ("sysctls", "forwarding and reverse path filters"),
    ("ports", "other programs at the UDP ports of gossip and VXLAN"),
    ("firewall", "rules and policies that drop what comes in at those ports"),
    ("forwarding", "whether packets of pods pass this host, and the chain that drops them"),
    ("routing", "where the kernel sends packets to peers, and what leads them elsewhere"),
    ("docker", "Docker 28's rule against direct access to containers"),
    ("overlays", "other overlays and routes in the way"),
    ("mtu", "the chain of MTUs from the underlay to the pods"),
    ("clock", "a clock that was set back, or never set"),
    ("state", "the state directory: rights, space, the database's health"),
    ("token", "a token that is missing, damaged or of another cluster"),
    ("seeds", "members to join by: names, reachability, and whether they take our secret"),
    ("agent", "whether it runs, has converged, and what it complains of"),
    ("members", "those that are down, or come and go"),
    ("paths", "peers that packets do not reach, and why"),
    ("addresses", "members with the same address or the same name"),
    ("identity", "a copied state directory"),
    ("offload", "checksums that the network card gets wrong"),
    ("tables", "entries in the kernel that differ from what they should be"),
];

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub verdict: Verdict,
    pub seen: String,
    /// Why it matters.
    pub why: Option<String>,
    /// What helps: a command, or a setting.
    pub fix: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// It could not be looked at.
    Skipped,
    /// It may hurt one day, or under load.
    Warning,
    /// Pods are not reached, or will not be.
    Problem,
}

impl Finding {
    fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, seen: seen.into(), why: None, fix: None }
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
        Self { check, verdict: Verdict::Problem, seen: seen.into(), why, fix }
    }

    fn warning(
        check: &'static str,
        seen: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Warning, ..Self::problem(check, seen, why, fix) }
    }

    /// A sentence of the agent, which says what is wrong and what helps.
    fn sentence(check: &'static str, sentence: &str) -> Self {
        Self { verdict: Verdict::Problem, ..Self::ok(check, sentence) }
    }
}

/// What is examined.
pub struct Examination {
    /// As the agent would read it.
    pub config: Result<Config, ConfigError>,
    /// `/v1/status`, `/v1/routes` and the kept events; none, if no agent answers.
    pub agent: Option<Agent>,
    /// Why none answers.
    pub agent_error: Option<String>,
    pub socket: PathBuf,
}

pub struct Agent {
    pub status: Value,
    pub routes: Value,
    pub events: Value,
}

/// All checks. Must be called outside of a runtime; takes a few seconds where a seed does not answer.
pub fn examine(patient: &Examination) -> Vec<Finding> {
    let mut findings = Vec::new();
    state::configuration(patient, &mut findings);
    host::examine(patient, &mut findings);
    firewall::examine(patient, &mut findings);
    routing::examine(patient, &mut findings);
    state::examine(patient, &mut findings);
    cluster::examine(patient, &mut findings);
    let place = |finding: &Finding| CHECKS.iter().position(|(name, _)| *name == finding.check);
    findings.sort_by_key(place);
    findings
}

/// What is looked for follows from the cluster where it is known, from the settings otherwise.
struct Numbers {
    vni: u32,
    vxlan_port: u16,
    gossip_port: u16,
    networks: Vec<ipnet::IpNet>,
}

impl Examination {
    fn status(&self) -> Option<&Value> {
        self.agent.as_ref().map(|agent| &agent.status)
    }

    /// What the agent complains of.
    fn problems(&self) -> impl Iterator<Item = &str> {
        let problems = self.status().and_then(|status| status["problems"].as_array());
        problems.into_iter().flatten().filter_map(Value::as_str)
    }

    /// What the agent warns of.
    fn warnings(&self) -> impl Iterator<Item = &str> {
        let warnings = self.status().and_then(|status| status["warnings"].as_array());
        warnings.into_iter().flatten().filter_map(Value::as_str)
    }

    /// The process behind the control socket.
    fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref()?;
        let stream = UnixStream::connect(&self.socket).ok()?;
        Some(getsockopt(&stream, PeerCredentials).ok()?.pid())
    }

    fn numbers(&self) -> Numbers {
        let config = self.config.as_ref().ok();
        let settings = self.status().map(|status| &status["settings"]);
        let number = |key: &str| settings.and_then(|settings| settings[key].as_u64());
        let networks = ["network", "network6"].map(|key| {
            let text = settings.and_then(|settings| settings["pool"][key].as_str());
            text.and_then(|text| text.parse().ok())
        });
        let mut networks: Vec<_> = networks.into_iter().flatten().collect();
        if networks.is_empty() {
            networks.extend(config.and_then(|config| config.wish.network));
        }
        let me = self.status().and_then(|status| {
            let mut members = status["members"].as_array()?.iter();
            let me = members.find(|member| member["me"] == true)?;
            me["address"].as_str()?.parse::<std::net::SocketAddr>().ok()
        });
        let configured = config.map_or(Instance::default().port(), |config| {
            config.listen.map_or(config.port, |listen| listen.port())
        });
        let wish = config.and_then(|config| config.wish.vxlan_port);
        let vxlan_port = number("vxlan_port").and_then(|port| u16::try_from(port).ok());
        Numbers {
            vni: number("vni")
                .and_then(|vni| u32::try_from(vni).ok())
                .unwrap_or_else(|| config.map_or(1, |c| c.vni)),
            vxlan_port: vxlan_port.or(wish).unwrap_or(DEFAULT_VXLAN_PORT),
            gossip_port: me.map_or(configured, |me| me.port()),
            networks,
        }
    }
}
