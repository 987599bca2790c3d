//! What has come to the agent's own pod from those of other hosts, for agents there that ask what became of
//! their packets.

use std::{collections::BTreeMap, time::Duration};

use super::Sort;
use crate::{model::Time, wire::Arrivals};

/// Answers a second, and at once. Above that packets are shed: what the pod sends is bounded, whoever asks.
const RATE: u64 = 200;
const BURST: u64 = 400;
/// Rounds that are remembered; the oldest is forgotten for a new one.
const MAX_ROUNDS: usize = 512;
/// For so long after packets were shed nothing counts as not having come.
const SHED: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Witness {
    /// Since when there is a pod.
    since: Time,
    /// By the number of a round: when it was first heard of, and which packets of it have come.
    rounds: BTreeMap<u32, (Time, u8)>,
    /// Up to when answers are used up, if each takes its part of a second.
    spent: Time,
    shed: Option<Time>,
}

impl Witness {
    pub const fn new(now: Time) -> Self {
        Self { since: now, rounds: BTreeMap::new(), spent: now, shed: None }
    }

    /// Whether one more may be answered now.
    pub fn admit(&mut self, now: Time) -> bool {
        let each = Duration::from_nanos(1_000_000_000 / RATE);
        let spent = self.spent.max(now);
        let is_over = spent.since(now) > each * (BURST - 1) as u32;
        if is_over {
            self.shed = Some(now);
        } else {
            self.spent = spent + each;
        }
        !is_over
    }

    /// A packet of a round has come, and was answered.
    pub fn note(&mut self, now: Time, round: u32, sort: Sort) {
        if !self.rounds.contains_key(&round) && self.rounds.len() >= MAX_ROUNDS {
            let oldest = self.rounds.iter().min_by_key(|(_, (at, _))| *at);
            if let Some(oldest) = oldest.map(|(round, _)| *round) {
                self.rounds.remove(&oldest);
            }
            self.shed = Some(now);
        }
        self.rounds.entry(round).or_insert((now, 0)).1 |= sort.bit();
    }

    /// What is known of a round.
    pub fn testify(&self, now: Time, round: u32) -> Arrivals {
        let there_for = now.since(self.since).as_millis();
        Arrivals {
            there_for_ms: u32::try_from(there_for).unwrap_or(u32::MAX),
            came: self.rounds.get(&round).map_or(0, |(_, came)| *came),
            shed: self.shed.is_some_and(|at| now.since(at) < SHED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::forwarding::Kind;

    const SMALL: Sort = Sort { ipv4: true, kind: Kind::Small };

    fn at(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    #[test]
    fn it_tells_what_has_come_of_a_round_and_since_when_it_listens() {
        let mut witness = Witness::new(at(1_000));
        witness.note(at(2_000), 7, SMALL);
        let told = Arrivals { there_for_ms: 4_000, came: SMALL.bit(), shed: false };
        assert_eq!(witness.testify(at(5_000), 7), told);
        assert_eq!(witness.testify(at(5_000), 8), Arrivals { came: 0, ..told });
    }

    #[test]
    fn answers_are_bounded_and_what_was_shed_is_told_for_a_while() {
        let mut witness = Witness::new(at(0));
        let admitted = (0..10 * BURST).filter(|_| witness.admit(at(10))).count();
        assert_eq!(admitted as u64, BURST);
        assert!(witness.testify(at(10), 1).shed);
        assert!(witness.admit(at(1_000)), "it fills again");
        assert!(!witness.testify(at(40_000), 1).shed);
    }

    #[test]
    fn memory_of_very_many_rounds_is_bounded() {
        let mut witness = Witness::new(at(0));
        (0..5_000_u32).for_each(|round| witness.note(at(round.into()), round, SMALL));
        assert_eq!(witness.rounds.len(), MAX_ROUNDS);
        assert!(witness.rounds.contains_key(&4_999) && witness.testify(at(5_000), 0).shed);
    }
}
