//! Connection ids that have begun a handshake, so that no first packet begins a second one.
//!
//! QUIC recognizes a repeated first packet only while its handshake lasts. But a Retry token is
//! valid for 15 s, with any connection id of the server, so a repeated packet could begin any
//! number of handshakes.

use std::{
    collections::BTreeSet,
    mem,
    time::{Duration, Instant},
};

use quinn::ConnectionId;

/// Time for which an id is stored at least, unless there are too many.
pub(super) const MIN_RETENTION: Duration = Duration::from_secs(60);
/// Upper limit of the stored ids. Non-members begin 200 handshakes per second, so half of the ids
/// cover 20 s.
pub(super) const MAX_IDS: usize = 8_192;

/// Two generations of ids.
pub(super) struct UsedIds {
    since: Instant,
    present: BTreeSet<ConnectionId>,
    previous: BTreeSet<ConnectionId>,
}

impl UsedIds {
    pub(super) const fn new(now: Instant) -> Self {
        Self { since: now, present: BTreeSet::new(), previous: BTreeSet::new() }
    }

    /// Whether a packet with this id has begun a handshake.
    pub(super) fn contains(&self, id: &ConnectionId) -> bool {
        self.present.contains(id) || self.previous.contains(id)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.present.len() + self.previous.len()
    }

    /// Stores the id of a packet that begins a handshake.
    pub(super) fn insert(&mut self, now: Instant, id: ConnectionId) {
        let is_old = now.saturating_duration_since(self.since) >= MIN_RETENTION;
        if is_old || self.present.len() >= MAX_IDS / 2 {
            self.previous = mem::take(&mut self.present);
            self.since = now;
        }
        self.present.insert(id);
    }
}
