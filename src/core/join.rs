//! From stranger to member with a lease.
//!
//! A stranger asks its seeds, a few at a time, until one welcomes it; that answer holds the cluster, all
//! facts and usually a slot. A member without a lease (its seed had no spare, or its lease went to the
//! heir of a node that was declared gone) asks those who have spares, one after the other, for ever.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Slot, SlotState, Time},
    wire::{Facts, GrantWish, Hello, Key, Refusal, Request, Response, Welcome},
};

use super::{
    CallError, Home, Node, Output, Purpose, SlotTable, Stop, Target, boot::preferred,
    rank::peer_score,
};

/// The next seed is tried when the one before has not answered within this time.
const NEXT_SEED_AFTER: Duration = Duration::from_millis(100);
/// Pause after all seeds were tried: the first, and the longest it grows to.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A seed that is in no cluster yet itself is asked again this soon.
const NOT_READY_PAUSE: Duration = Duration::from_millis(20);
/// Greetings on their way at once.
const MAX_OPEN_HELLOS: usize = 4;
/// Pause after all donors were asked in vain.
const DONOR_PAUSE: Duration = Duration::from_secs(2);

type Answer = Result<(NodeId, Response), CallError>;

/// A stranger's search for somebody who lets it in.
pub(super) struct Joining {
    next_seed: usize,
    next_try: Time,
    pause: Duration,
    open: usize,
    /// The last word of each seed.
    said: Vec<Option<CallError>>,
    pub(super) refusal: Option<Refusal>,
}

/// A member's search for a lease.
pub(super) struct LeaseSearch {
    /// The slot it would like, until its owner has been asked in vain.
    prefer: Option<Slot>,
    tried: BTreeSet<NodeId>,
    open: bool,
    next_try: Option<Time>,
    /// The lease last found.
    held: Option<Slot>,
    pub(super) refusal: Option<Refusal>,
}

impl Joining {
    pub(super) fn new(now: Time, seeds: usize) -> Self {
        Self {
            next_seed: 0,
            next_try: now,
            pause: FIRST_PAUSE,
            open: 0,
            said: vec![None; seeds],
            refusal: None,
        }
    }

    /// The last word of each seed, for status.
    pub(super) fn seed_errors(&self) -> impl Iterator<Item = Option<String>> + '_ {
        self.said.iter().map(|said| said.as_ref().map(ToString::to_string))
    }
}

impl LeaseSearch {
    pub(super) fn new(prefer: Option<Slot>) -> Self {
        Self {
            prefer,
            tried: BTreeSet::new(),
            open: false,
            next_try: None,
            held: None,
            refusal: None,
        }
    }
}

impl Node {
    pub(super) fn next_join_step(&self) -> Option<Time> {
        match &self.home {
            None => (self.joining.open < MAX_OPEN_HELLOS).then_some(self.joining.next_try),
            Some(home) => home.search.next_try.filter(|_| self.leaving.is_none()),
        }
    }

