//! Admission: decides which handshakes begin, so that non-members cannot exhaust what members need.
//!
//! The first packet of a handshake may have a forged source address. A host that is not a member
//! has to prove its address with QUIC's Retry (RFC 9000, 8.1.2) before it costs more than an answer
//! of a few hundred bytes. A member begins at once, within a small budget for unproven first
//! packets; beyond that, it has to prove its address, too. Each kind has a budget of its own.
//!
//! A host without the secret is a non-member at any address. It may share a member's address, as a
//! user of the member's host. The connection id of a first packet shows whether its sender has the
//! secret ([`FirstIds`]). Non-members therefore take places from each other only, however many
//! handshakes they begin.
//!
//! A host with a few addresses can prove them and then finish no handshake. Each source therefore
//! has few places, and when all places are taken, the source with the most loses its oldest
//! handshake. Within a source, which may be a network or a host with many users, the address with
//! the most places loses one. If all have the same address, half of the places become available
//! again soon. No packet begins two handshakes.
//!
//! Answers to unproven addresses (Retry, version negotiation, refusal) are limited in the socket:
//! see [`Admissions::may_send`].

mod tally;
#[cfg(test)]
mod tests;
mod used_ids;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use quinn::ConnectionId;

pub use self::tally::Flood;
use self::{tally::Tally, used_ids::UsedIds};
use super::bucket::Bucket;
use crate::{model::bounded::MAX_MEMBERS, transport::first_id::FirstIds};

/// Upper limit of handshakes in progress with hosts without the secret that have proven their
/// addresses. Each may cost about 40 KiB and a millisecond of CPU time.
const MAX_OF_NON_MEMBERS: usize = 128;
/// Upper limit of these handshakes that begin per second, however soon they end. None succeeds: a
/// host with another cluster's secret gets an error.
const NON_MEMBERS_PER_SECOND: f64 = 200.0;
/// Upper limit of these handshakes in progress from one source.
const MAX_PER_SOURCE: usize = 16;
/// Number of the oldest of them that newer ones of the same source do not displace. Several hosts
/// behind a NAT router share a source. With a round trip of 300 ms, these places allow 20
/// handshakes per second.
const PROTECTED_PER_SOURCE: usize = 8;
/// Age from which the others are displaced by newer ones of their source. Without loss, a handshake
/// takes milliseconds, so hosts nearby get in despite handshakes that never end. One source begins
/// at most 80 more per second this way.
const MIN_DISPLACED_AGE_IN_SOURCE: Duration = Duration::from_millis(100);
/// Time limit of a non-member's handshake. With a round trip of 300 ms, the host sends its
/// certificate after 300 ms, and, if that packet is lost, again 900 ms later: QUIC waits for three
/// round trips after its first sample (RFC 9002, 5.3 and 6.2.1). Earlier losses are repaired
/// sooner, from 60 ms on.
pub(super) const NON_MEMBERS_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Minimum age of a handshake that is displaced if all sources have the same number. Otherwise,
/// hosts that join at the same time would displace each other, and none would finish.
const MIN_DISPLACED_AGE: Duration = Duration::from_millis(250);
/// Upper limit of handshakes in progress with hosts that have the secret and have proven their
/// addresses.
const MAX_OF_MEMBERS: usize = 192;
/// Upper limit of these from one address, which several nodes behind a NAT router may share.
const MAX_PER_MEMBER: usize = 24;
/// Number of the oldest of them that newer ones of the same address do not displace.
const PROTECTED_PER_MEMBER: usize = 16;
/// Upper limit of handshakes in progress with members that have not proven their addresses.
const MAX_UNPROVEN: usize = 64;
/// Upper limit of these from one address.
const MAX_UNPROVEN_PER_MEMBER: usize = 4;
/// Upper limit of all handshakes in progress.
pub(super) const MAX_PLACES: usize = MAX_OF_NON_MEMBERS + MAX_OF_MEMBERS + MAX_UNPROVEN;
/// Upper limit of the stored addresses of non-members that have proven them or that this node
/// dials.
const MAX_PROVEN: usize = 1_024;
/// Upper limit of packets per second to addresses without a recent proof. Packets to an unused
/// address of the local network stay in the socket's buffer until ARP or ND fails, after 3 s: these
/// 9,000 packets, which the kernel counts as about 800 bytes each, take a quarter of the buffer.
const ANSWERS_PER_SECOND: f64 = 3_000.0;
/// Packets that may be sent at once to unproven addresses.
const ANSWER_BURST: f64 = 1_000.0;
/// Time after the last proof of an address in which packets to it are not limited. The kernel
/// treats the neighbor as reachable for at least 15 s (`base_reachable_time`), so none of them waits
/// for ARP or ND. Longer than a dial takes.
const UNLIMITED_AFTER_PROOF: Duration = Duration::from_secs(5);
/// Unproven first packets per window from which they count as a flood. 1,000 hosts that boot at the
/// same time send fewer.
const FLOOD_THRESHOLD: u64 = 3_000;
/// Handshakes per window that get no place, or lose it, from which a problem is reported.
const CROWD_THRESHOLD: u64 = 30;

