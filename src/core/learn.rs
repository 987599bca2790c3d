//! Merging what others say, and what this node says about itself.
//!
//! A fact is news if merging it changed something. Truth is decided by the table and the directory alone;
//! here it is only carried to them, and what follows from it is set going.

use std::collections::BTreeSet;

use crate::{
    model::{Incarnation, MemberRecord, NodeId, Time},
    wire::{Facts, Key},
};

use super::{Node, sync::Doubt};

impl Node {
    /// Merges what somebody told; what is new is passed on, except to whom it came from.
    pub(super) fn learn(&mut self, now: Time, facts: &Facts, from: Option<NodeId>) {
        let news = self.absorb(now, facts);
        if !news.is_empty() {
            self.sync.unsettle(now);
            self.push.add(now, &news, from);
        }
    }

    /// Merges what somebody told and says what of it was new.
    pub(super) fn absorb(&mut self, now: Time, facts: &Facts) -> Facts {
        let mut news = Facts::default();
        for record in &facts.members {
            if self.merge_member(now, record) {
                news.members.push(record.clone());
            }
        }
        if let Some(home) = &mut self.home {
            let merged = home.slots.merge(&facts.slots);
            self.counters.violations += merged.violations.len() as u64;
            for (slot, ours, theirs) in &merged.violations {
                tracing::error!(?slot, ?ours, ?theirs, "two owners of one slot at one epoch");
            }
            self.note_slots(&merged.changed);
            news.slots = merged.changed.into_iter().map(|(run, _)| run).collect();
        }
        if !news.slots.is_empty() {
            self.recheck_lease(now);
        }
        self.membership.introduce(now, facts.active.iter().copied());
        news
    }

    /// Takes a newer member record.
    fn merge_member(&mut self, now: Time, record: &MemberRecord) -> bool {
        if record.node == self.me.node {
            if record.version.starts >= self.me.version.starts && record.boot != self.me.boot {
                self.on_another_self(now, record);
            }
            return false;
        }
        let new = self.directory.merge(record);
        if new {
            self.dirty.mark(Key::Member(record.node), false);
            self.view_stale = true;
        }
        new
    }

    /// A record of this node that this process did not write, and that outranks it. From an earlier life
    /// whose database was lost: this life goes on above it. From another process that lives now, which
    /// answers by going above us in turn: a copied state directory, and nothing to be won by a race.
    fn on_another_self(&mut self, now: Time, record: &MemberRecord) {
        if self.outranked.contains(&record.boot) {
            if self.counters.clones == 0 {
                tracing::error!(address = %record.address, "another process runs with this node's key");
            }
            self.counters.clones += 1;
            return;
        }
        self.outranked.insert(record.boot);
        self.doubt_memory();
        self.me.version.starts = record.version.starts.saturating_add(1);
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

    /// This node has lost its memory. It may have granted slots that not everybody has heard of, so all
    /// who are there are asked before it writes another record.
    pub(super) fn doubt_memory(&mut self) {
        let me = self.me.node;
        let there: BTreeSet<_> =
            self.membership.active().into_keys().filter(|node| *node != me).collect();
        if !there.is_empty() {
            self.sync.doubt(Doubt::AllOf(there));
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