    /// Greets the next seed when it is its turn.
    pub(super) fn step_join(&mut self, now: Time) {
        let seeds = self.config.seeds;
        let joining = &mut self.joining;
        if self.home.is_some()
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
            self.joining.next_try = now + self.jittered(pause);
        } else {
            joining.next_try = now + NEXT_SEED_AFTER;
        }
        let hello = Hello {
            member: self.me.clone(),
            identity: self.membership.identity(),
            settings: self.config.wish,
            grant: GrantWish { prefer: self.config.prefer_subnet },
        };
        let after = self.after();
        self.call(Target::Seed(seed), Purpose::Hello { seed }, &Request::Hello(hello), after);
    }

    pub(super) fn on_hello_answer(&mut self, now: Time, seed: usize, answer: Answer) {
        self.joining.open = self.joining.open.saturating_sub(1);
        match answer {
            Ok((from, Response::Welcome(welcome))) => {
                self.sync.note_seed(seed, from);
                self.joining.said[seed] = None;
                self.enter(now, from, *welcome);
            }
            Ok((from, Response::Refused(refusal))) => self.on_refusal(now, from, refusal),
            Ok((from, _)) => self.note_malformed(from, &"no answer to a greeting"),
            Err(error) => self.on_no_welcome(now, seed, error),
        }
    }

    fn enter(&mut self, now: Time, from: NodeId, welcome: Welcome) {
        let Welcome { cluster, facts, no_slot } = welcome;
        match &self.home {
            // A second seed answered too. What it granted is ours by the table and is given back.
            Some(home) if home.cluster.id == cluster.id => self.learn(now, &facts, None),
            Some(_) => {
                tracing::error!(theirs = %cluster.id, "a seed welcomed us to another cluster")
            }
            None => {
                tracing::info!(cluster = %cluster.id, members = facts.members.len(), "joined");
                let search = LeaseSearch::new(preferred(&cluster, &self.config));
                let slots = SlotTable::empty(cluster.settings.pool);
                self.home = Some(Home { cluster, slots, search });
                self.dirty.mark(Key::Cluster, true);
                self.directory.merge(&self.me);
                self.dirty.mark(Key::Member(self.me.node), false);
                // The seed passes on what is new; all the rest is old news to everybody else.
                self.absorb(now, &facts);
                self.sync.complete(now, from, false);
                if let Some(home) = &mut self.home {
                    home.search.refusal = no_slot;
                }
            }
        }
    }

    fn on_refusal(&mut self, now: Time, from: NodeId, refusal: Refusal) {
        tracing::warn!(peer = %from, %refusal, "a seed refused this node");
        self.joining.refusal = Some(refusal.clone());
        match refusal {
            Refusal::OtherCluster { .. } | Refusal::Settings(_) | Refusal::Left
                if self.home.is_none() =>
            {
                self.outputs.push_back(Output::Stop(Stop::Refused(refusal)));
            }
            _ => self.joining.next_try = self.joining.next_try.min(now + NOT_READY_PAUSE),
        }
    }

    fn on_no_welcome(&mut self, now: Time, seed: usize, error: CallError) {
        tracing::debug!(seed, %error, "seed did not answer");
        if matches!(error, CallError::Myself) {
            self.sync.note_seed(seed, self.me.node);
        }
        self.joining.said[seed] = Some(error);
        let rejected = |said: &Option<CallError>| matches!(said, Some(CallError::Rejected(_)));
        if self.home.is_none() && self.joining.said.iter().all(rejected) {
            let why = self.joining.said[seed].as_ref().map(ToString::to_string).unwrap_or_default();
            self.outputs.push_back(Output::Stop(Stop::Rejected { seed, why }));
        }
        if self.joining.next_seed != 0 {
            self.joining.next_try = now;
        }
    }

    /// Sees to it that this node has exactly one lease.
    pub(super) fn step_lease(&mut self, now: Time) {
        let me = self.me.node;
        let synced = self.sync.synced() || self.is_alone();
        let Some(home) = &mut self.home else { return };
        if self.leaving.is_some() || home.search.next_try.is_none_or(|at| now < at) {
            return;
        }
        home.search.next_try = None;
        let leased: Vec<Slot> = home.slots.leased_by(me).collect();
        if let [keep, surplus @ ..] = leased.as_slice() {
            home.search.tried.clear();
            home.search.refusal = None;
            if home.search.held.replace(*keep) != Some(*keep) {
                let subnet = home.cluster.settings.pool.subnet(*keep);
                tracing::info!(%subnet, "this node's subnet");
            }
            let released: Vec<_> =
                surplus.iter().filter_map(|slot| home.slots.release_own(me, *slot)).collect();
            self.note_own_change(now, released);
            return;
        }
        if synced && let Some(change) = home.slots.lease_own(me, home.search.prefer) {
            self.note_own_change(now, vec![change]);
            return;
        }
        if !home.search.open {
            self.ask_donor(now);
        }
    }

    /// Has another look for a lease at the next step: the table changed.
    pub(super) fn recheck_lease(&mut self, now: Time) {
        if let Some(home) = &mut self.home {
            home.search.next_try = Some(now);
        }
    }

    fn ask_donor(&mut self, now: Time) {
        let me = self.me.node;
        let Some(home) = &mut self.home else { return };
        let spares = home.slots.census().spare;
        let untried = |node: &NodeId| {
            let reachable = *node != me && self.directory.get(*node).is_some();
            reachable && !home.search.tried.contains(node)
        };
        let wanted = home
            .search
            .prefer
            .and_then(|slot| home.slots.record(slot))
            .filter(|record| record.state == SlotState::Spare && untried(&record.owner));
        let candidates = || spares.keys().copied().filter(untried);
        let active = self.membership.active();
        let donor = wanted.map(|record| record.owner).or_else(|| {
            candidates()
                .filter(|node| active.contains_key(node))
                .max_by_key(|donor| peer_score(me, *donor))
                .or_else(|| candidates().max_by_key(|donor| peer_score(me, *donor)))
        });
        let Some(donor) = donor else {
            home.search.tried.clear();
            home.search.prefer = None;
            let pause = self.jittered(DONOR_PAUSE);
            if let Some(home) = &mut self.home {
                home.search.next_try = Some(now + pause);
            }
            self.sync.hasten(now);
            return;
        };
        home.search.open = true;
        let prefer =
            home.search.prefer.map(|slot| home.cluster.settings.pool.subnet(slot).network());
        let after = self.after();
        let request = Request::Grant(GrantWish { prefer });
        self.call_member(donor, Purpose::Grant { donor }, &request, after);
    }

    pub(super) fn on_grant_answer(&mut self, now: Time, donor: NodeId, answer: Answer) {
        let Some(home) = &mut self.home else { return };
        home.search.open = false;
        home.search.next_try = Some(now);
        home.search.tried.insert(donor);
        match answer {
            Ok((_, Response::Granted(facts))) => self.learn(now, &facts, Some(donor)),
            Ok((_, Response::Refused(refusal))) => home.search.refusal = Some(refusal),
            Ok((from, _)) => self.note_malformed(from, &"no answer to a grant request"),
            Err(error) => tracing::debug!(%donor, %error, "donor did not answer"),
        }
    }
}

impl Welcome {
    /// Everything there is, for a node that knows nothing.
    pub(super) fn everything(node: &Node, home: &Home, no_slot: Option<Refusal>) -> Self {
        let facts = Facts {
            members: node.directory.iter().cloned().collect(),
            slots: home.slots.runs().to_vec(),
            active: node.membership.active().into_values().collect(),
        };
        Self { cluster: home.cluster, facts, no_slot }
    }
}
