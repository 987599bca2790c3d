//! Limits how often the kernel is dumped because a netlink socket overran and lost messages.
//!
//! A dump makes the next overrun more likely, and a pod can cause overruns continually. So the pause between
//! dumps doubles until there was no overrun for a while.
//!
//! Pure: the time comes with each call.

use std::time::{Duration, Instant};

/// Pause after the first dump.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between dumps.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After this long without a dump the pauses start again at `FIRST_PAUSE`. More than `LONGEST_PAUSE`.
const QUIET_PERIOD: Duration = Duration::from_secs(10);

/// The overruns of one socket.
#[derive(Debug, Default)]
pub struct Overruns {
    /// Whether there was an overrun since the last dump.
    is_waiting: bool,
    dumped_at: Option<Instant>,
    pause: Duration,
}

impl Overruns {
    /// Records whether a read found an overrun.
    pub const fn note(&mut self, overrun: bool) {
        self.is_waiting |= overrun;
    }

    /// Returns when to dump; `None` if nothing was lost.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.is_waiting.then(|| self.dumped_at.map_or(now, |dumped_at| dumped_at + self.pause))
    }

    /// Whether to dump now. If so, the caller does it.
    pub fn take(&mut self, now: Instant) -> bool {
        let is_due = self.due(now).is_some_and(|due| due <= now);
        if is_due {
            self.is_waiting = false;
            let before = self.dumped_at.replace(now);
            let is_first =
                before.is_none_or(|before| now.saturating_duration_since(before) >= QUIET_PERIOD);
            self.pause = match is_first {
                true => FIRST_PAUSE,
                false => (self.pause * 2).min(LONGEST_PAUSE),
            };
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_continual_overruns_slow_down_and_a_later_one_is_immediate() {
        let start = Instant::now();
        let mut overruns = Overruns::default();
        overruns.note(false);
        assert!(!overruns.take(start), "nothing was lost");
        let mut dumps = Vec::new();
        for milliseconds in 0..20_000 {
            overruns.note(true);
            if overruns.take(start + Duration::from_millis(milliseconds)) {
                dumps.push(milliseconds);
            }
        }
        assert_eq!(dumps[..5], [0, 50, 150, 350, 750], "{dumps:?}");
        assert!(dumps.len() < 20, "{dumps:?}");
        assert!(overruns.take(start + Duration::from_secs(25)), "the last overrun of the series");
        let later = start + Duration::from_secs(40);
        assert_eq!(overruns.due(later), None);
        overruns.note(true);
        assert!(overruns.take(later));
        overruns.note(true);
        assert_eq!(overruns.due(later), Some(later + FIRST_PAUSE));
    }

    #[test]
    fn take_overrun_during_a_pause_waits_for_its_end() {
        let start = Instant::now();
        let mut overruns = Overruns::default();
        overruns.note(true);
        assert!(overruns.take(start));
        overruns.note(true);
        assert!(!overruns.take(start));
        assert!(overruns.take(start + FIRST_PAUSE));
        assert_eq!(overruns.due(start + FIRST_PAUSE), None);
    }
}
