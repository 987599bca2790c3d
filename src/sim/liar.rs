//! A member that errs, and one that lies: what it says goes to the others under its own proven identity.
//!
//! Its process is the production core and does its part; what is wrong is told beside it, and put into its
//! answers. What no receiver can tell from the truth is left out (docs/decisions/0017): a member that takes
//! slots at a believable epoch, or says of others that they left or are gone.

use bytes::Bytes;
use foca::{Header, Member, Message};
use rand::{RngExt as _, prelude::IteratorRandom as _, rngs::StdRng};

use super::{host::Host, world::World};
use crate::{
    core::{CallError, CallId, Input, Node},
    model::{
        Forget, Identity, Incarnation, Mac, MemberRecord, NodeId, Run, Slot, SlotRecord, SlotState,
    },
    wire::{Facts, Frame, Key, Push, Record, Request, Response, SwimPacket},
};

/// Underlay addresses of no host; the last one is inside the pool.
const NO_HOSTS: [&str; 7] = [
    "fe80::1",
    "224.0.0.5",
    "127.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "::ffff:10.99.0.10",
    "10.42.7.1",
];

impl World {
    /// The member that errs or lies, from when there is one.
    fn liar(&mut self, rng: &mut StdRng) -> Option<usize> {
        let is_member = |host: &&Host| host.process.is_some() && host.own_record().is_some();
        if self.liar.is_none() {
            self.liar = self.hosts.iter().filter(is_member).map(|host| host.index).choose(rng);
        }
        self.liar.filter(|liar| is_member(&&self.hosts[*liar]))
    }

    /// A member says something of itself that cannot be, by a bad build or a flipped bit.
    pub fn err(&mut self, rng: &mut StdRng) {
        let Some(liar) = self.liar(rng) else { return };
        let Some(mut record) = self.hosts[liar].own_record() else { return };
        self.oracle.reach("a member erred");
        record.version.change += 1;
        let high = 1 << rng.random_range(28..32);
        let node = record.node;
        let mut facts = Facts::default();
        match rng.random_range(0..7) {
            0 => {
                let address = NO_HOSTS.iter().filter_map(|text| text.parse().ok()).choose(rng);
                record.vtep.underlay = address.unwrap_or(record.vtep.underlay);
                facts.members.push(record);
            }
            1 => {
                record.address.set_port(0);
                facts.members.push(record);
            }
            2 => {
                record.vtep.mac = Mac::of_node(self.victim(liar, rng).unwrap_or(node));
                facts.members.push(record);
            }
            3 if rng.random_bool(0.5) => {
                record.version.starts ^= high;
                facts.members.push(record);
            }
            3 => {
                record.version.change ^= high;
                facts.members.push(record);
            }
            4 => {
                let shift = if rng.random_bool(0.5) { 32 } else { 0 };
                let flipped = |run: &Run| {
                    let epoch = run.record.epoch ^ u64::from(high) << shift;
                    Run { record: SlotRecord { epoch, ..run.record }, ..*run }
                };
                let runs = self.hosts[liar].node().and_then(Node::slots);
                facts.slots.extend(runs.into_iter().flatten().choose(rng).map(flipped));
            }
            5 => {
                let record =
                    SlotRecord { epoch: 3, owner: node, state: SlotState::Free, granter: node };
                let run = |start, len| Run { start: Slot(start), len, record };
                facts.slots = vec![run(0, 0), run(u32::MAX, u32::MAX), run(1 << 30, 7)];
            }
            _ => {
                let incarnation = Incarnation { starts: record.version.starts ^ high, renewals: 0 };
                facts.active.push(Identity { node, incarnation });
            }
        }
        self.tell(liar, facts, rng);
    }

