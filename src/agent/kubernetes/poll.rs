//! Periodic queries for the subnet of this node while the agent runs. They notice an assignment of another
//! subnet, and repeat a list of nodes that failed at the start.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    super::{Agent, Ending, LoopEvent},
    Assignment, Freshness, LookupError, RETRY, api, query,
};
use crate::{
    api::{EventKind, EventLevel},
    config::PodCidr,
    model::{Pool, Problem, ProblemCode},
};

/// Time between queries while nothing is missing.
const POLL_INTERVAL: Duration = Duration::from_secs(20);

/// The answer about this node, and the list of others if it was requested.
#[derive(Debug)]
pub(crate) struct NodeReport {
    cidrs: Result<Vec<IpNet>, LookupError>,
    others: Option<Result<Vec<std::net::IpAddr>, String>>,
}

/// The source of this node's subnets, and what is known from it.
pub(crate) struct PodCidrSource {
    from: PodCidr,
    /// Name of this node.
    name: String,
    pool: Pool,
    /// The subnets that this node uses.
    cidrs: Vec<IpNet>,
    report: UnboundedSender<LoopEvent>,
    /// When to query next; `None` while an answer is pending.
    due: Option<Instant>,
    /// Why the other nodes are unknown, until a first list has come.
    unlisted: Option<String>,
    /// Seeds of the last list.
    seeds: Vec<String>,
    /// The problem of this node's subnet.
    problem: Option<Problem>,
    /// The last logged failure of each kind.
    logged: BTreeMap<&'static str, String>,
    /// Pause before the next query.
    pause: Duration,
}

impl PodCidrSource {
    /// Returns `None` if the source cannot change.
    pub(crate) fn new(
        from: &PodCidr,
        name: &str,
        pool: Pool,
        given: &Assignment,
        seeds: Vec<String>,
        report: UnboundedSender<LoopEvent>,
    ) -> Option<Self> {
        if matches!(from, PodCidr::Values(_)) {
            return None;
        }
        let unlisted = given.others.as_ref().err().cloned();
        let pause = if unlisted.is_some() { RETRY } else { POLL_INTERVAL };
        Some(Self {
            from: from.clone(),
            name: name.to_owned(),
            pool,
            cidrs: given.cidrs.clone(),
            report,
            due: Some(Instant::now() + pause),
            unlisted,
            seeds,
            problem: None,
            logged: BTreeMap::new(),
            pause,
        })
    }

    /// Returns when to query next.
    pub(crate) const fn next(&self) -> Option<Instant> {
        self.due
    }

    /// Returns the problem with the subnet of this node, and with `no_other` (no other node is known) the
    /// problem with the list of nodes.
    pub(crate) fn problems(&self, no_other: bool) -> impl Iterator<Item = Problem> {
        let unlisted = self.unlisted.as_ref().filter(|_| no_other).map(|why| {
            let what = format!("no other node is known, and Kubernetes does not list them: {why}");
            Problem::new(ProblemCode::Kubernetes, "nodes", what, "")
        });
        self.problem.iter().cloned().chain(unlisted)
    }

    /// Whether no list of nodes has come yet.
    pub(crate) const fn lacks_list(&self) -> bool {
        self.unlisted.is_some()
    }

    /// Queries the source in a task, which reports to the event loop. Requests a list of nodes too if none
    /// has come or no other member is known.
    fn query(&mut self, is_alone: bool) {
        self.due = None;
        let with_list = matches!(self.from, PodCidr::Api) && (self.unlisted.is_some() || is_alone);
        let (from, name, pool) = (self.from.clone(), self.name.clone(), self.pool);
        let (known, report) = (self.cidrs.clone(), self.report.clone());
        tokio::spawn(async move {
            let cidrs = match query(&from, &name, &pool, Freshness::Cached).await {
                Ok((cidrs, _)) if cidrs == known => Ok(cidrs),
                // A changed answer from a cache may be outdated: query the newest state.
                Ok(_) | Err(LookupError::NotAssigned(_)) => {
                    query(&from, &name, &pool, Freshness::Newest).await.map(|(cidrs, _)| cidrs)
                }
                Err(error) => Err(error),
            };
            let others = match with_list {
                true => Some(api::addresses_of_others(&name).await),
                false => None,
            };
            let _ = report.send(LoopEvent::Node(NodeReport { cidrs, others }));
        });
    }

    /// Logs a failure, if it differs from the last of its kind.
    fn log(&mut self, why: String, event: &'static str) {
        if self.is_new_failure(&why, event) {
            tracing::warn!(%why, "{event}");
        }
    }

