//! Turns a non-member into a member.
//!
//! A non-member sends `Hello` to its seeds, several at a time, until one answers with `Welcome`: the cluster,
//! all facts and usually a slot. A member without a slot searches for one in `lease`.

use std::time::Duration;

use crate::{
    model::{NodeId, Time},
    wire::{GrantWish, Hello, Key, Refusal, Request, Response, Welcome},
};

use super::{
    Answer, CallError, ClusterState, Node, Purpose, SlotTable, Stop, Target, lease::LeaseSearch,
};

/// The next seed is tried if the previous one has not answered within this time.
const NEXT_SEED_AFTER: Duration = Duration::from_millis(100);
/// Pause after all seeds were tried; doubles from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Pause before another attempt if a seed is in no cluster yet; doubles up to `LONGEST_PAUSE`.
const NOT_READY_PAUSE: Duration = Duration::from_millis(20);
/// Limit of unanswered `Hello` requests.
const MAX_OPEN_HELLOS: usize = 4;

/// A non-member's search for a member that admits it.
pub(super) struct Joining {
    next_seed: usize,
    next_try: Time,
    pause: Duration,
    not_ready_pause: Duration,
    open: usize,
    /// The last failure of each seed, by seed index.
    last_failures: Vec<Option<SeedFailure>>,
    pub(super) refusal: Option<Refusal>,
}

/// The reason for which a seed did not admit this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SeedFailure {
    NoAnswer(CallError),
    Refused(Refusal),
}

impl SeedFailure {
    /// Whether the seed's address is this node's own.
    pub(super) const fn is_own_address(&self) -> bool {
        matches!(self, Self::NoAnswer(CallError::Myself))
    }

    /// Whether a retry at the same seed cannot succeed.
    const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer(CallError::Rejected(_) | CallError::OtherSecret(_))
                | Self::Refused(Refusal::OtherCluster { .. } | Refusal::Settings(_))
        )
    }
}

impl std::fmt::Display for SeedFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoAnswer(error @ CallError::Unreachable(_)) => write!(
                f,
                "{error}: check that gossamer runs there, and that firewalls of both hosts allow UDP to that \
                 port (8473 unless you set another one)"
            ),
            Self::NoAnswer(error) => error.fmt(f),
            Self::Refused(refusal) => write!(f, "it refused: {refusal}"),
        }
    }
}

impl Joining {
    pub(super) fn new(now: Time, seeds: usize) -> Self {
        Self {
            next_seed: 0,
            next_try: now,
            pause: FIRST_PAUSE,
            not_ready_pause: NOT_READY_PAUSE,
            open: 0,
            last_failures: vec![None; seeds],
            refusal: None,
        }
    }

    /// Sets a seed's last failure. Ignores answers of seeds that were removed meanwhile.
    fn note(&mut self, seed: usize, failure: Option<SeedFailure>) {
        if let Some(last_failure) = self.last_failures.get_mut(seed) {
            *last_failure = failure;
        }
    }

    /// Returns the seeds' last failures with their indices, for status.
    pub(super) fn failures(&self) -> impl Iterator<Item = (usize, &SeedFailure)> {
        self.last_failures
            .iter()
            .enumerate()
            .filter_map(|(seed, failure)| Some((seed, failure.as_ref()?)))
    }
}

