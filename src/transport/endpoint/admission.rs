//! Admission: which handshakes are begun, so that strangers never use up what members need.
//!
//! The first packet of a handshake may carry any source address. A host that is no member yet must prove its
//! address by QUIC's Retry (RFC 9000, 8.1.2) before it costs more than an answer of some hundred bytes. A
//! member begins at once, within a small budget for first packets that prove nothing; beyond it, it has to
//! prove its address, too. Each kind has a budget of its own.
//!
//! A host without the secret is a stranger at any address, also at that of a member, which it may share as a
//! user of the member's host. The connection id of a first packet tells ([`FirstIds`]). So strangers take
//! places from each other alone, however many handshakes they begin.
//!
//! A host with a few addresses of its own can prove them and then finish no handshake. So each source has few
//! places, and when all places are taken, the source with the most of them loses its oldest handshake. Within
//! a source, which may be a whole network or a host with many users, the address with the most does; where
//! all come from one address, half of the places are given on soon. No packet begins two handshakes.
//!
//! Whatever the endpoint answers to addresses that have proven nothing (a Retry, a list of versions, a
//! refusal) is limited in the socket: see [`Admissions::may_send`].

mod once;
mod tally;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use quinn::ConnectionId;

pub use self::tally::Flood;
use self::{
    once::Once,
    tally::{Bucket, Tally},
};
use crate::{model::bounded::MAX_MEMBERS, transport::first_id::FirstIds};

/// Handshakes under way with hosts without the secret that have proven their addresses. Each handshake may
/// cost about 40 KiB and a millisecond of CPU.
const MAX_OF_STRANGERS: usize = 128;
/// So many begin in a second, however soon they end. None of them succeeds: a host with another cluster's
/// secret is told so.
const STRANGERS_PER_SECOND: f64 = 200.0;
/// The same from one source.
const MAX_OF_ONE_SOURCE: usize = 16;
/// The oldest of them are not ended for newer ones of the same source. Several hosts may share it, behind a
/// router that translates: on a network with a round trip of 300 ms they finish 20 handshakes a second.
const KEPT_OF_ONE_SOURCE: usize = 8;
/// Any other has to end for a newer one of its source after this, where a handshake takes milliseconds
/// without loss. So one that does not end keeps no near host out, and a source begins 80 more a second.
const UNDISTURBED_BY_OWN: Duration = Duration::from_millis(100);
/// A stranger's handshake ends after this. With a round trip of 300 ms the host sends its certificate after
/// 300 ms, and if that packet is lost, once more 900 ms later: QUIC waits for three round trips after its
/// first sample (RFC 9002, 5.3 and 6.2.1). Losses before are repaired sooner, from 60 ms on.
pub(super) const STRANGERS_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Among sources that have equally many, a handshake has to end for a newer one after this at the earliest.
/// Otherwise many hosts that join at once would end each other's handshakes, and none would finish.
const UNDISTURBED: Duration = Duration::from_millis(250);
/// Handshakes under way with hosts that have the secret and have proven their addresses.
const MAX_OF_MEMBERS: usize = 192;
/// The same from one address. Several nodes may share it, behind a router that translates.
const MAX_OF_ONE_MEMBER: usize = 24;
const KEPT_OF_ONE_MEMBER: usize = 16;
/// Handshakes under way with members that have not proven their addresses.
const MAX_UNPROVEN: usize = 64;
const MAX_UNPROVEN_OF_ONE: usize = 4;
/// Handshakes under way at once.
pub(super) const MAX_PLACES: usize = MAX_OF_STRANGERS + MAX_OF_MEMBERS + MAX_UNPROVEN;
/// Strangers that have proven their addresses, or that this node dials, which are remembered.
const MAX_PROVEN: usize = 1_024;
/// Packets per second to addresses that have proven nothing. Those to an address of the own network that no
/// host has stay in the socket's buffer until the kernel gives up ARP or ND, 3 s later: 9,000 packets, of
/// which the kernel counts each as some 800 bytes, take a quarter of the buffer.
const ANSWERS_PER_SECOND: f64 = 3_000.0;
const ANSWER_BURST: f64 = 1_000.0;
/// So many in a window are a flood. 1,000 hosts that boot at once send fewer.
const FLOOD: u64 = 3_000;
/// So many handshakes that found no place, or lost it, in a window are a problem.
const CROWD: u64 = 30;

/// The first packet of a handshake.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    pub(super) from: IpAddr,
    /// The connection id that its sender chose. A token that proves the address holds it.
    pub(super) id: ConnectionId,
    pub(super) is_proven: bool,
}

/// What becomes of the first packet of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Begin(Begun),
    Retry,
    /// Its address is its own, and there are too many handshakes.
    Refuse,
    /// It has begun a handshake before.
    Ignore,
}

/// A handshake that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Begun {
    pub(super) number: u64,
    pub(super) budget: Budget,
    /// The handshake that has to end for it.
    pub(super) instead_of: Option<u64>,
}

