//! Merges facts from peers, and publishes this node's own record.
//!
//! A fact is news if merging it changed something. The slot table and the directory decide that; this module
//! passes facts to them and triggers what follows from a change.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use crate::{
    model::{Identity, Incarnation, MemberRecord, NodeId, Run, Time},
    wire::{Facts, Key},
};

use super::{
    Node, comparisons::NeededWitnesses, key_use::Sighting, malformed::Kind, outbox::Outbox,
    replica::Replica, slots::Contested, vet::Refusals,
};

/// The result of merging a peer's facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MergeResult {
    /// Whether anything was new.
    pub(super) new: bool,
    /// Whether anything was refused because it cannot be true.
    pub(super) refused: bool,
}

impl Replica {
    /// Returns all other members that are not gone.
    pub(super) fn other_members(&self) -> BTreeSet<NodeId> {
        self.directory.peers(self.me.node).map(|record| record.node).collect()
    }

    /// Notes that a possible witness of this node's memory is gone. If it was the last one, all other members
    /// have to confirm.
    pub(super) fn drop_witness(&mut self, node: NodeId) {
        // One message may contain as many departures as the directory holds, and few are of witnesses.
        if self.sync.drop_witness(node) {
            self.sync.require_others(self.other_members());
        }
    }

    /// Notes that a member left or was forgotten, so that other members have to provide what it knew.
    pub(super) fn note_departure(&mut self, node: NodeId) {
        self.drop_witness(node);
        self.forgetting.note_departure(node);
    }

    /// Merges another node's record. Returns whether it was new.
    fn merge_member(&mut self, outbox: &mut Outbox, record: &MemberRecord) -> bool {
        let new = self.directory.merge(record);
        if new {
            outbox.mark(Key::Member(record.node));
            outbox.invalidate_view();
            self.sync.partners.end_pause(record.node);
            if record.has_left() {
                self.note_departure(record.node);
            }
        }
        new
    }

    /// Publishes this node's own record.
    pub(super) fn publish_self(&mut self, outbox: &mut Outbox, now: Time) {
        self.directory.merge(&self.me);
        outbox.mark(Key::Member(self.me.node));
        let facts = Facts { members: vec![self.me.clone()], ..Facts::default() };
        self.push.add(now, &facts, None);
        self.sync.unsettle(now);
    }

    /// Leaves out late grants of forgotten nodes to this one while it may not write: it would have to pass
    /// them on to the successor. Comparisons bring them again.
    fn without_late_grants<'a>(&self, may_write: bool, runs: &'a [Run]) -> Cow<'a, [Run]> {
        if may_write {
            return Cow::Borrowed(runs);
        }
        let late = |run: &&Run| {
            run.record.owner == self.me.node
                && self.directory.forgotten(run.record.granter).is_some()
        };
        runs.iter().filter(|run| !late(run)).copied().collect()
    }
}

impl Node {
    /// Merges facts and pushes the new ones to other members, but not back to a single sender. `from` is
    /// `None` for this node's own decisions.
    pub(super) fn learn(&mut self, now: Time, facts: &Facts, from: Option<NodeId>) -> MergeResult {
        let (news, refused) = self.absorb(now, facts, from);
        let new = !news.is_empty();
        if new {
            self.replica.sync.unsettle(now);
            self.replica.push.add(now, &news, from);
        }
        MergeResult { new, refused }
    }

    /// Merges facts without pushing them. Returns the new ones, and whether any were refused. `from` is
    /// `None` for this node's own decisions, which are not vetted.
    pub(super) fn absorb(
        &mut self,
        now: Time,
        facts: &Facts,
        from: Option<NodeId>,
    ) -> (Facts, bool) {
        let mut news = Facts::default();
        let mut refused = Refusals::default();
        for record in &facts.members {
            let is_own = from.is_none();
            if (is_own || self.replica.is_possible_member(now, record, &mut refused))
                && self.merge_member(now, record)
            {
                news.members.push(record.clone());
            }
        }
        self.merge_slots(now, facts, from, &mut news, &mut refused);
        for forget in &facts.forgets {
            let is_own = from.is_none();
            if (is_own || self.replica.is_possible_forget(now, forget, &mut refused))
                && self.merge_forget(now, forget)
            {
                news.forgets.push(*forget);
            }
        }
        self.replica.forgetting.check_departures();
        let active = self.credible_identities(now, &facts.active);
        self.introduce(now, active);
        (news, from.is_some_and(|from| self.report_refused(from, &refused)))
    }

