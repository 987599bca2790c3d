//! The underlay as QUIC shows it: datagrams that may be lost, doubled and late; streams that arrive whole,
//! late after losses, or not at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rand::{RngExt as _, rngs::StdRng};

use crate::model::Time;

/// A call that has no answer by then has failed, as in `transport`.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections are kept so long, and so many, as in `transport`.
const IDLE: Duration = Duration::from_secs(600);
const MAX_CONNECTIONS: usize = 256;
/// Bytes on the wire, measured on loopback with IPv4: all of a handshake with both certificates; what QUIC,
/// UDP and IP add to a frame and to its acknowledgement.
const HANDSHAKE: u64 = 4_350;
const AROUND_A_FRAME: u64 = 130;
/// What a lost packet of a stream costs.
const RETRANSMIT: Duration = Duration::from_millis(200);

/// The state of all links.
#[derive(Debug)]
pub struct Network {
    /// Directed pairs of hosts between which nothing arrives.
    cut: BTreeSet<(usize, usize)>,
    pub latency: (Duration, Duration),
    /// Chances of a datagram: to be lost, to arrive twice, to be late by up to `tail`.
    pub loss: f64,
    pub doubled: f64,
    pub late: f64,
    pub tail: Duration,
    /// Bytes of frames that were sent, and what they are on the wire.
    pub sent: u64,
    pub sent_on_wire: u64,
    /// By host: whom it has a connection to, last used when.
    connections: BTreeMap<usize, BTreeMap<usize, Time>>,
    rng: StdRng,
}

impl Network {
    pub fn new(rng: StdRng) -> Self {
        Self {
            cut: BTreeSet::new(),
            latency: (Duration::from_micros(500), Duration::from_micros(1500)),
            loss: 0.0,
            doubled: 0.0,
            late: 0.0,
            tail: Duration::ZERO,
            sent: 0,
            sent_on_wire: 0,
            connections: BTreeMap::new(),
            rng,
        }
    }

    /// A clean network from now on; what is late stays late.
    pub fn heal(&mut self) {
        self.cut.clear();
        (self.loss, self.doubled, self.late) = (0.0, 0.0, 0.0);
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    pub fn mend(&mut self) {
        self.cut.clear();
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Keeps count of what is sent, and of the handshakes that it takes.
    pub fn count(&mut self, now: Time, from: usize, to: usize, bytes: usize) {
        self.sent += bytes as u64;
        self.sent_on_wire += bytes as u64 + AROUND_A_FRAME;
        for (one, other) in [(from, to), (to, from)] {
            let kept = self.connections.entry(one).or_default();
            let known = kept.insert(other, now).is_some_and(|used| now.since(used) < IDLE);
            if !known && one == from {
                self.sent_on_wire += HANDSHAKE;
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

    /// When the copies of a datagram arrive; none, if it is lost.
    pub fn datagram(&mut self, from: usize, to: usize) -> Vec<Duration> {
        if self.is_cut(from, to) || self.rng.random_bool(self.loss) {
            return Vec::new();
        }
        let copies = 1 + usize::from(self.rng.random_bool(self.doubled));
        (0..copies).map(|_| self.delay()).collect()
    }

    /// When a message on a stream arrives; none, if the link is cut in one direction: nothing is
    /// acknowledged then either.
    pub fn stream(&mut self, from: usize, to: usize) -> Option<Duration> {
        if self.is_cut(from, to) || self.is_cut(to, from) {
            return None;
        }
        let mut delay = self.delay();
        while self.rng.random_bool(self.loss) && delay < CALL_TIMEOUT {
            delay += RETRANSMIT;
        }
        Some(delay)
    }

    fn delay(&mut self) -> Duration {
        let (least, most) = self.latency;
        let usual = self.rng.random_range(least..=most);
        let late = self.rng.random_bool(self.late) && !self.tail.is_zero();
        usual + if late { self.rng.random_range(Duration::ZERO..self.tail) } else { Duration::ZERO }
    }
}
