//! Merges a peer's records in one pass over both tables, however many runs a message holds.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{Change, Contested, Run, SlotRecord, SlotTable, clip, precedence};
use crate::model::Pool;

/// Up to this many changes are applied one by one; for more, the table is rebuilt.
const MAX_SINGLE_CHANGES: usize = 16;

/// The result of a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// The runs that changed, with what they replaced: disjoint, in slot order.
    pub changed: Vec<Change>,
    /// Ownership conflicts: runs whose slots have another record of the same epoch here.
    pub contested: Vec<Contested>,
}

impl SlotTable {
    /// Takes over the newer records of `theirs`. Ignores slots outside the pool.
    pub fn merge(&mut self, theirs: &[Run]) -> Merged {
        let mut merged = Merged::default();
        for run in disjoint(theirs, &self.pool) {
            for (part, ours) in self.overlaps(run) {
                match ours {
                    Some(ours) if ours == part.record || ours.epoch > part.record.epoch => {}
                    Some(ours) if ours.epoch == part.record.epoch => {
                        resolve_conflict(part, ours, &mut merged);
                    }
                    _ => merged.changed.push((part, ours)),
                }
            }
        }
        self.overwrite(&merged.changed);
        merged
    }

    /// Applies changes that are disjoint, in slot order, and each within one run or gap of this table.
    pub(super) fn overwrite(&mut self, changes: &[Change]) {
        if changes.len() <= MAX_SINGLE_CHANGES {
            return changes.iter().for_each(|(run, _)| self.set(*run));
        }
        let mut replacements = changes.iter().map(|(run, _)| *run).peekable();
        let before = std::mem::take(&mut self.runs);
        let mut runs: Vec<Run> = Vec::with_capacity(before.len() + changes.len());
        let mut add = |run: Run| match runs.last_mut() {
            Some(last) if last.record == run.record && last.end() == run.start.0 => {
                last.len += run.len;
            }
            _ => runs.push(run),
        };
        for old in before {
            let mut at = old.start.0;
            while let Some(new) = replacements.next_if(|new| new.start.0 < old.end()) {
                clip(&old, at, new.start.0).map(&mut add);
                add(new);
                at = at.max(new.end());
            }
            clip(&old, at, old.end()).map(&mut add);
        }
        replacements.for_each(&mut add);
        self.hashes = Default::default();
        for run in &runs {
            self.toggle(run);
        }
        self.runs = runs;
    }
}

/// Resolves an ownership conflict. All nodes keep the same record, whichever they received first.
fn resolve_conflict(part: Run, ours: SlotRecord, merged: &mut Merged) {
    merged.contested.push((part, ours));
    let theirs = part.record;
    let mut won: Option<Run> = None;
    for slot in part.slots() {
        let is_won = precedence(slot, &theirs) > precedence(slot, &ours);
        match &mut won {
            Some(run) if is_won => run.len += 1,
            None if is_won => won = Some(Run { start: slot, len: 1, record: theirs }),
            _ => merged.changed.extend(won.take().map(|run| (run, Some(ours)))),
        }
    }
    merged.changed.extend(won.map(|run| (run, Some(ours))));
}

/// Cuts a message's runs to the pool and returns them disjoint, in slot order. Of overlapping runs, such as
/// successive changes of one slot in one message, the higher epoch holds; of two with equal epochs the first.
/// If the other record is the right one, the next comparison brings it again.
fn disjoint(theirs: &[Run], pool: &Pool) -> Vec<Run> {
    let (first, end) = (*pool.slots().start(), pool.slots().end() + 1);
    let mut runs: Vec<Run> = theirs.iter().filter_map(|run| clip(run, first, end)).collect();
    if runs.windows(2).all(|pair| pair[0].end() <= pair[1].start.0) {
        return runs;
    }
    runs.sort_by_key(|run| Reverse(run.record.epoch));
    // Ranges that have a record, end by start; none touches another.
    let mut covered: BTreeMap<u32, u32> = BTreeMap::new();
    let mut parts = Vec::new();
    for run in runs {
        let (mut from, mut to) = (run.start.0, run.end());
        let touching = covered.range(..=to).rev().map(|(start, end)| (*start, *end));
        let touching: Vec<_> = touching.take_while(|(_, end)| *end >= from).collect();
        let mut at = from;
        for (start, end) in touching.into_iter().rev() {
            parts.extend(clip(&run, at, start));
            at = at.max(end);
            (from, to) = (from.min(start), to.max(end));
            covered.remove(&start);
        }
        parts.extend(clip(&run, at, run.end()));
        covered.insert(from, to);
    }
    parts.sort_by_key(|run| run.start);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, PoolSpec, Slot, SlotState};

    fn pool() -> Pool {
        let spec = PoolSpec {
            subnet_len: Some(24),
            ..PoolSpec::of("10.0.0.0/8".parse().expect("a network"))
        };
        Pool::new(&spec).expect("a pool")
    }

    fn run(start: u32, len: u32, epoch: u64, owner: u32) -> Run {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&owner.to_le_bytes());
        let owner = NodeId::from_bytes(bytes);
        let record = SlotRecord { epoch, owner, state: SlotState::Leased, granter: owner };
        Run { start: Slot(start), len, record }
    }

    #[test]
    fn overlapping_runs_of_one_message_become_disjoint_ones_of_the_highest_epochs() {
        let runs = [run(10, 10, 1, 1), run(15, 10, 2, 2), run(5, 30, 0, 3), run(12, 2, 1, 4)];
        let parts: Vec<_> = disjoint(&runs, &pool())
            .iter()
            .map(|run| (run.start.0, run.len, run.record.epoch))
            .collect();
        assert_eq!(parts, [(5, 5, 0), (10, 5, 1), (15, 10, 2), (25, 10, 0)]);
    }

    /// A message of 400 overlapping runs with one epoch once caused 100,000 log lines and took a second. This
    /// one, resolved slot by slot, would take hours.
    #[test]
    fn merge_of_any_message_is_one_pass_over_both_tables() {
        let slots = pool().slot_count();
        let mut table = SlotTable::created_by(pool(), NodeId::from_bytes([9; 8]));
        let contradictions: Vec<Run> = (0..60_000).map(|n| run(0, slots + 1, 0, n)).collect();
        let merged = table.merge(&contradictions);
        assert_eq!(merged.contested.len(), 1, "one run, however many records contradict it");
        let singly: Vec<Run> = pool().slots().rev().map(|n| run(n, 1, 7, n)).collect();
        assert_eq!(table.merge(&singly).changed.len(), table.runs().len());
        let contested: Vec<Run> = pool().slots().rev().map(|n| run(n, 1, 7, n + 1)).collect();
        assert_eq!(table.merge(&contested).contested.len(), slots as usize);
    }
}
