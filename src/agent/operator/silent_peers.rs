//! Peers that send nothing: former selves of living hosts, and those that gossip has not judged yet.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
    time::Duration,
};

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

/// Tells earlier identities of living hosts from other silent peers. It is made once for all peers: a member
/// may invent as many others as the directory holds, and a search among all for each of them is quadratic.
pub(in crate::agent) struct Successors<'a> {
    agent: &'a Agent,
    labels: &'a Labels<'a>,
    states: &'a BTreeMap<NodeId, PathState>,
    living: LivingAt,
}

/// The members that are active or whose kernels answer, by underlay address. At most two of each address are
/// kept, because only the question whether there is another one is asked.
#[derive(Default)]
struct LivingAt(BTreeMap<IpAddr, (NodeId, Option<NodeId>)>);

impl LivingAt {
    fn add(&mut self, address: IpAddr, node: NodeId) {
        match self.0.entry(address) {
            Entry::Vacant(vacant) => _ = vacant.insert((node, None)),
            Entry::Occupied(mut known) => known.get_mut().1 = Some(node),
        }
    }

    /// Returns whether another living member than this one has the address.
    fn is_of_other(&self, address: IpAddr, node: NodeId) -> bool {
        self.0.get(&address).is_some_and(|(one, other)| *one != node || other.is_some())
    }
}

impl Successors<'_> {
    /// Whether a peer that does not answer is an earlier identity of a living host. A notice names it, and
    /// the causes of silence do not apply to that host.
    pub(in crate::agent) fn supersede(&self, node: NodeId, state: PathState) -> bool {
        let Self { agent, labels, states, .. } = self;
        let is_silent = state.is_lost() || !agent.prober.paths.is_alive(node);
        if is_silent && labels.former_selves().contains(&node) {
            return true;
        }
        let successor = is_silent.then(|| labels.living_namesake(node)).flatten();
        let is_replaced = successor.is_some_and(|successor| {
            let answers = states.get(&successor).is_some_and(|state| !state.is_lost());
            answers || !agent.node.is_active(node)
        });
        is_replaced || is_silent && !agent.node.is_active(node) && self.is_address_of_other(node)
    }

    /// Returns whether another member that is active or whose kernel answers has the underlay address of
    /// this one: packets to that address do not show what this one does.
    fn is_address_of_other(&self, node: NodeId) -> bool {
        let peer = self.agent.kernel.wanted.view.as_ref().and_then(|view| view.peers.get(&node));
        peer.is_some_and(|peer| self.living.is_of_other(peer.vtep.underlay, node))
    }
}

impl Agent {
    /// Returns who has succeeded silent peers. It takes a pass over all peers.
    pub(in crate::agent) fn successors<'a>(
        &'a self,
        labels: &'a Labels<'a>,
        states: &'a BTreeMap<NodeId, PathState>,
    ) -> Successors<'a> {
        let mut living = LivingAt::default();
        for (node, peer) in self.kernel.wanted.view.iter().flat_map(|view| &view.peers) {
            let answers = states.get(node).is_some_and(|state| state.is_answered());
            if answers || self.node.is_active(*node) {
                living.add(peer.vtep.underlay, *node);
            }
        }
        Successors { agent: self, labels, states, living }
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
    /// its silence is named only once gossip would have reported a dead host as down. `reaches_others` says
    /// that the path to another active member is not lost.
    pub(super) fn undecided_problem(
        &self,
        node: NodeId,
        name: String,
        cause: Option<&Problem>,
        reaches_others: bool,
    ) -> Option<Problem> {
        let silent = self.silent_span(node).filter(|_| self.node.is_active(node))?;
        let is_decided = silent >= MAX_DECISION;
        let cause = cause.filter(|_| is_decided);
        Some(silent_problem(name, silent, cause, is_decided && reaches_others))
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
    fn address_is_of_another_only_if_another_living_member_has_it() {
        let node = |byte| NodeId::from_bytes([byte; 8]);
        let at = |last| IpAddr::from([192, 0, 2, last]);
        let mut living = LivingAt::default();
        for (address, member) in [(1, 1), (2, 2), (2, 3), (2, 4)] {
            living.add(at(address), node(member));
        }
        assert!(!living.is_of_other(at(1), node(1)), "its own");
        assert!(living.is_of_other(at(1), node(9)));
        for member in [2, 3, 4, 9] {
            assert!(living.is_of_other(at(2), node(member)), "{member}");
        }
        assert!(!living.is_of_other(at(3), node(9)), "no member there");
    }

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
