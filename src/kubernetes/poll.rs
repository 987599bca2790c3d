//! Periodic queries for the subnet of this node while the agent runs. They notice an assignment of another
//! subnet, and repeat a list of nodes that failed at the start.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Assignment, Freshness, LookupError, RETRY, api, query};
use crate::{
    config::PodCidr,
    model::{Pool, Problem, ProblemCode},
};
use ipnet::IpNet;

/// Time between queries while nothing is missing.
const POLL_INTERVAL: Duration = Duration::from_secs(20);

/// The answer about this node, and the list of others if it was requested.
#[derive(Debug)]
pub(crate) struct NodeReport {
    cidrs: Result<Vec<IpNet>, LookupError>,
    others: Option<Result<Vec<IpAddr>, String>>,
}

/// What an answer changes for this node.
#[derive(Debug)]
pub(crate) enum Change {
    /// This node has other subnets.
    Subnets {
        /// The subnets until now.
        old: Vec<IpNet>,
        /// The new ones.
        new: Vec<IpNet>,
    },
    /// The addresses of the other nodes are known.
    Others(Vec<IpAddr>),
}

/// Receives the reports of queries.
type Tell = Arc<dyn Fn(NodeReport) + Send + Sync>;

/// The source of this node's subnets, and what is known from it.
pub(crate) struct PodCidrSource {
    from: PodCidr,
    /// Name of this node.
    name: String,
    pool: Pool,
    /// The subnets that this node uses.
    cidrs: Vec<IpNet>,
    report: Tell,
    /// When to query next; `None` while an answer is pending.
    due: Option<Instant>,
    /// Why the other nodes are unknown, until a first list has come.
    unlisted: Option<String>,
    /// Seeds of the last list.
    pub(crate) seeds: Vec<String>,
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
        report: impl Fn(NodeReport) + Send + Sync + 'static,
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
            report: Arc::new(report),
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

    /// Queries the source in a task, if that is due; the task reports the answer. Requests a list of
    /// nodes too if none has come or no other member is known.
    pub(crate) fn query_if_due(&mut self, now: Instant, is_alone: bool) {
        if self.due.is_none_or(|due| due > now) {
            return;
        }
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
            report(NodeReport { cidrs, others });
        });
    }

    /// Stores an answer of the source, and returns what it changes.
    pub(crate) fn on_report(
        &mut self,
        now: Instant,
        NodeReport { cidrs, others }: NodeReport,
    ) -> Option<Change> {
        let mut pause = Duration::ZERO;
        let mut failed = false;
        match cidrs {
            Ok(cidrs) if cidrs == self.cidrs => self.problem = None,
            Ok(new) => return Some(Change::Subnets { old: self.cidrs.clone(), new }),
            Err(LookupError::NotAssigned(why)) => {
                failed = true;
                let known = self.cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
                let what = format!("{why}; this node continues with {known}");
                self.problem = Some(Problem::new(ProblemCode::Kubernetes, "subnet", what, ""));
                self.log(why, "Kubernetes no longer assigns this node a usable subnet");
            }
            Err(LookupError::NoAnswer { why, pause: requested }) => {
                (failed, pause) = (true, requested);
                self.log(why, "no answer from Kubernetes about this node");
            }
        }
        let listed = match others {
            None => None,
            Some(Err(why)) => {
                failed = true;
                if self.unlisted.is_some() {
                    self.unlisted = Some(why.clone());
                }
                self.log(why, "Kubernetes does not list the other nodes");
                None
            }
            Some(Ok(others)) => {
                self.unlisted = None;
                Some(Change::Others(others))
            }
        };
        if !failed && !self.logged.is_empty() {
            self.logged.clear();
            tracing::info!("Kubernetes answers again");
        }
        self.plan(now, failed, pause);
        listed
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
        let source = PodCidrSource::new(&PodCidr::Api, "n1", pool, &given, Vec::new(), |_| ());
        let mut source = source.expect("a source that may change");
        for is_first in [true, false, false] {
            assert_eq!(source.is_new_failure("no answer", "nothing about this node"), is_first);
            assert_eq!(source.is_new_failure("no list", "no other nodes"), is_first);
        }
        assert!(source.is_new_failure("403", "no other nodes"));
    }
}
