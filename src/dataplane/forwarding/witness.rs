//! What has come to the agent's own pod from those of other hosts, for agents there that ask what became of
//! their packets.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use super::{Kind, SEES_DATA, Sort};
use crate::{model::Time, wire::Arrivals};

/// Answers to all askers. What the pod sends is bounded, however many ask.
const ALL: Rate = Rate { each_second: 400, at_once: 800 };
/// Answers to one asker: more than a trial takes, with all that is sent again.
const ONE: Rate = Rate { each_second: 50, at_once: 100 };
/// Rounds of one asker that are remembered; the oldest is forgotten for a new one.
const MAX_ROUNDS: usize = 8;
/// A round that is younger than this may still be asked about.
const YOUNG: Duration = Duration::from_secs(10);
/// For so long after packets were shed nothing counts as not having come.
const SHED: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Witness {
    /// Since when there is a pod.
    since: Time,
    /// By their addresses, of which there are as many as may ask.
    askers: BTreeMap<IpAddr, Asker>,
    spent: Time,
    /// Packets of unknown rounds were shed last.
    shed: Option<Time>,
}

#[derive(Debug)]
struct Asker {
    spent: Time,
    rounds: VecDeque<Round>,
    /// It has asked too much, so that not all of its rounds are known.
    overrun: Option<Time>,
}

#[derive(Debug)]
struct Round {
    number: u32,
    begun: Time,
    /// Which packets of it have come.
    came: u16,
    /// How many have come that are counted.
    samples: u16,
    /// Packets of it were not answered.
    is_shed: bool,
}

struct Rate {
    each_second: u32,
    at_once: u32,
}

impl Witness {
    pub const fn new(now: Time) -> Self {
        Self { since: now, askers: BTreeMap::new(), spent: now, shed: None }
    }

    /// Forgets those that may not ask any more.
    pub fn keep(&mut self, may_ask: impl Fn(IpAddr) -> bool) {
        self.askers.retain(|from, _| may_ask(*from));
    }

    /// A packet of a round has come from an address that may ask. Says whether it is to be answered.
    pub fn on_question(&mut self, now: Time, from: IpAddr, number: u32, sort: Sort) -> bool {
        let fresh = || Asker { spent: now, rounds: VecDeque::new(), overrun: None };
        let asker = self.askers.entry(from).or_insert_with(fresh);
        let is_within = ONE.admit(&mut asker.spent, now);
        let is_answered = is_within && ALL.admit(&mut self.spent, now);
        if !is_within {
            asker.overrun = Some(now);
        } else if !is_answered {
            self.shed = Some(now);
        }
        let round = asker.round(now, number);
        round.is_shed |= !is_answered;
        if is_answered {
            round.came |= sort.bit();
            let count = u16::from(sort.kind == Kind::Sample);
            round.samples = round.samples.saturating_add(count);
        }
        is_answered
    }

    /// The kernel had no room for packets, of whatever round.
    pub const fn on_overflow(&mut self, now: Time) {
        self.shed = Some(now);
    }

    /// What is known of a round of the member that has these addresses.
    pub fn testify(&self, now: Time, number: u32, is_its: impl Fn(IpAddr) -> bool) -> Arrivals {
        let there_for = now.since(self.since).as_millis();
        let is_recent = |at: Option<Time>| at.is_some_and(|at| now.since(at) < SHED);
        let mut told = Arrivals {
            pod_age_ms: u32::try_from(there_for).unwrap_or(u32::MAX),
            came: SEES_DATA,
            samples: 0,
            shed: is_recent(self.shed),
        };
        for (_, asker) in self.askers.iter().filter(|(from, _)| is_its(**from)) {
            match asker.rounds.iter().find(|round| round.number == number) {
                Some(round) => {
                    told.came |= round.came;
                    told.samples = told.samples.saturating_add(round.samples);
                    told.shed |= round.is_shed;
                }
                None => told.shed |= is_recent(asker.overrun),
            }
        }
        told
    }
}

impl Asker {
    fn round(&mut self, now: Time, number: u32) -> &mut Round {
        let at = self.rounds.iter().position(|round| round.number == number).unwrap_or_else(|| {
            if self.rounds.len() >= MAX_ROUNDS
                && let Some(oldest) = self.rounds.pop_front()
                && now.since(oldest.begun) < YOUNG
            {
                self.overrun = Some(now);
            }
            self.rounds.push_back(Round {
                number,
                begun: now,
                came: 0,
                samples: 0,
                is_shed: false,
            });
            self.rounds.len() - 1
        });
        &mut self.rounds[at]
    }
}