    /// A member says something of others, or in their name.
    pub fn lie(&mut self, rng: &mut StdRng) {
        let Some(liar) = self.liar(rng) else { return };
        let Some(victim) = self.victim(liar, rng) else { return };
        let me = self.hosts[liar].key;
        self.oracle.reach("a member lied");
        let top = Incarnation { starts: u32::MAX, renewals: u32::MAX };
        let mut facts = Facts::default();
        match rng.random_range(0..8) {
            kind @ 0..=2 => {
                let host = self.hosts.iter().find(|host| host.key == victim);
                let Some(mut record) = host.and_then(Host::own_record) else { return };
                record.version.change += 1;
                record.address = ([10, 200, 0, 1], 8473).into();
                record.vtep.underlay = [10, 200, 0, 1].into();
                match kind {
                    0 => {}
                    1 => record.version.change = u32::MAX,
                    _ => record.version.starts = u32::MAX,
                }
                facts.members.push(record);
            }
            3 => {
                let taken = SlotRecord {
                    epoch: u64::MAX - rng.random_range(0..1 << 33),
                    owner: me,
                    state: SlotState::Leased,
                    granter: me,
                };
                let runs = self.hosts[liar].node().and_then(Node::slots);
                let theirs = runs.into_iter().flatten().filter(|run| run.record.owner == victim);
                facts.slots.extend(theirs.map(|run| Run { record: taken, ..*run }));
            }
            4 => {
                facts.active = (0..300).map(|_| non_member(rng)).collect();
                facts.active.push(Identity { node: victim, incarnation: top });
            }
            5 => {
                let round = 1 << rng.random_range(20..32);
                facts.forgets.push(Forget { node: victim, round, forced: false, successor: me });
            }
            6 => {
                // In the name of another member, dead ones above all, which then never go down.
                let dead = self.hosts.iter().filter(|host| !host.power).map(|host| host.key);
                let spoken_for = dead.choose(rng).unwrap_or(victim);
                return self.gossip_as(liar, spoken_for, Vec::new());
            }
            _ => {
                let updates = vec![
                    Member::alive(Identity { node: victim, incarnation: top }),
                    Member::alive(non_member(rng)),
                ];
                return self.gossip_as(liar, me, updates);
            }
        }
        self.tell(liar, facts, rng);
    }

    /// Some other member that runs.
    fn victim(&self, liar: usize, rng: &mut StdRng) -> Option<NodeId> {
        let is_other = |host: &&Host| host.index != liar && host.own_record().is_some();
        self.hosts.iter().filter(is_other).map(|host| host.key).choose(rng)
    }

    /// To some of the others at once.
    fn tell(&mut self, liar: usize, facts: Facts, rng: &mut StdRng) {
        let push = Push { facts }.encode();
        self.inject(liar, |cluster| Frame::Push(&push).encode(cluster), |_| rng.random_bool(0.5));
    }

    fn gossip_as(&mut self, liar: usize, sender: NodeId, updates: Vec<Member<Identity>>) {
        let host = self.hosts.iter().find(|host| host.key == sender);
        let Some(record) = host.and_then(Host::own_record) else { return };
        let starts = record.version.starts + u32::from(sender != self.hosts[liar].key);
        let src = Identity { node: sender, incarnation: Incarnation { starts, renewals: 0 } };
        let targets: Vec<usize> = (0..self.hosts.len()).collect();
        for to in targets {
            let node = self.hosts[to].key;
            let Some(incarnation) = self.hosts[to]
                .own_record()
                .map(|record| Incarnation { starts: record.version.starts, renewals: 0 })
            else {
                continue;
            };
            let dst = Identity { node, incarnation };
            let header = Header { src, src_incarnation: 0, dst, message: Message::Gossip };
            let packet = SwimPacket::new(header, updates.clone()).encode();
            let active = |world: &Self| Some(world.hosts[to].node()?.roots().active);
            let before = active(self);
            self.inject(liar, |cluster| Frame::Swim(&packet).encode(cluster), |host| host == to);
            let is_taken = before.is_some() && active(self).is_some_and(|now| Some(now) != before);
            if is_taken && sender != self.hosts[liar].key {
                self.oracle
                    .accuse(|| format!("I20: host {to} believes a packet in {sender}'s name"));
            }
        }
    }

    fn inject(
        &mut self,
        liar: usize,
        frame: impl FnOnce(crate::model::ClusterId) -> Vec<u8>,
        mut to: impl FnMut(usize) -> bool,
    ) {
        let from = self.hosts[liar].key;
        let Some(cluster) = self.hosts[liar].saved_cluster else { return };
        let bytes = Bytes::from(frame(cluster));
        for host in (0..self.hosts.len()).filter(|host| *host != liar) {
            if to(host) && !self.network.is_cut(liar, host) {
                self.input(host, Input::Message { from, bytes: bytes.to_vec() });
            }
        }
    }

