//! What is reported when no other member answers: the address of this host has changed, the seeds are
//! addresses of this host, or all members are down.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::join_log::JoinLog;
use crate::{
    agent::{Agent, diagnosis::auditor::Detour},
    core::Labels,
    dataplane::{
        foreign::{ClosedPort, Extent},
        remedies::open_chain,
    },
    model::{Liveness, NodeId, PathState, Problem, ProblemCode, list_at_most, own_address_problem},
};

/// How long no member answers before it counts: after a start, or after the network was away, gossip reaches
/// members within some seconds.
const MIN_ISOLATION: Duration = Duration::from_secs(10);
/// Gossip considers a member alive for less than this after its last packet.
const GOSSIP_EXPIRY: Duration = Duration::from_secs(60);
/// Limit of members named in one sentence.
const MAX_NAMED: usize = 3;
/// Limit of members that are down and have a problem of their own each.
const MAX_DOWN_NAMED: usize = 5;
/// Remedy for members that are down and not named.
const SEE_MEMBERS: &str = "see gossamer members";

/// Whether other members answer, and under which address they know this host.
#[derive(Debug, Default)]
pub(in crate::agent) struct Isolation {
    /// Since when gossip does not know these members.
    unseen_since: BTreeMap<NodeId, Instant>,
    /// Since when no member answers although there are some.
    isolated_since: Option<Instant>,
    /// The address under which members know this host, and when the present one replaced it.
    address_change: Option<(IpAddr, Instant)>,
    /// Whether the log says that the members use another secret.
    is_secret_told: bool,
    /// What the log says about joining.
    pub(in crate::agent) join_log: JoinLog,
}

impl Isolation {
    /// Records that the address of this host changed.
    pub(in crate::agent) fn on_address_change(&mut self, before: IpAddr, now: IpAddr) {
        let (known, _) = *self.address_change.get_or_insert((before, Instant::now()));
        self.address_change = (known != now).then_some((known, Instant::now()));
    }

    /// Returns the address under which members know this host, if it is not the present one.
    pub(in crate::agent) fn previous_address(&self) -> Option<IpAddr> {
        self.address_change.map(|(known, _)| known)
    }
}

impl Agent {
    /// Records whether other members answer, and forgets the previous address once they know the present one.
    pub(in crate::agent) fn watch_isolation(&mut self, now: Instant) {
        let opinions = self.node.opinions();
        let unseen = self.node.peers().filter(|node| !opinions.contains_key(node));
        let known = std::mem::take(&mut self.gossip.isolation.unseen_since);
        let since = |node: NodeId| (node, known.get(&node).copied().unwrap_or(now));
        self.gossip.isolation.unseen_since = unseen.map(since).collect();
        if self.node.is_alone() || self.node.has_active_peer() {
            self.gossip.isolation.isolated_since = None;
            let is_known =
                |(_, at): &mut (IpAddr, Instant)| now.duration_since(*at) >= GOSSIP_EXPIRY;
            if self.gossip.isolation.address_change.take_if(is_known).is_some() {
                self.save_underlay();
            }
        } else {
            self.gossip.isolation.isolated_since.get_or_insert(now);
        }
        self.log_other_secret();
    }

    /// Returns why no other member answers, unless each is reported by the problem of its path, or why there
    /// is no other member yet.
    pub(in crate::agent) fn isolation_problem(
        &self,
        of_paths: &BTreeMap<NodeId, Problem>,
        states: &BTreeMap<NodeId, PathState>,
        labels: &Labels<'_>,
    ) -> Option<Problem> {
        self.own_seeds_problem()
            .or_else(|| self.secret_problem())
            .or_else(|| self.moved_problem(labels))
            .or_else(|| self.alone_problem(of_paths, states, labels))
    }

    /// Returns the problem that seeds are addresses of this host.
    fn own_seeds_problem(&self) -> Option<Problem> {
        let seeds = self.node.own_seeds().filter_map(|seed| self.config.seeds.get(seed));
        let seeds: Vec<&str> = seeds.map(String::as_str).collect();
        let token = self.config.token.as_ref().or(self.secrets.saved_token.as_ref());
        let is_of_token =
            |seed: &&str| token.is_some_and(|token| token.seeds.iter().any(|s| s == seed));
        (!seeds.is_empty()).then(|| own_address_problem(&seeds, seeds.iter().all(is_of_token)))
    }

    /// Whether no member has answered for [`MIN_ISOLATION`] although the underlay works.
    pub(in crate::agent) fn is_isolated(&self) -> bool {
        self.gossip.isolation.isolated_since.is_some_and(|since| since.elapsed() >= MIN_ISOLATION)
            && !self.lacks_underlay()
    }

