//! Merging what others say, and what this node says about itself.
//!
//! A fact is news if merging it changed something. Truth is decided by the table and the directory alone;
//! here it is only carried to them, and what follows from it is set going.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    model::{Identity, Incarnation, MemberRecord, NodeId, Run, Time},
    wire::{Facts, Key},
};

use super::{
    DuplicateSeen, Node,
    malformed::Kind,
    planted::{Bug, planted},
    slots::Contested,
    sync::Doubt,
    vet::Refused,
};

/// A node with a copy tells the world about itself again this often.
const SPEAK_UP: Duration = Duration::from_secs(10);
/// And goes above what others tell of it at most this often.
const OUTBID_EVERY: Duration = Duration::from_secs(1);
/// Processes with this node's key that are told apart.
const MAX_OUTRANKED: usize = 1024;
/// A copy that was silent for so long is none any more.
const DUPLICATE_GONE: Duration = Duration::from_secs(120);

/// What came of facts that a peer told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Learned {
    /// Something was new.
    pub(super) new: bool,
    /// Something cannot be true.
    pub(super) refused: bool,
}

impl Node {
    /// Merges what somebody told; what is new is passed on, except to whom it came from.
    pub(super) fn learn(&mut self, now: Time, facts: &Facts, from: Option<NodeId>) -> Learned {
        let (news, refused) = self.absorb(now, facts, from);
        let new = !news.is_empty();
        if new {
            self.sync.unsettle(now);
            self.push.add(now, &news, from);
        }
        Learned { new, refused }
    }

    /// Merges facts, and says what of them was new and whether anything was refused. What this node decided
    /// itself comes from no peer.
    pub(super) fn absorb(
        &mut self,
        now: Time,
        facts: &Facts,
        from: Option<NodeId>,
    ) -> (Facts, bool) {
        let mut news = Facts::default();
        let mut refused = Refused::default();
        for record in &facts.members {
            let is_own_word = from.is_none();
            if (is_own_word || self.can_be(now, record, &mut refused))
                && self.merge_member(now, record)
            {
                news.members.push(record.clone());
            }
        }
        self.merge_slots(now, facts, from, &mut news, &mut refused);
        for forget in &facts.forgets {
            let is_own_word = from.is_none();
            if (is_own_word || self.can_be_gone(now, forget, &mut refused))
                && self.merge_forget(now, forget)
            {
                news.forgets.push(*forget);
            }
        }
        let there = self.credible(now, &facts.active);
        self.introduce(now, there);
        (news, from.is_some_and(|from| self.name_refused(from, &refused)))
    }

    fn merge_slots(
        &mut self,
        now: Time,
        facts: &Facts,
        from: Option<NodeId>,
        news: &mut Facts,
        refused: &mut Refused,
    ) {
        let possible = match from {
            Some(_) => Cow::Owned(self.possible(now, &facts.slots, refused)),
            None => Cow::Borrowed(&facts.slots[..]),
        };
        let theirs = self.timely(&possible);
        let Some(home) = &mut self.home else { return };
        let merged = home.slots.merge(&theirs);
        self.note_contested(&merged.contested, from);
        let me = self.me.node;
        // Of a slot that it knew before: who has lost its whole database remembers nothing.
        let unknown = merged
            .changed
            .iter()
            .filter(|(run, before)| run.record.granter == me && before.is_some());
        let forgotten_writes: u64 = unknown.map(|(run, _)| u64::from(run.len)).sum();
        self.note_slots(&merged.changed);
        news.slots = merged.changed.into_iter().map(|(run, _)| run).collect();
        if forgotten_writes > 0 {
            self.on_rollback(forgotten_writes);
        }
        if !news.slots.is_empty() {
            self.recheck_lease(now);
            self.recheck_forgets(now);
            self.decline_late_grants(now, &news.slots);
        }
    }

