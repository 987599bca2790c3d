//! Mutations: deliberate defects. The simulator switches them on one by one, and its oracle has to detect
//! each.
//!
//! In the product [`has_mutation`] is the constant `false` and costs nothing.

/// A deliberate defect of the core or of the kernel's plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// Outputs do not wait for the write that they depend on.
    AnswerBeforeFlush,
    /// A restarted node grants slots with unverified memory.
    GrantBeforeSync,
    /// Of two records of a slot the later one to arrive is kept, even with a lower epoch.
    MergeByLowerEpoch,
    /// A grant does not raise the slot's epoch.
    SameEpoch,
    /// A member that gossip holds as down loses its slots.
    DownFreesSlots,
    /// A successor reclaims without waiting for acknowledgements.
    ForgetWithoutAcknowledgements,
    /// A reclaimed slot's epoch does not exceed what the forgotten node wrote.
    ReclaimKeepsGeneration,
    /// States are never compared with down members, nor with a seed whose node is known.
    NeverCompareWithDown,
    /// Any difference in the kernel removes all entries before the wanted ones are added.
    RemoveBeforeAdd,
    /// Unknown kernel entries are removed before the first comparison.
    RemoveUnconfirmedEntries,
    /// A leaving node hands its subnet over while its kernel still uses it.
    LeaveWithoutWithdrawal,
    /// A leaving node stops before a member has accepted its records.
    LeaveWithoutAcceptance,
    /// A surplus lease is released while the kernel still uses it.
    ReleaseLeaseInUse,
    /// Starts are not counted, so an incarnation is used twice.
    StartsNotCounted,
    /// A repeated grant request gets another slot instead of the same one.
    GrantAnotherSlot,
    /// Comparisons never exchange slots.
    NeverExchangeSlots,
    /// Member records are merged whatever their version.
    IgnoreVersions,
    /// Member records are merged whatever their addresses and MAC.
    AcceptUnfitRecords,
    /// Counters are accepted beyond their horizon.
    AcceptJumps,
    /// Gossip accepts identities of nodes without a record.
    AcceptAnyIdentity,
    /// A gossip packet may name any sender.
    AcceptAnySender,
    /// A member whose differences never resolve keeps this node unsettled.
    FruitlessComparisonUnsettles,
    /// The next comparison may be with the member that just did not answer.
    RetrySilentPartner,
    /// A forged record of this node is not exceeded.
    IgnoreForgedRecords,
}

impl Mutation {
    /// All mutations.
    pub const ALL: [Self; 24] = [
        Self::AnswerBeforeFlush,
        Self::GrantBeforeSync,
        Self::MergeByLowerEpoch,
        Self::SameEpoch,
        Self::DownFreesSlots,
        Self::ForgetWithoutAcknowledgements,
        Self::ReclaimKeepsGeneration,
        Self::NeverCompareWithDown,
        Self::RemoveBeforeAdd,
        Self::RemoveUnconfirmedEntries,
        Self::LeaveWithoutWithdrawal,
        Self::LeaveWithoutAcceptance,
        Self::ReleaseLeaseInUse,
        Self::StartsNotCounted,
        Self::GrantAnotherSlot,
        Self::NeverExchangeSlots,
        Self::IgnoreVersions,
        Self::AcceptUnfitRecords,
        Self::AcceptJumps,
        Self::AcceptAnyIdentity,
        Self::AcceptAnySender,
        Self::FruitlessComparisonUnsettles,
        Self::RetrySilentPartner,
        Self::IgnoreForgedRecords,
    ];
}

/// Returns whether this mutation is switched on in this thread.
#[cfg(any(test, feature = "sim"))]
pub fn has_mutation(mutation: Mutation) -> bool {
    ACTIVE_MUTATION.get() == Some(mutation)
}

/// Returns false: the product has no mutations.
#[cfg(not(any(test, feature = "sim")))]
pub const fn has_mutation(_: Mutation) -> bool {
    false
}

/// Runs `work` with one mutation switched on, in this thread only.
#[cfg(any(test, feature = "sim"))]
pub fn with<T>(mutation: Mutation, work: impl FnOnce() -> T) -> T {
    ACTIVE_MUTATION.set(Some(mutation));
    let result = work();
    ACTIVE_MUTATION.set(None);
    result
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static ACTIVE_MUTATION: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}
