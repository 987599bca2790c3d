//! The source of this node's subnet is asked again and again while the agent runs: another subnet is noticed,
//! and other nodes are found by a list that failed at first.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    super::{Agent, Ending, LoopEvent},
    Age, Given, RETRY, Unknown, api, ask,
};
use crate::{
    api::{EventKind, EventLevel},
    config::PodCidr,
    model::Pool,
};

/// The source is asked this often as long as nothing is missing.
const PERIOD: Duration = Duration::from_secs(20);

/// What was heard of this node, and of others if that was asked.
#[derive(Debug)]
pub(crate) struct NodeReport {
    cidrs: Result<Vec<IpNet>, Unknown>,
    others: Option<Result<Vec<std::net::IpAddr>, String>>,
}

/// Where the subnet of this node is said, and what is known from there.
pub(crate) struct Source {
    from: PodCidr,
    name: String,
    pool: Pool,
    cidrs: Vec<IpNet>,
    report: UnboundedSender<LoopEvent>,
    /// When to ask; none while an answer is awaited.
    due: Option<Instant>,
    /// Why the other nodes are not known, as long as no list has come.
    unlisted: Option<String>,
    /// Seeds of the last list.
    seeds: Vec<String>,
    /// What is wrong with this node's subnet.
    problem: Option<String>,
    /// The last failure of each kind in the log.
    logged: BTreeMap<&'static str, String>,
    pause: Duration,
}

impl Source {
    /// None, if it always says the same.
    pub(crate) fn new(
        from: &PodCidr,
        name: &str,
        pool: Pool,
        given: &Given,
        seeds: Vec<String>,
        report: UnboundedSender<LoopEvent>,
    ) -> Option<Self> {
        if matches!(from, PodCidr::Values(_)) {
            return None;
        }
        let unlisted = given.others.as_ref().err().cloned();
        let pause = if unlisted.is_some() { RETRY } else { PERIOD };
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

    pub(crate) const fn next(&self) -> Option<Instant> {
        self.due
    }

    /// What is wrong: with the subnet of this node, and with the list of others if it knows `no_other`.
    pub(crate) fn problems(&self, no_other: bool) -> impl Iterator<Item = String> {
        let unlisted =
            self.unlisted.as_ref().filter(|_| no_other).map(|why| {
                format!("no other node is known, and Kubernetes does not list them: {why}")
            });
        self.problem.iter().cloned().chain(unlisted)
    }

    /// Whether a list of nodes has never come.
    pub(crate) const fn lacks_list(&self) -> bool {
        self.unlisted.is_some()
    }

    fn ask(&mut self, is_alone: bool) {
        self.due = None;
        let with_list = matches!(self.from, PodCidr::Api) && (self.unlisted.is_some() || is_alone);
        let (from, name, pool) = (self.from.clone(), self.name.clone(), self.pool);
        let (known, report) = (self.cidrs.clone(), self.report.clone());
        tokio::spawn(async move {
            let cidrs = match ask(&from, &name, &pool, Age::Cached).await {
                Ok((cidrs, _)) if cidrs == known => Ok(cidrs),
                // What a cache says may be old.
                Ok(_) | Err(Unknown::Said(_)) => {
                    ask(&from, &name, &pool, Age::Newest).await.map(|(cidrs, _)| cidrs)
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

    fn log(&mut self, why: String, event: &'static str) {
        if self.is_news(&why, event) {
            tracing::warn!(%why, "{event}");
        }
    }

    /// Whether a failure is another one than the last of its kind.
    fn is_news(&mut self, why: &str, event: &'static str) -> bool {
        self.logged.insert(event, why.to_owned()).as_deref() != Some(why)
    }

    /// Plans the next question: soon after a failure, and then less and less often.
    fn plan(&mut self, now: Instant, failed: bool, at_least: Duration) {
        self.pause = match failed {
            true if self.pause >= PERIOD => RETRY,
            true => (self.pause * 2).min(PERIOD - RETRY),
            false => PERIOD,
        };
        self.due = Some(now + self.pause.max(at_least));
    }
}

impl Agent {
    /// Asks where it is time.
    pub(in crate::agent) fn ask_about_node(&mut self, now: Instant) {
        let is_alone = !self.node.has_active_peer();
        if let Some(source) = self.source.as_mut().filter(|s| s.due.is_some_and(|due| due <= now)) {
            source.ask(is_alone);
        }
    }

    pub(in crate::agent) fn on_node_report(&mut self, NodeReport { cidrs, others }: NodeReport) {
        let now = Instant::now();
        let Some(source) = &mut self.source else { return };
        let mut pause = Duration::ZERO;
        let mut failed = false;
        match cidrs {
            Ok(cidrs) if cidrs == source.cidrs => source.problem = None,
            Ok(cidrs) => return self.move_to(&cidrs),
            Err(Unknown::Said(why)) => {
                failed = true;
                let known =
                    source.cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
                source.problem = Some(format!("{why}; this node goes on with {known}"));
                source.log(why, "Kubernetes gives this node no usable subnet any more");
            }
            Err(Unknown::Unanswered { why, pause: asked }) => {
                (failed, pause) = (true, asked);
                source.log(why, "Kubernetes says nothing about this node");
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
            tracing::info!("Kubernetes answers");
        }
        source.plan(now, failed, pause);
        if let Some(seeds) = listed {
            self.replace_listed(seeds);
        }
    }

    /// Takes the seeds of a new list in the place of those of the last one.
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

    /// Starts again with other subnets, which the start saves. Pods keep their addresses until they are
    /// started again.
    fn move_to(&mut self, cidrs: &[IpNet]) {
        let listed =
            |cidrs: &[IpNet]| cidrs.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        let old = self.source.as_ref().map_or_else(String::new, |source| listed(&source.cidrs));
        let new = listed(cidrs);
        tracing::warn!(%old, %new, "Kubernetes has given this node another subnet: starting again with it");
        let text = format!("Kubernetes has given this node {new} in the place of {old}");
        self.journal.note(EventKind::Agent, EventLevel::Warn, text);
        self.ending = Some(Ending::Reassigned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PoolSpec;

    #[test]
    fn failures_of_two_kinds_that_last_are_news_once_each() {
        let network: IpNet = "10.42.0.0/16".parse().expect("a network");
        let pool = Pool::new(&PoolSpec::of(network)).expect("a pool");
        let given = Given { cidrs: Vec::new(), address: network.network(), others: Ok(Vec::new()) };
        let (report, _news) = tokio::sync::mpsc::unbounded_channel();
        let source = Source::new(&PodCidr::Api, "n1", pool, &given, Vec::new(), report);
        let mut source = source.expect("a source that may change");
        for is_first in [true, false, false] {
            assert_eq!(source.is_news("no answer", "nothing about this node"), is_first);
            assert_eq!(source.is_news("no list", "no other nodes"), is_first);
        }
        assert!(source.is_news("403", "no other nodes"));
    }
}
