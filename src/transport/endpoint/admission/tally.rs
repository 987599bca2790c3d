//! Rate limits for non-members, and counters that detect floods.

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

/// A token bucket.
pub(super) struct Bucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(super) const fn new(now: Instant, per_second: f64, burst: f64) -> Self {
        Self { per_second, burst, tokens: burst, filled: now }
    }

    /// Takes a token; returns whether there was one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let span = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + span * self.per_second).min(self.burst);
        self.filled = now;
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }
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
