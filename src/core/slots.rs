//! The slot table: which node owns which slot of the pool, and the only rules that change it.
//!
//! Only the owner of a slot writes its record, so no vote is needed: a grant is a record that the owner
//! writes, and a merge of two tables keeps the newer record of each slot. Merging is commutative,
//! associative and idempotent. The rules use neither liveness nor clocks and do no IO. The caller makes a
//! change durable before it sends the new record.

use std::{cmp::Reverse, collections::BTreeMap};

use crate::{
    model::{NodeId, Pool, Run, Slot, SlotRecord, SlotState},
    wire::{Buckets, Refusal},
};

use super::rank::{slot_score, state_hash};

/// The upper half of an epoch counts how often the slot was reclaimed (the generation), the lower half counts
/// the records written since.
const GENERATION_SHIFT: u32 = 32;

/// Returns how often the slot was reclaimed.
pub const fn generation_of(epoch: u64) -> u64 {
    epoch >> GENERATION_SHIFT
}

/// Returns how many records were written since the last reclaim.
pub const fn count_of(epoch: u64) -> u64 {
    epoch & ((1 << GENERATION_SHIFT) - 1)
}

/// Returns the first epoch of the generation that is `by` generations after that of `epoch`.
fn later_generation(epoch: u64, by: u64) -> u64 {
    generation_of(epoch).saturating_add(by).min(u64::from(u32::MAX)) << GENERATION_SHIFT
}

/// A grant includes this part of the granter's free slots. Even a host that joins again and again as a
/// new node so takes few of them, and a seed serves many joiners in a row.
const JOINER_SHARE: u32 = 16;

/// The records of all slots of one pool, as maximal runs in slot order.
#[derive(Clone, Debug)]
pub struct SlotTable {
    pool: Pool,
    /// Sorted, disjoint, within the pool; adjacent runs have different records.
    runs: Vec<Run>,
    /// Hashes of the buckets, kept consistent with `runs`.
    hashes: [u64; Buckets::COUNT],
}

/// A changed run, and the record that its slots had before (`None` if unknown until now).
pub type Change = (Run, Option<SlotRecord>);

/// A peer's run, and this node's different record of the same epoch for its slots.
pub type Contested = (Run, SlotRecord);

/// The result of a grant request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The changes that the grant made.
    New(Vec<Change>),
    /// The node owns these slots already; nothing changed.
    Again(Vec<Run>),
}

/// How the slots of the pool are divided at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Number of leased slots.
    pub leased: u32,
    /// Numbers of free slots, by owner.
    pub free: BTreeMap<NodeId, u32>,
}

impl SlotTable {
    /// Returns a table without records.
    pub fn empty(pool: Pool) -> Self {
        Self { pool, runs: Vec::new(), hashes: [0; Buckets::COUNT] }
    }

    /// Returns the table of a new cluster: all slots are free slots of the creator at epoch 0.
    pub fn created_by(pool: Pool, creator: NodeId) -> Self {
        let record =
            SlotRecord { epoch: 0, owner: creator, state: SlotState::Free, granter: creator };
        let mut table = Self::empty(pool);
        table.set(Run { start: Slot(*pool.slots().start()), len: pool.slot_count(), record });
        table
    }

    /// Returns all records, as maximal runs in slot order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Returns the record of one slot, if known.
    pub fn record(&self, slot: Slot) -> Option<SlotRecord> {
        let after = self.runs.partition_point(|run| run.start <= slot);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (slot.0 < run.end()).then_some(run.record)
    }