    fn merge_slots(
        &mut self,
        now: Time,
        facts: &Facts,
        from: Option<NodeId>,
        news: &mut Facts,
        refused: &mut Refusals,
    ) {
        let possible_runs = match from {
            Some(_) => Cow::Owned(self.replica.possible_runs(now, &facts.slots, refused)),
            None => Cow::Borrowed(&facts.slots[..]),
        };
        let theirs = self.replica.without_late_grants(self.may_write(), &possible_runs);
        let Some(cluster_state) = &mut self.replica.cluster_state else { return };
        let merged = cluster_state.slots.merge(&theirs);
        self.note_contested(&merged.contested, from);
        let me = self.replica.me.node;
        // Only slots that had a record before: a node that lost its whole database is not rolled back.
        let rolled_back = merged
            .changed
            .iter()
            .filter(|(run, before)| run.record.granter == me && before.is_some());
        let lost_records: u64 = rolled_back.map(|(run, _)| u64::from(run.len)).sum();
        self.replica.note_slots(&mut self.outbox, &merged.changed);
        news.slots = merged.changed.into_iter().map(|(run, _)| run).collect();
        if lost_records > 0 {
            self.handle_rollback(lost_records);
        }
        if !news.slots.is_empty() {
            self.lifecycle.recheck_lease(now);
            self.recheck_forgets(now);
            self.decline_late_grants(now, &news.slots);
        }
    }

    /// Counts and logs ownership conflicts, with one log line per message.
    fn note_contested(&mut self, contested: &[Contested], from: Option<NodeId>) {
        let slots: u64 = contested.iter().map(|(run, _)| u64::from(run.len)).sum();
        self.counters.ownership_conflicts += slots;
        // Two nodes may claim an assigned subnet at once; they report that as a problem of its own.
        let Some((theirs, ours)) = contested.first().filter(|_| self.config.assigned.is_none())
        else {
            return;
        };
        let peer = from.unwrap_or(self.replica.me.node);
        if let Some(slots) = self.note(peer, Kind::TwoOwners, slots, "") {
            tracing::error!(
                slots, first = ?theirs.start, ?ours, theirs = ?theirs.record, %peer,
                "ownership conflict: two records of one epoch"
            );
        }
    }

    /// Merges a member record. Returns whether it was new.
    fn merge_member(&mut self, now: Time, record: &MemberRecord) -> bool {
        if record.node == self.replica.me.node {
            if record.boot == self.replica.me.boot {
                self.handle_forged_record(now, record);
            } else if record.version.starts >= self.replica.me.version.starts {
                self.handle_competing_record(now, record);
            }
            return false;
        }
        self.replica.merge_member(&mut self.outbox, record)
    }

    /// Handles a record that names this very process but was not written by it: a member is faulty or lies.
    /// This node publishes its own record with a higher version.
    fn handle_forged_record(&mut self, now: Time, record: &MemberRecord) {
        let is_old = record.version < self.replica.me.version || *record == self.replica.me;
        if is_old || !self.key_use.may_outbid(now) {
            return;
        }
        self.counters.forged += 1;
        tracing::error!(
            version = ?record.version, address = %record.address,
            "received a forged record of this node, publishing a higher version"
        );
        if record.version.starts > self.replica.me.version.starts {
            return self.publish_later_start(now, record.version.starts);
        }
        self.replica.me.version.change = record.version.change.saturating_add(1);
        self.replica.publish_self(&mut self.outbox, now);
    }

