//! Records which packets from the agents' pods of other hosts arrived at this host's, for agents that ask for
//! reports.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use super::remote::message::{Kind, SEES_DATA, Sort};
use crate::{model::Time, wire::Arrivals};

/// Maximum rate of answers in total.
const TOTAL_RATE: Rate = Rate { per_second: 400, burst: 800 };
/// Maximum rate of answers to one requester: enough for a trial with all repetitions.
const RATE_PER_REQUESTER: Rate = Rate { per_second: 50, burst: 100 };
/// Rounds stored per requester; a new round replaces the oldest.
const MAX_ROUNDS: usize = 8;
/// Age up to which a report about a round may still be requested.
const MAX_QUERY_AGE: Duration = Duration::from_secs(10);
/// Time after discarded packets during which missing packets do not count as lost.
const DISCARD_VALIDITY: Duration = Duration::from_secs(30);

/// The packets that arrived at the agent's own pod.
#[derive(Debug)]
pub struct ArrivalLog {
    /// Since when the pod exists.
    since: Time,
    /// Requesters by address; bounded by the number of addresses that may send questions.
    requesters: BTreeMap<IpAddr, Requester>,
    /// Time up to which the total rate is used.
    used_until: Time,
    /// When packets of unknown rounds were last discarded.
    shed: Option<Time>,
}

#[derive(Debug)]
struct Requester {
    /// Time up to which its rate is used.
    used_until: Time,
    rounds: VecDeque<Round>,
    /// When it last exceeded its rate or number of rounds, so that not all of its rounds are known.
    exceeded: Option<Time>,
}

#[derive(Debug)]
struct Round {
    number: u32,
    begun: Time,
    /// Bit set of the sorts that arrived ([`Sort::bit`]).
    came: u16,
    /// Number of samples that arrived.
    samples: u16,
    /// Some of its packets were not answered.
    has_discards: bool,
}

struct Rate {
    /// Sustained rate per second.
    per_second: u32,
    /// Maximum burst.
    burst: u32,
}

impl ArrivalLog {
    /// Starts the record of a new pod.
    pub const fn new(now: Time) -> Self {
        Self { since: now, requesters: BTreeMap::new(), used_until: now, shed: None }
    }

    /// Forgets the addresses that may no longer send questions.
    pub fn keep(&mut self, may_send: impl Fn(IpAddr) -> bool) {
        self.requesters.retain(|from, _| may_send(*from));
    }

    /// Records a packet of a round from an address that may send questions. Returns whether to answer it.
    pub fn on_question(&mut self, now: Time, from: IpAddr, number: u32, sort: Sort) -> bool {
        let fresh = || Requester { used_until: now, rounds: VecDeque::new(), exceeded: None };
        let requester = self.requesters.entry(from).or_insert_with(fresh);
        let is_within = RATE_PER_REQUESTER.admit(&mut requester.used_until, now);
        let is_answered = is_within && TOTAL_RATE.admit(&mut self.used_until, now);
        if !is_within {
            requester.exceeded = Some(now);
        } else if !is_answered {
            self.shed = Some(now);
        }
        let round = requester.round(now, number);
        round.has_discards |= !is_answered;
        if is_answered {
            round.came |= sort.bit();
            let count = u16::from(sort.kind == Kind::Sample);
            round.samples = round.samples.saturating_add(count);
        }
        is_answered
    }

    /// Records that the kernel discarded packets of unknown rounds because its buffer was full.
    pub const fn on_overflow(&mut self, now: Time) {
        self.shed = Some(now);
    }

    /// Returns the report about a round of the member that has these addresses.
    pub fn arrivals(
        &self,
        now: Time,
        number: u32,
        has_address: impl Fn(IpAddr) -> bool,
    ) -> Arrivals {
        let there_for = now.since(self.since).as_millis();
        let is_recent = |at: Option<Time>| at.is_some_and(|at| now.since(at) < DISCARD_VALIDITY);
        let mut report = Arrivals {
            pod_age_ms: u32::try_from(there_for).unwrap_or(u32::MAX),
            came: SEES_DATA,
            samples: 0,
            shed: is_recent(self.shed),
        };
        for (_, requester) in self.requesters.iter().filter(|(from, _)| has_address(**from)) {
            match requester.rounds.iter().find(|round| round.number == number) {
                Some(round) => {
                    report.came |= round.came;
                    report.samples = report.samples.saturating_add(round.samples);
                    report.shed |= round.has_discards;
                }
                None => report.shed |= is_recent(requester.exceeded),
            }
        }
        report
    }
}

