//! Liveness of members: SWIM, implemented by foca. No other module uses foca, except for its wire codec.
//!
//! foca runs without IO: packets and due timers go in; packets, timers and notices come out. Three
//! properties of foca are handled here:
//!
//! - It sends "you are down" to a node even if the node has refuted the suspicion. Such packets are dropped.
//! - After a healed partition nodes renew their identities. Peers are keyed by node, so a renewal is no new
//!   peer.
//! - Its settings depend on the size of the cluster. They are adapted to it.
//!
//! Liveness is an estimate: nothing in this module may change ownership or the kernel.

mod contacts;
mod identity;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    num::{NonZeroU8, NonZeroU32, NonZeroUsize},
    time::Duration,
};

use bytes::Bytes;
use foca::{
    AccumulatingRuntime, Config, Foca, Member, Message, NoCustomBroadcast, OwnedNotification,
    PeriodicParams, State, Timer,
};
use rand::{SeedableRng as _, rngs::StdRng};

use crate::{
    model::{Identity, Incarnation, Liveness, NodeId, Suspicion, Time},
    wire::{Buckets, DATAGRAM_MAX, ROOTS_LEN, SwimCodec, SwimPacket},
};

use self::{contacts::Contacts, identity::identity_hash};

/// Maximum size of a SWIM packet in bytes: a datagram without the frame around it, the hashes and a reserve
/// for its growth.
const PACKET_MAX: usize = DATAGRAM_MAX - ROOTS_LEN - 20;

/// A suspicion of this node may name a refutation count this much above the last one sent, because foca
/// counts refutations before it sends them.
pub(super) const UNSENT_REFUTATIONS: u16 = 16;

/// Timers that are this late indicate that this process was frozen, not that peers are silent.
const FREEZE_THRESHOLD: Duration = Duration::from_millis(500);
/// Time to read the packets that arrived while the process was frozen.
const SOCKET_DRAIN_TIME: Duration = Duration::from_millis(250);

/// An event or packet from gossip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Send this packet to a member.
    Send {
        /// The recipient.
        to: NodeId,
        /// The SWIM packet.
        packet: Bytes,
    },
    /// A member is active: alive or suspect.
    Up(NodeId),
    /// This node's own probe of a member failed. The member will be down unless it refutes the suspicion.
    Suspect(Suspicion),
    /// A member is down.
    Down(NodeId),
    /// A peer considered this node down; it continues under this identity.
    Renewed(Identity),
}

/// This node's SWIM instance.
pub struct Membership {
    foca: Foca<Identity, SwimCodec, StdRng, NoCustomBroadcast>,
    runtime: AccumulatingRuntime<Identity>,
    /// Pending timers by due time; the number keeps timers of equal due time in order.
    timers: BTreeMap<(Time, u64), Timer<Identity>>,
    timers_armed: u64,
    /// The next gossip timer and its delay, while there is nothing to gossip.
    idle_gossip: Option<(Duration, Timer<Identity>)>,
    /// The cluster size that foca's settings were made for.
    tuned_for: u32,
    /// The refutation count of this node, as last sent; foca calls it the incarnation.
    refutation: u16,
    notices: VecDeque<Notice>,
    /// Members considered alive or suspect, without this node. A lookup in foca would be linear.
    active: BTreeMap<NodeId, Identity>,
    /// Hashes of the buckets, kept consistent with `active`.
    hashes: [u64; Buckets::COUNT],
    /// Whom foca may contact, kept consistent with `active`.
    contacts: Contacts,
}

impl Membership {
    /// Creates an instance that knows no other member.
    pub fn new(identity: Identity, mut rng: StdRng) -> Self {
        let contacts = Contacts::new(identity.node, StdRng::from_rng(&mut rng));
        Self {
            foca: Foca::new(identity, settings(1), rng, SwimCodec),
            runtime: AccumulatingRuntime::new(),
            timers: BTreeMap::new(),
            timers_armed: 0,
            idle_gossip: None,
            tuned_for: 1,
            refutation: 0,
            notices: VecDeque::new(),
            active: BTreeMap::new(),
            hashes: [0; Buckets::COUNT],
            contacts,
        }
    }

