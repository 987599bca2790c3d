//! Reclaiming what a node owned that is gone for good.
//!
//! Somebody vouches that a node is gone, and becomes its successor. The record of it spreads like any fact;
//! from then on nobody listens to the forgotten node. But it may have granted slots to somebody whom the
//! successor has not met, so the successor asks every member: each makes the record durable, and answers
//! with all that the successor lacks. Members that so become known are asked too. Once all have
//! acknowledged, nothing that was granted is unknown to the successor, and it alone reclaims the rest. A
//! node that left counts as gone by its own word.
//!
//! Liveness plays one part only: an operator is not allowed to forget somebody who is alive.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    model::{Forget, MemberRecord, NodeId, Run, Slot, Time},
    wire::{Facts, Key, Request, Response},
};

use super::{
    Answer, Liveness, Node, Output, Purpose, Stop,
    planted::{Bug, planted},
    rank::peer_score,
};

/// Members that did not acknowledge are asked again after this.
const RETRY: Duration = Duration::from_secs(2);
/// Acknowledgements asked for at once.
const MAX_ASKED: usize = 16;

/// What a successor knows of who has acknowledged.
#[derive(Default)]
pub(super) struct Forgetting {
    acknowledged: BTreeMap<Forget, BTreeSet<NodeId>>,
    asked: BTreeSet<NodeId>,
    /// Grows when somebody is gone: what was asked before that no longer counts.
    era: u64,
    retry_at: Option<Time>,
}

impl Forgetting {
    /// Whoever had not acknowledged may have told what it knew to those who had: they are asked again.
    pub(super) fn note_departure(&mut self, gone: NodeId) {
        self.era += 1;
        for (forget, heard) in &mut self.acknowledged {
            if forget.node != gone && !heard.contains(&gone) {
                heard.clear();
            }
        }
    }
}

/// Why a node is not forgotten.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotForget {
    #[error("no member is called {0}: see `gossamer members`")]
    Unknown(String),
    #[error("{0} members are called {1}: give the node's id, see `gossamer members`")]
    Ambiguous(usize, String),
    #[error("a node cannot forget itself: use `gossamer leave`")]
    Myself,
    #[error(
        "{0} is alive, for all that is known: stop its agent first, or run `gossamer leave` on it. \
         If that host is out of your hands, --force forgets it all the same; its pods keep addresses that \
         others will be given"
    )]
    Alive(String),
    #[error("this node is in no cluster yet")]
    NoCluster,
    #[error("this node is leaving itself: run it on another member")]
    Leaving,
}

/// How far the reclaiming of a forgotten node's slots has come.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Reclaiming {
    pub node: NodeId,
    pub name: String,
    pub successor: NodeId,
    /// Slots that are not reclaimed yet.
    pub slots: u32,
    /// Who has not acknowledged; known on the successor only.
    pub waits_for: Option<Vec<String>>,
}

impl Node {
    /// An operator vouches that a member is gone for good; `whom` is its name or id. This node becomes its
    /// successor.
    ///
    /// # Errors
    /// Why nothing was done.
    pub fn forget(&mut self, now: Time, whom: &str, force: bool) -> Result<NodeId, CannotForget> {
        if self.home.is_none() {
            return Err(CannotForget::NoCluster);
        }
        if self.leaving.is_some() {
            return Err(CannotForget::Leaving);
        }
        let node = self.member_called(whom)?;
        let gone = match self.membership.opinions().get(&node) {
            Some(liveness) => *liveness == Liveness::Down,
            // Right after a start nothing is known of anybody, until a member has told whom it holds as
            // alive.
            None => self.sync.has_confirmed(),
        };
        if !gone && !force {
            return Err(CannotForget::Alive(self.name_of(node).to_owned()));
        }
        self.vouch(now, node, force);
        self.advance(now);
        Ok(node)
    }

    pub(super) fn member_called(&self, whom: &str) -> Result<NodeId, CannotForget> {
        let called = |record: &&MemberRecord| {
            !record.has_left() && (record.name.as_str() == whom || record.node.to_string() == whom)
        };
        let mut found: Vec<NodeId> =
            self.directory.iter().filter(called).map(|record| record.node).collect();
        if found.len() > 1 {
            // Those that were forgotten before do not stand in the way of the one that was not.
            found.retain(|node| self.directory.forgotten(*node).is_none());
        }
        if found.is_empty() {
            found.extend(whom.parse().ok().filter(|node| self.is_remembered(*node)));
        }
        match found[..] {
            [node] if node == self.me.node => Err(CannotForget::Myself),
            [node] => Ok(node),
            [] => Err(CannotForget::Unknown(whom.to_owned())),
            _ => Err(CannotForget::Ambiguous(found.len(), whom.to_owned())),
        }
    }

