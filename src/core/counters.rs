//! What a node counts, for people and tests.

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Broken promises of single ownership, each settled alike on all nodes.
    pub ownership_conflicts: u64,
    /// Records of another process that runs with this node's key.
    pub duplicates: u64,
    /// Frames and answers that could not be read.
    pub malformed: u64,
    /// Entries of peers that cannot be true.
    pub refused: u64,
    /// Records in the name of this process that it never wrote.
    pub forged: u64,
    pub grants: u64,
    /// Times that a forgotten node's slots were taken over.
    pub reclaims: u64,
    /// Members that this node forgot because most voters had missed them for long.
    pub voted_gone: u64,
    /// Records of this node's own that it did not remember: its state directory was rolled back.
    pub rollbacks: u64,
    /// Times that gossip called a member down.
    pub downs: u64,
    /// Leases of its own that it did not need and made free slots.
    pub surplus: u64,
    /// Late grants of forgotten nodes, passed on to their successors.
    pub declined: u64,
    /// Rounds of comparison that ended in "same" / "different".
    pub syncs_same: u64,
    pub syncs_different: u64,
}
