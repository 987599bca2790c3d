//! Admission: which handshakes are begun, so that strangers never use up what members need.
//!
//! The first packet of a handshake may carry any source address. A stranger, an address from which no member
//! has spoken yet, must prove its address by QUIC's Retry (RFC 9000, 8.1.2) before it costs more than an
//! answer of some hundred bytes. A member begins at once, within a small budget for first packets that
//! prove nothing; beyond it, it has to prove its address, too. Each kind has a budget of its own.
//!
//! Whatever the endpoint answers to addresses that have proven nothing (a Retry, a list of versions, a
//! refusal) is limited in the socket: see [`Admissions::may_send`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Handshakes under way with strangers that have proven their addresses. Each handshake may cost about
/// 40 KiB and a millisecond of CPU.
const MAX_OF_STRANGERS: usize = 128;
/// The same from one IPv4 address or one IPv6 network of 64 bits, which a single host can have whole.
const MAX_OF_ONE_SOURCE: usize = 64;
/// Handshakes under way with members.
const MAX_OF_MEMBERS: usize = 192;
/// The same from one member's address. Several nodes may share it, behind a router that translates.
const MAX_OF_ONE_MEMBER: usize = 16;
/// Handshakes under way in the name of members that have not proven their addresses.
const MAX_UNPROVEN: usize = 64;
const MAX_UNPROVEN_OF_ONE: usize = 4;
use crate::model::bounded::MAX_MEMBERS;
/// Strangers that have proven their addresses, or that this node dials, which are remembered.
const MAX_PROVEN: usize = 1_024;
/// Packets per second to addresses that have proven nothing. Those to an address of the own network that no
/// host has stay in the socket's buffer until the kernel gives up ARP or ND, 3 s later: 9,000 packets, of
/// which the kernel counts each as some 800 bytes, take a quarter of the buffer.
const ANSWERS_PER_SECOND: f64 = 3_000.0;
const ANSWER_BURST: f64 = 1_000.0;
/// Windows in which first packets that prove nothing are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// So many in a window are a flood. 1,000 hosts that boot at once send fewer.
const FLOOD: u64 = 3_000;

/// What becomes of the first packet of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Begin(Budget),
    Retry,
    /// Its address is its own, and it has too many handshakes under way.
    Refuse,
}

/// Whose budget a handshake uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Budget {
    Stranger,
    Member,
    Unproven,
}

/// Counts since the start, by what became of first packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Handshakes {
    pub begun: u64,
    /// Asked to prove their address.
    pub retried: u64,
    /// Refused: too many of their source were under way.
    pub refused: u64,
    /// Answers that were not sent, to addresses that had proven nothing: there were too many.
    pub unanswered: u64,
}

/// First packets that prove no address, many of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flood {
    /// In one minute.
    pub packets: u64,
    /// The source address of one of them, which may be forged. It stays the same while the flood lasts.
    pub example: IpAddr,
}

/// The state of admission. Pure: the time comes with each call.
pub(super) struct Admissions {
    members: BTreeMap<IpAddr, Instant>,
    proven: BTreeMap<IpAddr, Instant>,
    /// Handshakes under way, by budget and source.
    under_way: BTreeMap<(Budget, IpAddr), usize>,
    answers: Bucket,
    counts: Handshakes,
    unproven: Unproven,
}

/// A token bucket.
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let span = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + span * ANSWERS_PER_SECOND).min(ANSWER_BURST);
        self.filled = now;
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }
}

/// First packets without a proof, less the proofs that followed, in this window and the one before.
struct Unproven {
    since: Instant,
    before: u64,
    present: u64,
    example: Option<IpAddr>,
}

impl Unproven {
    fn turn(&mut self, now: Instant) {
        let span = now.saturating_duration_since(self.since);
        if span >= WINDOW {
            self.before = if span < 2 * WINDOW { self.present } else { 0 };
            (self.present, self.since) = (0, now);
        }
        if self.present.max(self.before) < FLOOD {
            self.example = None;
        }
    }
}

