//! Limits on counters from peers; higher values are refused.
//!
//! Epochs, starts and the other counters of the protocol only grow, and the greatest value holds. A flipped
//! bit, a faulty build or a lying member could raise a counter so far that no later value exceeds it. So a
//! value is accepted only up to a horizon: the greatest value known when this process started, plus a leap
//! for what it may have missed before, plus one for each second since (docs/decisions/0017). Values accepted
//! later do not move the horizon, so no number of messages does.
//!
//! A few values after a known one are accepted beyond the horizon, at a bounded rate: if a record was raised
//! to the horizon elsewhere, its owner must be able to exceed it.

use std::time::Duration;

use crate::model::{ClusterRecord, Forget, Incarnation, MemberRecord, NodeId, Run, Time};

use super::slots::{count_of, generation_of};

/// Allowance for missed events: one a second for more than four years. systemd restarts a failing agent that
/// often.
const MAX_LEAP: u64 = 1 << 27;
/// The same for rounds: successors of one node that were lost one after the other before any could reclaim.
const MAX_ROUND_LEAP: u64 = 1 << 12;
/// Beyond the horizon, a value may exceed the known one by this much.
const MAX_STEP: u64 = 8;
/// Minimum time between such steps of one kind of counter.
const STEP_INTERVAL: Duration = Duration::from_secs(1);
/// Limit of saved values, which is far above any correct one. It bounds the start of a horizon.
pub(super) const MAX_SAVED_VALUE: u64 = 1 << 30;

/// The horizon of one kind of counter.
#[derive(Clone, Copy, Debug)]
struct Horizon {
    base: u64,
    leap: u64,
    last_step: Option<Time>,
}

impl Horizon {
    const fn new(leap: u64) -> Self {
        Self { base: 0, leap, last_step: None }
    }

    fn include(&mut self, value: u64) {
        self.base = self.base.max(value.min(MAX_SAVED_VALUE));
    }