    /// Its record was lost with it, but it owns slots, or was somebody's successor, or told all by one that
    /// left.
    fn is_remembered(&self, node: NodeId) -> bool {
        let owns = |home: &super::Home| home.slots.runs_of(node).next().is_some();
        let inherits = self.directory.forgets().any(|forget| forget.successor == node);
        let keeps = self.directory.iter().any(|record| record.left_to == Some(node));
        inherits || keeps || self.home.as_ref().is_some_and(owns)
    }

    /// Puts down that `node` is gone and this node its successor; over an earlier word only where that one's
    /// successor is gone too, or more is risked.
    pub(super) fn vouch(&mut self, now: Time, node: NodeId, forced: bool) {
        let earlier = self.directory.forgotten(node);
        if earlier
            .is_some_and(|earlier| !self.is_gone(earlier.successor) && (earlier.forced || !forced))
        {
            return;
        }
        let round = earlier.map_or(0, |earlier| earlier.round) + 1;
        let forget = Forget { node, round, forced, successor: self.me.node };
        tracing::info!(%node, name = self.name_of(node), round, forced, "forgetting");
        self.dirty.mark(Key::Forget(node), true);
        self.learn(now, &Facts { forgets: vec![forget], ..Facts::default() }, None);
    }

    /// Takes the word that a node is gone. Says whether it was new.
    pub(super) fn merge_forget(&mut self, now: Time, forget: &Forget) -> bool {
        if forget.node == self.me.node {
            if self.leaving.is_none() {
                self.outputs
                    .push_back(Output::Stop(Stop::Expelled { successor: Some(forget.successor) }));
            }
            return false;
        }
        let new = self.directory.merge_forget(forget);
        if new {
            self.dirty.mark(Key::Forget(forget.node), false);
            self.view_stale = true;
            self.forgetting.retry_at = Some(now);
            self.note_departure(forget.node);
        }
        new
    }

    /// It left or was forgotten: it writes no more records.
    pub(super) fn is_gone(&self, node: NodeId) -> bool {
        self.directory.forgotten(node).is_some()
            || self.directory.get(node).is_some_and(MemberRecord::has_left)
    }

    pub(super) fn next_forget_step(&self) -> Option<Time> {
        self.forgetting.retry_at.filter(|_| self.home.is_some())
    }

    pub(super) fn step_forget(&mut self, now: Time) {
        if self.home.is_none() || self.forgetting.retry_at.is_none_or(|at| now < at) {
            return;
        }
        self.forgetting.retry_at = None;
        if self.leaving.is_some() {
            return;
        }
        self.inherit(now);
        let mine: Vec<Forget> = self.inheritances().collect();
        if mine.is_empty() {
            return;
        }
        self.forgetting.retry_at = Some(now + RETRY);
        for forget in &mine {
            if self.missing(forget).is_empty() || forget.forced {
                self.reclaim(now, forget);
            }
        }
        self.ask_for_acknowledgement(&mine);
    }

    /// Something that a successor waits for may have changed.
    pub(super) fn recheck_forgets(&mut self, now: Time) {
        self.forgetting.retry_at = Some(now);
    }

    /// Steps in where slots belong to nobody who is there: those of a node that left before it heard of them,
    /// and those of a forgotten one whose successor is gone as well.
    fn inherit(&mut self, now: Time) {
        let Some(home) = self.home.as_ref().filter(|_| self.sync.settled()) else { return };
        let orphaned = |node: &NodeId| match self.directory.forgotten(*node) {
            Some(forget) => self.is_gone(forget.successor),
            None => self.is_gone(*node),
        };
        let owners = home.slots.runs().iter().map(|run| run.record.owner);
        let orphans: BTreeSet<NodeId> = owners.filter(orphaned).collect();
        if orphans.is_empty() {
            return;
        }
        let active = self.active();
        for node in orphans {
            let best = active.keys().max_by_key(|successor| peer_score(node, **successor));
            if best == Some(&self.me.node) {
                self.vouch(now, node, false);
            }
        }
    }

