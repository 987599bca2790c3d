//! Who is alive: SWIM, by foca, wrapped once and exposed nowhere else.
//!
//! foca is driven sans-IO: packets and due timers go in, packets, timers and notices come out. Three of
//! its traps are handled here and only here: a node that refuted a suspicion is still told that it is
//! down (the notice is dropped), every heal renews identities (peers are keyed by node, a renewal is
//! nothing), and its settings depend on the cluster's size (they follow it). What is down here is an
//! opinion: nothing in this module may touch ownership or the kernel.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    num::{NonZeroU8, NonZeroU32, NonZeroUsize},
    time::Duration,
};

use bytes::Bytes;
use foca::{
    AccumulatingRuntime, Codec as _, Config, Foca, Member, Message, NoCustomBroadcast,
    OwnedNotification, PeriodicParams, State, Timer,
};
use rand::rngs::StdRng;
use serde::Serialize;

use crate::{
    model::{Identity, Incarnation, NodeId, Suspicion, Time},
    wire::{Buckets, DATAGRAM_MAX, SwimCodec},
};

use super::rank::state_hash;

/// Largest SWIM packet: a datagram less the frame around it, with room for the frame to grow.
const PACKET_MAX: usize = DATAGRAM_MAX - 20;

/// A suspicion of this node names one of its own refutations; the last ones may not have been sent yet.
pub(super) const UNSENT_REFUTATIONS: u16 = 16;

/// A timer that is served so much too late tells of this process, not of its peers.
const PAUSE: Duration = Duration::from_millis(500);
/// What waits in the socket is read within this.
const CATCH_UP: Duration = Duration::from_millis(250);

/// A member as gossip sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    Alive,
    Suspect,
    Down,
}

/// What the rest of the node learns from gossip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Send {
        to: NodeId,
        packet: Bytes,
    },
    Up(NodeId),
    /// This node's own probe of a member failed. It will be down unless it refutes that.
    Suspect(Suspicion),
    Down(NodeId),
    /// Somebody believed us dead; we go on under this identity.
    Renewed(Identity),
}

pub struct Membership {
    foca: Foca<Identity, SwimCodec, StdRng, NoCustomBroadcast>,
    runtime: AccumulatingRuntime<Identity>,
    /// Armed timers by due time; the number keeps equal times in order of arming.
    timers: BTreeMap<(Time, u64), Timer<Identity>>,
    armed: u64,
    /// The timer of the next gossip and its delay, while there is nothing to gossip about.
    idle_gossip: Option<(Duration, Timer<Identity>)>,
    /// The cluster size that foca's settings were made for.
    tuned_for: u32,
    /// foca's own count of this node's refutations, as last sent.
    refutation: u16,
    notices: VecDeque<Notice>,
    /// Members held as alive or suspect, this node excluded: foca's own search is linear.
    active: BTreeMap<NodeId, Identity>,
    /// One per bucket, always that of `active`.
    hashes: [u64; Buckets::COUNT],
}

impl Membership {
    pub fn new(identity: Identity, rng: StdRng) -> Self {
        Self {
            foca: Foca::new(identity, settings(1), rng, SwimCodec),
            runtime: AccumulatingRuntime::new(),
            timers: BTreeMap::new(),
            armed: 0,
            idle_gossip: None,
            tuned_for: 1,
            refutation: 0,
            notices: VecDeque::new(),
            active: BTreeMap::new(),
            hashes: [0; Buckets::COUNT],
        }
    }

    pub fn identity(&self) -> Identity {
        *self.foca.identity()
    }

    /// A SWIM packet from an authenticated peer.
    pub fn handle_packet(&mut self, now: Time, packet: &[u8]) {
        let result = self.foca.handle_data(packet, &mut self.runtime);
        self.collect(now, "packet", result);
    }

    /// Members that somebody credible holds as alive, or that talk to us.
    pub fn introduce(&mut self, now: Time, identities: impl Iterator<Item = Identity>) {
        let me = self.identity().node;
        let members: Vec<_> = identities.filter(|id| id.node != me).map(Member::alive).collect();
        let result = self.foca.apply_many(members.into_iter(), true, &mut self.runtime);
        self.collect(now, "introduce", result);
    }

    /// Whether this node holds the member as something else than active in this identity.
    pub fn is_news(&self, identity: &Identity) -> bool {
        identity.node != self.identity().node && self.active.get(&identity.node) != Some(identity)
    }

