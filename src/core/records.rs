//! The records of the replica: which ones a change affects, and their present contents.

use crate::{
    model::{Slot, SlotState},
    wire::{Buckets, Key, Record},
};

use super::{outbox::Outbox, replica::Replica, slots::Change};

impl Replica {
    /// Marks changed slots to be written; at once if this node is the old or the new owner of one.
    pub(super) fn note_slots(&mut self, outbox: &mut Outbox, changes: &[Change]) {
        let me = self.me.node;
        let Some(cluster_state) = &self.cluster_state else { return };
        for (run, before) in changes {
            let mine = run.record.owner == me || before.is_some_and(|record| record.owner == me);
            let (first, last) = (run.start, Slot(run.end().saturating_sub(1)));
            for bucket in cluster_state.slots.bucket_of(first)..=cluster_state.slots.bucket_of(last)
            {
                let key = Key::Slots(bucket as u8);
                if mine { outbox.mark_urgent(key) } else { outbox.mark(key) }
            }
            if before.is_some_and(|record| record.state == SlotState::Leased) {
                self.reassigned.extend(run.slots());
            }
            if mine {
                outbox.mark_lease();
            }
            outbox.invalidate_view();
        }
        let has_moved = |(run, before): &&Change| {
            before.is_some_and(|old| (old.owner, old.state) != (run.record.owner, run.record.state))
        };
        let moved: Vec<Change> = changes.iter().filter(has_moved).copied().collect();
        outbox.report_changes(moved);
    }

    /// Marks all records to be written at once, because the disk has lost them.
    pub(super) fn mark_everything(&self, outbox: &mut Outbox) {
        let members: Vec<_> =
            self.directory.iter().map(|record| Key::Member(record.node)).collect();
        let forgets: Vec<_> =
            self.directory.forgets().map(|forget| Key::Forget(forget.node)).collect();
        let slots = (0..Buckets::COUNT as u8).map(Key::Slots);
        let all =
            [Key::Starts, Key::Cluster].into_iter().chain(slots).chain(members).chain(forgets);
        for key in all {
            outbox.mark_urgent(key);
        }
    }

    /// Returns the present contents of a record.
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
}
