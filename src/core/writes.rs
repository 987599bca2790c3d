//! What is written when: at once where this node's word depends on it, else gathered.
//!
//! Records of this node's own slots must be on disk before anybody hears of them; records learned from
//! others can be had again, and flash wears, so they wait for each other, and nothing waits for them. All are
//! flushed: what members know of each other's grants must survive a power cut too. Nothing is written when
//! nothing has changed.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{Slot, SlotState, Time},
    wire::{Buckets, Key, Record},
};

use super::{Node, Output, WriteSeq, slots::Change};

/// How long facts learned from others may wait to be written.
const LAZY_WRITE: Duration = Duration::from_secs(1);

/// Records that changed since they were last written.
#[derive(Default)]
pub(super) struct Dirty {
    pub(super) keys: BTreeSet<Key>,
    /// Something among them must be on disk before anybody hears of it.
    pub(super) durable: bool,
    /// When the rest is written at the latest.
    pub(super) lazy_at: Option<Time>,
}

impl Dirty {
    /// Has what has gathered written now.
    pub(super) fn hasten(&mut self, now: Time) {
        self.lazy_at = self.lazy_at.map(|at| at.min(now));
    }

    pub(super) fn mark(&mut self, key: Key, durable: bool) {
        self.keys.insert(key);
        self.durable |= durable;
    }
}

impl Node {
    /// Slots that changed: to be written, and before anything else where this node gains or loses one.
    pub(super) fn note_slots(&mut self, changes: &[Change]) {
        let me = self.me.node;
        let Some(home) = &self.home else { return };
        for (run, before) in changes {
            let mine = run.record.owner == me || before.is_some_and(|record| record.owner == me);
            let (first, last) = (run.start, Slot(run.end().saturating_sub(1)));
            for bucket in home.slots.bucket_of(first)..=home.slots.bucket_of(last) {
                self.dirty.mark(Key::Slots(bucket as u8), mine);
            }
            if before.is_some_and(|record| record.state == SlotState::Leased) {
                self.moved.extend(run.slots());
            }
            if mine {
                self.lease_write = self.writes + 1;
            }
            self.view_stale = true;
        }
        let moved = |(run, before): &&Change| {
            before.is_some_and(|old| (old.owner, old.state) != (run.record.owner, run.record.state))
        };
        let moved: Vec<Change> = changes.iter().filter(moved).copied().collect();
        if !moved.is_empty() {
            self.outputs.push_back(Output::Owned(moved));
        }
    }

    /// Writes what changed: at once and durably, or lazily in one batch with whatever else comes.
    pub(super) fn write_changes(&mut self, now: Time) {
        if self.dirty.keys.is_empty() {
            return;
        }
        let due = *self.dirty.lazy_at.get_or_insert(now + LAZY_WRITE);
        if !self.dirty.durable && now < due {
            return;
        }
        let Dirty { keys, durable, .. } = std::mem::take(&mut self.dirty);
        self.writes += 1;
        let seq = self.writes;
        if durable {
            self.needed_write = seq;
        }
        let records = keys.into_iter().filter_map(|key| Some((key, self.record(key)?.encode())));
        let records = records.collect();
        self.outputs.push_back(Output::Write { records, seq });
    }

    pub(super) fn record(&self, key: Key) -> Option<Record> {
        match key {
            Key::Starts => Some(Record::Starts(self.me.version.starts)),
            Key::Cluster => Some(Record::Cluster(self.home.as_ref()?.cluster)),
            Key::Slots(bucket) => {
                Some(Record::Slots(self.home.as_ref()?.slots.bucket(usize::from(bucket))))
            }
            Key::Member(node) => self.directory.get(node).cloned().map(Record::Member),
            Key::Forget(node) => self.directory.forgotten(node).copied().map(Record::Forget),
            // The shell keeps those.
            Key::Pod(_) => None,
        }
    }

    /// Everything, as if the disk were empty: it is.
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

    /// The number of the write that everything this node vouches for by now will be part of.
    pub(super) fn after(&self) -> WriteSeq {
        if self.dirty.durable { self.writes + 1 } else { self.needed_write }
    }
}
