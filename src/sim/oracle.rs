//! The oracle: checks safety at every event against its own model of slot ownership.
//!
//! The model is built from the records that reach the disks; the oracle never queries a node. The rules:
//!
//! - I1: one record per slot and epoch
//! - I2: one user per subnet
//! - I3: only the owner of a slot, or the successor of its forgotten owner, writes the slot's next record
//! - I4: no epoch on a disk decreases
//! - I5: a node sends only records that are on the disk of the node that wrote them
//! - I7: a restarted node grants nothing before contact with a peer that it knew
//! - I16: repeated grant requests of one node yield one slot
//! - I17: no counter jumps to an implausible value
//! - I18: no disk holds a member record that no node can use
//! - I21: a node that leaves requests, leases and releases no slot for itself
//! - I22: a node releases no lease that its kernel still uses
//! - D4: no host removes the route to a subnet that is in use and reachable by it

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::{
    core::{Change, Output},
    dataplane::plan::{EntryOp, Op},
    model::{MemberRecord, NodeId, Pool, Run, Slot, SlotRecord, SlotState},
    wire::{Facts, Frame, Key, Push, Record, Request, Response},
};

/// Number of low bits of an epoch that count records within one generation. The high bits are the generation:
/// the number of times that the slot was reclaimed.
const EPOCH_COUNT_BITS: u32 = 32;
/// Greatest value that a counter can reach in a run.
const MAX_PLAUSIBLE_COUNT: u32 = 1 << 28;

/// The model of ownership, and what the run has shown so far.
#[derive(Debug, Default)]
pub struct Oracle {
    /// Whether a fault breaks a precondition (a disk lost or copied, a living node forgotten). Two owners of
    /// a slot are then possible, and must be detected and settled.
    pub lenient: bool,
    /// The cluster's pool: a member address inside it is unusable.
    pool: Option<Pool>,
    /// Whether to check only I2 and D4, for large worlds.
    pub subnets_only: bool,
    /// Every record by slot and epoch, as first flushed.
    records: BTreeMap<(u32, u64), SlotRecord>,
    /// The highest epoch that each node's disk has held, by slot.
    epochs: BTreeMap<NodeId, BTreeMap<u32, u64>>,
    /// Hosts whose kernels use a subnet.
    users: BTreeMap<IpNet, BTreeSet<usize>>,
    /// The node that wrote the first record of generation 0.
    creator: Option<NodeId>,
    /// Successors of forgotten nodes, as first flushed.
    forgotten: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// Nodes that have left or whose hosts were destroyed: they use nothing.
    pub departed: BTreeSet<NodeId>,
    /// Number of occurrences of each situation.
    pub reached: BTreeMap<&'static str, u64>,
    /// The first violation.
    pub violation: Option<String>,
}

