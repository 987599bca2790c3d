//! The judge: its own model of who owns what, built from what reaches the disks, never by asking a node.
//!
//! Safety is judged at every event. I1 one record per slot and epoch; I2 one user per subnet; I3 only the
//! owner (or the successor of a forgotten one) writes the next record; I4 no epoch on a disk goes back; I5
//! nothing is said that is not on its writer's disk; I7 no grant after a start before somebody was met; I16
//! who asks twice is given one slot; I17 no counter jumps; I18 no record that no node can use; D4 no
//! entry of a host that works is removed.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    dataplane::plan::Op,
    model::{MemberRecord, NodeId, Pool, Run, SlotRecord, SlotState},
    wire::{Facts, Frame, Key, Push, Record, Request, Response},
};

/// The epoch within one generation; the rest counts how often the slot was reclaimed.
const COUNT_BITS: u32 = 32;
/// In no run is anything counted so far.
const JUMP: u32 = 1 << 28;

#[derive(Debug, Default)]
pub struct Oracle {
    /// A promise's proviso was broken on purpose (a disk lost or copied, a living node forgotten): two
    /// owners may come about, and must be found out and settled.
    pub lenient: bool,
    /// Addresses in it are those of no host.
    pool: Option<Pool>,
    /// Large worlds: only who uses which subnet.
    pub light: bool,
    /// Every record, by slot and epoch, as first flushed.
    records: BTreeMap<(u32, u64), SlotRecord>,
    /// What each identity's disk has held: highest epoch by slot.
    epochs: BTreeMap<NodeId, BTreeMap<u32, u64>>,
    users: BTreeMap<IpNet, BTreeSet<usize>>,
    creator: Option<NodeId>,
    /// Successors of forgotten nodes, as first flushed.
    forgotten: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// Identities whose hosts were switched off for good, or left: they use nothing.
    pub gone: BTreeSet<NodeId>,
    /// Situations met, by name.
    pub reached: BTreeMap<&'static str, u64>,
    pub violation: Option<String>,
}

