//! How far counters of peers can have gone on: what is beyond that is refused.
//!
//! Epochs, starts and the other counters of the protocol only grow, and the greatest value holds. A flipped
//! bit, a bad build or a member that lies could raise one so far that nothing ever outranks it. So a value is
//! taken only up to a horizon: the greatest one that was known when this process began, a leap for all that
//! it may have missed before, and one more for each second since (docs/decisions/0017). The horizon does not
//! depend on what is taken afterwards, so no number of messages moves it.
//!
//! The next few values after a known one are always taken, at a bounded rate: the owner of a record that was
//! raised to the horizon elsewhere must be able to go above it.

use std::time::Duration;

use crate::model::{ClusterRecord, Forget, Incarnation, MemberRecord, NodeId, Run, Time};

use super::{
    planted::{Bug, planted},
    slots::{count_of, generation_of},
};

/// What may have been missed: one event a second, which is how often systemd restarts an agent that fails,
/// for more than four years.
const LEAP: u64 = 1 << 27;
/// Successors of one node that were lost one after the other before any of them could take over.
const LEAP_OF_ROUNDS: u64 = 1 << 12;
/// Beyond the horizon, so many after a known value.
const STEP: u64 = 8;
/// And so often.
const STEP_EVERY: Duration = Duration::from_secs(1);
/// Nothing that was written honestly comes near this. It is what a process can begin with at most.
pub(super) const TOP: u64 = 1 << 30;

/// The horizon of one kind of counter.
#[derive(Clone, Copy, Debug)]
struct Horizon {
    first: u64,
    leap: u64,
    stepped: Option<Time>,
}

impl Horizon {
    const fn new(leap: u64) -> Self {
        Self { first: 0, leap, stepped: None }
    }

    fn begin_with(&mut self, value: u64) {
        self.first = self.first.max(value.min(TOP));
    }

    /// Whether a counter can have this value, `watched` after the start, where `known` is the present one.
    fn reaches(&mut self, now: Time, watched: Duration, value: u64, known: Option<u64>) -> bool {
        if value <= self.first + self.leap + watched.as_secs() || planted(Bug::TakeJumps) {
            return true;
        }
        let is_next = known.is_some_and(|known| value <= known.saturating_add(STEP));
        let may_step = self.stepped.is_none_or(|at| at == now || now.since(at) >= STEP_EVERY);
        if is_next && may_step {
            self.stepped = Some(now);
        }
        is_next && may_step
    }
}

/// The horizons of all counters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Horizons {
    since: Time,
    starts: Horizon,
    changes: Horizon,
    renewals: Horizon,
    generations: Horizon,
    counts: Horizon,
    rounds: Horizon,
}

impl Horizons {
    pub(super) const fn new(now: Time) -> Self {
        let wide = Horizon::new(LEAP);
        Self {
            since: now,
            starts: wide,
            changes: wide,
            renewals: wide,
            generations: wide,
            counts: wide,
            rounds: Horizon::new(LEAP_OF_ROUNDS),
        }
    }

    /// What this node's disk, or the member that let it in, holds was taken before.
    pub(super) fn begin_with_member(&mut self, record: &MemberRecord) {
        self.starts.begin_with(u64::from(record.version.starts));
        self.changes.begin_with(u64::from(record.version.change));
    }

    pub(super) fn begin_with_run(&mut self, run: &Run) {
        self.generations.begin_with(generation_of(run.record.epoch));
        self.counts.begin_with(count_of(run.record.epoch));
    }

    pub(super) fn begin_with_forget(&mut self, forget: &Forget) {
        self.rounds.begin_with(u64::from(forget.round));
    }

    pub(super) fn reach_member(
        &mut self,
        now: Time,
        record: &MemberRecord,
        known: Option<&MemberRecord>,
    ) -> bool {
        let watched = now.since(self.since);
        let starts = known.map(|known| u64::from(known.version.starts));
        let same_start = known.filter(|known| known.version.starts == record.version.starts);
        let changes = same_start.map(|known| u64::from(known.version.change));
        self.starts.reaches(now, watched, u64::from(record.version.starts), starts)
            && self.changes.reaches(now, watched, u64::from(record.version.change), changes)
    }

    pub(super) fn reach_incarnation(
        &mut self,
        now: Time,
        incarnation: Incarnation,
        known: Option<&MemberRecord>,
    ) -> bool {
        let watched = now.since(self.since);
        let starts = known.map(|known| u64::from(known.version.starts));
        self.starts.reaches(now, watched, u64::from(incarnation.starts), starts)
            && self.renewals.reaches(now, watched, u64::from(incarnation.renewals), None)
    }

