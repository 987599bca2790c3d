//! The underlay as QUIC shows it: datagrams that may be lost, doubled and late; streams that arrive whole,
//! late after losses, or not at all.

use std::{collections::BTreeSet, time::Duration};

use rand::{RngExt as _, rngs::StdRng};

/// A call that has no answer by then has failed, as in `transport`.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
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
