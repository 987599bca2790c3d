//! Distinguishes a fight with another program from occasional repairs.
//!
//! A fight means that another program keeps undoing what gossamer repairs. A repair is one pass that found a
//! change. How much it found does not matter: one command may change many objects, and the kernel reports
//! them in portions. So at most one repair per second counts. Ten counted repairs within a minute are a
//! fight; an operator's commands, a restart of a network manager or a reload of a firewall cause two or
//! three.
//!
//! During a fight, repairs of that kind are delayed, each time twice as long, so that neither program
//! consumes a CPU. The delay stays short enough that repairs continue to fill the window while the other
//! program continues. The fight ends when nothing of that kind needed a repair for a while.
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
/// Counted repairs within `WINDOW` that make a fight.
const FIGHT_REPAIRS: usize = 10;
/// The same for sysctls. They are checked every ten seconds, so at most six checks fall into `WINDOW`.
const FIGHT_REPAIRS_SYSCTLS: usize = 4;
/// Delay of the first repair in a fight.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Maximum delay of a repair: less than `WINDOW / FIGHT_REPAIRS`, and less than `QUIET_PERIOD`.
const MAX_DELAY: Duration = Duration::from_secs(4);
/// Time without a repair after which a fight is over.
const QUIET_PERIOD: Duration = Duration::from_secs(30);

/// The object of a fight.
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
pub struct Fights(BTreeMap<Kind, RepairHistory>);

#[derive(Debug, Default)]
struct RepairHistory {
    /// Times of the counted repairs within `WINDOW`: at most one per second.
    counted: VecDeque<Time>,
    last: Time,
    /// Delay of the next repair; zero if there is no fight.
    delay: Duration,
}

/// The start of a fight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FightStart {
    /// Number of counted repairs.
    pub repairs: usize,
    /// Time from the first to the last counted repair.
    pub within: Duration,
}

impl Fights {
    /// Counts a repair. Returns the start of a fight if this repair makes it one.
    pub fn note(&mut self, now: Time, kind: Kind) -> Option<FightStart> {
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
        let required = if kind == Kind::Sysctls { FIGHT_REPAIRS_SYSCTLS } else { FIGHT_REPAIRS };
        let first = *record.counted.front().filter(|_| record.counted.len() >= required)?;
        record.delay = FIRST_DELAY;
        Some(FightStart { repairs: record.counted.len(), within: now.since(first) })
    }

    /// Returns the delay between the last repair of this kind and the next; zero if there is no fight.
    pub fn delay(&self, kind: Kind) -> Duration {
        self.0.get(&kind).map_or(Duration::ZERO, |record| record.delay)
    }

    /// Returns whether there is a fight about this kind.
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
    fn burst_of_repairs_is_no_fight() {
        let mut fights = Fights::default();
        for n in 0..500 {
            assert_eq!(fights.note(at(n * 10), Kind::Entries), None, "{n}");
        }
        assert_eq!(fights.delay(Kind::Entries), Duration::ZERO);
    }

    #[test]
    fn occasional_repairs_are_no_fight() {
        let mut fights = Fights::default();
        for n in 0..100 {
            assert_eq!(fights.note(at(n * 7_000), Kind::Bridge), None, "{n}");
        }
    }

    #[test]
    fn repeated_repairs_are_a_fight_of_their_kind_only() {
        let mut fights = Fights::default();
        let start = (0..20).find_map(|n| fights.note(at(n * 1_000), Kind::Bridge));
        assert_eq!(start, Some(FightStart { repairs: 10, within: Duration::from_secs(9) }));
        assert!(fights.is_under_way(at(9_000), Kind::Bridge));
        assert!(!fights.is_under_way(at(9_000), Kind::Entries));
        assert!(fights.delay(Kind::Entries).is_zero());
    }

    #[test]
    fn sysctls_wrong_at_every_check_are_a_fight() {
        let mut fights = Fights::default();
        let start = (0..6).find_map(|n| fights.note(at(n * 10_000), Kind::Sysctls));
        assert_eq!(start, Some(FightStart { repairs: 4, within: Duration::from_secs(30) }));
    }

    #[test]
    fn delays_grow_to_a_maximum_and_end_with_the_fight() {
        let mut fights = Fights::default();
        let mut now = 0;
        let mut delays = Vec::new();
        for _ in 0..18 {
            fights.note(at(now), Kind::Firewall);
            delays.push(fights.delay(Kind::Firewall));
            // The other program undoes the repair at once.
            now += 1_000.max(delays.last().map_or(0, Duration::as_millis) as u64);
        }
        assert!(delays.is_sorted() && delays[8].is_zero(), "{delays:?}");
        assert_eq!((delays[9], delays[17]), (FIRST_DELAY, MAX_DELAY));
        assert!(fights.is_under_way(at(now), Kind::Firewall));
        assert!(!fights.is_under_way(at(now + 30_000), Kind::Firewall));
        assert_eq!(fights.note(at(now + 30_000), Kind::Firewall), None, "counting starts at zero");
        assert!(fights.delay(Kind::Firewall).is_zero());
    }
}
