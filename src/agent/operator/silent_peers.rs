//! Peers that send nothing: former selves of living hosts, and those that gossip has not judged yet.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    agent::Agent,
    core::{Input, Labels, RunningHosts},
    model::{NodeId, PathState, Problem, ProblemCode},
};

/// A peer whose packets are lost on one way only sends a probe each second, in a large cluster more rarely.
const MIN_SILENCE: Duration = Duration::from_secs(3);

/// How long a peer is silent before a cause is named although gossip counts it as alive. Gossip reports a
/// dead host as down in less than this time.
const MAX_DECISION: Duration = Duration::from_secs(20);

impl Agent {
    /// Whether a peer that does not answer is an earlier identity of a living host. A notice names it, and
    /// the causes of silence do not apply to that host.
    pub(in crate::agent) fn is_superseded(
        &self,
        node: NodeId,
        state: PathState,
        labels: &Labels<'_>,
        states: &BTreeMap<NodeId, PathState>,
    ) -> bool {
        let is_silent = state.is_lost() || !self.prober.paths.is_alive(node);
        if is_silent && labels.former_selves().contains(&node) {
            return true;
        }
        let successor = is_silent.then(|| labels.living_namesake(node)).flatten();
        let is_replaced = successor.is_some_and(|successor| {
            let answers = states.get(&successor).is_some_and(|state| !state.is_lost());
            answers || !self.node.is_active(node)
        });
        is_replaced
            || is_silent && !self.node.is_active(node) && self.is_address_of_other(node, states)
    }

    /// Returns whether another member that is active or whose kernel answers has the underlay address of
    /// this one: packets to that address do not show what this one does.
    fn is_address_of_other(&self, node: NodeId, states: &BTreeMap<NodeId, PathState>) -> bool {
        let peers = self.kernel.wanted.view.as_ref().map(|view| &view.peers);
        let Some((peers, peer)) = peers.and_then(|peers| Some((peers, peers.get(&node)?))) else {
            return false;
        };
        let mut same = peers.iter().filter(|(other, candidate)| {
            **other != node && candidate.vtep.underlay == peer.vtep.underlay
        });
        same.any(|(other, _)| {
            let answers = states.get(other).is_some_and(|state| state.is_answered());
            answers || self.node.is_active(*other)
        })
    }

    /// Passes the members whose hosts run although their agents are silent to the core: their subnets are in
    /// use. An earlier identity of a living host is none of them.
    pub(in crate::agent) fn report_running_hosts(&mut self) {
        let hosts = self.running_hosts();
        self.input(Input::RunningHosts(hosts));
    }

    /// Does the same if they are not those that were passed last.
    pub(in crate::agent) fn update_running_hosts(&mut self) {
        let hosts = self.running_hosts();
        if !hosts.keys().eq(self.node.running_hosts().keys()) {
            self.input(Input::RunningHosts(hosts));
        }
    }

    fn running_hosts(&self) -> RunningHosts {
        let is_silent = |node| !self.node.is_active(node) && !self.node.is_forgotten(node);
        let mut hosts: RunningHosts = self
            .prober
            .paths
            .running(self.clock.now())
            .filter(|(node, _)| is_silent(*node))
            .collect();
        for (node, state, _) in self.path_states() {
            if is_silent(node) && self.is_passed_by_pods(node, state) {
                hosts.entry(node).or_insert(None);
            }
        }
        if !hosts.is_empty() {
            let labels = self.node.labels();
            hosts.retain(|node, _| !labels.former_selves().contains(node));
        }
        hosts
    }

    /// Returns for how long neither agent nor kernel of a peer has sent anything, if that is long enough to
    /// tell a host that is off from one whose packets are lost on one way only.
    pub(in crate::agent) fn silent_span(&self, node: NodeId) -> Option<Duration> {
        let span = self.prober.paths.silent_span(self.clock.now(), node)?;
        (span >= MIN_SILENCE).then_some(span)
    }

    /// Returns the problem of a peer that sends nothing although gossip counts it as alive. A cause found for
    /// its silence is named only once gossip would have reported a dead host as down.
    pub(super) fn undecided_problem(
        &self,
        node: NodeId,
        cause: Option<&Problem>,
        labels: &Labels<'_>,
    ) -> Option<Problem> {
        let silent = self.silent_span(node).filter(|_| self.node.is_active(node))?;
        let is_other = |(other, state, _): (NodeId, PathState, _)| {
            other != node && self.node.is_active(other) && !state.is_lost()
        };
        let is_decided = silent >= MAX_DECISION;
        let is_reached = is_decided && self.path_states().any(is_other);
        let cause = cause.filter(|_| is_decided);
        Some(silent_problem(labels.of(node), silent, cause, is_reached))
    }
}

/// Describes a peer that sends nothing. `is_reached` says that gossip reaches it through other members.
fn silent_problem(
    name: String,
    silent: Duration,
    cause: Option<&Problem>,
    is_reached: bool,
) -> Problem {
    let others = "gossip still gets there through other members";
    if let Some(cause) = cause {
        let mut problem = cause.clone();
        if is_reached {
            problem.what = format!("{}; {others}", problem.what);
        }
        return problem;
    }
    let silent = silent.as_secs();
    let what = format!("{name} has not answered for {silent} s: neither its agent nor its kernel");
    let (what, fix) = match is_reached {
        true => (
            format!("{what}; {others}, so that host runs"),
            "look at the network between the two hosts (isolated ports, private VLAN, a macvlan guest and \
             its host, a firewall on the way), and at the other host (there: gossamer status)",
        ),
        false => (
            what,
            "wait until gossip has decided whether it is down, or see whether that host runs",
        ),
    };
    Problem::new(ProblemCode::PathLost, name, what, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_peer_that_others_reach_has_the_cause_found_or_a_place_to_look() {
        let cause = Problem::new(ProblemCode::PathLost, "n2", "no machine answers ARP", "cable?");
        let of = |seconds, cause, is_reached| {
            let silent = Duration::from_secs(seconds);
            silent_problem("n2".to_owned(), silent, cause, is_reached).to_string()
        };
        let undecided = of(5, None, false);
        assert!(undecided.contains("for 5 s") && undecided.contains("wait until gossip"));
        let reached = "gossip still gets there through other members";
        let unexplained = of(30, None, true);
        assert!(unexplained.contains(reached) && unexplained.contains("private VLAN"));
        assert!(!unexplained.contains("wait until"), "{unexplained}");
        let explained = of(30, Some(&cause), true);
        assert!(explained.contains(&format!("answers ARP; {reached}")), "{explained}");
        assert!(!of(30, Some(&cause), false).contains(reached));
    }
}