    /// Returns the slots leased by `node`, lowest first; more than one only until it releases the others.
    pub fn leased_by(&self, node: NodeId) -> impl Iterator<Item = Slot> + '_ {
        self.runs_of(node).filter(|run| run.record.state == SlotState::Leased).flat_map(Run::slots)
    }

    /// Returns the runs that `owner` owns, in slot order.
    pub fn runs_of(&self, owner: NodeId) -> impl Iterator<Item = &Run> + '_ {
        self.runs.iter().filter(move |run| run.record.owner == owner)
    }

    /// Counts leased and free slots.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for run in &self.runs {
            match run.record.state {
                SlotState::Leased => census.leased += run.len,
                SlotState::Free => *census.free.entry(run.record.owner).or_default() += run.len,
            }
        }
        census
    }

    /// Grants a free slot of `me` to `to`, as its lease, with a part of the remaining free slots. The slot is
    /// `prefer` if it is free, else the one with the highest score. A node that owns slots already gets those
    /// again. The caller makes the change durable.
    ///
    /// # Errors
    /// Fails if `me` has no free slot, or if the preferred slot is a free slot of another node.
    pub fn grant(
        &mut self,
        me: NodeId,
        to: NodeId,
        prefer: Option<Slot>,
    ) -> Result<Grant, Refusal> {
        let known: Vec<Run> = self.runs_of(to).copied().collect();
        if !known.is_empty() {
            return Ok(Grant::Again(known));
        }
        let preferred_elsewhere = prefer
            .and_then(|slot| self.record(slot))
            .is_some_and(|record| record.state == SlotState::Free && record.owner != me);
        if preferred_elsewhere {
            return Err(self.no_free_slot());
        }
        let Some(chosen) = self.choose(me, to, prefer, |_| true) else {
            return Err(self.no_free_slot());
        };
        let mut granted = vec![self.rewrite(chosen, 1, me, to, SlotState::Leased)];
        granted.extend(self.give_part(me, to, JOINER_SHARE));
        Ok(Grant::New(granted))
    }

    /// Gives half of the free slots of `me` to a member that has fewer. The caller makes the change durable.
    pub fn supply(&mut self, me: NodeId, to: NodeId) -> Vec<Change> {
        self.give_part(me, to, 2)
    }

    /// Returns the number of free slots of a node.
    pub fn free_count(&self, node: NodeId) -> u32 {
        self.free_slots_of(node).map(|run| run.len).sum()
    }

    /// Turns a free slot of `me` into its lease, the preferred one if possible.
    pub fn lease_own(&mut self, me: NodeId, prefer: Option<Slot>) -> Option<Change> {
        self.lease_own_where(me, prefer, |_| true)
    }

    /// Turns a free slot of `me` that satisfies `is_wanted` into its lease.
    pub fn lease_own_where(
        &mut self,
        me: NodeId,
        prefer: Option<Slot>,
        is_wanted: impl Fn(Slot) -> bool,
    ) -> Option<Change> {
        let chosen = self.choose(me, me, prefer, is_wanted)?;
        Some(self.rewrite(chosen, 1, me, me, SlotState::Leased))
    }

    /// Makes an externally assigned slot the lease of `me`. The new epoch is of a later generation, so it
    /// exceeds all that the previous owner can have written.
    pub fn claim(&mut self, me: NodeId, slot: Slot) -> Change {
        let before = self.record(slot);
        let epoch = later_generation(before.map_or(0, |record| record.epoch), 1);
        let record = SlotRecord { epoch, owner: me, state: SlotState::Leased, granter: me };
        let run = Run { start: slot, len: 1, record };
        self.set(run);
        (run, before)
    }

    /// Turns all leases of `me` into free slots, except the one in use.
    pub fn release_all_but(&mut self, me: NodeId, used: Slot) -> Vec<Change> {
        let surplus = self.leased_by(me).filter(|slot| *slot != used);
        let released = surplus.filter_map(|slot| {
            let before = self.record(slot)?;
            Some(next_record(Run { start: slot, len: 1, record: before }, me, me))
        });
        let released: Vec<Change> = released.collect();
        self.overwrite(&released);
        released
    }

    /// Makes all slots of `me` free slots of `successor`.
    pub fn hand_over(&mut self, me: NodeId, successor: NodeId) -> Vec<Change> {
        let changes: Vec<Change> =
            self.runs_of(me).map(|run| next_record(*run, me, successor)).collect();
        self.overwrite(&changes);
        changes
    }

    /// Makes all slots of the forgotten node `gone` free slots of `me`. The new epochs exceed all that the
    /// forgotten node, the nodes it granted to, or the successor of an earlier round can have written.
    pub fn reclaim(&mut self, me: NodeId, gone: NodeId, round: u32) -> Vec<Change> {
        let reclaimed = self.runs_of(gone).map(|run| {
            let epoch = later_generation(run.record.epoch, u64::from(round));
            let record = SlotRecord { epoch, owner: me, state: SlotState::Free, granter: me };
            (Run { record, ..*run }, Some(run.record))
        });
        let changes: Vec<Change> = reclaimed.collect();
        self.overwrite(&changes);
        changes
    }

    /// Makes runs that `me` owns and never used free slots of the given successors, unless their records have
    /// changed. The runs are disjoint and in order of their slots.
    pub fn pass_on(&mut self, runs: &[(Run, NodeId)], me: NodeId) -> Vec<Change> {
        let is_present = |(run, _): &&(Run, NodeId)| self.record(run.start) == Some(run.record);
        let present = runs.iter().filter(is_present);
        let changes: Vec<Change> =
            present.map(|(run, successor)| next_record(*run, me, *successor)).collect();
        self.overwrite(&changes);
        changes
    }

    /// Returns the bucket of a slot. Buckets are equal, contiguous parts of the pool, so few runs are cut.
    pub fn bucket_of(&self, slot: Slot) -> usize {
        (slot.0.saturating_sub(*self.pool.slots().start()) / self.bucket_width()) as usize
    }

    /// Returns the runs of one bucket, cut at its borders.
    pub fn bucket(&self, bucket: usize) -> Vec<Run> {
        let width = self.bucket_width();
        let start = self.pool.slots().start() + bucket as u32 * width;
        self.range(start, start.saturating_add(width)).collect()
    }

    /// Returns the runs in `[start, end)`, cut at its borders.
    pub fn range(&self, start: u32, end: u32) -> impl Iterator<Item = Run> + '_ {
        let first = self.runs.partition_point(|run| run.end() <= start);
        let last = self.runs.partition_point(|run| run.start.0 < end);
        self.runs[first..last.max(first)].iter().filter_map(move |run| clip(run, start, end))
    }

    /// Returns one hash per bucket; equal tables have equal hashes.
    pub const fn hashes(&self) -> [u64; Buckets::COUNT] {
        self.hashes
    }

    fn bucket_width(&self) -> u32 {
        self.pool.slot_count().div_ceil(Buckets::COUNT as u32)
    }

    fn free_slots_of(&self, owner: NodeId) -> impl Iterator<Item = Run> + '_ {
        self.runs_of(owner).filter(|run| run.record.state == SlotState::Free).copied()
    }

    /// Returns whether `node` has a free slot that satisfies `is_wanted`.
    pub fn has_free_slot_where(&self, node: NodeId, is_wanted: impl Fn(Slot) -> bool) -> bool {
        self.free_slots_of(node).flat_map(|run| run.slots()).any(is_wanted)
    }

    /// Returns the free slot of `owner` to lease to `user`, among those that satisfy `is_wanted`: the
    /// preferred one, else the one with the highest rendezvous score.
    fn choose(
        &self,
        owner: NodeId,
        user: NodeId,
        prefer: Option<Slot>,
        is_wanted: impl Fn(Slot) -> bool,
    ) -> Option<Slot> {
        let all = || self.free_slots_of(owner).flat_map(|run| run.slots());
        let free_slots = || all().filter(|slot| is_wanted(*slot));
        prefer
            .filter(|slot| free_slots().any(|free| free == *slot))
            .or_else(|| free_slots().max_by_key(|slot| (slot_score(user, *slot), Reverse(*slot))))
    }

    /// Returns the reason for which this node gives no slot.
    pub fn no_free_slot(&self) -> Refusal {
        let census = self.census();
        match census.free.values().sum() {
            0 => Refusal::Exhausted { total: self.pool.slot_count(), leased: census.leased },
            free_elsewhere => Refusal::NoFreeSlotHere { free_elsewhere },
        }
    }

    /// Makes one of `parts` equal parts of the free slots of `me`, rounded down, free slots of `to`: the
    /// highest ones, so that whole runs move where possible.
    fn give_part(&mut self, me: NodeId, to: NodeId, parts: u32) -> Vec<Change> {
        let free_slots: Vec<Run> = self.free_slots_of(me).collect();
        let mut left = free_slots.iter().map(|run| run.len).sum::<u32>() / parts;
        let mut granted = Vec::new();
        for run in free_slots.iter().rev() {
            let len = run.len.min(left);
            if len == 0 {
                break;
            }
            left -= len;
            granted.push(self.rewrite(Slot(run.end() - len), len, me, to, SlotState::Free));
        }
        granted
    }

    /// Writes the next record of a run of slots that `me` owns and that share one record.
    fn rewrite(
        &mut self,
        start: Slot,
        len: u32,
        me: NodeId,
        owner: NodeId,
        state: SlotState,
    ) -> Change {
        let before = self.record(start);
        debug_assert!(before.is_some_and(|r| r.owner == me), "only the owner writes {start:?}");
        let epoch = before.map_or(0, |record| next_epoch(&record));
        let run = Run { start, len, record: SlotRecord { epoch, owner, state, granter: me } };
        self.set(run);
        (run, before)
    }

    /// Cuts `run` at the borders of this table's runs and pairs each part with this table's record.
    fn overlaps(&self, run: Run) -> Vec<Change> {
        let pool = self.pool.slots();
        let mut parts = Vec::new();
        let mut at = run.start.0.max(*pool.start());
        let end = run.end().min(pool.end() + 1);
        while at < end {
            let next = self.runs.partition_point(|ours| ours.end() <= at);
            let (ours, until) = match self.runs.get(next) {
                Some(ours) if ours.start.0 <= at => (Some(ours.record), ours.end()),
                Some(ours) => (None, ours.start.0),
                None => (None, end),
            };
            let len = until.min(end) - at;
            parts.push((Run { start: Slot(at), len, record: run.record }, ours));
            at += len;
        }
        parts
    }

    /// Overwrites a range of slots and keeps the runs maximal.
    fn set(&mut self, new: Run) {
        let (start, end) = (new.start.0, new.end());
        let first = self.runs.partition_point(|run| run.end() < start);
        let last = self.runs.partition_point(|run| run.start.0 <= end);
        let mut middle: Vec<Run> = Vec::with_capacity(3);
        let touched = &self.runs[first..last];
        middle.extend(touched.iter().filter_map(|run| clip(run, 0, start)));
        middle.push(new);
        middle.extend(touched.iter().filter_map(|run| clip(run, end, u32::MAX)));
        middle.dedup_by(|next, run| {
            let joins = run.record == next.record && run.end() == next.start.0;
            if joins {
                run.len += next.len;
            }
            joins
        });
        touched.to_vec().iter().chain(&middle).for_each(|run| self.toggle(run));
        self.runs.splice(first..last, middle);
    }

    /// Adds a run to the hashes of its buckets, or removes it: XOR undoes itself.
    fn toggle(&mut self, run: &Run) {
        let width = self.bucket_width();
        for bucket in self.bucket_of(run.start)..=self.bucket_of(Slot(run.end() - 1)) {
            let start = self.pool.slots().start() + bucket as u32 * width;
            let part = clip(run, start, start.saturating_add(width));
            self.hashes[bucket] ^= part.as_ref().map_or(0, run_hash);
        }
    }
}

