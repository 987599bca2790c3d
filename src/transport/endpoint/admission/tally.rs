//! Counters that detect floods of non-members.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// Length of the windows in which events are counted.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// Too many packets or handshakes of non-members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flood {
    /// Number in one minute.
    pub packets: u64,
    /// The source address of one of them, which stays the same while the flood lasts.
    pub example: IpAddr,
}

/// Counts events in the current and the previous window.
pub(super) struct Tally {
    /// The number of events per window that is a flood.
    limit: u64,
    since: Instant,
    previous: u64,
    present: u64,
    example: Option<IpAddr>,
}

impl Tally {
    pub(super) const fn new(limit: u64, now: Instant) -> Self {
        Self { limit, since: now, previous: 0, present: 0, example: None }
    }

    /// Starts a new window if the current one has ended.
    pub(super) fn advance(&mut self, now: Instant) {
        let span = now.saturating_duration_since(self.since);
        if span >= WINDOW {
            self.previous = if span < 2 * WINDOW { self.present } else { 0 };
            (self.present, self.since) = (0, now);
        }
        if self.present.max(self.previous) < self.limit {
            self.example = None;
        }
    }

    /// Counts an event.
    pub(super) fn add(&mut self, from: IpAddr) {
        self.present += 1;
        if self.present >= self.limit {
            self.example.get_or_insert(from);
        }
    }

    /// Removes a counted event that turned out to be legitimate.
    pub(super) fn uncount(&mut self) {
        self.present = self.present.saturating_sub(1);
    }

    /// Returns the flood, if there is one.
    pub(super) fn flood(&mut self, now: Instant) -> Option<Flood> {
        self.advance(now);
        Some(Flood { packets: self.present.max(self.previous), example: self.example? })
    }
}
