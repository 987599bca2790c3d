//! Log lines about seeds that do not admit this host: at once, and then at growing intervals.

use std::time::{Duration, Instant};

use crate::{
    agent::Agent,
    core::Phase,
    model::{Problem, ProblemCode, seed_failure, visible},
};

/// Interval after the first warning; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Most seeds that one round of warnings names.
const MAX_SEEDS: usize = 3;

/// When to log next that no seed admits this host.
#[derive(Debug, Default)]
pub(in crate::agent) struct JoinLog {
    /// Whether the log says through which seeds this host joins.
    announced: bool,
    /// The time of the next warning, and the pause after it. `None`: as soon as a seed has failed.
    next: Option<(Instant, Duration)>,
}

impl JoinLog {
    /// Returns whether a warning is due, and plans the next one.
    fn is_due(&mut self, now: Instant) -> bool {
        let pause = match self.next {
            Some((at, _)) if now < at => return false,
            Some((_, pause)) => (pause * 2).min(LONGEST_PAUSE),
            None => FIRST_PAUSE,
        };
        self.next = Some((now + pause, pause));
        true
    }
}

impl Agent {
    /// Returns one problem for each seed that does not admit this host while it is in no cluster. Those that
    /// are addresses of this host have a problem of their own.
    pub(in crate::agent) fn join_problems(&self) -> Vec<Problem> {
        let problem = |(seed, why): (usize, String)| {
            let seed = self.config.seeds.get(seed).map_or("?", String::as_str);
            Problem::new(ProblemCode::SeedUnreachable, seed, seed_failure(seed, &why), "")
        };
        self.node.foreign_seed_failures().map(problem).collect()
    }

    /// Logs which seeds do not admit this host, while it is in no cluster.
    pub(in crate::agent) fn log_join(&mut self, now: Instant) {
        if self.node.phase() != Phase::Joining {
            self.gossip.isolation.join_log = JoinLog::default();
            return;
        }
        if !self.gossip.isolation.join_log.announced && !self.config.seeds.is_empty() {
            self.gossip.isolation.join_log.announced = true;
            tracing::info!("joining through {}", visible(&self.config.seeds.join(", ")));
        }
        let failures: Vec<(usize, String)> = self.node.seed_failures().collect();
        if failures.is_empty() || !self.gossip.isolation.join_log.is_due(now) {
            return;
        }
        let more = failures.len().saturating_sub(MAX_SEEDS);
        for (seed, why) in failures.into_iter().take(MAX_SEEDS) {
            let seed = self.config.seeds.get(seed).map_or("?", String::as_str);
            tracing::warn!("not joined yet: {}", visible(&seed_failure(seed, &why)));
        }
        if more > 0 {
            tracing::warn!("{more} more seeds do not admit this host: see `gossamer status`");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // The type for time of the agent can only be read from the clock.
    #[allow(clippy::disallowed_methods)]
    fn is_due_at_once_and_then_at_growing_intervals() {
        let start = Instant::now();
        let mut log = JoinLog::default();
        let due: Vec<u64> =
            (0..2_000).filter(|second| log.is_due(start + Duration::from_secs(*second))).collect();
        assert_eq!(due, [0, 10, 30, 70, 150, 310, 610, 910, 1210, 1510, 1810]);
    }
}