/// The first packet of a handshake.
#[derive(Clone, Copy, Debug)]
pub(super) struct FirstPacket {
    pub(super) from: IpAddr,
    /// The connection id that the sender chose. A token that proves the address contains it.
    pub(super) id: ConnectionId,
    /// Whether a token proves the address.
    pub(super) is_proven: bool,
}

/// The decision about a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// The handshake begins.
    Begin(NewHandshake),
    /// The sender has to prove its address.
    Retry,
    /// Refused: the address is proven, but there are too many handshakes.
    Refuse,
    /// Not answered: the packet has already begun a handshake.
    Ignore,
}

/// A handshake that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NewHandshake {
    /// Identifies the handshake.
    pub(super) number: u64,
    /// The budget that it uses.
    pub(super) budget: Budget,
    /// The handshake that it displaces.
    pub(super) instead_of: Option<u64>,
}

/// The budget that a handshake uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Budget {
    /// Of hosts without the secret.
    NonMember,
    /// Of hosts with the secret: members, and hosts that join.
    Member,
    /// Of members that have not proven their addresses.
    Unproven,
}

/// Counters of first packets since the start, by decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Handshakes {
    /// Handshakes that have begun.
    pub begun: u64,
    /// First packets whose sender had to prove its address.
    pub retried: u64,
    /// Refused: too many handshakes of the source were in progress, or too many non-members began
    /// one in this second.
    pub refused: u64,
    /// Not answered: the packet had already begun a handshake.
    pub repeated: u64,
    /// Handshakes that a newer one displaced: all places, or all of their source, were taken.
    pub displaced: u64,
    /// Answers to unproven addresses that were not sent, because there were too many.
    pub unanswered: u64,
}

/// The state of admission. Pure: each call passes the time.
pub(super) struct Admissions {
    members: BTreeMap<IpAddr, Instant>,
    proven: BTreeMap<IpAddr, Instant>,
    /// The pods' networks.
    overlay: Vec<IpNet>,
    /// Handshakes in progress, from the oldest to the newest.
    in_progress: BTreeMap<u64, Handshake>,
    next: u64,
    ids: FirstIds,
    /// Ids that have begun handshakes: of hosts with the secret, and of others.
    begun: [UsedIds; 2],
    /// Limits the rate of handshakes with hosts without the secret.
    non_members: Bucket,
    /// Limits the rate of packets to unproven addresses.
    answers: Bucket,
    counts: Handshakes,
    /// First packets without a proof, minus the proofs that followed. The addresses may be forged.
    unproven: Tally,
    /// Handshakes that got no place, or lost it. The addresses are proven.
    crowd: Tally,
}

/// Number of handshakes in progress, by source or by address.
type Places = BTreeMap<IpAddr, usize>;

/// Upper limits of the handshakes in progress of one budget.
#[derive(Clone, Copy)]
struct Limits {
    total: usize,
    per_source: usize,
    /// Number of the oldest of one source that its newer ones do not displace.
    protected: usize,
}

impl Budget {
    /// Returns the limits of the budget.
    const fn limits(self) -> Limits {
        let (total, per_source, protected) = match self {
            Self::NonMember => (MAX_OF_NON_MEMBERS, MAX_PER_SOURCE, PROTECTED_PER_SOURCE),
            Self::Member => (MAX_OF_MEMBERS, MAX_PER_MEMBER, PROTECTED_PER_MEMBER),
            Self::Unproven => (MAX_UNPROVEN, MAX_UNPROVEN_PER_MEMBER, MAX_UNPROVEN_PER_MEMBER),
        };
        Limits { total, per_source, protected }
    }
}