/// What is counted together: an IPv6 host can have every address of its network.
fn source(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

impl Admissions {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            members: BTreeMap::new(),
            proven: BTreeMap::new(),
            under_way: BTreeMap::new(),
            answers: Bucket { tokens: ANSWER_BURST, filled: now },
            counts: Handshakes::default(),
            unproven: Unproven { since: now, before: 0, present: 0, example: None },
        }
    }

    /// A member has spoken from this address, or is about to be dialled there.
    pub(super) fn learn_member(&mut self, now: Instant, address: IpAddr) {
        learn(&mut self.members, MAX_MEMBERS, now, address);
    }

    /// A stranger is about to be dialled at this address.
    pub(super) fn learn_stranger(&mut self, now: Instant, address: IpAddr) {
        learn(&mut self.proven, MAX_PROVEN, now, address);
    }

    /// Whether a packet may be sent: always to members and to those who have proven their addresses.
    pub(super) fn may_send(&mut self, now: Instant, to: IpAddr) -> bool {
        let to = to.to_canonical();
        let may_send = self.members.contains_key(&to)
            || self.proven.contains_key(&to)
            || self.answers.take(now);
        self.counts.unanswered += u64::from(!may_send);
        may_send
    }

    /// Judges the first packet of a handshake. What begins must be ended by [`Self::end`].
    pub(super) fn judge(&mut self, now: Instant, from: IpAddr, is_proven: bool) -> Admission {
        let from = from.to_canonical();
        let is_member = self.members.contains_key(&from);
        if is_proven && !is_member {
            self.learn_stranger(now, from);
        }
        let admission = self.admission(from, is_member, is_proven);
        match admission {
            Admission::Begin(budget) => {
                *self.under_way.entry(key(budget, from)).or_default() += 1;
                self.counts.begun += 1;
            }
            Admission::Retry => self.counts.retried += 1,
            Admission::Refuse => self.counts.refused += 1,
        }
        self.unproven.turn(now);
        if is_proven {
            self.unproven.present = self.unproven.present.saturating_sub(1);
        } else if admission == Admission::Retry {
            self.unproven.present += 1;
            if self.unproven.present >= FLOOD {
                self.unproven.example.get_or_insert(from);
            }
        }
        admission
    }

    fn admission(&self, from: IpAddr, is_member: bool, is_proven: bool) -> Admission {
        let (budget, of_one, of_all) = match (is_member, is_proven) {
            (true, true) => (Budget::Member, MAX_OF_ONE_MEMBER, MAX_OF_MEMBERS),
            (true, false) => (Budget::Unproven, MAX_UNPROVEN_OF_ONE, MAX_UNPROVEN),
            (false, true) => (Budget::Stranger, MAX_OF_ONE_SOURCE, MAX_OF_STRANGERS),
            (false, false) => return Admission::Retry,
        };
        let own = self.under_way.get(&key(budget, from)).copied().unwrap_or(0);
        if own < of_one && self.all(budget) < of_all {
            Admission::Begin(budget)
        } else if is_proven {
            Admission::Refuse
        } else {
            Admission::Retry
        }
    }

    fn all(&self, budget: Budget) -> usize {
        self.under_way.iter().filter(|((of, _), _)| *of == budget).map(|(_, count)| count).sum()
    }

    /// A handshake is over, one way or the other.
    fn end(&mut self, budget: Budget, from: IpAddr) {
        let key = key(budget, from.to_canonical());
        if let Some(count) = self.under_way.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.under_way.remove(&key);
            }
        }
    }

    pub(super) fn counts(&self) -> Handshakes {
        self.counts
    }

    /// Whether strangers flood this node now.
    pub(super) fn flood(&mut self, now: Instant) -> Option<Flood> {
        self.unproven.turn(now);
        let packets = self.unproven.present.max(self.unproven.before);
        let example = self.unproven.example?;
        Some(Flood { packets, example })
    }
}

fn key(budget: Budget, from: IpAddr) -> (Budget, IpAddr) {
    (budget, if budget == Budget::Stranger { source(from) } else { from })
}

/// Remembers an address; the one that was learned longest ago makes way.
fn learn(known: &mut BTreeMap<IpAddr, Instant>, limit: usize, now: Instant, address: IpAddr) {
    let is_new = known.insert(address.to_canonical(), now).is_none();
    if is_new && known.len() > limit {
        let oldest = known.iter().min_by_key(|(_, learned)| **learned);
        if let Some(oldest) = oldest.map(|(address, _)| *address) {
            known.remove(&oldest);
        }
    }
}

/// The admissions as the accepting task and the endpoint's owner share it.
#[derive(Clone)]
pub(super) struct SharedAdmissions(Arc<Mutex<Admissions>>);

impl SharedAdmissions {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Admissions::new(Instant::now()))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Admissions> {
        // Nothing in it is half changed where a panic could happen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What holds a place of its budget until it is dropped.
    pub(super) fn place(&self, budget: Budget, from: IpAddr) -> Place {
        Place { admissions: self.clone(), budget, from }
    }
}

