//! Who owns a slot: the record that nodes agree on, and runs of slots with the same record.

use serde::{Deserialize, Serialize};

use super::{NodeId, Slot};

/// Ownership of one slot.
///
/// Only the owner writes a new record for its slot, and each new record has a higher epoch, so two
/// records with one epoch are equal unless the promise of single ownership was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Version of the record; the higher one is the truth.
    pub epoch: u64,
    pub owner: NodeId,
    pub state: SlotState,
    /// The node that wrote this record: the owner before a grant, or the owner itself.
    pub granter: NodeId,
}

/// What the owner does with its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotState {
    /// Owned and not in use: may be granted to a joiner.
    Free,
    /// Owned and in use: pods live in this subnet.
    Leased,
}

/// `len` slots from `start` on that share one record. A pool of 65,536 slots is mostly few, long runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub start: Slot,
    pub len: u32,
    pub record: SlotRecord,
}

impl Run {
    /// First slot after the run.
    pub const fn end(&self) -> u32 {
        self.start.0.saturating_add(self.len)
    }

    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        (self.start.0..self.end()).map(Slot)
    }
}
