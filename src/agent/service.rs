//! Notifications to systemd (`sd_notify(3))`: readiness, status text and watchdog.
//!
//! "Ready" means that the agent answers requests, not that it has a subnet: units ordered after it must
//! not wait for an unreachable cluster. Without a service manager nothing is sent.

use std::{
    env,
    fmt::Write as _,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::{Duration, Instant},
};

use sd_notify::NotifyState;

/// The variable with the address of the service manager's socket.
const SOCKET: &str = "NOTIFY_SOCKET";
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
        let has_manager = env::var_os(SOCKET).is_some();
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
        match notify(&states) {
            Ok(()) => (self.ready, self.last_status) = (true, status),
            Err(error) => tracing::debug!(%error, "notification of the service manager failed"),
        }
    }

    /// Reports that the agent is ending.
    pub(super) fn stopping(&self) {
        if self.next.is_some() {
            let _ = notify(&[NotifyState::Stopping]);
        }
    }
}

/// Sends a notification. Never waits for the service manager to read.
fn notify(states: &[NotifyState]) -> io::Result<()> {
    let Some(address) = env::var_os(SOCKET) else { return Ok(()) };
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&address)?,
    };
    let mut message = String::new();
    for state in states {
        // Writing to a string cannot fail.
        let _ = writeln!(message, "{state}");
    }
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}
