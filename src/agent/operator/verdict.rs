//! The verdict on this node.

use crate::{
    agent::Agent,
    api::Verdict,
    core::Phase,
    dataplane::forwarding::{Direction, TrialProtocol},
    model::{Problem, ProblemCode, family_name, list_at_most, visible},
};

/// Problems that make the node not ready whatever else works.
const BLOCKING: [ProblemCode; 2] = [ProblemCode::NoUnderlay, ProblemCode::PodsRefused];

/// Limit of addresses to join through that the verdict names.
const MAX_NAMED_SEEDS: usize = 3;

impl Agent {
    /// Returns the verdict, given the present problems.
    pub(in crate::agent) fn verdict(&self, problems: &[Problem]) -> Verdict {
        Verdict::new(self.unready_reason(problems), problems.len())
    }

    /// Returns why the node is not ready: it has not finished its start, or its pods reach nothing. The
    /// state of single peers does not count.
    fn unready_reason(&self, problems: &[Problem]) -> Option<String> {
        let phase = match self.node.phase() {
            Phase::Waiting => Some("it waits to start".to_owned()),
            Phase::Joining => Some(self.joining_reason()),
            Phase::Leaseless => Some("it has no subnet yet".to_owned()),
            Phase::Leaving => Some("it is leaving the cluster".to_owned()),
            Phase::Member => None,
        };
        if phase.is_some() {
            return phase;
        }
        // A lost underlay does not matter while peers answer.
        let is_blocking = |code| {
            BLOCKING.contains(&code) && (code != ProblemCode::NoUnderlay || self.lacks_underlay())
        };
        let blocking = problems.iter().find(|problem| is_blocking(problem.code));
        let blocking = blocking.map(|problem| problem.what.clone());
        let unfinished = || (!self.has_converged()).then(|| "it has not converged yet".to_owned());
        blocking.or_else(|| self.cut_off_reason()).or_else(unfinished)
    }

    /// Returns why the node is not ready before a member has admitted it.
    fn joining_reason(&self) -> String {
        let seeds = &self.config.seeds;
        let through = match seeds.is_empty() {
            true => "it has no address to join through".to_owned(),
            false => {
                let named = seeds.iter().map(|seed| visible(seed));
                format!("it joins through {}", list_at_most(named, MAX_NAMED_SEEDS))
            }
        };
        format!("no member has admitted it yet ({through})")
    }

    /// Returns why packets of pods of all address families are dropped on this host.
    fn cut_off_reason(&self) -> Option<String> {
        let networks = self.kernel.wanted.view.as_ref()?.settings.pool.networks();
        let reasons = networks.iter().map(|network| self.family_reason(network.addr().is_ipv4()));
        let reasons: Option<Vec<String>> = reasons.collect();
        reasons?.into_iter().next()
    }

    /// Returns why packets of pods of one address family are dropped on this host.
    fn family_reason(&self, ipv4: bool) -> Option<String> {
        if let Some(reason) = self.kernel.host.forwarding_off.get(&ipv4) {
            return Some(reason.clone());
        }
        let closed = &self.kernel.diagnoses.forwarding.closed;
        let is_closed =
            |direction| closed.iter().any(|way| way.ipv4 == ipv4 && way.direction == direction);
        let all = |of: fn(TrialProtocol) -> Direction| {
            [TrialProtocol::Udp, TrialProtocol::Tcp]
                .into_iter()
                .all(|transport| is_closed(of(transport)))
        };
        let is_cut_off = is_closed(Direction::Gateway) || all(Direction::Out) || all(Direction::In);
        is_cut_off
            .then(|| format!("this host does not forward packets of pods ({})", family_name(ipv4)))
    }

    /// Whether the node has converged since the start of the agent.
    fn has_converged(&self) -> bool {
        self.journal.has_converged() || self.is_converged()
    }
}