/// Whose budget a handshake uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Budget {
    /// Of hosts without the secret.
    Stranger,
    /// Of hosts with the secret: members, and those that join.
    Member,
    /// Of members that have not proven their addresses.
    Unproven,
}

/// Counts since the start, by what became of first packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Handshakes {
    pub begun: u64,
    /// Asked to prove their address.
    pub retried: u64,
    /// Refused: too many of their source were under way, or too many strangers in this second.
    pub refused: u64,
    /// Not answered: they had begun a handshake before.
    pub repeated: u64,
    /// Begun, and ended for a newer one: all places were taken, or all of their source.
    pub displaced: u64,
    /// Answers that were not sent, to addresses that had proven nothing: there were too many.
    pub unanswered: u64,
}

/// The state of admission. Pure: the time comes with each call.
pub(super) struct Admissions {
    members: BTreeMap<IpAddr, Instant>,
    proven: BTreeMap<IpAddr, Instant>,
    /// Networks of pods.
    overlay: Vec<IpNet>,
    /// Handshakes under way, from the oldest to the newest.
    under_way: BTreeMap<u64, Handshake>,
    next: u64,
    ids: FirstIds,
    /// Of hosts with the secret, and of others.
    begun: [Once; 2],
    /// Handshakes with hosts without the secret.
    strangers: Bucket,
    answers: Bucket,
    counts: Handshakes,
    /// First packets without a proof, less the proofs that followed. Their addresses may be forged.
    unproven: Tally,
    /// Handshakes that found no place, or lost it. Their addresses are proven.
    crowd: Tally,
}

/// Handshakes under way of each source, or of each address of a source.
type Places = BTreeMap<IpAddr, usize>;

/// How many handshakes may be under way in one budget.
#[derive(Clone, Copy)]
struct Limits {
    of_all: usize,
    of_one: usize,
    /// So many of one source are not ended for its newer ones.
    kept: usize,
}

impl Budget {
    const fn limits(self) -> Limits {
        let (of_all, of_one, kept) = match self {
            Self::Stranger => (MAX_OF_STRANGERS, MAX_OF_ONE_SOURCE, KEPT_OF_ONE_SOURCE),
            Self::Member => (MAX_OF_MEMBERS, MAX_OF_ONE_MEMBER, KEPT_OF_ONE_MEMBER),
            Self::Unproven => (MAX_UNPROVEN, MAX_UNPROVEN_OF_ONE, MAX_UNPROVEN_OF_ONE),
        };
        Limits { of_all, of_one, kept }
    }
}

/// A handshake under way.
struct Handshake {
    begun: Instant,
    budget: Budget,
    /// What it is counted with.
    source: IpAddr,
    from: IpAddr,
}

impl Handshake {
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.begun)
    }
}

