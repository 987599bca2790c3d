//! Whom SWIM contacts: neighbors only.
//!
//! foca chooses its contacts from all members, so that after some time each node would have a connection to
//! each other one. Here the contacts that it begins go to the neighborhood instead:
//!
//! - A member that is no neighbor is passed over as if it had answered its probe. Its own neighbors probe it.
//!   A node that has missed their verdict learns it from a comparison, and probes the member itself.
//! - A neighbor is asked to probe a silent member indirectly.
//! - Gossip and announcements go to random neighbors.
//!
//! Answers, and announcements to members that are down, go where foca sends them.

use std::collections::BTreeSet;

use bytes::Bytes;
use foca::{Header, Message, ProbeNumber, State, Timer};
use rand::{rngs::StdRng, seq::SliceRandom as _};

use crate::{
    core::neighborhood::Neighborhood,
    model::{Identity, NodeId, Time},
    wire::SwimPacket,
};

use super::{Membership, Notice};

/// Members that are passed over in one turn of the event loop. A step scans foca's list of members.
const STEPS_PER_TURN: usize = 64;
/// Limit of the members that are probed because peers hold them as down. A probe of one scans foca's list.
const MAX_DOUBTED: usize = 64;
/// Limit of the members that one message makes this node notify of their being held as down.
const MAX_DOWN_NOTICES: usize = 2;

/// The neighborhood, and the state of the present probe.
pub(super) struct Contacts {
    neighborhood: Neighborhood,
    rng: StdRng,
    /// Members that a peer holds as down and this node as active.
    doubted: BTreeSet<NodeId>,
    /// The neighbors that were asked to probe the present target.
    helpers: BTreeSet<NodeId>,
    /// The target of the present probe and its number, if it is passed over.
    passed_over: Option<(Identity, ProbeNumber)>,
    /// The keys of the timers that end the present probe, in the order in which foca armed them.
    probe_timers: Vec<(Time, u64)>,
}

impl Contacts {
    pub(super) fn new(me: NodeId, rng: StdRng) -> Self {
        Self {
            neighborhood: Neighborhood::new(me),
            rng,
            doubted: BTreeSet::new(),
            helpers: BTreeSet::new(),
            passed_over: None,
            probe_timers: Vec::new(),
        }
    }

    pub(super) const fn neighbors(&self) -> &BTreeSet<NodeId> {
        self.neighborhood.neighbors()
    }

    pub(super) const fn relays(&self) -> &BTreeSet<NodeId> {
        self.neighborhood.relays()
    }

    /// Notes a timer that foca has armed.
    pub(super) fn note_timer(&mut self, key: (Time, u64), timer: &Timer<Identity>) {
        if matches!(timer, Timer::SendIndirectProbe { .. } | Timer::ProbeRandomMember(_)) {
            self.probe_timers.push(key);
        }
    }

    /// Notes that a peer holds active members as down.
    pub(super) fn doubt(&mut self, members: impl Iterator<Item = NodeId>) {
        let room = MAX_DOUBTED.saturating_sub(self.doubted.len());
        self.doubted.extend(members.take(room));
    }

    /// Notes that a message of a node has arrived.
    pub(super) fn meet(&mut self, node: NodeId) {
        self.neighborhood.meet(node);
    }

    /// Notes that a member is active.
    pub(super) fn activate(&mut self, node: NodeId) {
        self.neighborhood.insert(node);
    }

    /// Notes that a member is no longer active.
    pub(super) fn deactivate(&mut self, node: NodeId) {
        self.neighborhood.remove(node);
        self.doubted.remove(&node);
    }
}

impl Membership {
    /// Whether this node probes the member: a neighbor, or a suspect that a peer holds as down.
    fn probes(&mut self, member: &Identity) -> bool {
        if self.contacts.neighborhood.neighbors().contains(&member.node) {
            return true;
        }
        if !self.contacts.doubted.contains(&member.node) {
            return false;
        }
        let mut suspects = self.foca.iter_members().filter(|m| m.state() == State::Suspect);
        let is_suspect = suspects.any(|suspect| suspect.id() == member);
        if !is_suspect {
            self.contacts.doubted.remove(&member.node);
        }
        is_suspect
    }