    pub(super) fn reach_epoch(&mut self, now: Time, epoch: u64, known: Option<u64>) -> bool {
        let watched = now.since(self.since);
        let (generation, count) = (generation_of(epoch), count_of(epoch));
        let same = known.filter(|known| generation_of(*known) == generation);
        self.generations.reaches(now, watched, generation, known.map(generation_of))
            && self.counts.reaches(now, watched, count, same.map(count_of))
    }

    pub(super) fn reach_round(
        &mut self,
        now: Time,
        forget: &Forget,
        known: Option<&Forget>,
    ) -> bool {
        let known = known.map(|known| u64::from(known.round));
        self.rounds.reaches(now, now.since(self.since), u64::from(forget.round), known)
    }
}

/// Whether a member record from disk can be used. Earlier releases took what this one refuses.
pub(super) fn is_sound_member(
    record: &MemberRecord,
    me: NodeId,
    cluster: Option<&ClusterRecord>,
) -> bool {
    let version = record.version;
    let unfit = cluster.and_then(|cluster| record.why_unusable(&cluster.settings.pool));
    record.node == me || unfit.is_none() && u64::from(version.starts.max(version.change)) <= TOP
}

pub(super) fn is_sound_epoch(epoch: u64) -> bool {
    generation_of(epoch).max(count_of(epoch)) <= TOP
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Time {
        Time::ZERO + SECOND * u32::try_from(seconds).expect("136 years")
    }

    /// Whether an epoch of this count is taken by a process that has run for `seconds`.
    fn takes(horizons: &mut Horizons, seconds: u64, count: u64, known: Option<u64>) -> bool {
        horizons.reach_epoch(at(seconds), count, known)
    }

    #[test]
    fn counters_of_a_member_that_was_away_for_years_are_taken() {
        let year = 365 * 24 * 3600;
        let mut horizons = Horizons::new(Time::ZERO);
        // It wrote once a second all the time.
        assert!(takes(&mut horizons, 0, 4 * year, Some(0)));
        // And this process has watched it do so for two years more.
        assert!(takes(&mut horizons, 2 * year, 6 * year, None));
        // Each slot of a generation of its own, reclaimed every second for a year.
        assert!(takes(&mut horizons, 0, year << 32, Some(0)));
    }

    #[test]
    fn flipped_bit_at_the_top_of_a_counter_is_refused() {
        for bit in 28..32 {
            let mut horizons = Horizons::new(Time::ZERO);
            assert!(!takes(&mut horizons, 10, 7 ^ 1 << bit, Some(7)), "bit {bit}");
            assert!(!takes(&mut horizons, 10, 7 ^ 1 << (32 + bit), Some(7)), "bit {}", 32 + bit);
        }
    }

    #[test]
    fn no_number_of_messages_moves_the_horizon() {
        let mut horizons = Horizons::new(Time::ZERO);
        let (mut known, mut taken) = (0, 0);
        // A thousand times a second for an hour: always as far as it gets.
        for millis in 0..3_600_000_u64 {
            let now = Time::ZERO + Duration::from_millis(millis);
            let far = (known + (1 << 20)).max(LEAP + millis / 1000);
            for next in [far, known + STEP] {
                if horizons.reach_epoch(now, next, Some(known)) {
                    known = next;
                    taken += 1;
                }
            }
        }
        assert!(taken > 3_000 && known < LEAP + 10 * 3_600, "{known} after {taken}");
    }

    #[test]
    fn next_value_after_a_known_one_is_taken_beyond_the_horizon() {
        let mut horizons = Horizons::new(Time::ZERO);
        assert!(takes(&mut horizons, 0, LEAP, Some(0)));
        assert!(takes(&mut horizons, 0, LEAP + 1, Some(LEAP)), "its owner goes above it");
        assert!(!takes(&mut horizons, 0, LEAP + STEP + 1, Some(LEAP)));
    }

    #[test]
    fn process_begins_with_no_more_than_any_honest_history_has() {
        let mut horizons = Horizons::new(Time::ZERO);
        horizons.counts.begin_with(u64::MAX);
        assert!(!takes(&mut horizons, 0, TOP + LEAP + 1, None));
        assert!(!is_sound_epoch(u64::MAX) && !is_sound_epoch(1 << 63) && is_sound_epoch(5 << 32));
    }
}
