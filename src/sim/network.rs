//! The underlay as QUIC presents it. Datagrams may be lost, duplicated and late. Streams arrive completely or
//! not at all; losses delay them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rand::{RngExt as _, rngs::StdRng};

use crate::model::Time;

/// A call without an answer fails after this time, as in `transport`.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle timeout of connections, as in `transport`.
const CONNECTION_IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Limit of connections per host, as in `transport`.
const MAX_CONNECTIONS: usize = 256;
/// Bytes of a handshake with both certificates on the wire, measured on loopback with IPv4.
const HANDSHAKE_BYTES: u64 = 4_350;
/// Bytes that QUIC, UDP and IP add to a frame and its acknowledgement, measured likewise.
const FRAME_OVERHEAD_BYTES: u64 = 130;
/// Delay that each lost packet adds to a stream.
const RETRANSMIT_DELAY: Duration = Duration::from_millis(200);

/// The state of all links.
#[derive(Debug)]
pub struct Network {
    /// Directed pairs of hosts whose packets are lost.
    cut: BTreeSet<(usize, usize)>,
    /// Least and greatest delay of a packet.
    pub latency: (Duration, Duration),
    /// Chance that a packet is lost.
    pub loss: f64,
    /// Chance that a datagram arrives twice.
    pub duplication: f64,
    /// Chance that a packet is delayed by up to `max_extra_delay`.
    pub late: f64,
    /// Greatest extra delay of a late packet.
    pub max_extra_delay: Duration,
    /// Bytes of all frames sent.
    pub sent: u64,
    /// Bytes on the wire for these frames, handshakes included.
    pub sent_on_wire: u64,
    /// Peers to which each host has a connection, with the time of the last use.
    connections: BTreeMap<usize, BTreeMap<usize, Time>>,
    rng: StdRng,
}

impl Network {
    /// Returns a network without faults.
    pub fn new(rng: StdRng) -> Self {
        Self {
            cut: BTreeSet::new(),
            latency: (Duration::from_micros(500), Duration::from_micros(1500)),
            loss: 0.0,
            duplication: 0.0,
            late: 0.0,
            max_extra_delay: Duration::ZERO,
            sent: 0,
            sent_on_wire: 0,
            connections: BTreeMap::new(),
            rng,
        }
    }

    /// Ends all faults. Messages that are already late stay late.
    pub fn clear_faults(&mut self) {
        self.cut.clear();
        (self.loss, self.duplication, self.late) = (0.0, 0.0, 0.0);
    }

    /// Cuts the link from one host to another, in this direction.
    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    /// Restores all links.
    pub fn mend(&mut self) {
        self.cut.clear();
    }

    /// Whether the link is cut in this direction.
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Counts the bytes of a frame, and of a handshake if the hosts have no connection.
    pub fn record_traffic(&mut self, now: Time, from: usize, to: usize, bytes: usize) {
        self.sent += bytes as u64;
        self.sent_on_wire += bytes as u64 + FRAME_OVERHEAD_BYTES;
        for (one, other) in [(from, to), (to, from)] {
            let kept = self.connections.entry(one).or_default();
            let known = kept
                .insert(other, now)
                .is_some_and(|used| now.since(used) < CONNECTION_IDLE_TIMEOUT);
            if !known && one == from {
                self.sent_on_wire += HANDSHAKE_BYTES;
            }
            if kept.len() > MAX_CONNECTIONS {
                let oldest = kept.iter().min_by_key(|(_, used)| **used).map(|(peer, _)| *peer);
                let gone = oldest.and_then(|peer| kept.remove(&peer).map(|_| peer));
                if let Some(theirs) = gone.and_then(|peer| self.connections.get_mut(&peer)) {
                    theirs.remove(&one);
                }
            }
        }
    }

    /// Draws the delays of the copies of a datagram that arrive; none if it is lost.
    pub fn datagram(&mut self, from: usize, to: usize) -> Vec<Duration> {
        if self.is_cut(from, to) || self.rng.random_bool(self.loss) {
            return Vec::new();
        }
        let copies = 1 + usize::from(self.rng.random_bool(self.duplication));
        (0..copies).map(|_| self.delay()).collect()
    }

    /// Draws the delay of a message on a stream. `None` if the link is cut in either direction, because QUIC
    /// then receives no acknowledgements.
    pub fn stream(&mut self, from: usize, to: usize) -> Option<Duration> {
        if self.is_cut(from, to) || self.is_cut(to, from) {
            return None;
        }
        let mut delay = self.delay();
        while self.rng.random_bool(self.loss) && delay < CALL_TIMEOUT {
            delay += RETRANSMIT_DELAY;
        }
        Some(delay)
    }

    /// Draws the delay of one packet.
    fn delay(&mut self) -> Duration {
        let (least, most) = self.latency;
        let usual = self.rng.random_range(least..=most);
        let late = self.rng.random_bool(self.late) && !self.max_extra_delay.is_zero();
        usual
            + if late {
                self.rng.random_range(Duration::ZERO..self.max_extra_delay)
            } else {
                Duration::ZERO
            }
    }
}
