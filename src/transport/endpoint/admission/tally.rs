//! How much strangers get in a time, and how many of their packets are a flood.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// Windows in which first packets that prove nothing are counted.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// What strangers do too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flood {
    /// In one minute.
    pub packets: u64,
    /// The source address of one of them. It stays the same while the flood lasts.
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

/// How many there were in this window and in the one before.
pub(super) struct Tally {
    /// So many are a flood.
    limit: u64,
    since: Instant,
    before: u64,
    present: u64,
    example: Option<IpAddr>,
}

impl Tally {
    pub(super) const fn new(limit: u64, now: Instant) -> Self {
        Self { limit, since: now, before: 0, present: 0, example: None }
    }

    pub(super) fn turn(&mut self, now: Instant) {
        let span = now.saturating_duration_since(self.since);
        if span >= WINDOW {
            self.before = if span < 2 * WINDOW { self.present } else { 0 };
            (self.present, self.since) = (0, now);
        }
        if self.present.max(self.before) < self.limit {
            self.example = None;
        }
    }

    pub(super) fn add(&mut self, from: IpAddr) {
        self.present += 1;
        if self.present >= self.limit {
            self.example.get_or_insert(from);
        }
    }

    /// Something that was counted turned out to be none.
    pub(super) fn take_back(&mut self) {
        self.present = self.present.saturating_sub(1);
    }

    pub(super) fn flood(&mut self, now: Instant) -> Option<Flood> {
        self.turn(now);
        Some(Flood { packets: self.present.max(self.before), example: self.example? })
    }
}