impl Admissions {
    pub(super) fn new(now: Instant, ids: FirstIds) -> Self {
        Self {
            members: BTreeMap::new(),
            proven: BTreeMap::new(),
            overlay: Vec::new(),
            under_way: BTreeMap::new(),
            next: 0,
            ids,
            begun: [Once::new(now), Once::new(now)],
            strangers: Bucket::new(now, STRANGERS_PER_SECOND, STRANGERS_PER_SECOND),
            answers: Bucket::new(now, ANSWERS_PER_SECOND, ANSWER_BURST),
            counts: Handshakes::default(),
            unproven: Tally::new(FLOOD, now),
            crowd: Tally::new(CROWD, now),
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

    /// From these networks pods speak. All of them are one source, for a host can start many.
    pub(super) fn learn_overlay(&mut self, networks: Vec<IpNet>) {
        self.overlay = networks;
    }

    /// From now on the senders of these ids have the secret.
    pub(super) fn accept_ids(&mut self, ids: FirstIds) {
        self.ids = ids;
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
    pub(super) fn judge(&mut self, now: Instant, first: First) -> Admission {
        let First { from, is_proven, .. } = first;
        let first = First { from: from.to_canonical(), ..first };
        let from = first.from;
        if is_proven && !self.members.contains_key(&from) {
            self.learn_stranger(now, from);
        }
        self.unproven.turn(now);
        self.crowd.turn(now);
        let admission = self.admission(now, first);
        match admission {
            Admission::Begin(_) => self.counts.begun += 1,
            Admission::Retry => self.counts.retried += 1,
            Admission::Refuse => self.counts.refused += 1,
            Admission::Ignore => self.counts.repeated += 1,
        }
        if matches!(admission, Admission::Refuse | Admission::Ignore) {
            self.crowd.add(from);
        }
        if is_proven && admission != Admission::Ignore {
            self.unproven.take_back();
        } else if admission == Admission::Retry {
            self.unproven.add(from);
        }
        admission
    }

    fn admission(&mut self, now: Instant, first: First) -> Admission {
        let First { from, id, is_proven } = first;
        let has_secret = self.ids.show_secret(&id);
        let budget = match (has_secret, is_proven) {
            (true, true) => Budget::Member,
            (true, false) if self.members.contains_key(&from) => Budget::Unproven,
            (false, true) => Budget::Stranger,
            (_, false) => return Admission::Retry,
        };
        let kind = usize::from(!has_secret);
        if self.begun[kind].contains(&id) {
            return Admission::Ignore;
        }
        let source = if budget == Budget::Stranger { self.source(from) } else { from };
        let Limits { of_all, of_one, kept } = budget.limits();
        let places = self.places(budget);
        let is_source_full = count_of(&places, source) >= of_one;
        let is_full = places.values().sum::<usize>() >= of_all;
        let instead_of = match budget {
            Budget::Unproven => None,
            _ if is_source_full => self.rival_within(now, (budget, source), from, kept),
            _ if is_full => self.rival_of_all(now, budget, &places, source),
            _ => None,
        };
        let has_place = !(is_source_full || is_full) || instead_of.is_some();
        if !has_place || (budget == Budget::Stranger && !self.strangers.take(now)) {
            return if is_proven { Admission::Refuse } else { Admission::Retry };
        }
        if let Some(displaced) = instead_of.and_then(|number| self.under_way.remove(&number)) {
            self.crowd.add(displaced.from);
            self.counts.displaced += 1;
        }
        let number = self.next;
        self.next += 1;
        self.under_way.insert(number, Handshake { begun: now, budget, source, from });
        self.begun[kind].insert(now, id);
        Admission::Begin(Begun { number, budget, instead_of })
    }

    /// How many handshakes of each source are under way.
    fn places(&self, budget: Budget) -> Places {
        let mut places = BTreeMap::new();
        for handshake in self.under_way.values().filter(|handshake| handshake.budget == budget) {
            *places.entry(handshake.source).or_default() += 1;
        }
        places
    }

    /// The handshake that has to end for one of the source `newcomer`: the oldest of the sources that have
    /// the most.
    fn rival_of_all(
        &self,
        now: Instant,
        budget: Budget,
        places: &Places,
        newcomer: IpAddr,
    ) -> Option<u64> {
        let most = places.values().copied().max()?;
        let mut oldest_first = self.under_way.iter();
        let (number, oldest) = oldest_first.find(|(_, handshake)| {
            handshake.budget == budget && count_of(places, handshake.source) == most
        })?;
        let has_more = most > count_of(places, newcomer) + 1;
        (has_more || oldest.age(now) >= UNDISTURBED).then_some(*number)
    }

    /// The handshake that has to end for one of the address `newcomer`, whose source has all its places: the
    /// oldest of the addresses that have the most. Where the newcomer's address has as many, the oldest are
    /// kept.
    fn rival_within(
        &self,
        now: Instant,
        (budget, source): (Budget, IpAddr),
        newcomer: IpAddr,
        kept: usize,
    ) -> Option<u64> {
        let is_own =
            |handshake: &Handshake| handshake.budget == budget && handshake.source == source;
        let mut places = Places::new();
        for handshake in self.under_way.values().filter(|handshake| is_own(handshake)) {
            *places.entry(handshake.from).or_default() += 1;
        }
        let most = places.values().copied().max()?;
        let mut oldest_first = self.under_way.iter().filter(|(_, handshake)| {
            is_own(handshake) && count_of(&places, handshake.from) == most
        });
        let has_more = most > count_of(&places, newcomer) + 1;
        let (number, rival) = oldest_first.nth(if has_more { 0 } else { kept })?;
        (has_more || rival.age(now) >= UNDISTURBED_BY_OWN).then_some(*number)
    }

    /// What is counted together: what a single host can have whole. That is one IPv4 address or one IPv6
    /// network of 64 bits, all addresses of loopback, and all addresses of pods.
    fn source(&self, address: IpAddr) -> IpAddr {
        if let Some(overlay) = self.overlay.iter().find(|network| network.contains(&address)) {
            return overlay.network();
        }
        match address {
            IpAddr::V4(v4) if v4.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V4(_) => address,
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
        }
    }

    /// A handshake is over, one way or the other.
    fn end(&mut self, number: u64) {
        self.under_way.remove(&number);
    }

    pub(super) fn counts(&self) -> Handshakes {
        self.counts
    }

    /// Whether strangers flood this node now with first packets that prove no address.
    pub(super) fn flood(&mut self, now: Instant) -> Option<Flood> {
        self.unproven.flood(now)
    }

    /// Whether hosts, or users of one, take each other's places now.
    pub(super) fn crowd(&mut self, now: Instant) -> Option<Flood> {
        self.crowd.flood(now)
    }
}

fn count_of(places: &Places, source: IpAddr) -> usize {
    places.get(&source).copied().unwrap_or(0)
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
    pub(super) fn new(ids: FirstIds) -> Self {
        Self(Arc::new(Mutex::new(Admissions::new(Instant::now(), ids))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Admissions> {
        // Nothing in it is half changed where a panic could happen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What holds a place of its budget until it is dropped.
    pub(super) fn place(&self, number: u64) -> Place {
        Place { admissions: self.clone(), number }
    }
}

/// The place of a handshake that is under way.
pub(super) struct Place {
    admissions: SharedAdmissions,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admissions.lock().end(self.number);
    }
}
