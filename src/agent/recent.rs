//! Losses that a counter of the kernel showed of late.

/// A loss that is told for some looks after it was seen.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// How much was lost when last something was, and the looks since.
    last: Option<(u64, u32)>,
}

impl Recent {
    /// Takes note of a look, and of what was lost since the one before, if that counts. Forgets what was seen
    /// more than `hold` looks ago.
    pub(super) fn note(&mut self, lost: Option<u64>, hold: u32) {
        self.last = match (lost, self.last) {
            (Some(lost), _) => Some((lost, 0)),
            (None, Some((lost, looks))) if looks < hold => Some((lost, looks + 1)),
            (None, _) => None,
        };
    }

    /// The loss that is told now.
    pub(super) fn lost(&self) -> Option<u64> {
        self.last.map(|(lost, _)| lost)
    }
}
