//! When the kernel thread compares and repairs: by a slow timer, and after changes by other programs.
//!
//! Pure. The thread asks what is due and how long to wait for it; both answers follow from the same times.

use std::time::{Duration, Instant};

use super::RETRY_INTERVAL;

/// Interval of comparisons of the kernel with the desired state, for up to [`RECONCILE_ROUTES`] routes. The
/// interval grows in proportion to further routes.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(10);
/// Number of routes up to which the interval is [`RECONCILE_INTERVAL`].
const RECONCILE_ROUTES: f64 = 250.0;
/// Longest interval of comparisons.
const RECONCILE_MAX_INTERVAL: Duration = Duration::from_secs(60);
/// Shortest time between two repairs, so that endless changes cannot use a whole CPU.
const MIN_REPAIR_INTERVAL: Duration = Duration::from_millis(20);

/// Changes by other programs that are not repaired yet: for each kind the pause since the last repair that a
/// conflict requires, and `None` without a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Entries and the device.
    pub(super) entries: Option<Duration>,
    /// The nftables table and the policy rules.
    pub(super) table: Option<Duration>,
}

/// What is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// The comparison of everything.
    pub(super) comparison: bool,
    /// A repair of entries.
    pub(super) entries: bool,
    /// A repair of the table.
    pub(super) table: bool,
}

/// When the last repair was, and when to compare next.
#[derive(Debug, Default)]
pub(super) struct RepairSchedule {
    compare_at: Option<Instant>,
    last_repair: Option<Instant>,
}

impl RepairSchedule {
    /// Makes a comparison due.
    pub(super) fn compare_now(&mut self, now: Instant) {
        self.compare_at = Some(now);
    }

    /// Records an attempt to repair.
    pub(super) fn on_repair(&mut self, now: Instant) {
        self.last_repair = Some(now);
    }

    /// Records that the entries were compared with a desired state of `routes` routes. `is_clean`: nothing
    /// was refused.
    pub(super) fn on_comparison(&mut self, now: Instant, routes: usize, is_clean: bool) {
        self.on_repair(now);
        let pause = RECONCILE_INTERVAL.mul_f64(routes as f64 / RECONCILE_ROUTES);
        let pause = pause.clamp(RECONCILE_INTERVAL, RECONCILE_MAX_INTERVAL);
        let next = now + if is_clean { pause } else { RETRY_INTERVAL };
        // Consecutive repairs must not postpone the checks that only the timer starts.
        let pending = self.compare_at.filter(|at| *at > now);
        self.compare_at = Some(pending.map_or(next, |at| at.min(next)));
    }

    /// Returns what is due.
    pub(super) fn due(&self, now: Instant, changes: Changes) -> Due {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        Due {
            comparison: is_due(self.compare_at),
            entries: is_due(self.repair_at(now, changes.entries)),
            table: is_due(self.repair_at(now, changes.table)),
        }
    }

    /// Returns when something is due: not before `now`, and `None` if nothing will be.
    pub(super) fn next(&self, now: Instant, changes: Changes) -> Option<Instant> {
        let repairs = [changes.entries, changes.table].map(|change| self.repair_at(now, change));
        let next = repairs.into_iter().chain([self.compare_at]).flatten().min();
        next.map(|next| next.max(now))
    }

    /// Returns when a change may be repaired.
    fn repair_at(&self, now: Instant, change: Option<Duration>) -> Option<Instant> {
        let pause = change?.max(MIN_REPAIR_INTERVAL);
        Some(self.last_repair.map_or(now, |last| last + pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Asserts that something is due at the announced time, and not before. Returns the time.
    fn assert_next(schedule: &RepairSchedule, now: Instant, changes: Changes) -> Instant {
        let next = schedule.next(now, changes).expect("a time");
        assert_ne!(schedule.due(next, changes), Due::default());
        if next > now {
            assert_eq!(schedule.due(next - MS, changes), Due::default(), "it would wait in vain");
        }
        next
    }

    #[test]
    fn nothing_is_due_without_a_desired_state_and_changes() {
        let (schedule, now) = (RepairSchedule::default(), Instant::now());
        assert_eq!(schedule.due(now, Changes::default()), Due::default());
        assert_eq!(schedule.next(now, Changes::default()), None);
    }

    #[test]
    fn first_change_is_repaired_at_once_and_further_ones_after_a_pause() {
        let (mut schedule, now) = (RepairSchedule::default(), Instant::now());
        let changes = Changes { entries: Some(Duration::ZERO), table: None };
        assert_eq!(assert_next(&schedule, now, changes), now);
        schedule.on_repair(now);
        assert_eq!(schedule.due(now, changes), Due::default());
        assert_eq!(assert_next(&schedule, now, changes), now + MIN_REPAIR_INTERVAL);
        // In a conflict with another program about the table alone.
        let both = Changes { table: Some(Duration::from_secs(5)), ..changes };
        let next = assert_next(&schedule, now, both);
        let due = schedule.due(next, both);
        assert!(due.entries && !due.table && !due.comparison, "{due:?}");
        assert!(schedule.due(now + Duration::from_secs(5), both).table);
    }

    #[test]
    fn comparison_is_repeated_sooner_after_a_refusal_and_later_with_many_routes() {
        let now = Instant::now();
        let next = |routes, is_clean| {
            let mut schedule = RepairSchedule::default();
            schedule.compare_now(now);
            assert!(schedule.due(now, Changes::default()).comparison);
            schedule.on_comparison(now, routes, is_clean);
            assert_next(&schedule, now, Changes::default()) - now
        };
        assert_eq!(next(0, true), RECONCILE_INTERVAL);
        assert_eq!(next(500, true), 2 * RECONCILE_INTERVAL);
        assert_eq!(next(65_000, true), RECONCILE_MAX_INTERVAL);
        assert_eq!(next(65_000, false), RETRY_INTERVAL);
    }

    #[test]
    fn endless_changes_do_not_postpone_the_comparison() {
        let (mut schedule, mut now) = (RepairSchedule::default(), Instant::now());
        schedule.on_comparison(now, 1, true);
        let end = now + RECONCILE_INTERVAL;
        let changes = Changes { entries: Some(Duration::ZERO), table: None };
        while now < end {
            now = assert_next(&schedule, now, changes);
            assert_eq!(schedule.due(now, changes).comparison, now >= end);
            if now < end {
                schedule.on_comparison(now, 1, true);
            }
        }
        assert_eq!(now, end);
    }
}
