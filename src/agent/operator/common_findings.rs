//! What the findings about single paths have in common. Each part takes a pass over all peers, so it is
//! determined once: a member may invent as many others as the directory holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    agent::Agent,
    core::Labels,
    model::{NodeId, PathState, Problem, ProblemCode},
};

/// What the findings of single paths have in common.
pub(super) struct CommonFindings {
    /// The problem that neither the members nor this host are at their earlier addresses.
    pub(super) moved: Option<Problem>,
    /// Whether the path to any active member is not lost.
    pub(super) reaches_any: bool,
    /// The peers to or from whose pods packets are lost.
    closed_to_pods: BTreeSet<NodeId>,
}

impl CommonFindings {
    /// Returns the finding about a path without answers and without a known cause. If packets of the peer
    /// arrive, its firewall may drop only the probes, so it is a problem only if packets of pods are
    /// known to be lost as well.
    pub(super) fn unanswered(
        &self,
        (node, name): (NodeId, &str),
        state: PathState,
        what: String,
        fix: String,
    ) -> Problem {
        let is_proven = self.closed_to_pods.contains(&node);
        let problem = Problem::new(ProblemCode::PathLost, name, what, fix);
        match state {
            PathState::OneWay if !is_proven => problem.notice(),
            _ => problem,
        }
    }
}

impl Agent {
    /// Returns what the findings of single paths have in common.
    pub(super) fn common_findings(
        &self,
        labels: &Labels<'_>,
        states: &BTreeMap<NodeId, PathState>,
    ) -> CommonFindings {
        let is_reached =
            |(node, state): (&NodeId, &PathState)| self.node.is_active(*node) && !state.is_lost();
        let closed = &self.kernel.diagnoses.remote_pods.closed;
        CommonFindings {
            moved: self.moved_problem(labels),
            reaches_any: states.iter().any(is_reached),
            closed_to_pods: closed.iter().map(|way| way.node).collect(),
        }
    }
}
