//! Log lines about what happens often: one per interval, with the number since the last line.

use std::time::{Duration, Instant};

/// Counts what a log line reports.
#[derive(Debug)]
pub(super) struct CountedLine {
    interval: Duration,
    logged_at: Option<Instant>,
    unlogged: u64,
}

impl CountedLine {
    /// `interval` is the shortest time between two lines.
    pub(super) const fn new(interval: Duration) -> Self {
        Self { interval, logged_at: None, unlogged: 0 }
    }

    /// Adds `count`. Returns the number since the last line if there is any and another line is due.
    pub(super) fn add(&mut self, now: Instant, count: u64) -> Option<u64> {
        self.unlogged += count;
        let is_recent = |at: Instant| now.duration_since(at) < self.interval;
        if self.unlogged == 0 || self.logged_at.is_some_and(is_recent) {
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_due_once_per_interval_with_the_number_since_the_last() {
        let interval = Duration::from_secs(60);
        let (mut line, now) = (CountedLine::new(interval), Instant::now());
        assert_eq!(line.add(now, 0), None);
        assert_eq!(line.add(now, 5), Some(5));
        assert_eq!(line.add(now, 7), None);
        assert_eq!(line.add(now + interval / 2, 1), None);
        assert_eq!(line.add(now + interval, 0), Some(8));
    }
}
