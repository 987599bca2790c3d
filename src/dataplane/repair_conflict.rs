//! Distinguishes a conflict with another program from occasional repairs.
//!
//! A conflict means that another program keeps undoing what gossamer repairs. A repair is one pass that
//! found a change. How much it found does not matter: one command may change many objects, and the kernel
//! reports them in portions. So at most one repair per second counts. Ten counted repairs within a minute
//! are a conflict; an operator's commands, a restart of a network manager or a reload of a firewall cause
//! two or three.
//!
//! During a conflict, repairs of that kind are delayed, each time twice as long, so that neither program
//! consumes a CPU. The delay stays short enough that repairs continue to fill the window while the other
//! program continues. The conflict ends when nothing of that kind needed a repair for a while.
//!
//! Pure. The agent finds out which program it is.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::model::Time;

/// Period in which repairs are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Minimum time between two repairs that both count.
const MIN_COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// Counted repairs within `WINDOW` that make a conflict.
const CONFLICT_REPAIRS: usize = 10;
/// The same for sysctls. They are checked every ten seconds, so at most six checks fall into `WINDOW`.
const CONFLICT_REPAIRS_SYSCTLS: usize = 4;
/// Delay of the first repair in a conflict.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Maximum delay of a repair: less than `WINDOW / CONFLICT_REPAIRS`, and less than `QUIET_PERIOD`.
const MAX_DELAY: Duration = Duration::from_secs(4);
/// Time without a repair after which a conflict is over.
const QUIET_PERIOD: Duration = Duration::from_secs(30);

/// The object of a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The VXLAN device and the entries of the three tables.
    Entries,
    /// The pods' bridge and the ports on it.
    Bridge,
    /// gossamer's nftables table.
    Firewall,
    /// Forwarding and other sysctls.
    Sysctls,
    /// The nftables tables for pods' addresses.
    Spoofing,
}

/// The recent repairs of each kind.
#[derive(Debug, Default)]
pub struct Conflicts(BTreeMap<Kind, RepairHistory>);

#[derive(Debug, Default)]
struct RepairHistory {
    /// Times of the counted repairs within `WINDOW`: at most one per second.
    counted: VecDeque<Time>,
    last: Time,
    /// Delay of the next repair; zero if there is no conflict.
    delay: Duration,
}

/// The start of a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConflictStart {
    /// Number of counted repairs.
    pub repairs: usize,
    /// Time from the first to the last counted repair.
    pub within: Duration,
}

impl Conflicts {
    /// Counts a repair. Returns the start of a conflict if this repair makes it one.
    pub fn note(&mut self, now: Time, kind: Kind) -> Option<ConflictStart> {
        let record = self.0.entry(kind).or_default();
        record.reset_if_quiet(now);
        record.last = now;
        if record.counted.back().is_none_or(|last| now.since(*last) >= MIN_COUNT_INTERVAL) {
            record.counted.push_back(now);
        }
        while record.counted.front().is_some_and(|first| now.since(*first) > WINDOW) {
            record.counted.pop_front();
        }
        if !record.delay.is_zero() {
            record.delay = (record.delay * 2).min(MAX_DELAY);
            return None;
        }
        let required =
            if kind == Kind::Sysctls { CONFLICT_REPAIRS_SYSCTLS } else { CONFLICT_REPAIRS };
        let first = *record.counted.front().filter(|_| record.counted.len() >= required)?;
        record.delay = FIRST_DELAY;
        Some(ConflictStart { repairs: record.counted.len(), within: now.since(first) })
    }

    /// Returns the delay between the last repair of this kind and the next; zero if there is no conflict.
    pub fn delay(&self, kind: Kind) -> Duration {
        self.0.get(&kind).map_or(Duration::ZERO, |record| record.delay)
    }

    /// Returns whether there is a conflict about this kind.
    pub fn is_under_way(&mut self, now: Time, kind: Kind) -> bool {
        self.0.get_mut(&kind).is_some_and(|record| {
            record.reset_if_quiet(now);
            !record.delay.is_zero()
        })
    }
}

impl RepairHistory {
    fn reset_if_quiet(&mut self, now: Time) {
        if !self.delay.is_zero() && now.since(self.last) >= QUIET_PERIOD {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    #[test]
    fn burst_of_repairs_is_no_conflict() {
        let mut conflicts = Conflicts::default();
        for n in 0..500 {
            assert_eq!(conflicts.note(at(n * 10), Kind::Entries), None, "{n}");
        }
        assert_eq!(conflicts.delay(Kind::Entries), Duration::ZERO);
    }

    #[test]
    fn occasional_repairs_are_no_conflict() {
        let mut conflicts = Conflicts::default();
        for n in 0..100 {
            assert_eq!(conflicts.note(at(n * 7_000), Kind::Bridge), None, "{n}");
        }
    }

    #[test]
    fn repeated_repairs_are_a_conflict_of_their_kind_only() {
        let mut conflicts = Conflicts::default();
        let start = (0..20).find_map(|n| conflicts.note(at(n * 1_000), Kind::Bridge));
        assert_eq!(start, Some(ConflictStart { repairs: 10, within: Duration::from_secs(9) }));
        assert!(conflicts.is_under_way(at(9_000), Kind::Bridge));
        assert!(!conflicts.is_under_way(at(9_000), Kind::Entries));
        assert!(conflicts.delay(Kind::Entries).is_zero());
    }

    #[test]
    fn sysctls_wrong_at_every_check_are_a_conflict() {
        let mut conflicts = Conflicts::default();
        let start = (0..6).find_map(|n| conflicts.note(at(n * 10_000), Kind::Sysctls));
        assert_eq!(start, Some(ConflictStart { repairs: 4, within: Duration::from_secs(30) }));
    }

    #[test]
    fn delays_grow_to_a_maximum_and_end_with_the_conflict() {
        let mut conflicts = Conflicts::default();
        let mut now = 0;
        let mut delays = Vec::new();
        for _ in 0..18 {
            conflicts.note(at(now), Kind::Firewall);
            delays.push(conflicts.delay(Kind::Firewall));
            // The other program undoes the repair at once.
            now += 1_000.max(delays.last().map_or(0, Duration::as_millis) as u64);
        }
        assert!(delays.is_sorted() && delays[8].is_zero(), "{delays:?}");
        assert_eq!((delays[9], delays[17]), (FIRST_DELAY, MAX_DELAY));
        assert!(conflicts.is_under_way(at(now), Kind::Firewall));
        assert!(!conflicts.is_under_way(at(now + 30_000), Kind::Firewall));
        assert_eq!(
            conflicts.note(at(now + 30_000), Kind::Firewall),
            None,
            "counting starts at zero"
        );
        assert!(conflicts.delay(Kind::Firewall).is_zero());
    }
}
