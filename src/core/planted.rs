//! Defects on purpose, to test the tests: the simulator switches them on one by one and must catch each.
//!
//! In the product the question "is this defect planted?" is the constant `false` and costs nothing.

/// A deliberate defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// Outputs do not wait for the write that they depend on.
    AnswerBeforeFlush,
    /// A restarted node grants before it has compared its memory with anybody.
    DonateBeforeSync,
    /// Of two records of a slot the lower epoch is kept, if it comes later.
    MergeByLowerEpoch,
    /// The owner hands on a slot without raising its epoch.
    SameEpoch,
    /// A member that gossip holds as down loses its slots.
    DownFreesSlots,
    /// A successor reclaims without waiting for the others.
    ForgetWithoutAcknowledgements,
    /// A reclaimed slot does not outrank what the forgotten node wrote.
    ReclaimKeepsGeneration,
    /// Down members are never compared with, and seeds not either once one was met.
    NoAnnounceAfterHeal,
    /// Where anything differs all entries are removed, and then the wanted ones added.
    RemoveBeforeAdd,
    /// Unknown entries are swept before the first comparison.
    SweepAtOnce,
    /// A leaver hands its subnet over while its kernel still uses it.
    LeaveWithoutWithdrawal,
    /// A leaver goes without waiting for anybody to accept.
    LeaveWithoutAcceptance,
    /// A surplus lease is given back while the kernel still uses it.
    GiveBackInUse,
    /// The start is not on disk before the incarnation is used.
    ForgetStarts,
    /// A second grant to the same joiner is another slot than the first, and the first is forgotten.
    GrantAnotherSlot,
    /// Comparisons never exchange slots.
    NeverExchangeSlots,
    /// A member record is taken whatever its version.
    IgnoreVersions,
    /// A member record is taken whatever addresses and MAC it has.
    TakeUnfitRecords,
    /// Counters may jump as far as anybody says.
    TakeJumps,
    /// Gossip hears of nodes that have no record.
    TakeAnyIdentity,
    /// A gossip packet counts as sent by whom it says.
    TakeAnySender,
    /// A member whose state can never be taken over keeps this node unsettled.
    OddPeersUnsettle,
    /// A member that does not answer is compared with again at once.
    SilentTwice,
    /// A record of its own that a node never wrote is not answered.
    LetForgeriesStand,
}

impl Bug {
    pub const ALL: [Self; 24] = [
        Self::AnswerBeforeFlush,
        Self::DonateBeforeSync,
        Self::MergeByLowerEpoch,
        Self::SameEpoch,
        Self::DownFreesSlots,
        Self::ForgetWithoutAcknowledgements,
        Self::ReclaimKeepsGeneration,
        Self::NoAnnounceAfterHeal,
        Self::RemoveBeforeAdd,
        Self::SweepAtOnce,
        Self::LeaveWithoutWithdrawal,
        Self::LeaveWithoutAcceptance,
        Self::GiveBackInUse,
        Self::ForgetStarts,
        Self::GrantAnotherSlot,
        Self::NeverExchangeSlots,
        Self::IgnoreVersions,
        Self::TakeUnfitRecords,
        Self::TakeJumps,
        Self::TakeAnyIdentity,
        Self::TakeAnySender,
        Self::OddPeersUnsettle,
        Self::SilentTwice,
        Self::LetForgeriesStand,
    ];
}

/// Whether this defect is switched on in this thread.
#[cfg(any(test, feature = "sim"))]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Never.
#[cfg(not(any(test, feature = "sim")))]
pub const fn planted(_: Bug) -> bool {
    false
}

/// Runs `work` with one defect switched on, in this thread only.
#[cfg(any(test, feature = "sim"))]
pub fn with<T>(bug: Bug, work: impl FnOnce() -> T) -> T {
    PLANTED.set(Some(bug));
    let result = work();
    PLANTED.set(None);
    result
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}