    /// Returns the problem that the members use another secret than this host, so that none answers it.
    fn secret_problem(&self) -> Option<Problem> {
        if !self.is_isolated() {
            return None;
        }
        let with = self.node.peers().filter(|node| self.transport.has_other_secret(*node)).count();
        let what = match with {
            0 => return None,
            1 => {
                "another member uses a different secret than this host: one of the two missed a rotation"
            }
            _ => "the members use a different secret than this host: it missed a rotation",
        };
        let fix = "on a member with the new secret: gossamer token --out token. Copy the file to the host \
                   that missed it, and start the agent there with it (token_file)";
        Some(Problem::new(ProblemCode::Isolated, Problem::HOST, what, fix))
    }

    /// Logs once that the members use another secret.
    fn log_other_secret(&mut self) {
        match self.secret_problem() {
            None => self.gossip.isolation.is_secret_told = false,
            Some(problem) => {
                if !std::mem::replace(&mut self.gossip.isolation.is_secret_told, true) {
                    tracing::warn!("{problem}");
                }
            }
        }
    }

    /// Returns the problem that neither the members nor this host are at their earlier addresses. A peer in
    /// the network of this host that packets reach by a gateway may still have its address.
    pub(in crate::agent) fn moved_problem(&self, labels: &Labels<'_>) -> Option<Problem> {
        let mut detours = self.kernel.diagnoses.routing.detours.iter();
        let is_on_link = |detour: &Detour| matches!(detour, Detour::Gateway { .. });
        if detours.any(|(there, detour)| {
            is_on_link(detour) && !self.kernel.diagnoses.ways.reaches(*there, detour)
        }) {
            return None;
        }
        let known = self.gossip.isolation.previous_address().filter(|_| self.is_isolated())?;
        let now = self.underlay.local;
        let members = self.named(self.node.peers(), labels);
        Some(Problem::new(
            ProblemCode::AddressChanged,
            Problem::HOST,
            format!(
                "the address of this host has changed from {known} to {now}, and no member answers at the \
                 address known for it ({members})"
            ),
            "if the addresses of all hosts have changed, restart the agent of one host with --join ADDRESS, \
             where ADDRESS is the present address of another host (there: gossamer status, `underlay`)",
        ))
    }

    /// Returns the problem that no member answers. The likely causes follow from the state of the path to the
    /// first member.
    fn alone_problem(
        &self,
        of_paths: &BTreeMap<NodeId, Problem>,
        states: &BTreeMap<NodeId, PathState>,
        labels: &Labels<'_>,
    ) -> Option<Problem> {
        if !self.is_isolated() {
            return None;
        }
        // A notice is about former selves.
        let is_reported =
            |node: &NodeId| labels.former_selves().contains(node) || of_paths.contains_key(node);
        let unreported: Vec<NodeId> = self.node.peers().filter(|node| !is_reported(node)).collect();
        let first = *unreported.first()?;
        let gossip = self.node.address_of(first)?.port();
        let tunnels = self.kernel.wanted.view.as_ref().map(|view| view.settings.vxlan_port);
        let ports = tunnels.map_or(gossip.to_string(), |port| format!("{port} and {gossip}"));
        let what = format!(
            "no other member answers this host: {} down",
            self.named(unreported.into_iter(), labels)
        );
        if let Some(closed) = self.threads.monitors.silence_diagnosis.closed_gossip() {
            let ClosedPort { chain, port, extent } = closed;
            let (packets, advice) = match extent {
                Extent::Some => ("some packets to ", "if these are packets of members"),
                _ => ("", "members need this port"),
            };
            let what = format!("{what}; chain {chain} drops {packets}UDP {port} on this host");
            let fix = format!("{advice}: {}", open_chain(chain, &[*port]));
            return Some(Problem::new(ProblemCode::Isolated, Problem::HOST, what, fix));
        }
        let address = self.node.address_of(first)?.ip();
        let dead_hop = self.kernel.diagnoses.routing.dead_hops.get(&address);
        let why = match states.get(&first) {
            _ if dead_hop.is_some() => "a next hop of the route to it does not answer (see the separate \
                                        problem). If it is still silent after that is repaired, its status \
                                        may name the cause (there: gossamer status)"
                .to_owned(),
            Some(
                PathState::Ok
                | PathState::Asymmetric
                | PathState::MtuTooLarge
                | PathState::PartlyLost,
            ) => {
                format!(
                    "its kernel answers through the tunnel, so the host runs. Either its agent is \
                     stopped (there: systemctl status gossamer), or a firewall or the network (one of \
                     several routers, for example) blocks UDP {gossip} between the two hosts. Its own \
                     status may name the cause (there: gossamer status)"
                )
            }
            Some(PathState::OneWay) => format!(
                "its tunnel packets arrive here, so the host runs. UDP {ports} from this host are \
                 dropped there or on the way (there: gossamer status), or its agent is stopped as well"
            ),
            _ => format!(
                "either that host is off, its agent is stopped, or packets between the two hosts are \
                 lost. If it runs, its status may name the cause (there: gossamer status). If this host \
                 is cut off: check its network, its routes (ip route get ADDRESS; ip neigh), and \
                 whether firewalls let UDP {ports} pass"
            ),
        };
        Some(Problem::new(ProblemCode::Isolated, Problem::HOST, what, why))
    }