    /// Tells members that a peer holds as active and this node as down, so that they renew their identities.
    /// No other node has a reason to tell them: those that hold them as down are no neighbors of theirs.
    pub(super) fn notify_held_down(&mut self, active_elsewhere: &[Identity]) {
        let mut held_down = self.held_down(active_elsewhere);
        let (chosen, _) = held_down.partial_shuffle(&mut self.contacts.rng, MAX_DOWN_NOTICES);
        for held in chosen {
            let dst = held.identity;
            let header = Header {
                src: self.identity(),
                src_incarnation: self.refutation,
                dst,
                message: Message::TurnUndead,
            };
            let packet = SwimPacket::bare(header).encode().into();
            self.notices.push_back(Notice::Send { to: dst.node, packet });
        }
    }

    /// Probes the next neighbor in foca's order. If there are many other members before it, the probe
    /// continues in the next turn.
    pub(super) fn probe(&mut self, now: Time, timer: Timer<Identity>) {
        let mut timer = Some(timer);
        for _ in 0..STEPS_PER_TURN {
            let Some(due) = timer.take() else { return };
            self.contacts.probe_timers.clear();
            self.contacts.helpers.clear();
            let result = self.foca.handle_timer(due, &mut self.runtime);
            self.collect(now, "probe", result);
            let Some((identity, number)) = self.contacts.passed_over.take() else { return };
            self.acknowledge(now, identity, number);
            for key in std::mem::take(&mut self.contacts.probe_timers) {
                match self.timers.remove(&key) {
                    Some(next @ Timer::ProbeRandomMember(_)) => timer = Some(next),
                    Some(other) => {
                        let result = self.foca.handle_timer(other, &mut self.runtime);
                        self.collect(now, "probe", result);
                    }
                    None => {}
                }
            }
        }
        if let Some(next) = timer {
            self.arm(now, next);
        }
    }

    /// Passes an answer of the probed member to foca.
    fn acknowledge(&mut self, now: Time, member: Identity, number: ProbeNumber) {
        let header = Header {
            src: member,
            // The lowest refutation count neither refutes nor renews anything.
            src_incarnation: 0,
            dst: self.identity(),
            message: Message::Ack(number),
        };
        let packet = SwimPacket::bare(header).encode();
        let result = self.foca.handle_data(&packet, &mut self.runtime);
        self.collect(now, "acknowledge", result);
    }

    /// Handles a packet of a neighbor that has probed the present target for this node. foca expects it from
    /// the member that it has chosen itself.
    pub(super) fn note_relayed_answer(&mut self, now: Time, packet: &[u8]) {
        if self.contacts.helpers.is_empty() {
            return;
        }
        let Ok(SwimPacket { header, .. }) = SwimPacket::decode(packet) else { return };
        if let Message::ForwardedAck { origin, probe_number } = header.message
            && self.contacts.helpers.contains(&header.src.node)
        {
            self.acknowledge(now, origin, probe_number);
        }
    }

    /// Queues a packet of foca's, to a neighbor where that is possible.
    /// `decoded` is the same packet.
    pub(super) fn send(&mut self, to: &Identity, packet: Bytes, mut decoded: SwimPacket) {
        let unchanged = |packet| Notice::Send { to: to.node, packet };
        if !self.active.contains_key(&to.node) || self.probes(to) {
            if let Message::PingReq { .. } = decoded.header.message {
                self.contacts.helpers.insert(to.node);
            }
            self.notices.push_back(unchanged(packet));
            return;
        }
        let (message, excluded) = match decoded.header.message.clone() {
            Message::Ping(number) => {
                self.contacts.passed_over = Some((*to, number));
                if decoded.members.is_empty() {
                    return;
                }
                // foca counts the updates in it as sent.
                (Message::Gossip, None)
            }
            message @ (Message::Gossip | Message::Announce | Message::Broadcast) => (message, None),
            message @ Message::PingReq { target, .. } => (message, Some(target.node)),
            _ => return self.notices.push_back(unchanged(packet)),
        };
        let Contacts { neighborhood, rng, helpers, .. } = &mut self.contacts;
        let Some(neighbor) = neighborhood.choose(rng, excluded) else { return };
        if excluded.is_some() {
            helpers.insert(neighbor);
        }
        let Some(&dst) = self.active.get(&neighbor) else { return };
        decoded.header = Header { dst, message, ..decoded.header };
        let packet = decoded.encode().into();
        self.notices.push_back(Notice::Send { to: neighbor, packet });
    }
}
