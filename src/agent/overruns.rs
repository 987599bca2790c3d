//! How often everything is looked at because the kernel had more to tell than a socket could hold.
//!
//! What such a look costs makes the next overrun likelier, and a pod can cause one after the other. So they
//! follow one another ever more slowly, until there was none for a while.
//!
//! Pure: the time comes with each call.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After so long without one the next is looked at as soon as the first was. More than `LONGEST_PAUSE`.
const OVER: Duration = Duration::from_secs(10);

/// The overruns of one reader.
#[derive(Debug, Default)]
pub struct Overruns {
    /// There was one since the last look.
    is_waiting: bool,
    looked: Option<Instant>,
    pause: Duration,
}

impl Overruns {
    /// Takes note of whether a read has found one.
    pub const fn note(&mut self, overrun: bool) {
        self.is_waiting |= overrun;
    }

    /// When everything is to be looked at; none, if nothing was lost.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.is_waiting.then(|| self.looked.map_or(now, |looked| looked + self.pause))
    }

    /// Whether everything is to be looked at now. The caller does it then.
    pub fn take(&mut self, now: Instant) -> bool {
        let is_due = self.due(now).is_some_and(|due| due <= now);
        if is_due {
            self.is_waiting = false;
            let before = self.looked.replace(now);
            let is_first =
                before.is_none_or(|before| now.saturating_duration_since(before) >= OVER);
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
    fn overruns_without_end_are_looked_at_ever_more_slowly_and_a_later_one_at_once() {
        let start = Instant::now();
        let mut overruns = Overruns::default();
        overruns.note(false);
        assert!(!overruns.take(start), "nothing was lost");
        let mut looks = Vec::new();
        for milliseconds in 0..20_000 {
            overruns.note(true);
            if overruns.take(start + Duration::from_millis(milliseconds)) {
                looks.push(milliseconds);
            }
        }
        assert_eq!(looks[..5], [0, 50, 150, 350, 750], "{looks:?}");
        assert!(looks.len() < 20, "{looks:?}");
        assert!(overruns.take(start + Duration::from_secs(25)), "the last one of them");
        let later = start + Duration::from_secs(40);
        assert_eq!(overruns.due(later), None);
        overruns.note(true);
        assert!(overruns.take(later));
        overruns.note(true);
        assert_eq!(overruns.due(later), Some(later + FIRST_PAUSE));
    }

    #[test]
    fn overrun_during_a_pause_is_looked_at_when_it_has_passed() {
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
