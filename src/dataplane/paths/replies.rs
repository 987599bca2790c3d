//! Which answers to one kind of probe arrived.

/// Consecutive losses after which a peer, or one kind of probe, counts as not answering.
pub(super) const LOSSES_UNTIL_LOST: u32 = 3;
use crate::model::Time;

/// The answers to one kind of probe. A firewall may drop that kind although the path works.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Replies {
    /// Losses since the last answer.
    pub(super) lost: u32,
    /// When the first of these losses was sent.
    pub(super) silent_since: Option<Time>,
    /// The kind has been answered, and has not gone unanswered since while the peer was alive.
    pub(super) trusted: bool,
}

impl Replies {
    pub(super) fn mark_lost(&mut self, sent: Time) {
        self.lost += 1;
        self.silent_since.get_or_insert(sent);
    }

    pub(super) const fn is_silent(&self) -> bool {
        self.lost >= LOSSES_UNTIL_LOST
    }
}