    /// Returns whether a counter can have this value, `uptime` after the start; `known` is its present value.
    fn allows(&mut self, now: Time, uptime: Duration, value: u64, known: Option<u64>) -> bool {
        if value <= self.base + self.leap + uptime.as_secs() {
            return true;
        }
        let is_next = known.is_some_and(|known| value <= known.saturating_add(MAX_STEP));
        let may_step = self.last_step.is_none_or(|at| at == now || now.since(at) >= STEP_INTERVAL);
        if is_next && may_step {
            self.last_step = Some(now);
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
        let wide = Horizon::new(MAX_LEAP);
        Self {
            since: now,
            starts: wide,
            changes: wide,
            renewals: wide,
            generations: wide,
            counts: wide,
            rounds: Horizon::new(MAX_ROUND_LEAP),
        }
    }

    /// Raises the horizon to a record on this node's disk, or to one of the member that admitted it.
    pub(super) fn include_member(&mut self, record: &MemberRecord) {
        self.starts.include(u64::from(record.version.starts));
        self.changes.include(u64::from(record.version.change));
    }

    pub(super) fn include_run(&mut self, run: &Run) {
        self.generations.include(generation_of(run.record.epoch));
        self.counts.include(count_of(run.record.epoch));
    }

    pub(super) fn include_forget(&mut self, forget: &Forget) {
        self.rounds.include(u64::from(forget.round));
    }

    pub(super) fn allows_member(
        &mut self,
        now: Time,
        record: &MemberRecord,
        known: Option<&MemberRecord>,
    ) -> bool {
        let uptime = now.since(self.since);
        let starts = known.map(|known| u64::from(known.version.starts));
        let same_start = known.filter(|known| known.version.starts == record.version.starts);
        let changes = same_start.map(|known| u64::from(known.version.change));
        self.starts.allows(now, uptime, u64::from(record.version.starts), starts)
            && self.changes.allows(now, uptime, u64::from(record.version.change), changes)
    }

    pub(super) fn allows_incarnation(
        &mut self,
        now: Time,
        incarnation: Incarnation,
        known: Option<&MemberRecord>,
    ) -> bool {
        let uptime = now.since(self.since);
        let starts = known.map(|known| u64::from(known.version.starts));
        self.starts.allows(now, uptime, u64::from(incarnation.starts), starts)
            && self.renewals.allows(now, uptime, u64::from(incarnation.renewals), None)
    }

    pub(super) fn allows_epoch(&mut self, now: Time, epoch: u64, known: Option<u64>) -> bool {
        let uptime = now.since(self.since);
        let (generation, count) = (generation_of(epoch), count_of(epoch));
        let same = known.filter(|known| generation_of(*known) == generation);
        self.generations.allows(now, uptime, generation, known.map(generation_of))
            && self.counts.allows(now, uptime, count, same.map(count_of))
    }

    pub(super) fn allows_round(
        &mut self,
        now: Time,
        forget: &Forget,
        known: Option<&Forget>,
    ) -> bool {
        let known = known.map(|known| u64::from(known.round));
        self.rounds.allows(now, now.since(self.since), u64::from(forget.round), known)
    }
}

/// Returns whether a saved member record is usable. Earlier releases accepted records that this one refuses.
pub(super) fn is_sound_member(
    record: &MemberRecord,
    me: NodeId,
    cluster: Option<&ClusterRecord>,
) -> bool {
    let version = record.version;
    let unfit = cluster.and_then(|cluster| record.why_unusable(&cluster.settings.pool));
    record.node == me
        || unfit.is_none() && u64::from(version.starts.max(version.change)) <= MAX_SAVED_VALUE
}

/// Returns whether a saved epoch is plausible.
pub(super) fn is_sound_epoch(epoch: u64) -> bool {
    generation_of(epoch).max(count_of(epoch)) <= MAX_SAVED_VALUE
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Time {
        Time::ZERO + SECOND * u32::try_from(seconds).expect("136 years")
    }

    /// Returns whether a process that has run for `seconds` accepts an epoch with this count.
    fn accepts(horizons: &mut Horizons, seconds: u64, count: u64, known: Option<u64>) -> bool {
        horizons.allows_epoch(at(seconds), count, known)
    }

    #[test]
    fn counters_of_a_member_away_for_years_are_accepted() {
        let year = 365 * 24 * 3600;
        let mut horizons = Horizons::new(Time::ZERO);
        // It wrote once a second for four years.
        assert!(accepts(&mut horizons, 0, 4 * year, Some(0)));
        // Two more years, during which this process ran.
        assert!(accepts(&mut horizons, 2 * year, 6 * year, None));
        // A slot that was reclaimed every second for a year.
        assert!(accepts(&mut horizons, 0, year << 32, Some(0)));
    }

    #[test]
    fn flipped_bit_at_the_top_of_a_counter_is_refused() {
        for bit in 28..32 {
            let mut horizons = Horizons::new(Time::ZERO);
            assert!(!accepts(&mut horizons, 10, 7 ^ 1 << bit, Some(7)), "bit {bit}");
            assert!(!accepts(&mut horizons, 10, 7 ^ 1 << (32 + bit), Some(7)), "bit {}", 32 + bit);
        }
    }

    #[test]
    fn no_number_of_messages_moves_the_horizon() {
        let mut horizons = Horizons::new(Time::ZERO);
        let (mut known, mut accepted) = (0, 0);
        // A thousand attempts a second for an hour, each as high as possible.
        for millis in 0..3_600_000_u64 {
            let now = Time::ZERO + Duration::from_millis(millis);
            let far = (known + (1 << 20)).max(MAX_LEAP + millis / 1000);
            for next in [far, known + MAX_STEP] {
                if horizons.allows_epoch(now, next, Some(known)) {
                    known = next;
                    accepted += 1;
                }
            }
        }
        assert!(accepted > 3_000 && known < MAX_LEAP + 10 * 3_600, "{known} after {accepted}");
    }

    #[test]
    fn next_value_after_a_known_one_is_accepted_beyond_the_horizon() {
        let mut horizons = Horizons::new(Time::ZERO);
        assert!(accepts(&mut horizons, 0, MAX_LEAP, Some(0)));
        assert!(accepts(&mut horizons, 0, MAX_LEAP + 1, Some(MAX_LEAP)), "its owner exceeds it");
        assert!(!accepts(&mut horizons, 0, MAX_LEAP + MAX_STEP + 1, Some(MAX_LEAP)));
    }

    #[test]
    fn saved_value_raises_the_horizon_only_up_to_the_limit() {
        let mut horizons = Horizons::new(Time::ZERO);
        horizons.counts.include(u64::MAX);
        assert!(!accepts(&mut horizons, 0, MAX_SAVED_VALUE + MAX_LEAP + 1, None));
        assert!(!is_sound_epoch(u64::MAX) && !is_sound_epoch(1 << 63) && is_sound_epoch(5 << 32));
    }
}
