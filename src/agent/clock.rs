//! The agent's time.

use std::time::Instant;

use crate::model::Time;

/// The only reader of the monotonic clock.
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    pub(super) fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    pub(super) fn instant(&self, time: Time) -> Instant {
        self.0 + time.since(Time::ZERO)
    }
}