    /// What a member that errs or lies makes of an answer: it never agrees, and says what cannot be.
    pub(super) fn twist(&self, index: usize, bytes: Vec<u8>) -> Vec<u8> {
        let host = &self.hosts[index];
        if self.liar != Some(index) {
            return bytes;
        }
        let Ok((cluster, Frame::Response(payload))) = Frame::decode(&bytes) else { return bytes };
        let twisted = match Response::decode(payload) {
            Ok(Response::Same) => Response::Differ(Box::default()),
            Ok(Response::Facts { mut facts, down, down_as }) => {
                if let Some(mut record) = host.own_record() {
                    record.version.change += 1;
                    record.vtep.underlay = [127, 0, 0, 1].into();
                    facts.members.push(record);
                }
                Response::Facts { facts, down, down_as }
            }
            _ => return bytes,
        };
        Frame::Response(&twisted.encode()).encode(cluster)
    }

    /// A node that was settled stays so when a member only tells what cannot be.
    pub(super) fn judge_odd_answer(
        &mut self,
        index: usize,
        from: NodeId,
        before: Option<(bool, crate::wire::Roots)>,
        is_twisted: bool,
    ) {
        let liar = self.liar.map(|liar| self.hosts[liar].key);
        let Some(node) = self.hosts[index].node().filter(|_| liar == Some(from) && is_twisted)
        else {
            return;
        };
        if !self.oracle.lenient
            && let Some((true, roots)) = before
            && node.roots() == roots
            && !node.is_settled()
        {
            self.oracle.accuse(|| format!("R6: host {index} is unsettled by {from}, which lies"));
        }
    }

    /// Remembers who did not answer a comparison.
    pub(super) fn note_silence(
        &mut self,
        index: usize,
        call: CallId,
        answer: &Result<(NodeId, Vec<u8>), CallError>,
    ) {
        let Some(process) = &mut self.hosts[index].process else { return };
        if let Some(asked) = process.comparisons.remove(&call) {
            process.last_silent = answer.is_err().then_some(asked);
        } else if answer.is_ok() {
            process.last_silent = None;
        }
    }

    /// A member that has not answered a comparison is not asked next while there are others.
    pub(super) fn judge_partner(
        &mut self,
        index: usize,
        call: CallId,
        asked: NodeId,
        bytes: &[u8],
    ) {
        if !is_comparison(bytes) {
            return;
        }
        if let Some(process) = &mut self.hosts[index].process {
            process.comparisons.insert(call, asked);
        }
        let host = &self.hosts[index];
        let others = host.node().map_or(0, |node| node.peers().count());
        let silent = host.process.as_ref().and_then(|process| process.last_silent);
        if silent == Some(asked) && others > 1 {
            self.oracle.accuse(|| format!("R5: host {index} compares twice running with {asked}"));
        }
    }
}

impl Host {
    /// What it says of itself, once that is on its disk.
    pub fn own_record(&self) -> Option<MemberRecord> {
        match self.disk.flushed(Key::Member(self.key)) {
            Some(Record::Member(record)) if !record.has_left() => Some(record),
            _ => None,
        }
    }
}

fn non_member(rng: &mut StdRng) -> Identity {
    let node = NodeId::from_bytes(rng.random());
    Identity { node, incarnation: Incarnation { starts: 1, renewals: 0 } }
}

/// Whether an answer tells what cannot be, and nothing of who is down.
pub(super) fn is_twisted(bytes: &[u8]) -> bool {
    let response = match Frame::decode(bytes) {
        Ok((_, Frame::Response(payload))) => Response::decode(payload).ok(),
        _ => None,
    };
    match response {
        Some(Response::Facts { facts, down, down_as }) => {
            let mut members = facts.members.iter();
            members.any(|record| record.vtep.underlay.is_loopback())
                && down.is_empty()
                && down_as.is_none()
        }
        _ => false,
    }
}

fn is_comparison(bytes: &[u8]) -> bool {
    let request = match Frame::decode(bytes) {
        Ok((_, Frame::Request(payload))) => Request::decode(payload).ok(),
        _ => None,
    };
    matches!(request, Some(Request::Compare(_)))
}
