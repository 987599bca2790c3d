//! Ownership of slots: the record that nodes agree on, and runs of slots with equal records.

use serde::{Deserialize, Serialize};

use super::{NodeId, Slot};

/// Ownership of one slot.
///
/// Only the owner writes a new record of its slot, with a higher epoch. Two records with one epoch are
/// therefore equal, unless single ownership was violated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Version of the record; the highest one holds.
    pub epoch: u64,
    /// The node that may use or grant the slot.
    pub owner: NodeId,
    /// Whether the owner uses the slot.
    pub state: SlotState,
    /// The node that wrote this record: the granter of a grant, otherwise the owner.
    pub granter: NodeId,
}

/// What the owner does with its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SlotState {
    /// Not in use: the owner may grant it.
    Free,
    /// In use: pods have addresses of the subnet.
    Leased,
}

/// `len` slots from `start` that have equal records. A pool of 65,536 slots usually consists of few, long
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First slot.
    pub start: Slot,
    /// Number of slots.
    pub len: u32,
    /// The common record.
    pub record: SlotRecord,
}

impl Run {
    /// Returns the number of the first slot after the run.
    pub const fn end(&self) -> u32 {
        self.start.0.saturating_add(self.len)
    }

    /// Iterates over the slots.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        (self.start.0..self.end()).map(Slot)
    }
}
