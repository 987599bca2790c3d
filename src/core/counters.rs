//! Counters of a node, for metrics, status and tests.

/// Counts since the start of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Slots for which two records of one epoch were received (ownership conflicts).
    pub ownership_conflicts: u64,
    /// Records received from another process with this node's key.
    pub duplicates: u64,
    /// Frames and responses that could not be decoded or were of the wrong kind or cluster.
    pub malformed: u64,
    /// Facts of peers that were refused because they cannot be true.
    pub refused: u64,
    /// Records in the name of this process that it did not write.
    pub forged: u64,
    /// Slot grants to other nodes.
    pub grants: u64,
    /// Forgotten nodes whose slots this node reclaimed.
    pub reclaims: u64,
    /// Members that this node forgot by a vote.
    pub voted_gone: u64,
    /// Own records that peers hold and this node lost: its state directory was rolled back.
    pub rollbacks: u64,
    /// Transitions of members to down.
    pub downs: u64,
    /// Surplus leases that this node turned into free slots.
    pub surplus: u64,
    /// Late grants of forgotten nodes that this node passed on to their successors.
    pub declined: u64,
    /// Comparisons that found equal states.
    pub syncs_same: u64,
    /// Comparisons that found a difference.
    pub syncs_different: u64,
}