    /// Forgotten nodes that still own slots and whose successor this node is.
    fn inheritances(&self) -> impl Iterator<Item = Forget> + '_ {
        let owns =
            |node| self.home.as_ref().is_some_and(|home| home.slots.runs_of(node).next().is_some());
        self.directory
            .forgets()
            .filter(move |forget| forget.successor == self.me.node && owns(forget.node))
            .copied()
    }

    /// Whose acknowledgement is missing: members, and those who are known only as owners of slots or as
    /// whoever was told all by one that left. They may know of grants that nobody else has heard of.
    fn missing(&self, forget: &Forget) -> BTreeSet<NodeId> {
        if planted(Bug::ForgetWithoutAcknowledgements) {
            return BTreeSet::new();
        }
        let heard = self.forgetting.acknowledged.get(forget);
        let members = self.directory.peers(self.me.node).map(|record| record.node);
        let keepers = self.directory.iter().filter_map(|record| record.left_to);
        let runs = self.home.iter().flat_map(|home| home.slots.runs());
        let owners: BTreeSet<NodeId> = runs.map(|run| run.record.owner).collect();
        members
            .chain(keepers)
            .chain(owners)
            .filter(|node| *node != self.me.node && !self.is_gone(*node))
            .filter(|node| heard.is_none_or(|heard| !heard.contains(node)))
            .collect()
    }

    fn ask_for_acknowledgement(&mut self, mine: &[Forget]) {
        let missing: BTreeSet<NodeId> =
            mine.iter().flat_map(|forget| self.missing(forget)).collect();
        for node in missing {
            if self.forgetting.asked.len() >= MAX_ASKED || self.forgetting.asked.contains(&node) {
                continue;
            }
            let request =
                Request::Acknowledge { forgets: mine.to_vec(), buckets: Box::new(self.buckets()) };
            let (forgets, era) = (mine.to_vec(), self.forgetting.era);
            if self.call_member(node, Purpose::Acknowledge { node, forgets, era }, &request) {
                self.forgetting.asked.insert(node);
            }
        }
    }

    pub(super) fn on_acknowledgement(
        &mut self,
        now: Time,
        node: NodeId,
        forgets: &[Forget],
        era: u64,
        answer: Answer,
    ) {
        self.forgetting.asked.remove(&node);
        match answer {
            Ok((from, Response::Acknowledged(facts))) if from == node => {
                self.learn(now, &facts, Some(from));
                for forget in forgets.iter().filter(|_| era == self.forgetting.era) {
                    self.forgetting.acknowledged.entry(*forget).or_default().insert(node);
                }
                self.recheck_forgets(now);
            }
            Ok((from, other)) => self.note_unexpected(from, &other, "no acknowledgement"),
            Err(error) => tracing::debug!(%node, %error, "no acknowledgement"),
        }
    }

    /// Takes what the forgotten node owned.
    fn reclaim(&mut self, now: Time, forget: &Forget) {
        let me = self.me.node;
        // A node that was given its subnet from outside has no use for another one.
        let replaces = self.config.replace_by_name
            && self.config.assigned.is_none()
            && self.directory.get(forget.node).is_some_and(|record| record.name == self.me.name);
        let may_write = self.may_write();
        let Some(home) = self.home.as_mut().filter(|_| may_write) else { return };
        let leased: Option<Slot> = home.slots.leased_by(forget.node).next();
        let mut changes = home.slots.reclaim(me, forget.node, forget.round);
        if let Some(slot) = leased.filter(|_| replaces) {
            // The predecessor's subnet; the one leased meanwhile goes back once the kernel has moved over.
            changes.extend(home.slots.lease_own(me, Some(slot)));
            home.search.prefer_from_now(slot);
        }
        let slots: u32 = changes.iter().map(|(run, _)| run.len).sum();
        tracing::info!(node = %forget.node, slots, "reclaimed what a forgotten node owned");
        self.counters.reclaims += 1;
        self.forgetting.acknowledged.remove(forget);
        self.note_own_change(now, changes);
    }

    /// What a forgotten node granted to this one, and this one hears of only after it acknowledged the
    /// forgetting: the successor may have taken it already. It is the successor's in any case, and never
    /// used here.
    pub(super) fn decline_late_grants(&mut self, now: Time, news: &[Run]) {
        let me = self.me.node;
        for run in news.iter().filter(|run| run.record.owner == me) {
            let Some(forget) = self.directory.forgotten(run.record.granter) else { continue };
            let (Some(home), false) = (&mut self.home, forget.successor == me) else { continue };
            self.counters.declined += 1;
            let change = home.slots.pass_on(*run, me, forget.successor);
            self.note_own_change(now, change.into_iter().collect());
        }
    }

    /// A node that was restarted under its old name vouches for its predecessor.
    pub(super) fn replace_predecessor(&mut self, now: Time) {
        // Agreed: a peer holds the same members as alive.
        if !self.config.replace_by_name || self.leaving.is_some() || !self.sync.agreed() {
            return;
        }
        let predecessors: Vec<NodeId> = self
            .directory
            .peers(self.me.node)
            .filter(|record| record.name == self.me.name)
            .map(|record| record.node)
            .filter(|node| !self.membership.is_active(*node))
            .collect();
        for node in predecessors {
            self.vouch(now, node, false);
        }
    }

    /// What stands between forgotten nodes and the pool.
    pub fn reclaiming(&self) -> Vec<Reclaiming> {
        let Some(home) = &self.home else { return Vec::new() };
        let name = |node: NodeId| match self.name_of(node) {
            "?" => node.to_string(),
            name => name.to_owned(),
        };
        let reclaiming = |forget: &Forget| {
            let slots = home.slots.runs_of(forget.node).map(|run| run.len).sum();
            let waits_for = (forget.successor == self.me.node)
                .then(|| self.missing(forget).into_iter().map(name).collect());
            Reclaiming {
                node: forget.node,
                name: name(forget.node),
                successor: forget.successor,
                slots,
                waits_for,
            }
        };
        self.directory.forgets().map(reclaiming).filter(|reclaiming| reclaiming.slots > 0).collect()
    }
}