    /// Slots with two records of one epoch, however many in one line.
    fn note_contested(&mut self, contested: &[Contested], from: Option<NodeId>) {
        let slots: u64 = contested.iter().map(|(run, _)| u64::from(run.len)).sum();
        self.counters.ownership_conflicts += slots;
        // Of subnets that are given from outside both may have heard at once; one of them says so.
        let Some((theirs, ours)) = contested.first().filter(|_| self.config.assigned.is_none())
        else {
            return;
        };
        let teller = from.unwrap_or(self.me.node);
        if let Some(slots) = self.note(teller, Kind::TwoOwners, slots, "") {
            tracing::error!(
                slots, first = ?theirs.start, ?ours, theirs = ?theirs.record, told_by = %teller,
                "two owners of slots at one epoch"
            );
        }
    }

    /// Without grants of a forgotten node to this one that come late, while this one may not write: it
    /// would have to pass them on. They come again.
    fn timely<'a>(&self, runs: &'a [Run]) -> Cow<'a, [Run]> {
        if self.may_write() {
            return Cow::Borrowed(runs);
        }
        let late = |run: &&Run| {
            run.record.owner == self.me.node
                && self.directory.forgotten(run.record.granter).is_some()
        };
        runs.iter().filter(|run| !late(run)).copied().collect()
    }

    /// A member is gone: what it knew must be known from others.
    pub(super) fn note_departure(&mut self, node: NodeId) {
        self.lose_witness(node);
        self.forgetting.note_departure(node);
    }

    /// Takes a newer member record.
    fn merge_member(&mut self, now: Time, record: &MemberRecord) -> bool {
        if record.node == self.me.node {
            if record.boot == self.me.boot {
                self.on_forged_self(now, record);
            } else if record.version.starts >= self.me.version.starts {
                self.on_another_self(now, record);
            }
            return false;
        }
        let new = self.directory.merge(record);
        if new {
            self.dirty.mark(Key::Member(record.node), false);
            self.sync.partners.note_sound(record.node);
            self.view_stale = true;
            if record.has_left() {
                self.note_departure(record.node);
            }
        }
        new
    }

    /// A record in the name of this very process that it did not write, so a member errs or lies: the true
    /// one goes above it.
    fn on_forged_self(&mut self, now: Time, record: &MemberRecord) {
        let is_old = record.version < self.me.version || *record == self.me;
        if is_old || planted(Bug::LetForgeriesStand) || !self.may_outbid(now) {
            return;
        }
        self.counters.forged += 1;
        tracing::error!(
            version = ?record.version, address = %record.address,
            "a record of this node was told that it never wrote: going on above it"
        );
        if record.version.starts > self.me.version.starts {
            return self.go_above(now, record.version.starts);
        }
        self.me.version.change = record.version.change.saturating_add(1);
        self.publish_self(now);
    }

    /// Whatever is told of this node: it answers at a bounded rate, and is told again.
    fn may_outbid(&mut self, now: Time) -> bool {
        let may = self.outbid_at.is_none_or(|at| now >= at);
        if may {
            self.outbid_at = Some(now + OUTBID_EVERY);
        }
        may
    }

    /// A record of this node that this process did not write, and that outranks it. From an earlier life
    /// whose database was lost: this life goes on above it. From another process that lives now, which
    /// answers by going above us in turn: a copied state directory, and nothing to be won by a race.
    fn on_another_self(&mut self, now: Time, record: &MemberRecord) {
        // Once a peer's state was equal to ours, no earlier life of ours can come up that outranks this one.
        let known_best = self.counters.syncs_same > 0;
        if known_best || self.outranked.contains(&record.boot) {
            self.counters.duplicates += 1;
            let before = self.duplicate.replace(DuplicateSeen { address: record.address, at: now });
            match before {
                // The other one must hear of this one too, but two copies that outbid each other would never
                // end, so each speaks up rarely.
                Some(seen) if now.since(seen.at) < SPEAK_UP => {
                    self.duplicate = Some(DuplicateSeen { at: seen.at, ..seen });
                    return;
                }
                Some(_) => {}
                None => tracing::error!(
                    here = %self.me.address, there = %record.address,
                    "another process runs with this node's key: nothing is granted"
                ),
            }
        } else if !self.may_outbid(now) {
            return;
        }
        if self.outranked.len() < MAX_OUTRANKED {
            self.outranked.insert(record.boot);
        }
        self.doubt_memory();
        self.go_above(now, record.version.starts);
    }

    /// A peer holds this node as down under an incarnation, and must be told of a newer one. Its own
    /// suffices, unless another process has run with this node's key and was heard of by gossip alone.
    pub(super) fn rise_above(&mut self, now: Time, theirs: Incarnation) {
        let is_possible = self.horizons.reach_incarnation(now, theirs, Some(&self.me));
        if theirs > self.membership.identity().incarnation {
            if is_possible && self.may_outbid(now) {
                self.go_above(now, theirs.starts);
            }
        } else {
            self.membership.renew(now);
        }
    }

    fn go_above(&mut self, now: Time, starts: u32) {
        self.me.version.starts = starts.saturating_add(1);
        tracing::warn!(
            starts = self.me.version.starts,
            "peers remember a later start of this node than its own state: going on above it"
        );
        self.dirty.mark(Key::Starts, true);
        self.identity_write = self.after();
        let mut identity = self.membership.identity();
        identity.incarnation = Incarnation { starts: self.me.version.starts, renewals: 0 };
        self.membership.adopt(now, identity);
        self.publish_self(now);
    }

    /// Peers show records that this node wrote and does not remember. Every one is flushed before anybody
    /// hears of it, so its state directory was rolled back, and there may be more that it does not know of.
    fn on_rollback(&mut self, records: u64) {
        if self.counters.rollbacks == 0 {
            tracing::error!(
                records,
                "the state directory was rolled back: peers know more of this node"
            );
        }
        self.counters.rollbacks += records;
        let peers = self.roster();
        if !peers.is_empty() {
            self.sync.doubt(Doubt::AllOf(peers));
        }
    }

    /// This node has lost its memory. It may have granted slots that not everybody has heard of, so all
    /// who are there are asked before it writes another record.
    pub(super) fn doubt_memory(&mut self) {
        let me = self.me.node;
        let there = self.active().into_keys();
        let there: BTreeSet<_> = there.filter(|node| *node != me).collect();
        if !there.is_empty() {
            self.sync.doubt(Doubt::AllOf(there));
        }
    }

    /// A member is gone that could have told what this node's memory lacks: then all the others together
    /// must, among whom is whoever has its knowledge.
    fn lose_witness(&mut self, node: NodeId) {
        let others = self.roster();
        self.sync.lose_witness(node, others);
    }

    /// Members held as alive that are not gone, this node included. One that has left or was forgotten may
    /// linger in gossip for a while.
    pub(super) fn active(&self) -> BTreeMap<NodeId, Identity> {
        let mut active = self.membership.active();
        active.retain(|node, _| *node == self.me.node || !self.is_gone(*node));
        active
    }

    /// All other members that are not gone.
    fn roster(&self) -> BTreeSet<NodeId> {
        self.directory.peers(self.me.node).map(|record| record.node).collect()
    }

    /// Whether this node may write new records of ownership: its memory is beyond doubt.
    pub(super) fn may_write(&self) -> bool {
        (self.sync.synced() || self.is_alone()) && self.duplicate.is_none()
    }

    /// A copy that was not heard of for long is gone, or has another identity by now.
    pub(super) fn clear_duplicate(&mut self, now: Time) {
        if self.duplicate.as_ref().is_some_and(|seen| now.since(seen.at) > DUPLICATE_GONE) {
            self.duplicate = None;
            self.doubt_memory();
        }
    }

    /// Tells everybody the present version of this node's own record.
    pub(super) fn publish_self(&mut self, now: Time) {
        self.directory.merge(&self.me);
        self.dirty.mark(Key::Member(self.me.node), false);
        let facts = Facts { members: vec![self.me.clone()], ..Facts::default() };
        self.push.add(now, &facts, None);
        self.sync.unsettle(now);
    }
}