impl Node {
    /// Returns, while the node is in no cluster, the seeds that have not admitted it with the reason.
    pub fn seed_failures(&self) -> impl Iterator<Item = (usize, String)> + '_ {
        self.failures_before_membership().map(|(seed, failure)| (seed, failure.to_string()))
    }

    /// Returns the seeds whose address is this node's own; none once the node is in a cluster.
    pub fn own_seeds(&self) -> impl Iterator<Item = usize> + '_ {
        let failures = self.failures_before_membership();
        failures.filter(|(_, failure)| failure.is_own_address()).map(|(seed, _)| seed)
    }

    /// Returns the same without the seeds whose address is this node's own.
    pub fn foreign_seed_failures(&self) -> impl Iterator<Item = (usize, String)> + '_ {
        let failures = self.failures_before_membership();
        let failures = failures.filter(|(_, failure)| !failure.is_own_address());
        failures.map(|(seed, failure)| (seed, failure.to_string()))
    }

    fn failures_before_membership(&self) -> impl Iterator<Item = (usize, &SeedFailure)> {
        self.lifecycle.joining.failures().filter(|_| self.replica.cluster_state.is_none())
    }

    /// Replaces the seeds; `seeds` is their new number. Answers to calls to the old seeds are ignored,
    /// because their indices are no longer valid.
    pub fn set_seeds(&mut self, now: Time, seeds: usize) {
        self.config.seeds = seeds;
        let to_a_seed = |purpose: &Purpose| match purpose {
            Purpose::Hello { .. } => true,
            Purpose::Compare { partner } | Purpose::Exchange { partner, .. } => {
                matches!(partner, Target::Seed(_))
            }
            _ => false,
        };
        self.outbox.ignore_answers(to_a_seed);
        self.lifecycle.joining.open = 0;
        self.lifecycle.joining.last_failures = vec![None; seeds];
        self.lifecycle.joining.next_seed = 0;
        self.lifecycle.joining.next_try = now;
        self.replica.sync.set_seeds(seeds);
    }

    pub(super) fn next_join_step(&self) -> Option<Time> {
        let may_request =
            self.replica.cluster_state.is_none() && self.lifecycle.joining.open < MAX_OPEN_HELLOS;
        may_request.then_some(self.lifecycle.joining.next_try)
    }

    /// Sends `Hello` to the next seed if it is due.
    pub(super) fn step_join(&mut self, now: Time) {
        let seeds = self.config.seeds;
        let joining = &mut self.lifecycle.joining;
        if self.replica.cluster_state.is_some()
            || seeds == 0
            || now < joining.next_try
            || joining.open >= MAX_OPEN_HELLOS
        {
            return;
        }
        let seed = joining.next_seed;
        joining.open += 1;
        joining.next_seed = (seed + 1) % seeds;
        if joining.next_seed == 0 {
            let pause = joining.pause;
            joining.pause = (pause * 2).min(LONGEST_PAUSE);
            self.lifecycle.joining.next_try = now + self.jittered(pause);
        } else {
            joining.next_try = now + NEXT_SEED_AFTER;
        }
        let hello = Hello {
            member: self.replica.me.clone(),
            identity: self.membership.identity(),
            settings: self.config.wish,
            grant: GrantWish { prefer: self.config.prefer_subnet },
        };
        self.call(Target::Seed(seed), Purpose::Hello { seed }, &Request::Hello(hello));
    }

    pub(super) fn handle_hello_answer(&mut self, now: Time, seed: usize, answer: Answer) {
        self.lifecycle.joining.open = self.lifecycle.joining.open.saturating_sub(1);
        match answer {
            Ok((from, Response::Welcome(welcome))) => {
                self.replica.sync.note_seed(seed, from);
                self.lifecycle.joining.note(seed, None);
                self.enter_cluster(now, from, *welcome);
            }
            Ok((from, Response::Refused(refusal))) => {
                self.handle_hello_refusal(now, seed, from, refusal)
            }
            Ok((from, _)) => self.note_malformed(from, &"unexpected response to a hello"),
            Err(error) => self.handle_hello_failure(now, seed, error),
        }
    }

    fn enter_cluster(&mut self, now: Time, from: NodeId, welcome: Welcome) {
        let Welcome { cluster, facts, returning, no_slot } = welcome;
        match &self.replica.cluster_state {
            // A second seed answered as well. If it granted another slot, `lease` gives that one back.
            Some(cluster_state) if cluster_state.cluster.id == cluster.id => {
                self.learn(now, &facts, Some(from));
            }
            Some(_) => {
                self.note_foreign(from, cluster.id);
            }
            None => {
                tracing::info!(cluster = %cluster.id, members = facts.members.len(), "joined");
                let search = LeaseSearch::new(now, &cluster, &self.config);
                let slots = SlotTable::empty(cluster.settings.pool);
                self.replica.cluster_state = Some(ClusterState { cluster, slots });
                self.lifecycle.search = Some(search);
                self.outbox.mark_urgent(Key::Cluster);
                self.replica.directory.merge(&self.replica.me);
                self.outbox.mark(Key::Member(self.replica.me.node));
                // The facts are not pushed: only this node's join is new to the others, and the seed pushes
                // it.
                facts
                    .members
                    .iter()
                    .for_each(|record| self.replica.horizons.include_member(record));
                facts.slots.iter().for_each(|run| self.replica.horizons.include_run(run));
                facts
                    .forgets
                    .iter()
                    .for_each(|forget| self.replica.horizons.include_forget(forget));
                self.absorb(now, &facts, Some(from));
                if returning {
                    self.require_full_verification();
                }
                self.replica.note_comparison(&mut self.outbox, now, from, false);
                if let (Some(search), Some(refusal)) = (&mut self.lifecycle.search, no_slot) {
                    search.note_refusal(refusal);
                }
            }
        }
    }

    fn handle_hello_refusal(&mut self, now: Time, seed: usize, from: NodeId, refusal: Refusal) {
        let joining = &mut self.lifecycle.joining;
        if joining.refusal.as_ref() != Some(&refusal) {
            tracing::warn!(peer = %from, %refusal, "seed refused this node");
            joining.refusal = Some(refusal.clone());
        }
        joining.note(seed, Some(SeedFailure::Refused(refusal.clone())));
        match refusal {
            _ if self.replica.cluster_state.is_some() => {}
            Refusal::OtherCluster { .. } | Refusal::Settings(_) => {
                self.stop_if_all_seeds_refuse(seed)
            }
            Refusal::Left | Refusal::Forgotten { .. } => self.stop_if_expelled(&refusal),
            Refusal::NotReady => {
                let pause = joining.not_ready_pause;
                joining.not_ready_pause = (pause * 2).min(LONGEST_PAUSE);
                joining.next_try = joining.next_try.min(now + pause);
            }
            _ => {}
        }
    }

    /// Stops the node: the cluster considers it left or forgotten.
    pub(super) fn stop_if_expelled(&mut self, refusal: &Refusal) {
        let successor = match refusal {
            _ if self.lifecycle.is_leaving() => return,
            Refusal::Forgotten { successor } => Some(*successor),
            Refusal::Left => None,
            _ => return,
        };
        self.outbox.stop(Stop::Expelled { successor });
    }

    fn handle_hello_failure(&mut self, now: Time, seed: usize, error: CallError) {
        tracing::debug!(seed, %error, "seed did not answer");
        if matches!(error, CallError::Myself) {
            self.replica.sync.note_seed(seed, self.replica.me.node);
        }
        self.lifecycle.joining.note(seed, Some(SeedFailure::NoAnswer(error)));
        self.stop_if_all_seeds_refuse(seed);
        if self.lifecycle.joining.next_seed != 0 {
            self.lifecycle.joining.next_try = now;
        }
    }

    /// Stops the node once every seed has refused it for good. A single seed may be misconfigured while the
    /// others are right.
    fn stop_if_all_seeds_refuse(&mut self, seed: usize) {
        let last_failures = &self.lifecycle.joining.last_failures;
        let is_final =
            |failure: &Option<SeedFailure>| failure.as_ref().is_some_and(SeedFailure::is_final);
        if self.replica.cluster_state.is_some()
            || last_failures.is_empty()
            || !last_failures.iter().all(is_final)
        {
            return;
        }
        let stop = match last_failures.get(seed).and_then(Option::as_ref) {
            Some(SeedFailure::Refused(refusal)) => Stop::Refused(refusal.clone()),
            Some(SeedFailure::NoAnswer(error)) => Stop::Rejected { seed, why: error.to_string() },
            None => return,
        };
        self.outbox.stop(stop);
    }
}
