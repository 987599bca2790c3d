//! Decides when changed records are written: at once if messages depend on them, otherwise in batches.
//!
//! Records of this node's own slots must be durable before any peer receives them. Records from peers can be
//! fetched again, so they are collected for up to a second to save flash wear, and no message waits for them.
//! Both kinds are flushed, because what members know of each other's grants must survive a power cut. Without
//! changes nothing is written.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{Slot, SlotState, Time},
    wire::{Buckets, Key, Record},
};

use super::{Node, Output, WriteSeq, slots::Change};

/// How long records from peers may wait to be written.
const MAX_WRITE_DELAY: Duration = Duration::from_secs(1);

/// Records that changed since they were last written.
#[derive(Default)]
pub(super) struct Dirty {
    pub(super) keys: BTreeSet<Key>,
    /// Whether messages depend on one of them, so that it is written at once.
    pub(super) durable: bool,
    /// When the rest is written at the latest.
    pub(super) lazy_at: Option<Time>,
}

impl Dirty {
    /// Makes the collected records due now.
    pub(super) fn hasten(&mut self, now: Time) {
        self.lazy_at = self.lazy_at.map(|at| at.min(now));
    }

    pub(super) fn mark(&mut self, key: Key, durable: bool) {
        self.keys.insert(key);
        self.durable |= durable;
    }
}

impl Node {
    /// Marks changed slots to be written; at once if this node is the old or the new owner of one.
    pub(super) fn note_slots(&mut self, changes: &[Change]) {
        let me = self.me.node;
        let Some(cluster_state) = &self.cluster_state else { return };
        for (run, before) in changes {
            let mine = run.record.owner == me || before.is_some_and(|record| record.owner == me);
            let (first, last) = (run.start, Slot(run.end().saturating_sub(1)));
            for bucket in cluster_state.slots.bucket_of(first)..=cluster_state.slots.bucket_of(last)
            {
                self.dirty.mark(Key::Slots(bucket as u8), mine);
            }
            if before.is_some_and(|record| record.state == SlotState::Leased) {
                self.reassigned.extend(run.slots());
            }
            if mine {
                self.lease_write = self.writes + 1;
            }
            self.view_stale = true;
        }
        let has_moved = |(run, before): &&Change| {
            before.is_some_and(|old| (old.owner, old.state) != (run.record.owner, run.record.state))
        };
        let moved: Vec<Change> = changes.iter().filter(has_moved).copied().collect();
        if !moved.is_empty() {
            self.outputs.push_back(Output::SlotsChanged(moved));
        }
    }

    /// Writes changed records in one batch if one is urgent or the oldest has waited long enough.
    pub(super) fn write_changes(&mut self, now: Time) {
        if self.dirty.keys.is_empty() {
            return;
        }
        let due = *self.dirty.lazy_at.get_or_insert(now + MAX_WRITE_DELAY);
        if !self.dirty.durable && now < due {
            return;
        }
        let Dirty { keys, durable, .. } = std::mem::take(&mut self.dirty);
        self.writes += 1;
        let seq = self.writes;
        if durable {
            self.last_urgent_write = seq;
        }
        let records = keys.into_iter().filter_map(|key| Some((key, self.record(key)?.encode())));
        let records = records.collect();
        self.outputs.push_back(Output::Write { records, seq });
    }

    pub(super) fn record(&self, key: Key) -> Option<Record> {
        match key {
            Key::Starts => Some(Record::Starts(self.me.version.starts)),
            Key::Cluster => Some(Record::Cluster(self.cluster_state.as_ref()?.cluster)),
            Key::Slots(bucket) => {
                Some(Record::Slots(self.cluster_state.as_ref()?.slots.bucket(usize::from(bucket))))
            }
            Key::Member(node) => self.directory.get(node).cloned().map(Record::Member),
            Key::Forget(node) => self.directory.forgotten(node).copied().map(Record::Forget),
            // Pod records belong to the agent.
            Key::Pod(_) => None,
        }
    }

    /// Marks all records to be written at once, because the disk has lost them.
    pub(super) fn write_everything(&mut self) {
        let members: Vec<_> =
            self.directory.iter().map(|record| Key::Member(record.node)).collect();
        let forgets: Vec<_> =
            self.directory.forgets().map(|forget| Key::Forget(forget.node)).collect();
        let slots = (0..Buckets::COUNT as u8).map(Key::Slots);
        let all =
            [Key::Starts, Key::Cluster].into_iter().chain(slots).chain(members).chain(forgets);
        for key in all {
            self.dirty.mark(key, true);
        }
    }

    /// Returns the write that messages have to wait for: the one that holds all urgent changes up to now.
    pub(super) fn after(&self) -> WriteSeq {
        if self.dirty.durable { self.writes + 1 } else { self.last_urgent_write }
    }
}
