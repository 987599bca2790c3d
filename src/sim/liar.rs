//! The Byzantine member: sends impossible or false facts under its own proven identity.
//!
//! Its process is the production core and works as usual. The wrong facts are sent beside it and put into its
//! answers. Claims that no receiver can distinguish from true ones are excluded (docs/decisions/0017): slots
//! taken at a plausible epoch, and statements that other members left or are gone.

use bytes::Bytes;
use foca::{Header, Member, Message};
use rand::{RngExt as _, prelude::IteratorRandom as _, rngs::StdRng};

use super::{host::Host, world::World};
use crate::{
    core::{CallError, CallId, Input, Node},
    model::{
        Forget, Identity, Incarnation, Mac, MemberRecord, NodeId, Run, Slot, SlotRecord, SlotState,
    },
    wire::{Facts, Frame, Gossip, Key, Push, Record, Request, Response, Roots, SwimPacket},
};

/// Addresses that no host can have as its underlay address; the last one is inside the pool.
const UNUSABLE_ADDRESSES: [&str; 7] = [
    "fe80::1",
    "224.0.0.5",
    "127.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "::ffff:10.99.0.10",
    "10.42.7.1",
];

impl World {
    /// Returns the Byzantine host, which is chosen on first use, if it is a running member.
    fn pick_byzantine_host(&mut self, rng: &mut StdRng) -> Option<usize> {
        let is_member = |host: &&Host| host.process.is_some() && host.own_record().is_some();
        if self.byzantine_host.is_none() {
            self.byzantine_host =
                self.hosts.iter().filter(is_member).map(|host| host.index).choose(rng);
        }
        self.byzantine_host.filter(|byzantine| is_member(&&self.hosts[*byzantine]))
    }

    /// Makes the Byzantine member publish an impossible fact about itself, as a faulty build or a flipped bit
    /// would.
    pub fn send_impossible_facts(&mut self, rng: &mut StdRng) {
        let Some(byzantine) = self.pick_byzantine_host(rng) else { return };
        let Some(mut record) = self.hosts[byzantine].own_record() else { return };
        self.oracle.record_situation("impossible facts sent");
        record.version.change += 1;
        let high = 1 << rng.random_range(28..32);
        let node = record.node;
        let mut facts = Facts::default();
        match rng.random_range(0..7) {
            0 => {
                let address =
                    UNUSABLE_ADDRESSES.iter().filter_map(|text| text.parse().ok()).choose(rng);
                record.vtep.underlay = address.unwrap_or(record.vtep.underlay);
                facts.members.push(record);
            }
            1 => {
                record.address.set_port(0);
                facts.members.push(record);
            }
            2 => {
                record.vtep.mac = Mac::of_node(self.pick_victim(byzantine, rng).unwrap_or(node));
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
                let runs = self.hosts[byzantine].node().and_then(Node::slots);
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
        self.push_to_some(byzantine, facts, rng);
    }

    /// Makes the Byzantine member publish a false fact about another member, or send in that member's name.
    pub fn send_false_facts(&mut self, rng: &mut StdRng) {
        let Some(byzantine) = self.pick_byzantine_host(rng) else { return };
        let Some(victim) = self.pick_victim(byzantine, rng) else { return };
        let me = self.hosts[byzantine].key;
        self.oracle.record_situation("false facts sent");
        let highest = Incarnation { starts: u32::MAX, renewals: u32::MAX };
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
                let seized = SlotRecord {
                    epoch: u64::MAX - rng.random_range(0..1 << 33),
                    owner: me,
                    state: SlotState::Leased,
                    granter: me,
                };
                let runs = self.hosts[byzantine].node().and_then(Node::slots);
                let of_victim = runs.into_iter().flatten().filter(|run| run.record.owner == victim);
                facts.slots.extend(of_victim.map(|run| Run { record: seized, ..*run }));
            }
            4 => {
                facts.active = (0..300).map(|_| non_member(rng)).collect();
                facts.active.push(Identity { node: victim, incarnation: highest });
            }
            5 => {
                let round = 1 << rng.random_range(20..32);
                facts.forgets.push(Forget { node: victim, round, forced: false, successor: me });
            }
            6 => {
                // Gossip in the name of another member, a dead one if possible: accepting it would keep the
                // dead member alive.
                let dead = self.hosts.iter().filter(|host| !host.is_powered).map(|host| host.key);
                let impersonated = dead.choose(rng).unwrap_or(victim);
                return self.send_gossip_as(byzantine, impersonated, Vec::new());
            }
            _ => {
                let updates = vec![
                    Member::alive(Identity { node: victim, incarnation: highest }),
                    Member::alive(non_member(rng)),
                ];
                return self.send_gossip_as(byzantine, me, updates);
            }
        }
        self.push_to_some(byzantine, facts, rng);
    }

    /// Returns a random other member.
    fn pick_victim(&self, byzantine: usize, rng: &mut StdRng) -> Option<NodeId> {
        let is_other = |host: &&Host| host.index != byzantine && host.own_record().is_some();
        self.hosts.iter().filter(is_other).map(|host| host.key).choose(rng)
    }

    /// Pushes facts to each other host with a chance of one half.
    fn push_to_some(&mut self, byzantine: usize, facts: Facts, rng: &mut StdRng) {
        let push = Push { facts }.encode();
        self.inject(
            byzantine,
            |cluster| Frame::Push(&push).encode(cluster),
            |_| rng.random_bool(0.5),
        );
    }