impl Oracle {
    pub fn new(pool: Pool) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    pub fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    pub fn accuse(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// A promise that holds only while the provisos do.
    fn accuse_unless_lenient(&mut self, what: impl FnOnce() -> String) {
        if !self.lenient {
            self.accuse(what);
        }
    }

    /// Records that are now on the disk of `node` for good.
    pub fn on_flushed(&mut self, node: NodeId, met: bool, news: &BTreeMap<Key, Vec<u8>>) {
        if self.light {
            return;
        }
        // Slots last: they may be justified by what is flushed together with them.
        for (key, bytes) in news.iter().rev() {
            match Record::decode(key.to_string().as_bytes(), bytes) {
                Ok((_, Record::Slots(runs))) => {
                    runs.iter().for_each(|run| self.on_flushed_run(node, met, run));
                }
                Ok((_, Record::Forget(forget))) => {
                    self.forgotten.entry(forget.node).or_default().insert(forget.successor);
                }
                Ok((_, Record::Member(record))) => self.on_flushed_member(node, &record),
                Ok(_) => {}
                Err(error) => self.accuse(|| format!("{node} wrote what it cannot read: {error}")),
            }
        }
    }

    /// I17: no counter jumps beyond what any history can have reached; I18: no record of a member that no
    /// node can use.
    fn on_flushed_member(&mut self, node: NodeId, record: &MemberRecord) {
        let version = record.version;
        if version.starts.max(version.change) > JUMP {
            self.accuse(|| format!("I17: {node} has {} at {version:?}", record.node));
        }
        if let Some(unfit) = self.pool.as_ref().and_then(|pool| record.unfit(pool)) {
            self.accuse(|| format!("I18: {node} has a record of {}: {unfit}", record.node));
        }
    }

    fn on_flushed_run(&mut self, node: NodeId, met: bool, run: &Run) {
        let record = run.record;
        if (record.epoch >> COUNT_BITS).max(record.epoch & u64::from(u32::MAX)) > u64::from(JUMP) {
            self.accuse(|| format!("I17: {node} has {:?} at {record:?}", run.start));
        }
        for slot in run.slots() {
            let known = self.epochs.entry(node).or_default().insert(slot.0, record.epoch);
            if let Some(before) = known.filter(|before| *before > record.epoch) {
                self.accuse_unless_lenient(|| {
                    format!("I4: {slot:?} of {node}'s disk went from epoch {before} to {record:?}")
                });
            }
            match self.records.get(&(slot.0, record.epoch)) {
                Some(first) if *first == record => continue,
                Some(first) => {
                    let first = *first;
                    self.accuse_unless_lenient(|| {
                        format!("I1: {slot:?} has two records of one epoch: {first:?}, {record:?}")
                    });
                    continue;
                }
                None => {}
            }
            if record.granter != node {
                self.accuse_unless_lenient(|| {
                    format!("I5: {node} has {slot:?} {record:?} flushed before its granter has")
                });
            }
            if record.granter == node && record.owner != node && !met {
                self.accuse_unless_lenient(|| {
                    format!("I7: {node} granted {slot:?} before it met anybody")
                });
            }
            self.judge_grant(slot.0, &record);
            self.judge_succession(slot.0, &record);
            self.records.insert((slot.0, record.epoch), record);
        }
    }

    /// I16: whoever asks twice is given one slot.
    fn judge_grant(&mut self, slot: u32, record: &SlotRecord) {
        if record.state != SlotState::Leased || record.granter == record.owner {
            return;
        }
        let heads = self.records.iter().rev();
        let mut judged = BTreeSet::from([slot]);
        let twice = heads.filter(|((slot, _), _)| judged.insert(*slot)).any(|(_, head)| {
            head.state == SlotState::Leased
                && (head.owner, head.granter) == (record.owner, record.granter)
        });
        if twice {
            self.accuse_unless_lenient(|| {
                format!("I16: {} gave {} a second slot, {slot}", record.granter, record.owner)
            });
        }
    }

    /// I3: who may write the next record.
    fn judge_succession(&mut self, slot: u32, record: &SlotRecord) {
        let generation = record.epoch >> COUNT_BITS << COUNT_BITS;
        // What an owner rewrote before it was flushed is on no disk, so epochs may be missing.
        let before = self.records.range((slot, generation)..(slot, record.epoch)).next_back();
        let allowed = match before {
            Some((_, before)) => before.owner == record.granter,
            None if generation == 0 => {
                *self.creator.get_or_insert(record.granter) == record.granter
            }
            // This is the successor of a forgotten owner, and nobody owns the slot since by its own disk.
            None => {
                let owners = self.records.range((slot, 0)..(slot, generation)).rev();
                let inherits = |old: &SlotRecord| {
                    let successors = self.forgotten.get(&old.owner);
                    successors.is_some_and(|successors| successors.contains(&record.granter))
                };
                let owns = |epoch: u64, owner: NodeId| {
                    let disk = self.epochs.get(&owner).and_then(|epochs| epochs.get(&slot));
                    disk == Some(&epoch) && !self.gone.contains(&owner)
                };
                let mut last =
                    owners.filter(|((_, epoch), old)| inherits(old) || owns(*epoch, old.owner));
                last.next().is_some_and(|(_, old)| inherits(old))
            }
        };
        if !allowed {
            self.accuse_unless_lenient(|| {
                format!("I3: {} wrote slot {slot} {record:?} without owning it", record.granter)
            });
        }
    }

    /// I5: what leaves a process is on the disk of whoever wrote it.
    pub fn on_sent(&mut self, from: NodeId, bytes: &[u8]) {
        if self.light || self.lenient {
            return;
        }
        let Some(facts) = facts(bytes) else { return };
        for run in &facts.slots {
            for slot in run.slots() {
                if self.records.get(&(slot.0, run.record.epoch)) != Some(&run.record) {
                    self.accuse(|| {
                        format!("I5: {from} says {slot:?} {:?}, which is on no disk", run.record)
                    });
                }
            }
        }
    }

    /// The subnet that a host's kernel uses has changed.
    pub fn on_use(&mut self, host: usize, before: Option<IpNet>, after: Option<IpNet>) {
        if before == after {
            return;
        }
        if let Some(users) = before.and_then(|subnet| self.users.get_mut(&subnet)) {
            users.remove(&host);
        }
        let Some(subnet) = after else { return };
        let users = self.users.entry(subnet).or_default();
        users.insert(host);
        if users.len() > 1 {
            let users = users.clone();
            self.accuse_unless_lenient(|| format!("I2: {subnet} is used by hosts {users:?}"));
        }
    }

    pub fn user_of(&self, subnet: IpNet) -> Option<usize> {
        self.users.get(&subnet)?.first().copied()
    }

    pub fn shared_subnets(&self) -> impl Iterator<Item = (&IpNet, &BTreeSet<usize>)> {
        self.users.iter().filter(|(_, users)| users.len() > 1)
    }

    /// D4: `host` removes a kernel entry; `works` says whether by that entry packets reach a user of the
    /// subnet who is there to stay.
    pub fn on_op(&mut self, host: usize, op: &Op, works: impl Fn(usize, IpNet) -> bool) {
        let Op::RemoveRoute(subnet, _) = op else { return };
        let user = self.user_of(*subnet).filter(|user| *user != host && works(*user, *subnet));
        if let Some(user) = user {
            self.accuse_unless_lenient(|| {
                format!("D4: host {host} removed {subnet} of host {user}, which works")
            });
        }
    }
}

/// The facts that a frame carries, if it carries any.
fn facts(bytes: &[u8]) -> Option<Facts> {
    match Frame::decode(bytes).ok()?.1 {
        Frame::Swim(_) => None,
        Frame::Push(payload) => Push::decode(payload).ok().map(|push| push.facts),
        Frame::Request(payload) => match Request::decode(payload).ok()? {
            Request::Exchange { facts, .. } | Request::Handover(facts) => Some(facts),
            _ => None,
        },
        Frame::Response(payload) => match Response::decode(payload).ok()? {
            Response::Welcome(welcome) => Some(welcome.facts),
            Response::Facts { facts, .. }
            | Response::Granted(facts)
            | Response::Acknowledged(facts) => Some(facts),
            _ => None,
        },
    }
}