impl Oracle {
    /// Returns an oracle without records.
    pub fn new(pool: Pool) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    /// Counts one occurrence of a situation.
    pub fn record_situation(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    /// Records a violation, unless an earlier one is recorded.
    pub fn report_violation(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// Records a violation of a rule that holds only under the preconditions.
    fn report_unless_lenient(&mut self, what: impl FnOnce() -> String) {
        if !self.lenient {
            self.report_violation(what);
        }
    }

    /// Checks records that were flushed to the disk of `node`. `has_contacted_peer` states whether the node
    /// has had contact with a peer since its start, for I7.
    pub fn on_flushed(
        &mut self,
        node: NodeId,
        has_contacted_peer: bool,
        written: &BTreeMap<Key, Vec<u8>>,
    ) {
        if self.subnets_only {
            return;
        }
        // Slots come last: a forget in the same batch may justify their new owner.
        for (key, bytes) in written.iter().rev() {
            match Record::decode(key.to_string().as_bytes(), bytes) {
                Ok((_, Record::Slots(runs))) => {
                    runs.iter().for_each(|run| self.on_flushed_run(node, has_contacted_peer, run));
                }
                Ok((_, Record::Forget(forget))) => {
                    self.forgotten.entry(forget.node).or_default().insert(forget.successor);
                }
                Ok((_, Record::Member(record))) => self.on_flushed_member(node, &record),
                Ok(_) => {}
                Err(error) => {
                    self.report_violation(|| format!("{node} wrote an unreadable record: {error}"))
                }
            }
        }
    }

    /// Checks I17 and I18.
    fn on_flushed_member(&mut self, node: NodeId, record: &MemberRecord) {
        let version = record.version;
        if version.starts.max(version.change) > MAX_PLAUSIBLE_COUNT {
            self.report_violation(|| format!("I17: {node} has {} at {version:?}", record.node));
        }
        if let Some(unfit) = self.pool.as_ref().and_then(|pool| record.why_unusable(pool)) {
            self.report_violation(|| {
                format!("I18: {node} has a record of {}: {unfit}", record.node)
            });
        }
    }

    /// Checks I1, I3, I4, I5, I7, I16 and I17.
    fn on_flushed_run(&mut self, node: NodeId, has_contacted_peer: bool, run: &Run) {
        let record = run.record;
        if (record.epoch >> EPOCH_COUNT_BITS).max(record.epoch & u64::from(u32::MAX))
            > u64::from(MAX_PLAUSIBLE_COUNT)
        {
            self.report_violation(|| format!("I17: {node} has {:?} at {record:?}", run.start));
        }
        for slot in run.slots() {
            let known = self.epochs.entry(node).or_default().insert(slot.0, record.epoch);
            if let Some(before) = known.filter(|before| *before > record.epoch) {
                self.report_unless_lenient(|| {
                    format!("I4: {slot:?} of {node}'s disk went from epoch {before} to {record:?}")
                });
            }
            match self.records.get(&(slot.0, record.epoch)) {
                Some(first) if *first == record => continue,
                Some(first) => {
                    let first = *first;
                    self.report_unless_lenient(|| {
                        format!("I1: {slot:?} has two records of one epoch: {first:?}, {record:?}")
                    });
                    continue;
                }
                None => {}
            }
            if record.granter != node {
                self.report_unless_lenient(|| {
                    format!("I5: {node} has {slot:?} {record:?} flushed before its granter has")
                });
            }
            if record.granter == node && record.owner != node && !has_contacted_peer {
                self.report_unless_lenient(|| {
                    format!("I7: {node} granted {slot:?} before it had contact with a peer")
                });
            }
            self.check_grant(slot.0, &record);
            self.check_succession(slot.0, &record);
            self.records.insert((slot.0, record.epoch), record);
        }
    }

    /// Checks I16.
    fn check_grant(&mut self, slot: u32, record: &SlotRecord) {
        if record.state != SlotState::Leased || record.granter == record.owner {
            return;
        }
        let heads = self.records.iter().rev();
        let mut seen_slots = BTreeSet::from([slot]);
        let is_second = heads.filter(|((slot, _), _)| seen_slots.insert(*slot)).any(|(_, head)| {
            head.state == SlotState::Leased
                && (head.owner, head.granter) == (record.owner, record.granter)
        });
        if is_second {
            self.report_unless_lenient(|| {
                format!("I16: {} gave {} a second slot, {slot}", record.granter, record.owner)
            });
        }
    }

    /// Checks I3.
    fn check_succession(&mut self, slot: u32, record: &SlotRecord) {
        let generation = record.epoch >> EPOCH_COUNT_BITS << EPOCH_COUNT_BITS;
        // Epochs may be missing: an owner may replace a record before it is flushed.
        let before = self.records.range((slot, generation)..(slot, record.epoch)).next_back();
        let allowed = match before {
            Some((_, before)) => before.owner == record.granter,
            None if generation == 0 => {
                *self.creator.get_or_insert(record.granter) == record.granter
            }
            // First record of a generation. It requires a forgotten owner whose successor is the granter, and
            // no later owner that still holds the slot by its own disk.
            None => {
                let owners = self.records.range((slot, 0)..(slot, generation)).rev();
                let was_reclaimed = |old: &SlotRecord| {
                    let successors = self.forgotten.get(&old.owner);
                    successors.is_some_and(|successors| successors.contains(&record.granter))
                };
                let still_owns = |epoch: u64, owner: NodeId| {
                    let disk = self.epochs.get(&owner).and_then(|epochs| epochs.get(&slot));
                    disk == Some(&epoch) && !self.departed.contains(&owner)
                };
                let mut last = owners.filter(|((_, epoch), old)| {
                    was_reclaimed(old) || still_owns(*epoch, old.owner)
                });
                last.next().is_some_and(|(_, old)| was_reclaimed(old))
            }
        };
        if !allowed {
            self.report_unless_lenient(|| {
                format!("I3: {} wrote slot {slot} {record:?} without owning it", record.granter)
            });
        }
    }

    /// Checks I5 for a frame that leaves a process.
    pub fn on_sent(&mut self, from: NodeId, bytes: &[u8]) {
        if self.subnets_only || self.lenient {
            return;
        }
        let Some(facts) = facts(bytes) else { return };
        for run in &facts.slots {
            for slot in run.slots() {
                if self.records.get(&(slot.0, run.record.epoch)) != Some(&run.record) {
                    self.report_violation(|| {
                        format!("I5: {from} sent {slot:?} {:?}, which is on no disk", run.record)
                    });
                }
            }
        }
    }

    /// Checks I21 for an output of a node that leaves.
    pub fn on_output_while_leaving(&mut self, node: NodeId, output: &Output) {
        if self.subnets_only {
            return;
        }
        match output {
            Output::Call { bytes, .. } if is_grant_request(bytes) => {
                self.report_violation(|| format!("I21: {node} leaves and requested a slot"));
            }
            Output::SlotsChanged(changes) => {
                let own = changes
                    .iter()
                    .filter(|(run, _)| run.record.owner == node && run.record.granter == node);
                let is_lease =
                    |record: &SlotRecord| record.owner == node && record.state == SlotState::Leased;
                let mut steps = own.filter(|(run, before)| {
                    is_lease(&run.record) || before.is_some_and(|before| is_lease(&before))
                });
                if let Some((run, before)) = steps.next() {
                    self.report_unless_lenient(|| {
                        format!("I21: {node} leaves and changed {before:?} to {run:?}")
                    });
                }
            }
            _ => {}
        }
    }

    /// Checks I2 when the subnet that a host's kernel uses changes.
    pub fn on_subnet_change(&mut self, host: usize, before: Option<IpNet>, after: Option<IpNet>) {
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
            self.report_unless_lenient(|| format!("I2: {subnet} is used by hosts {users:?}"));
        }
    }

    /// Returns the first host whose kernel uses a subnet.
    pub fn user_of(&self, subnet: IpNet) -> Option<usize> {
        self.users.get(&subnet)?.first().copied()
    }

    /// Checks I22 for changes of `node`'s slots, while its kernel uses `used`.
    pub fn on_slots_changed(&mut self, node: NodeId, used: Option<Slot>, changes: &[Change]) {
        let is_release = |(run, before): &&Change| {
            let was_leased = before.is_some_and(|before| {
                before.owner == node
                    && before.state == SlotState::Leased
                    && run.record.epoch == before.epoch + 1
            });
            was_leased && run.record.owner == node && run.record.state == SlotState::Free
        };
        let mut released = changes.iter().filter(is_release).flat_map(|(run, _)| run.slots());
        if let Some(slot) = released.find(|slot| Some(*slot) == used) {
            self.report_unless_lenient(|| {
                format!("I22: {node} released slot {}, which its kernel uses", slot.0)
            });
        }
    }

    /// Returns the subnets that several hosts use.
    pub fn shared_subnets(&self) -> impl Iterator<Item = (&IpNet, &BTreeSet<usize>)> {
        self.users.iter().filter(|(_, users)| users.len() > 1)
    }

    /// Checks D4 before `host` applies an operation. `is_in_use` returns whether the route delivers packets
    /// to the given host, which uses the subnet and is not departing.
    pub fn on_kernel_op(&mut self, host: usize, op: &Op, is_in_use: impl Fn(usize, IpNet) -> bool) {
        let Op::Entry(EntryOp::RemoveRoute(subnet, _)) = op else { return };
        let user = self.user_of(*subnet).filter(|user| *user != host && is_in_use(*user, *subnet));
        if let Some(user) = user {
            self.report_unless_lenient(|| {
                format!("D4: host {host} removed {subnet} of host {user}, which is in use")
            });
        }
    }
}

/// Returns whether a frame requests a slot.
fn is_grant_request(bytes: &[u8]) -> bool {
    let Ok((_, Frame::Request(payload))) = Frame::decode(bytes) else { return false };
    matches!(Request::decode(payload), Ok(Request::Grant(_)))
}

/// Returns the facts that a frame carries.
fn facts(bytes: &[u8]) -> Option<Facts> {
    match Frame::decode(bytes).ok()?.1 {
        Frame::Swim(_) | Frame::Inquiry(_) | Frame::Answer(_) => None,
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