impl Rate {
    /// Whether one more is within it, where `spent` is the time up to which it is used up, if each takes its
    /// part of a second.
    fn admit(&self, spent: &mut Time, now: Time) -> bool {
        let each = Duration::from_secs(1) / self.each_second;
        let from = (*spent).max(now);
        let is_within = from.since(now) <= each * (self.at_once - 1);
        if is_within {
            *spent = from + each;
        }
        is_within
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    const SMALL: Sort = Sort { ipv4: true, kind: Kind::Small };

    fn at(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    fn asker(number: u8) -> IpAddr {
        [10, 42, number, 254].into()
    }

    #[test]
    fn it_tells_what_has_come_of_a_round_and_since_when_it_listens() {
        let mut witness = Witness::new(at(1_000));
        assert!(witness.on_question(at(2_000), asker(1), 7, SMALL));
        let ipv6 = Sort { ipv4: false, ..SMALL };
        assert!(witness.on_question(at(2_000), Ipv6Addr::LOCALHOST.into(), 7, ipv6));
        let is_its = |from: IpAddr| from == asker(1) || from.is_ipv6();
        let came = SEES_DATA | SMALL.bit() | ipv6.bit();
        let told = Arrivals { pod_age_ms: 4_000, came, samples: 0, shed: false };
        assert_eq!(witness.testify(at(5_000), 7, is_its), told);
        assert_eq!(witness.testify(at(5_000), 8, is_its), Arrivals { came: SEES_DATA, ..told });
        let other = |from: IpAddr| from == asker(2);
        assert_eq!(witness.testify(at(5_000), 7, other), Arrivals { came: SEES_DATA, ..told });
        let sample = Sort { kind: Kind::Sample, ..SMALL };
        (0..7).for_each(|_| _ = witness.on_question(at(5_000), asker(1), 8, sample));
        assert_eq!(witness.testify(at(5_000), 8, is_its).samples, 7);
    }

    #[test]
    fn asker_that_asks_too_much_is_told_so_and_takes_nothing_from_others() {
        let mut witness = Witness::new(at(0));
        let admitted = (0..1_000).filter(|_| witness.on_question(at(10), asker(1), 1, SMALL));
        assert_eq!(admitted.count(), ONE.at_once as usize);
        let its = |number| move |from: IpAddr| from == asker(number);
        assert!(witness.testify(at(10), 1, its(1)).shed);
        assert!(witness.on_question(at(10), asker(2), 2, SMALL));
        let Arrivals { came, shed, .. } = witness.testify(at(10), 2, its(2));
        assert_eq!((came, shed), (SEES_DATA | SMALL.bit(), false));
        assert!(witness.testify(at(10), 3, its(1)).shed, "all of it may have been shed");
        assert!(!witness.testify(at(10), 3, its(2)).shed, "another one has asked too much");
        assert!(witness.on_question(at(1_000), asker(1), 4, SMALL), "it fills again");
        for round in [3, 4] {
            assert!(!witness.testify(at(40_000), round, its(1)).shed);
        }
        witness.keep(|from| from == asker(2));
        assert_eq!(witness.askers.len(), 1);
    }

    #[test]
    fn answers_to_all_askers_are_bounded_and_what_was_shed_is_told_for_a_while() {
        let mut witness = Witness::new(at(0));
        let questions = (0..=u8::MAX).flat_map(|number| [asker(number); 10]);
        let admitted = questions.filter(|from| witness.on_question(at(10), *from, 1, SMALL));
        assert_eq!(admitted.count(), ALL.at_once as usize);
        let is_shed = |witness: &Witness, millis| witness.testify(at(millis), 9, |_| true).shed;
        assert!(is_shed(&witness, 10) && !is_shed(&witness, 40_000));
        witness.on_overflow(at(50_000));
        assert!(is_shed(&witness, 50_000) && !is_shed(&witness, 90_000));
    }

    #[test]
    fn memory_of_very_many_rounds_is_bounded() {
        let mut witness = Witness::new(at(0));
        for round in 0..5_000_u32 {
            witness.on_question(at((round * 50).into()), asker(1), round, SMALL);
        }
        assert_eq!(witness.askers[&asker(1)].rounds.len(), MAX_ROUNDS);
        let now = at(250_000);
        let told = |round| witness.testify(now, round, |_| true);
        assert_eq!(told(4_999).came, SEES_DATA | SMALL.bit());
        assert!(told(0).shed && !told(4_999).shed);
    }
}
