//! First packets that have begun a handshake, so that none begins a second one.
//!
//! QUIC knows a first packet that comes again while its handshake lasts. But a Retry token is taken for 15 s,
//! from a packet to any connection id of the server, so without this it begins any number of handshakes.

use std::{
    collections::BTreeSet,
    mem,
    time::{Duration, Instant},
};

use quinn::ConnectionId;

/// Each is remembered for this time at least, unless there are too many.
pub(super) const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// So many at most. Strangers begin 200 in a second, so half of it are remembered for 20 s.
pub(super) const REMEMBERED: usize = 8_192;

/// Two generations of ids.
pub(super) struct Once {
    since: Instant,
    present: BTreeSet<ConnectionId>,
    before: BTreeSet<ConnectionId>,
}

impl Once {
    pub(super) const fn new(now: Instant) -> Self {
        Self { since: now, present: BTreeSet::new(), before: BTreeSet::new() }
    }

    /// Whether a packet with this id has begun a handshake.
    pub(super) fn contains(&self, id: &ConnectionId) -> bool {
        self.present.contains(id) || self.before.contains(id)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.present.len() + self.before.len()
    }

    /// A packet with this id begins a handshake.
    pub(super) fn insert(&mut self, now: Instant, id: ConnectionId) {
        let is_old = now.saturating_duration_since(self.since) >= REMEMBERED_FOR;
        if is_old || self.present.len() >= REMEMBERED / 2 {
            self.before = mem::take(&mut self.present);
            self.since = now;
        }
        self.present.insert(id);
    }
}