    /// Returns this node's present identity.
    pub fn identity(&self) -> Identity {
        *self.foca.identity()
    }

    /// Handles a SWIM packet. The caller has checked its sender.
    pub fn handle_packet(&mut self, now: Time, packet: &[u8]) {
        let result = self.foca.handle_data(packet, &mut self.runtime);
        self.collect(now, "packet", result);
        self.note_relayed_answer(now, packet);
    }

    /// Notes that a message of a node has arrived.
    pub fn meet(&mut self, node: NodeId) {
        self.contacts.meet(node);
    }

    /// Adds members that a vetted peer considers alive, or that have sent a message to this node.
    pub fn introduce(&mut self, now: Time, identities: impl Iterator<Item = Identity>) {
        let me = self.identity().node;
        let identities: Vec<Identity> = identities.collect();
        self.notify_held_down(&identities);
        let members: Vec<_> =
            identities.into_iter().filter(|id| id.node != me).map(Member::alive).collect();
        let result = self.foca.apply_many(members.into_iter(), true, &mut self.runtime);
        self.collect(now, "introduce", result);
    }

    /// Returns whether `identity` is of another node and not the one considered active.
    pub fn is_new(&self, identity: &Identity) -> bool {
        identity.node != self.identity().node && self.active.get(&identity.node) != Some(identity)
    }

    /// Returns whether the member is considered active in exactly this identity.
    pub fn holds_alive(&self, identity: &Identity) -> bool {
        self.active.get(&identity.node) == Some(identity)
    }

    /// Returns the refutation count of this node, as last sent.
    pub const fn refutation(&self) -> u16 {
        self.refutation
    }

    /// Renews this node's identity, because a peer holds the present one as down.
    pub fn renew(&mut self, now: Time) {
        if let Some(identity) = foca::Identity::renew(&self.identity()) {
            self.adopt(now, identity);
        }
    }

    /// Continues under `identity`, which must be newer than the present one.
    pub fn adopt(&mut self, now: Time, identity: Identity) {
        let result = self.foca.change_identity(identity, &mut self.runtime);
        self.notices.push_back(Notice::Renewed(identity));
        self.collect(now, "change identity", result);
    }

    /// Refutes a suspicion of this node. Returns its identity and its refutation count afterwards.
    pub fn refute(&mut self, now: Time, suspicion: &Suspicion) -> Suspicion {
        // A valid suspicion names a refutation count that this node has sent, or is about to send.
        let is_plausible =
            suspicion.refutation <= self.refutation.saturating_add(UNSENT_REFUTATIONS);
        if suspicion.identity == self.identity() && is_plausible {
            let Suspicion { identity, refutation } = *suspicion;
            let suspect = Member::new(identity, refutation, State::Suspect);
            let result = self.foca.apply_many([suspect].into_iter(), false, &mut self.runtime);
            self.collect(now, "refute", result);
        }
        Suspicion { identity: self.identity(), refutation: self.refutation }
    }

    /// Returns which of these identities are held as down, with their refutation counts.
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

    /// Marks members that a peer considers down as suspects. They go down unless they refute it.
    pub fn suspect(&mut self, now: Time, suspicions: impl Iterator<Item = Suspicion>) {
        let suspicions: Vec<Suspicion> = suspicions.collect();
        let suspect = |suspicion: &Suspicion| {
            Member::new(suspicion.identity, suspicion.refutation, State::Suspect)
        };
        let members = suspicions.iter().map(suspect);
        let result = self.foca.apply_many(members, true, &mut self.runtime);
        self.collect(now, "suspect", result);
        let nodes = suspicions.iter().map(|suspicion| suspicion.identity.node);
        self.contacts.doubt(nodes.filter(|node| self.active.contains_key(node)));
    }

    /// Ends a suspicion, because the suspect answered.
    pub fn clear_suspicion(&mut self, now: Time, alive: &Suspicion) {
        let member = Member::new(alive.identity, alive.refutation, State::Alive);
        let result = self.foca.apply_many([member].into_iter(), true, &mut self.runtime);
        self.collect(now, "clear suspicion", result);
    }

