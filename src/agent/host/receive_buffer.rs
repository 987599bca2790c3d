//! Gossip packets that this host received but the agent did not read in time.

use std::time::{Duration, Instant};

use crate::{
    agent::host::recent_loss::RecentLoss,
    model::{Problem, ProblemCode},
    transport::ReceiveBuffer,
};

/// Time between two readings of the drop counter.
const RECHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Drops between two readings that are not a problem: a burst on a busy host.
const TOLERATED_DROPS: u64 = 100;
/// Number of readings for which a loss stays reported.
const HOLD_READINGS: u32 = 6;

/// The state of the gossip socket's drop counter over several readings.
#[derive(Debug, Default)]
pub(in crate::agent) struct ReceiveDrops {
    last_reading: Option<Instant>,
    dropped: u64,
    /// Recent losses above [`TOLERATED_DROPS`].
    recent: RecentLoss,
}

impl ReceiveDrops {
    /// Returns the number of packets dropped since the start.
    pub(in crate::agent) const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Reads the socket's drop counter if [`RECHECK_INTERVAL`] has passed.
    pub(in crate::agent) fn look(&mut self, now: Instant, buffer: ReceiveBuffer) {
        if self.last_reading.is_none_or(|at| now.duration_since(at) >= RECHECK_INTERVAL) {
            self.last_reading = Some(now);
            self.count(buffer.dropped().unwrap_or_default());
        }
    }

    fn count(&mut self, dropped: u64) {
        let new = dropped.saturating_sub(self.dropped);
        self.dropped = dropped;
        self.recent.note((new > TOLERATED_DROPS).then_some(new), HOLD_READINGS);
    }

    /// Returns the problem with its remedy. `capped` is the buffer size in bytes if `net.core.rmem_max`
    /// limited it.
    pub(in crate::agent) fn problem(&self, port: u16, capped: Option<usize>) -> Option<Problem> {
        let count = self.recent.lost()?;
        let (seconds, wanted) = (RECHECK_INTERVAL.as_secs(), ReceiveBuffer::wanted());
        let helps = match capped {
            Some(size) => format!(
                "its buffer has {size} bytes: sysctl -w net.core.rmem_max={wanted}, and a file in \
                 /etc/sysctl.d, then restart the agent"
            ),
            None => "see what floods it (gossamer status), or give the agent more CPU".to_owned(),
        };
        let what = format!(
            "{count} packets to UDP {port} were lost within {seconds} s, because the agent did not read them \
             in time"
        );
        Some(Problem::new(ProblemCode::PacketsUnread, format!("UDP {port}"), what, helps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_drops_are_reported_for_hold_readings_and_few_are_not() {
        let mut receive_drops = ReceiveDrops::default();
        receive_drops.count(TOLERATED_DROPS);
        assert_eq!(receive_drops.problem(8473, None), None);
        receive_drops.count(TOLERATED_DROPS * 3);
        let told = receive_drops.problem(8473, Some(212_992)).expect("many");
        assert!(told.contains("200 packets to UDP 8473") && told.contains("rmem_max"), "{told}");
        assert!(receive_drops.problem(8473, None).is_some_and(|told| !told.contains("rmem_max")));
        for _ in 0..HOLD_READINGS {
            receive_drops.count(TOLERATED_DROPS * 3);
            assert!(receive_drops.problem(8473, None).is_some());
        }
        receive_drops.count(TOLERATED_DROPS * 3);
        assert_eq!(
            (receive_drops.problem(8473, None), receive_drops.dropped()),
            (None, TOLERATED_DROPS * 3)
        );
    }
}