/// Returns the epoch of the record that its owner writes after this one.
const fn next_epoch(record: &SlotRecord) -> u64 {
    record.epoch.saturating_add(1)
}

/// Returns the change that makes a run of `me` free slots of `owner`, with the next record.
fn next_record(run: Run, me: NodeId, owner: NodeId) -> Change {
    debug_assert!(run.record.owner == me, "only the owner writes {:?}", run.start);
    let epoch = next_epoch(&run.record);
    let record = SlotRecord { epoch, owner, state: SlotState::Free, granter: me };
    (Run { record, ..run }, Some(run.record))
}

fn run_hash(run: &Run) -> u64 {
    let SlotRecord { epoch, owner, state, granter } = run.record;
    let mut bytes = [0; 33];
    bytes[..4].copy_from_slice(&run.start.0.to_le_bytes());
    bytes[4..8].copy_from_slice(&run.len.to_le_bytes());
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes[16..24].copy_from_slice(owner.as_bytes());
    bytes[24..32].copy_from_slice(granter.as_bytes());
    bytes[32] = u8::from(state == SlotState::Leased);
    state_hash(&bytes)
}

/// Returns the part of a run within `[start, end)`.
fn clip(run: &Run, start: u32, end: u32) -> Option<Run> {
    let from = run.start.0.max(start);
    let to = run.end().min(end);
    (from < to).then(|| Run { start: Slot(from), len: to - from, record: run.record })
}

/// Returns the key by which records of one slot are ordered; the greatest is kept. Within one epoch, which
/// occurs only in an ownership conflict, the owner with the lower score for the slot wins.
fn precedence(slot: Slot, record: &SlotRecord) -> (u64, Reverse<u64>, SlotRecord) {
    (record.epoch, Reverse(slot_score(record.owner, slot)), *record)
}

mod merge;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
