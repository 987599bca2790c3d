//! Notifications to systemd (`sd_notify(3))`: readiness, status text and watchdog.
//!
//! "Ready" means that the agent answers requests, not that it has a subnet: units ordered after it must
//! not wait for an unreachable cluster. Without a service manager nothing is sent.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Time between two reports if no watchdog requires more.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// The connection with the service manager.
pub(super) struct Service {
    /// Time of the next report; `None` without a service manager.
    next: Option<Instant>,
    pause: Duration,
    ready: bool,
    last_status: String,
}

impl Service {
    /// Reads the environment variables of `sd_notify(3)`.
    pub(super) fn new(now: Instant) -> Self {
        let has_manager = std::env::var_os("NOTIFY_SOCKET").is_some();
        // Half of the watchdog timeout, as sd_watchdog_enabled(3) recommends.
        let watched = sd_notify::watchdog_enabled().map_or(REPORT_INTERVAL, |limit| limit / 2);
        let pause = watched.min(REPORT_INTERVAL);
        Self { next: has_manager.then_some(now), pause, ready: false, last_status: String::new() }
    }

    /// Returns the time of the next report.
    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Returns whether a report is due.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }

    /// Sends a report. Only the event loop may call this: the watchdog notification proves that the loop
    /// runs.
    pub(super) fn report(&mut self, now: Instant, status: String) {
        self.next = Some(now + self.pause);
        let mut states = vec![NotifyState::Watchdog];
        if !self.ready {
            states.push(NotifyState::Ready);
        }
        if status != self.last_status {
            states.push(NotifyState::Status(&status));
        }
        match sd_notify::notify(&states) {
            Ok(()) => (self.ready, self.last_status) = (true, status),
            Err(error) => tracing::debug!(%error, "notification of the service manager failed"),
        }
    }

    /// Reports that the agent is ending.
    pub(super) fn stopping(&self) {
        if self.next.is_some() {
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        }
    }
}
