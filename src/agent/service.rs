//! What systemd hears (sd_notify(3)): that the agent has started, how it is, and that its loop still turns.
//!
//! Ready means that it can be asked, not that it has a subnet: whoever is started after it must not wait for
//! a cluster that is away. Without a service manager nothing is said.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Between two reports where no watchdog asks for more.
const REPORT: Duration = Duration::from_secs(10);

pub(super) struct Service {
    /// None without a service manager.
    next: Option<Instant>,
    pause: Duration,
    ready: bool,
    said: String,
}

impl Service {
    /// By what the environment says.
    pub(super) fn new(now: Instant) -> Self {
        let listened = std::env::var_os("NOTIFY_SOCKET").is_some();
        // Half of what systemd waits for, as sd_watchdog_enabled(3) has it.
        let watched = sd_notify::watchdog_enabled().map_or(REPORT, |limit| limit / 2);
        let pause = watched.min(REPORT);
        Self { next: listened.then_some(now), pause, ready: false, said: String::new() }
    }

    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }

    /// Only the loop may call this: it is the proof that it turns.
    pub(super) fn report(&mut self, now: Instant, status: String) {
        self.next = Some(now + self.pause);
        let mut states = vec![NotifyState::Watchdog];
        if !self.ready {
            states.push(NotifyState::Ready);
        }
        if status != self.said {
            states.push(NotifyState::Status(&status));
        }
        match sd_notify::notify(&states) {
            Ok(()) => (self.ready, self.said) = (true, status),
            Err(error) => tracing::debug!(%error, "the service manager does not listen"),
        }
    }

    pub(super) fn stopping(&self) {
        if self.next.is_some() {
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        }
    }
}