    /// Sends a gossip packet in the name of `sender` to all other hosts. Reports a violation (I20) if one
    /// accepts it, unless the Byzantine member is the sender.
    fn send_gossip_as(&mut self, byzantine: usize, sender: NodeId, updates: Vec<Member<Identity>>) {
        let host = self.hosts.iter().find(|host| host.key == sender);
        let Some(record) = host.and_then(Host::own_record) else { return };
        let starts = record.version.starts + u32::from(sender != self.hosts[byzantine].key);
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
            self.inject(
                byzantine,
                |cluster| {
                    Frame::Swim(&Gossip { roots: Roots::default(), packet: &packet }.encode())
                        .encode(cluster)
                },
                |host| host == to,
            );
            let is_accepted =
                before.is_some() && active(self).is_some_and(|now| Some(now) != before);
            if is_accepted && sender != self.hosts[byzantine].key {
                self.oracle.report_violation(|| {
                    format!("I20: host {to} accepted a forged packet in {sender}'s name")
                });
            }
        }
    }

    /// Delivers a frame of the Byzantine member to the reachable hosts that `to` selects.
    fn inject(
        &mut self,
        byzantine: usize,
        frame: impl FnOnce(crate::model::ClusterId) -> Vec<u8>,
        mut to: impl FnMut(usize) -> bool,
    ) {
        let from = self.hosts[byzantine].key;
        let Some(cluster) = self.hosts[byzantine].saved_cluster else { return };
        let bytes = Bytes::from(frame(cluster));
        for host in (0..self.hosts.len()).filter(|host| *host != byzantine) {
            if to(host) && !self.network.is_cut(byzantine, host) {
                self.input(host, Input::Message { from, bytes: bytes.to_vec() });
            }
        }
    }

    /// Falsifies a response of the Byzantine host: it never agrees in a comparison, and its facts include an
    /// unusable record.
    pub(super) fn falsify_answer(&self, index: usize, bytes: Vec<u8>) -> Vec<u8> {
        let host = &self.hosts[index];
        if self.byzantine_host != Some(index) {
            return bytes;
        }
        let Ok((cluster, Frame::Response(payload))) = Frame::decode(&bytes) else { return bytes };
        let falsified = match Response::decode(payload) {
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
        Frame::Response(&falsified.encode()).encode(cluster)
    }

    /// Checks R6: a settled node stays settled when a falsified answer changes none of its facts.
    pub(super) fn check_settled_after_falsified_answer(
        &mut self,
        index: usize,
        from: NodeId,
        before: Option<(bool, Roots)>,
        is_falsified: bool,
    ) {
        let byzantine = self.byzantine_host.map(|byzantine| self.hosts[byzantine].key);
        let Some(node) =
            self.hosts[index].node().filter(|_| byzantine == Some(from) && is_falsified)
        else {
            return;
        };
        if !self.oracle.lenient
            && let Some((true, roots)) = before
            && node.roots() == roots
            && !node.is_settled()
        {
            self.oracle.report_violation(|| {
                format!("R6: host {index} is no longer settled after a falsified answer of {from}")
            });
        }
    }

    /// Records the partner of an ended comparison if it did not answer.
    pub(super) fn record_unanswered_comparison(
        &mut self,
        index: usize,
        call: CallId,
        answer: &Result<(NodeId, Vec<u8>), CallError>,
    ) {
        let Some(process) = &mut self.hosts[index].process else { return };
        if let Some(partner) = process.comparisons.remove(&call) {
            process.last_silent = answer.is_err().then_some(partner);
        } else if answer.is_ok() {
            process.last_silent = None;
        }
    }

    /// Checks R5: a node does not compare with an unresponsive member twice in a row while it knows others.
    pub(super) fn check_comparison_partner(
        &mut self,
        index: usize,
        call: CallId,
        partner: NodeId,
        bytes: &[u8],
    ) {
        if !is_comparison(bytes) {
            return;
        }
        if let Some(process) = &mut self.hosts[index].process {
            process.comparisons.insert(call, partner);
        }
        let host = &self.hosts[index];
        let others = host.node().map_or(0, |node| node.peers().count());
        let unresponsive = host.process.as_ref().and_then(|process| process.last_silent);
        if unresponsive == Some(partner) && others > 1 {
            self.oracle.report_violation(|| {
                format!(
                    "R5: host {index} compares twice in a row with {partner}, which did not answer"
                )
            });
        }
    }
}

impl Host {
    /// Returns the host's own member record, once flushed and unless the node has left.
    pub fn own_record(&self) -> Option<MemberRecord> {
        match self.disk.flushed(Key::Member(self.key)) {
            Some(Record::Member(record)) if !record.has_left() => Some(record),
            _ => None,
        }
    }
}

/// Returns a random identity that no host has.
fn non_member(rng: &mut StdRng) -> Identity {
    let node = NodeId::from_bytes(rng.random());
    Identity { node, incarnation: Incarnation { starts: 1, renewals: 0 } }
}

/// Whether a request is a comparison.
fn is_comparison(bytes: &[u8]) -> bool {
    let request = match Frame::decode(bytes) {
        Ok((_, Frame::Request(payload))) => Request::decode(payload).ok(),
        _ => None,
    };
    matches!(request, Some(Request::Compare(_)))
}
