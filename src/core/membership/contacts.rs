//! Whom SWIM contacts: neighbors only.
//!
//! foca chooses its contacts from all members, so that after some time each node would have a connection to
//! each other one. Here the contacts that it begins go to the neighborhood instead:
//!
//! - A member that is no neighbor is passed over as if it had answered its probe. Its own neighbors probe it.
//! - A neighbor is asked to probe a silent member indirectly.
//! - Gossip and announcements go to random neighbors.
//!
//! Answers, and announcements to members that are down, go where foca sends them.

use std::collections::BTreeSet;

use bytes::Bytes;
use foca::{Header, Message, ProbeNumber, Timer};
use rand::rngs::StdRng;

use crate::{
    core::neighborhood::Neighborhood,
    model::{Identity, NodeId, Time},
    wire::SwimPacket,
};

use super::{Membership, Notice};

/// The neighborhood, and the state of the present probe.
pub(super) struct Contacts {
    pub(super) neighborhood: Neighborhood,
    rng: StdRng,
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
            helpers: BTreeSet::new(),
            passed_over: None,
            probe_timers: Vec::new(),
        }
    }

    /// Notes a timer that foca has armed.
    pub(super) fn note_timer(&mut self, key: (Time, u64), timer: &Timer<Identity>) {
        if matches!(timer, Timer::SendIndirectProbe { .. } | Timer::ProbeRandomMember(_)) {
            self.probe_timers.push(key);
        }
    }
}

impl Membership {
    /// Probes the next neighbor in foca's order.
    pub(super) fn probe(&mut self, now: Time, timer: Timer<Identity>) {
        let mut timer = Some(timer);
        // foca's order contains each member once, then begins again.
        for _ in 0..=2 * self.active.len() {
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
        let Ok(SwimPacket { header, .. }) = SwimPacket::decode(packet) else { return };
        if let Message::ForwardedAck { origin, probe_number } = header.message
            && self.contacts.helpers.contains(&header.src.node)
        {
            self.acknowledge(now, origin, probe_number);
        }
    }

    /// Queues a packet of foca's, to a neighbor where that is possible.
    pub(super) fn send(&mut self, to: &Identity, packet: Bytes) {
        let unchanged = |packet| Notice::Send { to: to.node, packet };
        let Ok(mut decoded) = SwimPacket::decode(&packet) else { return };
        let is_neighbor = self.contacts.neighborhood.neighbors().contains(&to.node);
        if is_neighbor || !self.active.contains_key(&to.node) {
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
