//! Bounds the log lines about members, because a member that lies can make thousands of others come and go.

use std::time::Duration;

use crate::model::Time;

/// Number of lines in a row.
const BURST: u32 = 40;
/// Interval in which a further line is allowed.
const REFILL_INTERVAL: Duration = Duration::from_secs(1);

/// A token bucket for log lines.
#[derive(Clone, Debug)]
pub(super) struct LogBudget {
    lines: u32,
    refilled: Time,
    left_out: u64,
}

impl LogBudget {
    pub(super) const fn new(now: Time) -> Self {
        Self { lines: BURST, refilled: now, left_out: 0 }
    }

    /// Returns whether a line may be logged; otherwise counts it as left out.
    pub(super) fn take(&mut self, now: Time) -> bool {
        self.refill(now);
        if self.lines > 0 {
            self.lines -= 1;
            return true;
        }
        self.left_out += 1;
        false
    }

    /// Returns the number of lines left out since the last call, once a line with it may be logged.
    pub(super) fn take_left_out(&mut self, now: Time) -> Option<u64> {
        if self.left_out == 0 {
            return None;
        }
        self.refill(now);
        self.lines = self.lines.checked_sub(1)?;
        Some(std::mem::take(&mut self.left_out))
    }

    fn refill(&mut self, now: Time) {
        let intervals = now.since(self.refilled).as_nanos() / REFILL_INTERVAL.as_nanos();
        let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
        self.lines = self.lines.saturating_add(intervals).min(BURST);
        self.refilled = self.refilled + REFILL_INTERVAL * intervals;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_burst_are_counted_and_reported_once() {
        let at = |millis| Time::ZERO + Duration::from_millis(millis);
        let mut budget = LogBudget::new(at(0));
        let logged = (0..10_000).filter(|_| budget.take(at(500))).count();
        assert_eq!(logged, BURST as usize);
        assert_eq!(budget.take_left_out(at(900)), None, "that line is beyond the budget, too");
        assert_eq!(budget.take_left_out(at(1_000)), Some(10_000 - u64::from(BURST)));
        assert_eq!(budget.take_left_out(at(9_000)), None);
        let logged = (0..100).filter(|_| budget.take(at(9_000))).count();
        assert_eq!(logged, 8, "one line a second");
    }
}
