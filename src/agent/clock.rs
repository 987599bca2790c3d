//! Conversion between the monotonic clock and the time of the core.

use std::time::Instant;

use crate::model::Time;

/// The time of the core: nanoseconds since the stored instant, the start of the agent.
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    /// Returns the present time of the core.
    pub(super) fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Returns the instant of a time of the core.
    pub(super) fn instant(&self, time: Time) -> Instant {
        self.0 + time.since(Time::ZERO)
    }
}