    /// Stores a failure, and returns whether it differs from the last of its kind.
    fn is_new_failure(&mut self, why: &str, event: &'static str) -> bool {
        self.logged.insert(event, why.to_owned()).as_deref() != Some(why)
    }

    /// Sets the time of the next query: soon after a first failure, then with doubling pauses.
    fn plan(&mut self, now: Instant, failed: bool, at_least: Duration) {
        self.pause = match failed {
            true if self.pause >= POLL_INTERVAL => RETRY,
            true => (self.pause * 2).min(POLL_INTERVAL - RETRY),
            false => POLL_INTERVAL,
        };
        self.due = Some(now + self.pause.max(at_least));
    }
}

impl Agent {
    /// Queries the source, if that is due.
    pub(in crate::agent) fn poll_pod_cidrs(&mut self, now: Instant) {
        let is_alone = !self.node.has_active_peer();
        if let Some(source) = self.source.as_mut().filter(|s| s.due.is_some_and(|due| due <= now)) {
            source.query(is_alone);
        }
    }

    /// Applies an answer of the source.
    pub(in crate::agent) fn on_node_report(&mut self, NodeReport { cidrs, others }: NodeReport) {
        let now = Instant::now();
        let Some(source) = &mut self.source else { return };
        let mut pause = Duration::ZERO;
        let mut failed = false;
        match cidrs {
            Ok(cidrs) if cidrs == source.cidrs => source.problem = None,
            Ok(cidrs) => return self.move_to(&cidrs),
            Err(LookupError::NotAssigned(why)) => {
                failed = true;
                let known =
                    source.cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
                let what = format!("{why}; this node continues with {known}");
                source.problem = Some(Problem::new(ProblemCode::Kubernetes, "subnet", what, ""));
                source.log(why, "Kubernetes no longer assigns this node a usable subnet");
            }
            Err(LookupError::NoAnswer { why, pause: requested }) => {
                (failed, pause) = (true, requested);
                source.log(why, "no answer from Kubernetes about this node");
            }
        }
        let listed = match others {
            None => None,
            Some(Err(why)) => {
                failed = true;
                if source.unlisted.is_some() {
                    source.unlisted = Some(why.clone());
                }
                source.log(why, "Kubernetes does not list the other nodes");
                None
            }
            Some(Ok(others)) => {
                source.unlisted = None;
                let port = self.config.port;
                Some(super::seeds(&others, port))
            }
        };
        if !failed && !source.logged.is_empty() {
            source.logged.clear();
            tracing::info!("Kubernetes answers again");
        }
        source.plan(now, failed, pause);
        if let Some(seeds) = listed {
            self.replace_listed(seeds);
        }
    }

    /// Replaces the seeds of the last list by those of a new one.
    fn replace_listed(&mut self, seeds: Vec<String>) {
        let Some(source) = &mut self.source else { return };
        let before = std::mem::replace(&mut source.seeds, seeds);
        let is_other =
            |seed: &String| !before.contains(seed) || self.configured_seeds.contains(seed);
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
    fn move_to(&mut self, cidrs: &[IpNet]) {
        let listed =
            |cidrs: &[IpNet]| cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        let old = self.source.as_ref().map_or_else(String::new, |source| listed(&source.cidrs));
        let new = listed(cidrs);
        tracing::warn!(%old, %new, "Kubernetes assigned this node another subnet; restarting with it");
        let text = format!("Kubernetes assigned this node {new} in place of {old}");
        self.journal.note(EventKind::Agent, EventLevel::Warn, text);
        self.ending = Some(Ending::Reassigned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PoolSpec;

    #[test]
    fn is_new_failure_lasting_failures_are_new_once_per_kind() {
        let network: IpNet = "10.42.0.0/16".parse().expect("a network");
        let pool = Pool::new(&PoolSpec::of(network)).expect("a pool");
        let given =
            Assignment { cidrs: Vec::new(), address: network.network(), others: Ok(Vec::new()) };
        let (report, _news) = tokio::sync::mpsc::unbounded_channel();
        let source = PodCidrSource::new(&PodCidr::Api, "n1", pool, &given, Vec::new(), report);
        let mut source = source.expect("a source that may change");
        for is_first in [true, false, false] {
            assert_eq!(source.is_new_failure("no answer", "nothing about this node"), is_first);
            assert_eq!(source.is_new_failure("no list", "no other nodes"), is_first);
        }
        assert!(source.is_new_failure("403", "no other nodes"));
    }
}