    /// Whether this node holds the member as active in this identity.
    pub fn holds_alive(&self, identity: &Identity) -> bool {
        self.active.get(&identity.node) == Some(identity)
    }

    /// foca's count of this node's refutations, as last sent.
    pub const fn refutation(&self) -> u16 {
        self.refutation
    }

    /// Goes on under a newer identity, because a peer believes that this one is down.
    pub fn renew(&mut self, now: Time) {
        if let Some(identity) = foca::Identity::renew(&self.identity()) {
            self.adopt(now, identity);
        }
    }

    /// Goes on under `identity`, which must be newer than the present one.
    pub fn adopt(&mut self, now: Time, identity: Identity) {
        let result = self.foca.change_identity(identity, &mut self.runtime);
        self.notices.push_back(Notice::Renewed(identity));
        self.collect(now, "change identity", result);
    }

    /// Somebody suspects this node. Says under which count of refutations it is alive all the same.
    pub fn refute(&mut self, now: Time, suspicion: &Suspicion) -> Suspicion {
        // A suspicion names a count that this node has told before.
        let is_told = suspicion.refutation <= self.refutation.saturating_add(UNSENT_REFUTATIONS);
        if suspicion.identity == self.identity() && is_told {
            let Suspicion { identity, refutation } = *suspicion;
            let suspect = Member::new(identity, refutation, State::Suspect);
            let result = self.foca.apply_many([suspect].into_iter(), false, &mut self.runtime);
            self.collect(now, "refute", result);
        }
        Suspicion { identity: self.identity(), refutation: self.refutation }
    }

    /// What is known of those of these identities that are held as down.
    pub fn held_down(&self, identities: &[Identity]) -> Vec<Suspicion> {
        let wanted: BTreeSet<&Identity> = identities
            .iter()
            .filter(|identity| !self.active.contains_key(&identity.node))
            .collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        self.foca
            .iter_membership_state()
            .filter(|member| member.state() == State::Down && wanted.contains(member.id()))
            .map(|member| Suspicion { identity: *member.id(), refutation: member.incarnation() })
            .collect()
    }

    /// A peer holds these members as down: they are, unless they say otherwise.
    pub fn suspect(&mut self, now: Time, suspicions: impl Iterator<Item = Suspicion>) {
        let suspect =
            |doubt: Suspicion| Member::new(doubt.identity, doubt.refutation, State::Suspect);
        let members: Vec<_> = suspicions.map(suspect).collect();
        let result = self.foca.apply_many(members.into_iter(), true, &mut self.runtime);
        self.collect(now, "suspect", result);
    }

    /// A suspect answered.
    pub fn absolve(&mut self, now: Time, alive: &Suspicion) {
        let member = Member::new(alive.identity, alive.refutation, State::Alive);
        let result = self.foca.apply_many([member].into_iter(), true, &mut self.runtime);
        self.collect(now, "absolve", result);
    }

