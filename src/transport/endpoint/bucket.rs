//! Rate limits: of non-members' handshakes, and of this node's own dials.

use std::time::Instant;

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