/// A handshake in progress.
struct Handshake {
    begun: Instant,
    budget: Budget,
    /// The source that it counts for.
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
            in_progress: BTreeMap::new(),
            next: 0,
            ids,
            begun: [UsedIds::new(now), UsedIds::new(now)],
            non_members: Bucket::new(now, NON_MEMBERS_PER_SECOND, NON_MEMBERS_PER_SECOND),
            answers: Bucket::new(now, ANSWERS_PER_SECOND, ANSWER_BURST),
            counts: Handshakes::default(),
            unproven: Tally::new(FLOOD_THRESHOLD, now),
            crowd: Tally::new(CROWD_THRESHOLD, now),
        }
    }

    /// Stores the address of a member, from which a packet has arrived or which is about to be
    /// dialed.
    pub(super) fn learn_member(&mut self, now: Instant, address: IpAddr) {
        learn(&mut self.members, MAX_MEMBERS, now, address);
    }

    /// Stores the address of a non-member that has proven it or is about to be dialed.
    pub(super) fn learn_non_member(&mut self, now: Instant, address: IpAddr) {
        learn(&mut self.proven, MAX_PROVEN, now, address);
    }

    /// Sets the pods' networks. They count as one source, because a host can start many pods.
    pub(super) fn learn_overlay(&mut self, networks: Vec<IpNet>) {
        self.overlay = networks;
    }

    /// Replaces the keys by which ids of hosts with the secret are recognized.
    pub(super) fn accept_ids(&mut self, ids: FirstIds) {
        self.ids = ids;
    }

    /// Returns whether a packet may be sent. Packets to members always may, and so may packets to
    /// addresses with a recent proof. A host that proved its address earlier may be gone.
    pub(super) fn may_send(&mut self, now: Instant, to: IpAddr) -> bool {
        let to = to.to_canonical();
        let is_recent =
            |proven: &Instant| now.saturating_duration_since(*proven) < UNLIMITED_AFTER_PROOF;
        let may_send = self.members.contains_key(&to)
            || self.proven.get(&to).is_some_and(is_recent)
            || self.answers.take(now);
        self.counts.unanswered += u64::from(!may_send);
        may_send
    }

    /// Decides about the first packet of a handshake. A handshake that begins has to be ended with
    /// [`Self::end`].
    pub(super) fn decide(&mut self, now: Instant, first: FirstPacket) -> Admission {
        let FirstPacket { from, is_proven, .. } = first;
        let first = FirstPacket { from: from.to_canonical(), ..first };
        let from = first.from;
        if is_proven && !self.members.contains_key(&from) {
            self.learn_non_member(now, from);
        }
        self.unproven.advance(now);
        self.crowd.advance(now);
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
            self.unproven.uncount();
        } else if admission == Admission::Retry {
            self.unproven.add(from);
        }
        admission
    }

    fn admission(&mut self, now: Instant, first: FirstPacket) -> Admission {
        let FirstPacket { from, id, is_proven } = first;
        let has_secret = self.ids.proves_secret(&id);
        let budget = match (has_secret, is_proven) {
            (true, true) => Budget::Member,
            (true, false) if self.members.contains_key(&from) => Budget::Unproven,
            (false, true) => Budget::NonMember,
            (_, false) => return Admission::Retry,
        };
        let kind = usize::from(!has_secret);
        if self.begun[kind].contains(&id) {
            return Admission::Ignore;
        }
        let source = if budget == Budget::NonMember { self.source(from) } else { from };
        let Limits { total, per_source, protected } = budget.limits();
        let places = self.places(budget);
        let is_source_full = count_of(&places, source) >= per_source;
        let is_full = places.values().sum::<usize>() >= total;
        let instead_of = match budget {
            Budget::Unproven => None,
            _ if is_source_full => {
                self.displaceable_in_source(now, (budget, source), from, protected)
            }
            _ if is_full => self.displaceable_of_all(now, budget, &places, source),
            _ => None,
        };
        let has_place = !(is_source_full || is_full) || instead_of.is_some();
        if !has_place || (budget == Budget::NonMember && !self.non_members.take(now)) {
            return if is_proven { Admission::Refuse } else { Admission::Retry };
        }
        if let Some(displaced) = instead_of.and_then(|number| self.in_progress.remove(&number)) {
            self.crowd.add(displaced.from);
            self.counts.displaced += 1;
        }
        let number = self.next;
        self.next += 1;
        self.in_progress.insert(number, Handshake { begun: now, budget, source, from });
        self.begun[kind].insert(now, id);
        Admission::Begin(NewHandshake { number, budget, instead_of })
    }

    /// Returns the number of handshakes in progress by source.
    fn places(&self, budget: Budget) -> Places {
        let mut places = BTreeMap::new();
        for handshake in self.in_progress.values().filter(|handshake| handshake.budget == budget) {
            *places.entry(handshake.source).or_default() += 1;
        }
        places
    }

    /// Returns the handshake that one of the source `newcomer` may displace: the oldest of the
    /// sources with the most.
    fn displaceable_of_all(
        &self,
        now: Instant,
        budget: Budget,
        places: &Places,
        newcomer: IpAddr,
    ) -> Option<u64> {
        let most = places.values().copied().max()?;
        let mut oldest_first = self.in_progress.iter();
        let (number, oldest) = oldest_first.find(|(_, handshake)| {
            handshake.budget == budget && count_of(places, handshake.source) == most
        })?;
        let has_more = most > count_of(places, newcomer) + 1;
        (has_more || oldest.age(now) >= MIN_DISPLACED_AGE).then_some(*number)
    }

    /// Returns the handshake that one of the address `newcomer` may displace in its source, which
    /// has no free place: the oldest of the addresses with the most. If the newcomer's address has
    /// as many, the oldest are kept.
    fn displaceable_in_source(
        &self,
        now: Instant,
        (budget, source): (Budget, IpAddr),
        newcomer: IpAddr,
        protected: usize,
    ) -> Option<u64> {
        let is_own =
            |handshake: &Handshake| handshake.budget == budget && handshake.source == source;
        let mut places = Places::new();
        for handshake in self.in_progress.values().filter(|handshake| is_own(handshake)) {
            *places.entry(handshake.from).or_default() += 1;
        }
        let most = places.values().copied().max()?;
        let mut oldest_first = self.in_progress.iter().filter(|(_, handshake)| {
            is_own(handshake) && count_of(&places, handshake.from) == most
        });
        let has_more = most > count_of(&places, newcomer) + 1;
        let (number, candidate) = oldest_first.nth(if has_more { 0 } else { protected })?;
        (has_more || candidate.age(now) >= MIN_DISPLACED_AGE_IN_SOURCE).then_some(*number)
    }

    /// Returns the source that an address counts for: what a single host may own completely. That
    /// is one IPv4 address or one IPv6 /64, all of loopback, and all addresses of pods.
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

    /// Frees the place of a handshake that has ended.
    fn end(&mut self, number: u64) {
        self.in_progress.remove(&number);
    }

    /// Returns the counters.
    pub(super) fn counts(&self) -> Handshakes {
        self.counts
    }

    /// Returns the current flood of first packets from unproven addresses, if there is one.
    pub(super) fn flood(&mut self, now: Instant) -> Option<Flood> {
        self.unproven.flood(now)
    }

    /// Returns the current excess of handshakes from proven addresses, if there is one.
    pub(super) fn crowd(&mut self, now: Instant) -> Option<Flood> {
        self.crowd.flood(now)
    }
}

