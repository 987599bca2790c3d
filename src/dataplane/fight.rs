//! Telling a fight with another program from repairs that happen now and then.
//!
//! A repair is one pass that found something changed; how much it found says nothing, for one command may
//! change many objects, and the kernel tells of them in portions. So no more than one repair a second counts.
//! Ten such seconds in a minute are a fight: an operator's commands, a restart of a network manager or a
//! reload of a firewall take two or three. From then on repairs of that kind wait, each time twice as long,
//! so that neither side takes a CPU; but never so long that the window would empty while the other program
//! goes on. The fight is over when nothing of that kind had to be repaired for a while.
//!
//! Pure. Which program it is, is found out elsewhere.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::model::Time;

/// Repairs older than this do not count.
const WINDOW: Duration = Duration::from_secs(60);
/// Repairs that follow one another faster are one.
const APART: Duration = Duration::from_secs(1);
/// So many in the window are a fight.
const MANY: usize = 10;
/// What is looked at every ten seconds only cannot be found wrong more often than six times in the window.
const MANY_LOOKS: usize = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Less than `WINDOW` by `MANY`, and less than `OVER`.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// Peace, after so long without a repair.
const OVER: Duration = Duration::from_secs(30);

/// What is fought about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The VXLAN device and the entries of the three tables.
    Entries,
    /// The pods' bridge and the ports on it.
    Bridge,
    /// The table of nftables.
    Firewall,
    Sysctls,
    /// The tables of nftables about pods' addresses.
    Spoofing,
}

/// Repairs of every kind, as far as they matter.
#[derive(Debug, Default)]
pub struct Fights(BTreeMap<Kind, Record>);

#[derive(Debug, Default)]
struct Record {
    /// When repairs that count were made: no more than `WINDOW` has seconds.
    counted: VecDeque<Time>,
    last: Time,
    /// How long the next repair waits; zero in peace.
    pause: Duration,
}

/// A fight that has just begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    pub repairs: usize,
    pub within: Duration,
}

impl Fights {
    /// Counts a repair. Says so if that makes it a fight.
    pub fn note(&mut self, now: Time, kind: Kind) -> Option<Begun> {
        let record = self.0.entry(kind).or_default();
        record.end(now);
        record.last = now;
        if record.counted.back().is_none_or(|last| now.since(*last) >= APART) {
            record.counted.push_back(now);
        }
        while record.counted.front().is_some_and(|first| now.since(*first) > WINDOW) {
            record.counted.pop_front();
        }
        if !record.pause.is_zero() {
            record.pause = (record.pause * 2).min(LONGEST_PAUSE);
            return None;
        }
        let many = if kind == Kind::Sysctls { MANY_LOOKS } else { MANY };
        let first = *record.counted.front().filter(|_| record.counted.len() >= many)?;
        record.pause = FIRST_PAUSE;
        Some(Begun { repairs: record.counted.len(), within: now.since(first) })
    }

    /// How long after the last repair the next one of this kind waits.
    pub fn pause(&self, kind: Kind) -> Duration {
        self.0.get(&kind).map_or(Duration::ZERO, |record| record.pause)
    }

    /// Whether one is under way.
    pub fn is_under_way(&mut self, now: Time, kind: Kind) -> bool {
        self.0.get_mut(&kind).is_some_and(|record| {
            record.end(now);
            !record.pause.is_zero()
        })
    }
}

impl Record {
    fn end(&mut self, now: Time) {
        if !self.pause.is_zero() && now.since(self.last) >= OVER {
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
    fn a_burst_of_repairs_is_no_fight() {
        let mut fights = Fights::default();
        for n in 0..500 {
            assert_eq!(fights.note(at(n * 10), Kind::Entries), None, "{n}");
        }
        assert_eq!(fights.pause(Kind::Entries), Duration::ZERO);
    }

    #[test]
    fn repairs_now_and_then_are_no_fight() {
        let mut fights = Fights::default();
        for n in 0..100 {
            assert_eq!(fights.note(at(n * 7_000), Kind::Bridge), None, "{n}");
        }
    }

    #[test]
    fn repairs_that_repeat_are_a_fight_of_their_kind_alone() {
        let mut fights = Fights::default();
        let begun = (0..20).find_map(|n| fights.note(at(n * 1_000), Kind::Bridge));
        assert_eq!(begun, Some(Begun { repairs: 10, within: Duration::from_secs(9) }));
        assert!(fights.is_under_way(at(9_000), Kind::Bridge));
        assert!(!fights.is_under_way(at(9_000), Kind::Entries));
        assert!(fights.pause(Kind::Entries).is_zero());
    }

    #[test]
    fn sysctls_that_are_wrong_at_every_look_are_a_fight() {
        let mut fights = Fights::default();
        let begun = (0..6).find_map(|n| fights.note(at(n * 10_000), Kind::Sysctls));
        assert_eq!(begun, Some(Begun { repairs: 4, within: Duration::from_secs(30) }));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_end_with_the_fight() {
        let mut fights = Fights::default();
        let mut now = 0;
        let mut pauses = Vec::new();
        for _ in 0..18 {
            fights.note(at(now), Kind::Firewall);
            pauses.push(fights.pause(Kind::Firewall));
            // The other program is there again as soon as the repair is made.
            now += 1_000.max(pauses.last().map_or(0, Duration::as_millis) as u64);
        }
        assert!(pauses.is_sorted() && pauses[8].is_zero(), "{pauses:?}");
        assert_eq!((pauses[9], pauses[17]), (FIRST_PAUSE, LONGEST_PAUSE));
        assert!(fights.is_under_way(at(now), Kind::Firewall));
        assert!(!fights.is_under_way(at(now + 30_000), Kind::Firewall));
        assert_eq!(fights.note(at(now + 30_000), Kind::Firewall), None, "it begins from nothing");
        assert!(fights.pause(Kind::Firewall).is_zero());
    }
}