    /// Returns the problems of members that are down, unless one of these problems is about them.
    pub(in crate::agent) fn down_members(
        &self,
        known: &[Problem],
        of_paths: &BTreeMap<NodeId, Problem>,
        states: &BTreeMap<NodeId, PathState>,
        labels: &Labels<'_>,
    ) -> Vec<Problem> {
        let of_all = [ProblemCode::Isolated, ProblemCode::AddressChanged, ProblemCode::NoUnderlay];
        if known.iter().any(|problem| of_all.contains(&problem.code)) {
            return Vec::new();
        }
        // A notice is about former selves.
        let is_told =
            |node: &NodeId| labels.former_selves().contains(node) || of_paths.contains_key(node);
        let down = self.node.peers().filter(|node| self.is_down(*node, labels.opinions()));
        let down: Vec<NodeId> = down.filter(|node| !is_told(node)).collect();
        let named = down.iter().take(MAX_DOWN_NAMED);
        let mut problems: Vec<Problem> =
            named.map(|node| self.down_problem(*node, states.get(node), labels)).collect();
        if let more @ 1.. = down.len().saturating_sub(MAX_DOWN_NAMED) {
            let what = format!("{more} more members are down");
            problems.push(Problem::new(
                ProblemCode::MemberDown,
                "other members",
                what,
                SEE_MEMBERS,
            ));
        }
        problems
    }

    /// Whether gossip considers a member down. A member that it has not heard of counts as down once it had
    /// time to answer.
    fn is_down(&self, node: NodeId, opinions: &BTreeMap<NodeId, Liveness>) -> bool {
        match opinions.get(&node) {
            Some(liveness) => *liveness == Liveness::Down,
            None => {
                let since = self.gossip.isolation.unseen_since.get(&node);
                since.is_some_and(|since| since.elapsed() >= MIN_ISOLATION)
            }
        }
    }

    fn down_problem(&self, node: NodeId, path: Option<&PathState>, labels: &Labels<'_>) -> Problem {
        let name = labels.of(node);
        if self.transport.has_other_secret(node) {
            let what = format!(
                "the agent of {name} runs with a different secret than this host, so it counts as down: it \
                 missed a rotation"
            );
            let fix = format!(
                "gossamer token --out token; copy the file to {name}, and start the agent there with it \
                 (token_file)"
            );
            return Problem::new(ProblemCode::MemberDown, name, what, fix);
        }
        let state = match labels.opinions().get(&node) {
            Some(_) => "is down",
            None => "has not been seen for a day, or since the agent started here",
        };
        let (what, start) = match path {
            Some(PathState::Ok) => (
                format!(
                    "the agent of {name} {state}; its kernel still forwards packets of its pods"
                ),
                "start its agent (there: systemctl start gossamer)",
            ),
            Some(_) => (format!("{name} {state}: its pods are unreachable"), "start it"),
            None => (format!("{name} {state}"), "start it"),
        };
        let gossip = self.node.address_of(node).map_or(0, |address| address.port());
        // Packets of its host arrive.
        let is_seen = path.is_some_and(|state| state.shows_life());
        let is_seen = is_seen && self.silent_span(node).is_none();
        let fix = match self.node.has_active_peer() {
            true if is_seen => format!(
                "{start}; if it runs, open UDP {gossip} between the two hosts in both directions"
            ),
            true => format!("{start}, or if that host is gone for good: gossamer forget {name}"),
            // The cause may be this host.
            false => format!(
                "{start}; if it runs, its own status may name the cause (there: gossamer status)"
            ),
        };
        Problem::new(ProblemCode::MemberDown, name, what, fix)
    }

    /// Returns up to [`MAX_NAMED`] members with their addresses, and the number of the others.
    fn named(&self, members: impl Iterator<Item = NodeId>, labels: &Labels<'_>) -> String {
        let display = |node: NodeId| {
            let name = labels.of(node);
            match self.node.address_of(node) {
                Some(at) => format!("{name} ({at})"),
                None => name,
            }
        };
        list_at_most(members.map(display), MAX_NAMED)
    }
}

/// Returns a notice about earlier identities of living hosts.
pub(in crate::agent) fn former_selves_notice(labels: &Labels<'_>) -> Option<Problem> {
    let former = labels.former_selves();
    if former.is_empty() {
        return None;
    }
    let what = format!(
        "earlier identities of living hosts are still members and keep their subnets: {}",
        list_at_most(former.iter().map(|node| labels.of(*node)), MAX_DOWN_NAMED)
    );
    let fix = "gossamer forget --former-selves";
    Some(Problem::new(ProblemCode::MemberDown, "former selves", what, fix).notice())
}