    /// Announces that this node leaves.
    pub fn leave(&mut self, now: Time) {
        let result = self.foca.leave_cluster(&mut self.runtime);
        self.collect(now, "leave", result);
    }

    /// Returns when [`Self::handle_timeout`] is due.
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.keys().next().map(|(due, _)| *due)
    }

    /// Handles all due timers, in the order that foca defines.
    pub fn handle_timeout(&mut self, now: Time) {
        self.postpone_overdue_timers(now);
        let later = self.timers.split_off(&(now + Duration::from_nanos(1), 0));
        let mut due: Vec<_> = std::mem::replace(&mut self.timers, later).into_values().collect();
        due.sort();
        for timer in due {
            if let Timer::ProbeRandomMember(_) = timer {
                self.probe(now, timer);
                continue;
            }
            let result = self.foca.handle_timer(timer, &mut self.runtime);
            self.collect(now, "timer", result);
        }
    }

    /// Postpones all timers if the process was frozen. Answers from that time are still unread, so expired
    /// timers do not prove that a peer is silent. The distances between timers remain.
    fn postpone_overdue_timers(&mut self, now: Time) {
        let late = self.next_timeout().map_or(Duration::ZERO, |due| now.since(due));
        if late > FREEZE_THRESHOLD {
            let timers = std::mem::take(&mut self.timers).into_iter();
            let moved = timers
                .map(|((due, number), timer)| ((due + late + SOCKET_DRAIN_TIME, number), timer));
            self.timers = moved.collect();
        }
    }

    /// Returns the next notice, oldest first.
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Returns whether the member is held as alive or suspect.
    pub fn is_active(&self, node: NodeId) -> bool {
        self.active.contains_key(&node)
    }

    /// Returns the identity of a member held as alive or suspect.
    pub fn active_as(&self, node: NodeId) -> Option<Identity> {
        self.active.get(&node).copied()
    }

    /// Returns the newest incarnation of a node in gossip, or the default one if gossip does not know the
    /// node.
    pub fn newest_incarnation(&self, node: NodeId) -> Incarnation {
        let known = self.foca.iter_membership_state().map(|member| *member.id());
        let incarnations = known.filter(|id| id.node == node).map(|id| id.incarnation);
        incarnations.max().unwrap_or_default()
    }

    /// Returns the identities of the members held as alive or suspect, without this node.
    pub const fn identities(&self) -> &BTreeMap<NodeId, Identity> {
        &self.active
    }

    /// Returns the neighbors: the members that this node probes and gossips with.
    pub fn neighbors(&self) -> &BTreeSet<NodeId> {
        self.contacts.neighbors()
    }

    /// Returns the neighbors to which this node passes on facts of other members.
    pub fn relays(&self) -> &BTreeSet<NodeId> {
        self.contacts.relays()
    }

    /// Returns the members held as alive or suspect, with this node, in order of their ids.
    pub fn active(&self) -> BTreeMap<NodeId, Identity> {
        let mut active = self.active.clone();
        active.insert(self.identity().node, self.identity());
        active
    }

    /// Returns the liveness of all members that gossip knows, without this node.
    pub fn opinions(&self) -> BTreeMap<NodeId, Liveness> {
        let mut opinions = BTreeMap::new();
        for member in self.foca.iter_membership_state() {
            let liveness = match member.state() {
                State::Alive => Liveness::Alive,
                State::Suspect => Liveness::Suspect,
                State::Down => Liveness::Down,
            };
            // An older identity may remain as down beside the one that replaced it.
            opinions
                .entry(member.id().node)
                .and_modify(|known: &mut Liveness| *known = liveness.min(*known))
                .or_insert(liveness);
        }
        opinions
    }

    /// Returns a hash that differs whenever a member's identity or liveness has changed.
    pub fn opinions_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for member in self.foca.iter_membership_state() {
            (member.id(), member.state() as u8).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Returns one hash per bucket over the active members and this node, without some of the active members.
    pub fn hashes(&self, without: impl Iterator<Item = Identity>) -> [u64; Buckets::COUNT] {
        let mut hashes = self.hashes;
        for identity in without.chain([self.identity()]) {
            hashes[Buckets::of_node(identity.node)] ^= identity_hash(&identity);
        }
        hashes
    }

    fn activate(&mut self, identity: Identity) {
        self.deactivate(identity.node);
        self.hashes[Buckets::of_node(identity.node)] ^= identity_hash(&identity);
        self.active.insert(identity.node, identity);
        self.contacts.activate(identity.node);
    }

    fn deactivate(&mut self, node: NodeId) {
        if let Some(before) = self.active.remove(&node) {
            self.hashes[Buckets::of_node(node)] ^= identity_hash(&before);
            self.contacts.deactivate(node);
        }
    }

    fn collect(&mut self, now: Time, what: &'static str, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            // All errors are harmless: stale packets, this node's own packets, an interrupted probe cycle.
            tracing::trace!(what, %error, "swim");
        }
        // After an identity change foca sends no probes until a packet arrives, so it would detect no dead
        // member. Applying an empty update restarts them.
        if let Err(error) = self.foca.apply_many(std::iter::empty(), false, &mut self.runtime) {
            tracing::debug!(%error, "swim");
        }
        while let Some((after, timer)) = self.runtime.to_schedule() {
            match &timer {
                Timer::PeriodicGossip(_) => {
                    self.idle_gossip = Some((after, timer));
                    continue;
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
            self.handle_notification(notification);
        }
        while let Some((to, packet)) = self.runtime.to_send() {
            let Ok(decoded) = SwimPacket::decode(&packet) else { continue };
            if decoded.header.src == self.identity() {
                self.refutation = decoded.header.src_incarnation;
            }
            if self.is_stray_down_notice(&to, &decoded.header.message) {
                tracing::trace!(to = %to.node, "dropped a down notice for an active member");
                continue;
            }
            self.send(&to, packet, decoded);
        }
        debug_assert!(
            self.foca.num_members() == self.active.len()
                && self.foca.iter_members().all(|m| self.active.get(&m.id().node) == Some(m.id())),
            "`active` equals foca's member list"
        );
        self.tune();
    }

    fn arm(&mut self, at: Time, timer: Timer<Identity>) {
        self.timers_armed += 1;
        let key = (at, self.timers_armed);
        self.contacts.note_timer(key, &timer);
        self.timers.insert(key, timer);
    }

    fn handle_notification(&mut self, notification: OwnedNotification<Identity>) {
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

    /// Returns whether a packet tells an active member that it is down. foca sends it even after a timely
    /// refutation.
    fn is_stray_down_notice(&self, to: &Identity, message: &Message<Identity>) -> bool {
        *message == Message::TurnUndead && self.active.get(&to.node) == Some(to)
    }

    /// Adapts foca's settings when the cluster's size has doubled or halved.
    fn tune(&mut self) {
        let size = u32::try_from(self.foca.num_members() + 1).unwrap_or(u32::MAX);
        if size >= self.tuned_for.saturating_mul(2) || size <= self.tuned_for / 2 {
            match self.foca.set_config(settings(size)) {
                Ok(()) => self.tuned_for = size,
                Err(error) => tracing::error!(%error, size, "foca settings rejected"),
            }
        }
    }
}

/// Bounds of the time from suspicion to down. Suspects are queried on a stream, and such a call fails in less
/// time; a short CPU shortage must not make a member down. Large clusters need no longer time.
const MIN_SUSPICION: Duration = Duration::from_secs(6);
const MAX_SUSPICION: Duration = Duration::from_secs(8);

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
        suspect_to_down_after: lan.suspect_to_down_after.clamp(MIN_SUSPICION, MAX_SUSPICION),
        max_transmissions: lan.max_transmissions.max(TRANSMISSIONS_MIN),
        max_packet_size: PACKET,
        // Facts travel by push; gossip carries suspicions and refutations.
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