/// The place of a handshake that is under way.
pub(super) struct Place {
    admissions: SharedAdmissions,
    budget: Budget,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admissions.lock().end(self.budget, self.from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(number: u32) -> IpAddr {
        IpAddr::V4((0x0a00_0000 + number).into())
    }

    #[test]
    fn stranger_proves_its_address_before_a_handshake_begins() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        assert_eq!(admissions.judge(now, ip(1), false), Admission::Retry);
        assert_eq!(admissions.judge(now, ip(1), true), Admission::Begin(Budget::Stranger));
        admissions.learn_member(now, ip(2));
        assert_eq!(admissions.judge(now, ip(2), false), Admission::Begin(Budget::Unproven));
        let counts = Handshakes { begun: 2, retried: 1, ..Handshakes::default() };
        assert_eq!(admissions.counts(), counts);
    }

    #[test]
    fn strangers_that_flood_leave_members_their_budget() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        for number in 0..100_000 {
            assert_eq!(admissions.judge(now, ip(number), false), Admission::Retry);
            admissions.may_send(now, ip(number));
        }
        for number in 0..1_000 {
            admissions.judge(now, ip(number), true);
        }
        assert_eq!(admissions.judge(now, ip(9), true), Admission::Refuse);
        admissions.learn_member(now, ip(200_000));
        assert_eq!(admissions.judge(now, ip(200_000), false), Admission::Begin(Budget::Unproven));
        assert_eq!(admissions.judge(now, ip(200_000), true), Admission::Begin(Budget::Member));
        assert!(admissions.may_send(now, ip(200_000)), "answers to members are not limited");
        assert_eq!(admissions.counts().unanswered, 99_000);
    }

    #[test]
    fn member_whose_address_is_forged_gets_in_by_a_proof() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        admissions.learn_member(now, ip(1));
        for _ in 0..MAX_UNPROVEN_OF_ONE {
            assert_eq!(admissions.judge(now, ip(1), false), Admission::Begin(Budget::Unproven));
        }
        assert_eq!(admissions.judge(now, ip(1), false), Admission::Retry);
        assert_eq!(admissions.judge(now, ip(1), true), Admission::Begin(Budget::Member));
        admissions.end(Budget::Unproven, ip(1));
        assert_eq!(admissions.judge(now, ip(1), false), Admission::Begin(Budget::Unproven));
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_one_budget() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        let host = |network: u128, host: u128| {
            IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) + (network << 64) + host))
        };
        for number in 0..MAX_OF_ONE_SOURCE as u128 {
            assert!(matches!(admissions.judge(now, host(1, number), true), Admission::Begin(_)));
        }
        assert_eq!(admissions.judge(now, host(1, 1 << 40), true), Admission::Refuse);
        assert!(matches!(admissions.judge(now, host(2, 1), true), Admission::Begin(_)));
    }

    #[test]
    fn answers_come_back_with_time_and_not_at_all_for_who_has_proven_its_address() {
        let start = Instant::now();
        let mut admissions = Admissions::new(start);
        let sent = (0..10_000).filter(|number| admissions.may_send(start, ip(*number))).count();
        assert_eq!(sent, ANSWER_BURST as usize);
        admissions.judge(start, ip(20_000), true);
        assert!(admissions.may_send(start, ip(20_000)));
        assert!(!admissions.may_send(start, ip(20_001)));
        assert!(admissions.may_send(start + Duration::from_millis(100), ip(20_001)));
    }

    #[test]
    fn flood_is_told_until_it_has_ended() {
        let start = Instant::now();
        let mut admissions = Admissions::new(start);
        for number in 0..10_000 {
            admissions.judge(start, ip(number), false);
        }
        assert_eq!(admissions.flood(start), Some(Flood { packets: 10_000, example: ip(2_999) }));
        assert!(admissions.flood(start + WINDOW + Duration::from_secs(1)).is_some());
        assert_eq!(admissions.flood(start + 3 * WINDOW), None);
    }

    #[test]
    fn hosts_that_prove_their_addresses_are_no_flood() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        for number in 0..20_000 {
            let later = now + Duration::from_millis(u64::from(number));
            assert_eq!(admissions.judge(later, ip(number), false), Admission::Retry);
            assert!(matches!(admissions.judge(later, ip(number), true), Admission::Begin(_)));
            admissions.end(Budget::Stranger, ip(number));
        }
        assert_eq!(admissions.flood(now + Duration::from_secs(20)), None);
    }

    #[test]
    fn known_addresses_are_bounded() {
        let now = Instant::now();
        let mut admissions = Admissions::new(now);
        for number in 0..MAX_MEMBERS as u32 + 100 {
            admissions.learn_member(now + Duration::from_micros(u64::from(number)), ip(number));
        }
        assert_eq!(admissions.members.len(), MAX_MEMBERS);
        assert!(!admissions.members.contains_key(&ip(0)));
    }
}