    /// Handles a record of this node from another process whose version is not lower. If it is from an
    /// earlier run whose database was lost, this run publishes a higher version. If it is from a process
    /// that runs now, because the state directory was copied, that process does the same, and neither can
    /// win.
    fn handle_competing_record(&mut self, now: Time, record: &MemberRecord) {
        // Once a peer's state equaled this node's, no record of an earlier run with a higher version can
        // appear.
        let has_matched_peer = self.counters.syncs_same > 0;
        if has_matched_peer || self.key_use.has_outranked(record.boot) {
            self.counters.duplicates += 1;
            match self.key_use.note_duplicate(now, record.address) {
                // The other process has to receive this node's record, too.
                Sighting::Again => {}
                Sighting::TooSoon => return,
                Sighting::First => tracing::error!(
                    here = %self.replica.me.address, there = %record.address,
                    "duplicate identity: another process runs with this node's key, granting nothing"
                ),
            }
        } else if !self.key_use.may_outbid(now) {
            return;
        }
        self.key_use.note_outranked(record.boot);
        self.require_full_verification();
        self.publish_later_start(now, record.version.starts);
    }

    /// Makes this node's incarnation exceed the one under which a peer considers it down. A renewal suffices
    /// unless gossip knows a later start of another process with this node's key.
    pub(super) fn exceed_incarnation(&mut self, now: Time, theirs: Incarnation) {
        let is_possible =
            self.replica.horizons.allows_incarnation(now, theirs, Some(&self.replica.me));
        if theirs > self.membership.identity().incarnation {
            if is_possible && self.key_use.may_outbid(now) {
                self.publish_later_start(now, theirs.starts);
            }
        } else {
            self.membership.renew(now);
        }
    }

    /// Publishes this node under a later start than `starts`.
    fn publish_later_start(&mut self, now: Time, starts: u32) {
        self.replica.me.version.starts = starts.saturating_add(1);
        tracing::warn!(
            starts = self.replica.me.version.starts,
            "start counter in the state directory is lower than the peers', publishing a higher one"
        );
        self.outbox.mark_identity();
        let mut identity = self.membership.identity();
        identity.incarnation = Incarnation { starts: self.replica.me.version.starts, renewals: 0 };
        self.membership.adopt(now, identity);
        self.replica.publish_self(&mut self.outbox, now);
    }

    /// Handles records that this node wrote and no longer has. Each one was flushed before any peer received
    /// it, so the state directory was rolled back, and more records may be missing.
    fn handle_rollback(&mut self, records: u64) {
        if self.counters.rollbacks == 0 {
            tracing::error!(
                records,
                "state directory was rolled back: peers hold records that this node no longer has"
            );
        }
        self.counters.rollbacks += records;
        let peers = self.replica.other_members();
        if !peers.is_empty() {
            self.replica.sync.require_witnesses(NeededWitnesses::AllOf(peers));
        }
    }

    /// Marks memory as unverified because this node lost it. It may have granted slots that few members know,
    /// so all active members have to confirm before it writes another ownership record.
    pub(super) fn require_full_verification(&mut self) {
        let me = self.replica.me.node;
        let peers = self.active().into_keys();
        let peers: BTreeSet<_> = peers.filter(|node| *node != me).collect();
        if !peers.is_empty() {
            self.replica.sync.require_witnesses(NeededWitnesses::AllOf(peers));
        }
    }

    /// Returns the active members that are not gone, with this node. Gossip may list a member for a while
    /// after it has left or was forgotten.
    pub(super) fn active(&self) -> BTreeMap<NodeId, Identity> {
        let mut active = self.membership.active();
        active.retain(|node, _| *node == self.replica.me.node || !self.replica.is_gone(*node));
        active
    }

    /// Returns whether this node may write ownership records: memory is verified, and the identity is unique.
    pub(super) fn may_write(&self) -> bool {
        (self.replica.sync.synced() || self.is_alone()) && self.key_use.is_unique()
    }

    /// Ends a duplicate identity after a time without records of the other process.
    pub(super) fn clear_duplicate(&mut self, now: Time) {
        if self.key_use.end_duplicate(now) {
            self.require_full_verification();
        }
    }
}