fn count_of(places: &Places, source: IpAddr) -> usize {
    places.get(&source).copied().unwrap_or(0)
}

/// Stores an address; replaces the one that was learned first if there are too many.
fn learn(known: &mut BTreeMap<IpAddr, Instant>, limit: usize, now: Instant, address: IpAddr) {
    let is_new = known.insert(address.to_canonical(), now).is_none();
    if is_new && known.len() > limit {
        let oldest = known.iter().min_by_key(|(_, learned)| **learned);
        if let Some(oldest) = oldest.map(|(address, _)| *address) {
            known.remove(&oldest);
        }
    }
}

/// Admission as the accepting task, the socket and the endpoint share it.
#[derive(Clone)]
pub(super) struct SharedAdmissions(Arc<Mutex<Admissions>>);

impl SharedAdmissions {
    pub(super) fn new(ids: FirstIds) -> Self {
        Self(Arc::new(Mutex::new(Admissions::new(Instant::now(), ids))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Admissions> {
        // A panic leaves no half-changed state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a guard that keeps the handshake's place until it is dropped.
    pub(super) fn place(&self, number: u64) -> HandshakePlace {
        HandshakePlace { admissions: self.clone(), number }
    }
}

/// The place of a handshake in progress.
pub(super) struct HandshakePlace {
    admissions: SharedAdmissions,
    number: u64,
}

impl Drop for HandshakePlace {
    fn drop(&mut self) {
        self.admissions.lock().end(self.number);
    }
}