    /// Tells the others that this node goes away on purpose.
    pub fn leave(&mut self, now: Time) {
        let result = self.foca.leave_cluster(&mut self.runtime);
        self.collect(now, "leave", result);
    }

    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.keys().next().map(|(due, _)| *due)
    }

    /// Serves every timer that is due, in foca's own order of preference.
    pub fn handle_timeout(&mut self, now: Time) {
        self.make_up_for_a_pause(now);
        let later = self.timers.split_off(&(now + Duration::from_nanos(1), 0));
        let mut due: Vec<_> = std::mem::replace(&mut self.timers, later).into_values().collect();
        due.sort();
        for timer in due {
            let result = self.foca.handle_timer(timer, &mut self.runtime);
            self.collect(now, "timer", result);
        }
    }

    /// A process that was frozen or starved has not heard the answers that came meanwhile: its timers prove
    /// nothing about anybody. All of them move to after those answers, at their old distances.
    fn make_up_for_a_pause(&mut self, now: Time) {
        let late = self.next_timeout().map_or(Duration::ZERO, |due| now.since(due));
        if late > PAUSE {
            let timers = std::mem::take(&mut self.timers).into_iter();
            let moved =
                timers.map(|((due, number), timer)| ((due + late + CATCH_UP, number), timer));
            self.timers = moved.collect();
        }
    }

    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    pub fn is_active(&self, node: NodeId) -> bool {
        self.active.contains_key(&node)
    }

    /// As far as gossip has heard of a node; the first possible one, if it has not.
    pub fn newest_incarnation(&self, node: NodeId) -> Incarnation {
        let known = self.foca.iter_membership_state().map(|member| *member.id());
        let incarnations = known.filter(|id| id.node == node).map(|id| id.incarnation);
        incarnations.max().unwrap_or_default()
    }

    /// Members held as alive or suspect, without this node.
    pub fn others(&self) -> impl Iterator<Item = NodeId> {
        self.active.keys().copied()
    }

    /// Members held as alive or suspect, this node included, in order of their ids.
    pub fn active(&self) -> BTreeMap<NodeId, Identity> {
        let mut active = self.active.clone();
        active.insert(self.identity().node, self.identity());
        active
    }

    /// Gossip's opinion on everybody it has heard of, this node excluded.
    pub fn opinions(&self) -> BTreeMap<NodeId, Liveness> {
        let mut opinions = BTreeMap::new();
        for member in self.foca.iter_membership_state() {
            let liveness = match member.state() {
                State::Alive => Liveness::Alive,
                State::Suspect => Liveness::Suspect,
                State::Down => Liveness::Down,
            };
            // An old identity may linger as down beside the one that replaced it.
            opinions
                .entry(member.id().node)
                .and_modify(|known: &mut Liveness| *known = liveness.min(*known))
                .or_insert(liveness);
        }
        opinions
    }

    /// Another one whenever an opinion has changed.
    pub fn opinions_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for member in self.foca.iter_membership_state() {
            (member.id(), member.state() as u8).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// One hash per bucket over the active members and this node, without those who are `gone`; each of
    /// them is named once.
    pub fn hashes(&self, gone: impl Iterator<Item = NodeId>) -> [u64; Buckets::COUNT] {
        let mut hashes = self.hashes;
        let there = gone.filter_map(|node| self.active.get(&node));
        for identity in there.chain([&self.identity()]) {
            hashes[Buckets::of_node(identity.node)] ^= identity_hash(identity);
        }
        hashes
    }

    fn activate(&mut self, identity: Identity) {
        self.deactivate(identity.node);
        self.hashes[Buckets::of_node(identity.node)] ^= identity_hash(&identity);
        self.active.insert(identity.node, identity);
    }

    fn deactivate(&mut self, node: NodeId) {
        if let Some(before) = self.active.remove(&node) {
            self.hashes[Buckets::of_node(node)] ^= identity_hash(&before);
        }
    }

    fn collect(&mut self, now: Time, what: &'static str, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            // All are survivable: stale packets, packets of our own, an interrupted probe cycle.
            tracing::trace!(what, %error, "swim");
        }
        // Under a new identity foca is at rest until somebody is heard from: nobody would be found dead.
        if let Err(error) = self.foca.apply_many(std::iter::empty(), false, &mut self.runtime) {
            tracing::debug!(%error, "swim");
        }
        while let Some((mut after, timer)) = self.runtime.to_schedule() {
            match &timer {
                Timer::PeriodicGossip(_) => {
                    self.idle_gossip = Some((after, timer));
                    continue;
                }
                // foca's own period cannot be changed while it runs.
                Timer::ProbeRandomMember(_) | Timer::PeriodicAnnounce(_) => {
                    after = after.mul_f64(self.stretch());
                }
                Timer::ChangeSuspectToDown { member_id, incarnation, .. } => {
                    let suspicion = Suspicion { identity: *member_id, refutation: *incarnation };
                    self.notices.push_back(Notice::Suspect(suspicion));
                }
                _ => {}
            }
            self.arm(now + after, timer);
        }
        if self.foca.updates_backlog() > 0
            && let Some((after, timer)) = self.idle_gossip.take()
        {
            self.arm(now + after, timer);
        }
        while let Some(notification) = self.runtime.to_notify() {
            self.on_notification(notification);
        }
        while let Some((to, packet)) = self.runtime.to_send() {
            let header = SwimCodec.decode_header(packet.as_ref());
            if let Ok(header) = &header
                && header.src == self.identity()
            {
                self.refutation = header.src_incarnation;
            }
            if header.is_ok_and(|header| self.is_stray_down_notice(&to, &header.message)) {
                tracing::trace!(to = %to.node, "dropped a down notice to a member that is active");
                continue;
            }
            self.notices.push_back(Notice::Send { to: to.node, packet });
        }
        debug_assert!(
            self.foca.num_members() == self.active.len()
                && self.foca.iter_members().all(|m| self.active.get(&m.id().node) == Some(m.id())),
            "what foca told is what it holds"
        );
        self.tune();
    }

    fn arm(&mut self, at: Time, timer: Timer<Identity>) {
        self.armed += 1;
        self.timers.insert((at, self.armed), timer);
    }

    fn on_notification(&mut self, notification: OwnedNotification<Identity>) {
        match notification {
            OwnedNotification::MemberUp(id) => {
                self.activate(id);
                self.notices.push_back(Notice::Up(id.node));
            }
            OwnedNotification::Rename(_, id) if self.active.contains_key(&id.node) => {
                self.activate(id);
            }
            OwnedNotification::MemberDown(id) => {
                self.deactivate(id.node);
                self.notices.push_back(Notice::Down(id.node));
            }
            OwnedNotification::Rejoin(identity) => {
                self.notices.push_back(Notice::Renewed(identity));
            }
            _ => {}
        }
    }

    /// foca sends "you are down" also when the suspicion it stems from was refuted in time.
    fn is_stray_down_notice(&self, to: &Identity, message: &Message<Identity>) -> bool {
        *message == Message::TurnUndead && self.active.get(&to.node) == Some(to)
    }

    /// How much slower than in a small cluster members are probed and announced to.
    fn stretch(&self) -> f64 {
        f64::max(self.foca.num_members() as f64 / PROBED_EACH_SECOND, 1.0)
    }

    /// Follows the cluster's size when it has doubled or halved.
    fn tune(&mut self) {
        let size = u32::try_from(self.foca.num_members() + 1).unwrap_or(u32::MAX);
        if size >= self.tuned_for.saturating_mul(2) || size <= self.tuned_for / 2 {
            match self.foca.set_config(settings(size)) {
                Ok(()) => self.tuned_for = size,
                Err(error) => tracing::error!(%error, size, "swim settings refused"),
            }
        }
    }
}