impl Requester {
    /// Returns the round with this number, which is created if necessary.
    fn round(&mut self, now: Time, number: u32) -> &mut Round {
        let at = self.rounds.iter().position(|round| round.number == number).unwrap_or_else(|| {
            if self.rounds.len() >= MAX_ROUNDS
                && let Some(oldest) = self.rounds.pop_front()
                && now.since(oldest.begun) < MAX_QUERY_AGE
            {
                self.exceeded = Some(now);
            }
            self.rounds.push_back(Round {
                number,
                begun: now,
                came: 0,
                samples: 0,
                has_discards: false,
            });
            self.rounds.len() - 1
        });
        &mut self.rounds[at]
    }
}

impl Rate {
    /// Returns whether one more packet is within the rate. Each admitted packet moves `used_until`, the time
    /// up to which the rate is used, by its share of a second.
    fn admit(&self, used_until: &mut Time, now: Time) -> bool {
        let each = Duration::from_secs(1) / self.per_second;
        let from = (*used_until).max(now);
        let is_within = from.since(now) <= each * (self.burst - 1);
        if is_within {
            *used_until = from + each;
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

    fn requester(number: u8) -> IpAddr {
        [10, 42, number, 254].into()
    }

    #[test]
    fn report_holds_arrivals_of_the_round_and_age_of_the_pod() {
        let mut log = ArrivalLog::new(at(1_000));
        assert!(log.on_question(at(2_000), requester(1), 7, SMALL));
        let ipv6 = Sort { ipv4: false, ..SMALL };
        assert!(log.on_question(at(2_000), Ipv6Addr::LOCALHOST.into(), 7, ipv6));
        let has_address = |from: IpAddr| from == requester(1) || from.is_ipv6();
        let came = SEES_DATA | SMALL.bit() | ipv6.bit();
        let report = Arrivals { pod_age_ms: 4_000, came, samples: 0, shed: false };
        assert_eq!(log.arrivals(at(5_000), 7, has_address), report);
        assert_eq!(log.arrivals(at(5_000), 8, has_address), Arrivals { came: SEES_DATA, ..report });
        let other = |from: IpAddr| from == requester(2);
        assert_eq!(log.arrivals(at(5_000), 7, other), Arrivals { came: SEES_DATA, ..report });
        let sample = Sort { kind: Kind::Sample, ..SMALL };
        (0..7).for_each(|_| _ = log.on_question(at(5_000), requester(1), 8, sample));
        assert_eq!(log.arrivals(at(5_000), 8, has_address).samples, 7);
    }

    #[test]
    fn requester_over_its_rate_is_reported_and_does_not_affect_others() {
        let mut log = ArrivalLog::new(at(0));
        let admitted = (0..1_000).filter(|_| log.on_question(at(10), requester(1), 1, SMALL));
        assert_eq!(admitted.count(), RATE_PER_REQUESTER.burst as usize);
        let of_requester = |number| move |from: IpAddr| from == requester(number);
        assert!(log.arrivals(at(10), 1, of_requester(1)).shed);
        assert!(log.on_question(at(10), requester(2), 2, SMALL));
        let Arrivals { came, shed, .. } = log.arrivals(at(10), 2, of_requester(2));
        assert_eq!((came, shed), (SEES_DATA | SMALL.bit(), false));
        assert!(
            log.arrivals(at(10), 3, of_requester(1)).shed,
            "all of its packets may have been discarded"
        );
        assert!(
            !log.arrivals(at(10), 3, of_requester(2)).shed,
            "only the other requester exceeded its rate"
        );
        assert!(log.on_question(at(1_000), requester(1), 4, SMALL), "the rate recovers");
        for round in [3, 4] {
            assert!(!log.arrivals(at(40_000), round, of_requester(1)).shed);
        }
        log.keep(|from| from == requester(2));
        assert_eq!(log.requesters.len(), 1);
    }

    #[test]
    fn answers_in_total_are_limited_and_discards_are_reported_for_a_while() {
        let mut log = ArrivalLog::new(at(0));
        let questions = (0..=u8::MAX).flat_map(|number| [requester(number); 10]);
        let admitted = questions.filter(|from| log.on_question(at(10), *from, 1, SMALL));
        assert_eq!(admitted.count(), TOTAL_RATE.burst as usize);
        let has_discards = |log: &ArrivalLog, millis| log.arrivals(at(millis), 9, |_| true).shed;
        assert!(has_discards(&log, 10) && !has_discards(&log, 40_000));
        log.on_overflow(at(50_000));
        assert!(has_discards(&log, 50_000) && !has_discards(&log, 90_000));
    }

    #[test]
    fn number_of_stored_rounds_is_bounded() {
        let mut log = ArrivalLog::new(at(0));
        for round in 0..5_000_u32 {
            log.on_question(at((round * 50).into()), requester(1), round, SMALL);
        }
        assert_eq!(log.requesters[&requester(1)].rounds.len(), MAX_ROUNDS);
        let now = at(250_000);
        let report = |round| log.arrivals(now, round, |_| true);
        assert_eq!(report(4_999).came, SEES_DATA | SMALL.bit());
        assert!(report(0).shed && !report(4_999).shed);
    }
}
