//! Answers of Kubernetes about this node's subnets and the other nodes.

use std::time::Instant;

use ipnet::IpNet;

use crate::{
    agent::{Agent, Ending},
    api::{EventKind, EventLevel},
    kubernetes::{self, Change, NodeReport, PodCidrSource},
};

/// What this node is told from outside the cluster.
pub(in crate::agent) struct Sources {
    /// Seeds of the configuration only.
    pub(in crate::agent) seeds: Vec<String>,
    /// Where the subnet of this node comes from, if it is assigned from outside the cluster.
    pub(in crate::agent) kubernetes: Option<PodCidrSource>,
}

impl Agent {
    /// Queries the source, if that is due.
    pub(in crate::agent) fn poll_pod_cidrs(&mut self, now: Instant) {
        let is_alone = !self.node.has_active_peer();
        if let Some(source) = &mut self.sources.kubernetes {
            source.query_if_due(now, is_alone);
        }
    }

    /// Applies an answer of the source.
    pub(in crate::agent) fn on_node_report(&mut self, report: NodeReport) {
        let Some(source) = &mut self.sources.kubernetes else { return };
        match source.on_report(Instant::now(), report) {
            Some(Change::Subnets { old, new }) => self.move_to(&old, &new),
            Some(Change::Others(others)) => {
                self.replace_listed(kubernetes::seeds(&others, self.config.port));
            }
            None => {}
        }
    }

    /// Replaces the seeds of the last list by those of a new one.
    fn replace_listed(&mut self, seeds: Vec<String>) {
        let Some(source) = &mut self.sources.kubernetes else { return };
        let before = std::mem::replace(&mut source.seeds, seeds);
        let is_other = |seed: &String| !before.contains(seed) || self.sources.seeds.contains(seed);
        let mut all: Vec<String> =
            self.config.seeds.iter().filter(|seed| is_other(seed)).cloned().collect();
        for seed in &source.seeds {
            if !all.contains(seed) {
                all.push(seed.clone());
            }
        }
        if all != self.config.seeds {
            self.config.seeds = all;
            self.node.set_seeds(self.clock.now(), self.config.seeds.len());
        }
    }

    /// Ends this run for a restart with other subnets, which the start saves. Pods keep their addresses until
    /// they are restarted.
    fn move_to(&mut self, old: &[IpNet], new: &[IpNet]) {
        let listed =
            |cidrs: &[IpNet]| cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        let (old, new) = (listed(old), listed(new));
        tracing::warn!(%old, %new, "Kubernetes assigned this node another subnet; restarting with it");
        let text = format!("Kubernetes assigned this node {new} in place of {old}");
        self.journal.note(EventKind::Agent, EventLevel::Warn, text);
        self.lifetime.ending = Some(Ending::Reassigned);
    }
}