fn identity_hash(Identity { node, incarnation }: &Identity) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(node.as_bytes());
    bytes[8..12].copy_from_slice(&incarnation.starts.to_le_bytes());
    bytes[12..].copy_from_slice(&incarnation.renewals.to_le_bytes());
    state_hash(&bytes)
}

impl foca::Identity for Identity {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        let mut renewed = *self;
        renewed.incarnation.renewals = renewed.incarnation.renewals.checked_add(1)?;
        Some(renewed)
    }

    fn addr(&self) -> NodeId {
        self.node
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.incarnation > adversary.incarnation
    }
}

/// Clusters up to this size are probed once a second by each member; larger ones ever less often, so that a
/// member meets each of the others about as often as before and their connections stay open.
const PROBED_EACH_SECOND: f64 = 250.0;
/// How long a member is suspected before it is called down. Suspects are asked on a stream, and a call fails
/// in less than that; a starved CPU is not a death. In a large cluster it need not take longer.
const SUSPECTED_MIN: Duration = Duration::from_secs(6);
const SUSPECTED_MAX: Duration = Duration::from_secs(8);

fn settings(cluster_size: u32) -> Config {
    const ONE: NonZeroUsize = NonZeroUsize::MIN;
    const TWO: NonZeroUsize = ONE.saturating_add(1);
    const PACKET: NonZeroUsize = NonZeroUsize::new(PACKET_MAX).unwrap();
    const TRANSMISSIONS_MIN: NonZeroU8 = NonZeroU8::new(3).unwrap();
    const THREE: NonZeroUsize = ONE.saturating_add(2);
    let every_10_s =
        |num_members| Some(PeriodicParams { frequency: Duration::from_secs(10), num_members });
    let size = NonZeroU32::new(cluster_size).unwrap_or(NonZeroU32::MIN);
    let lan = Config::new_lan(size);
    Config {
        suspect_to_down_after: lan.suspect_to_down_after.clamp(SUSPECTED_MIN, SUSPECTED_MAX),
        max_transmissions: lan.max_transmissions.max(TRANSMISSIONS_MIN),
        max_packet_size: PACKET,
        // News travel by push; this carries suspicions and their refutations.
        periodic_gossip: Some(PeriodicParams {
            frequency: Duration::from_millis(500),
            num_members: THREE,
        }),
        periodic_announce: every_10_s(ONE),
        periodic_announce_to_down_members: every_10_s(TWO),
        ..lan
    }
}

#[cfg(test)]
mod tests;
