//! Recent losses that a kernel counter reported.

/// The last loss that a kernel counter reported, held for a number of readings.
#[derive(Debug, Default)]
pub(super) struct RecentLoss {
    /// The counter at the last reading.
    counter: Option<u64>,
    /// The amount of the last loss, and the number of readings since.
    last: Option<(u64, u32)>,
}

impl RecentLoss {
    /// Records one reading: the loss since the previous reading, or `None` if there was no relevant
    /// loss. Drops a loss that is more than `hold` readings old.
    pub(in crate::agent) fn note(&mut self, lost: Option<u64>, hold: u32) {
        self.last = match (lost, self.last) {
            (Some(lost), _) => Some((lost, 0)),
            (None, Some((lost, looks))) if looks < hold => Some((lost, looks + 1)),
            (None, _) => None,
        };
    }

    /// Processes a reading of the counter. `is_relevant` decides whether the increase since the last
    /// reading is a loss. Returns the loss that is currently reported; the first reading reports none.
    pub(in crate::agent) fn update(
        &mut self,
        counter: u64,
        hold: u32,
        is_relevant: impl FnOnce(u64) -> bool,
    ) -> Option<u64> {
        let before = self.counter.replace(counter)?;
        let new = counter.saturating_sub(before);
        self.note(is_relevant(new).then_some(new), hold);
        self.lost()
    }

    /// Returns the loss that is currently reported.
    pub(in crate::agent) fn lost(&self) -> Option<u64> {
        self.last.map(|(lost, _)| lost)
    }
}
