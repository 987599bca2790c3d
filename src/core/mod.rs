//! One node as a state machine: `handle(now, input)`, `poll_output()`, `poll_timeout()`.
//!
//! All of a node's decisions are made here and in the modules below, from inputs alone: no clock, no
//! randomness but the seed it was given, no socket, file or task. Production and the simulator run this
//! same code. What is decided elsewhere: how bytes travel, how the kernel is made equal to the view.
//!
//! - [`membership`]: who is alive (SWIM); an opinion, which changes nothing else
//! - [`slots`]: who owns which slot; the table and its rules
//! - [`directory`]: what each node says about itself
//! - `learn`: merging what others say
//! - `join`: from stranger to member with a lease
//! - `push`, `sync`: how a change reaches everybody: at once, and surely
//! - `serve`: answers to peers
//! - `leave`: handing over and going

mod boot;
mod directory;
mod io;
mod join;
mod learn;
mod leave;
mod membership;
mod push;
mod rank;
mod serve;
mod slots;
mod status;
mod sync;
#[cfg(test)]
mod tests;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use ipnet::Ipv4Net;
use rand::{RngExt as _, rngs::StdRng};

pub use boot::{Founding, NodeConfig, StartError};
pub use directory::MAX_MEMBERS;
pub use io::{CallError, CallId, Command, Input, Output, ReplyId, Stop, Target, WriteSeq};
pub use membership::Liveness;
pub use status::{MemberStatus, NodeStatus, Phase, SlotCounts};
pub use view::{Own, Peer, View};

use self::{
    directory::Directory,
    io::earlier,
    join::{Joining, LeaseSearch},
    leave::Leaving,
    membership::{Membership, Notice},
    push::PushQueue,
    slots::{Change, SlotTable},
    sync::SyncRound,
};
use crate::{
    model::{BootId, ClusterId, ClusterRecord, MemberRecord, NodeId, Slot, SlotState, Time},
    wire::{Frame, Key, Push, Record, Request, Response},
};

/// How long facts learned from others may wait to be written: they can be had again, and flash wears.
const LAZY_WRITE: Duration = Duration::from_secs(1);

/// The write of the start itself. Nothing leaves before it: an incarnation that was seen is never used
/// a second time.
const FIRST_WRITE: WriteSeq = 1;

/// A node. Feed it with [`Node::handle`], then drain [`Node::poll_output`].
pub struct Node {
    /// What this node says about itself; the newest version is also in the directory.
    me: MemberRecord,
    /// What the operator wants of a cluster that this node enters.
    config: NodeConfig,
    rng: StdRng,
    membership: Membership,
    directory: Directory,
    /// Known from the moment this node is in a cluster.
    home: Option<Home>,
    joining: Joining,
    leaving: Option<Leaving>,
    push: PushQueue,
    sync: SyncRound,
    calls: Calls,
    dirty: Dirty,
    /// The number of the latest durable write asked for.
    writes: WriteSeq,
    /// Processes with this node's key that it has gone above; bounded by what peers remember of it.
    outranked: BTreeSet<BootId>,
    /// The write that holds the last change of this node's own slots.
    lease_write: WriteSeq,
    /// The view last asked to be programmed, and whether something it is made of has changed since.
    programmed: Option<View>,
    view_stale: bool,
    counters: Counters,
    outputs: VecDeque<Output>,
}

/// The cluster this node belongs to.
struct Home {
    cluster: ClusterRecord,
    slots: SlotTable,
    search: LeaseSearch,
}

/// Questions on their way, by what to do with the answer.
#[derive(Default)]
struct Calls {
    next: u64,
    open: BTreeMap<CallId, Purpose>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Hello {
        seed: usize,
    },
    Compare,
    Exchange,
    Grant {
        donor: NodeId,
    },
    /// Is the heir there?
    AskHeir {
        heir: NodeId,
    },
    Handover {
        keeper: NodeId,
    },
}

/// Records that changed since they were last written.
#[derive(Default)]
struct Dirty {
    keys: BTreeSet<Key>,
    /// Something among them must be on disk before anybody hears of it.
    durable: bool,
    /// When the rest is written at the latest.
    lazy_at: Option<Time>,
}

/// Counts since the start, for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Broken promises of single ownership, each settled alike on all nodes.
    pub violations: u64,
    /// Records of another process that runs with this node's key.
    pub clones: u64,
    /// Frames and answers that could not be read.
    pub malformed: u64,
    pub grants: u64,
    /// Rounds of comparison that ended in "same" / "different".
    pub syncs_same: u64,
    pub syncs_different: u64,
}

impl Node {
    /// Takes in what happened. Everything that follows from it is in the outputs afterwards.
    pub fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Message { from, bytes } => self.handle_message(now, from, &bytes),
            Input::Request { from, reply, bytes } => self.serve(now, from, reply, &bytes),
            Input::Answer { call, result } => self.handle_answer(now, call, result),
            Input::Timeout => self.membership.handle_timeout(now),
            Input::Command(Command::Leave) => self.start_leaving(),
            Input::Command(Command::Sync) => self.sync.hasten(now),
            Input::Command(Command::Save) => self.dirty.hasten(now),
        }
        self.advance(now);
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Time> {
        let deadlines = [
            self.membership.next_timeout(),
            self.next_join_step(),
            self.next_leave_step(),
            self.push.due(),
            self.home.as_ref().map(|_| self.sync.due()),
            self.dirty.lazy_at,
        ];
        deadlines.into_iter().fold(None, earlier)
    }

    /// Everything that is due by time or follows from the last input.
    fn advance(&mut self, now: Time) {
        self.step_join(now);
        self.step_lease(now);
        self.step_leave(now);
        self.step_sync(now);
        self.drain_membership(now);
        self.write_changes(now);
        self.flush_push(now);
        self.program();
    }

    fn handle_message(&mut self, now: Time, from: NodeId, bytes: &[u8]) {
        let Some(cluster) = self.cluster_id() else { return };
        match Frame::decode(bytes) {
            Ok((theirs, _)) if theirs != cluster => {
                self.note_foreign(from, theirs);
            }
            Ok((_, Frame::Swim(packet))) => self.membership.handle_packet(now, packet),
            Ok((_, Frame::Push(payload))) => match Push::decode(payload) {
                Ok(push) => self.learn(now, &push.facts, Some(from)),
                Err(error) => self.note_malformed(from, &error),
            },
            Ok(_) => self.note_malformed(from, &"a request or response outside a stream"),
            Err(error) => self.note_malformed(from, &error),
        }
    }

    fn handle_answer(
        &mut self,
        now: Time,
        call: CallId,
        result: Result<(NodeId, Vec<u8>), CallError>,
    ) {
        let Some(purpose) = self.calls.open.remove(&call) else { return };
        let answer = result.and_then(|(from, bytes)| match read_response(&bytes) {
            Ok(response) => Ok((from, response)),
            Err(error) => {
                self.note_malformed(from, &error);
                Err(CallError::Unreachable(error))
            }
        });
        match purpose {
            Purpose::Hello { seed } => self.on_hello_answer(now, seed, answer),
            Purpose::Grant { donor } => self.on_grant_answer(now, donor, answer),
            Purpose::Compare => self.on_compare_answer(now, answer),
            Purpose::Exchange => self.on_exchange_answer(now, answer),
            Purpose::AskHeir { heir } => self.on_heir_answer(heir, answer),
            Purpose::Handover { keeper } => self.on_handover_answer(now, keeper, answer),
        }
    }

    /// Slots that changed: to be written, and before anything else where this node gains or loses one.
    fn note_slots(&mut self, changes: &[Change]) {
        let me = self.me.node;
        let Some(home) = &self.home else { return };
        for (run, before) in changes {
            let mine = run.record.owner == me || before.is_some_and(|record| record.owner == me);
            let (first, last) = (run.start, Slot(run.end().saturating_sub(1)));
            for bucket in home.slots.bucket_of(first)..=home.slots.bucket_of(last) {
                self.dirty.mark(Key::Slots(bucket as u8), mine);
            }
            if mine {
                self.lease_write = self.writes + 1;
            }
            self.view_stale = true;
        }
    }

    fn drain_membership(&mut self, now: Time) {
        while let Some(notice) = self.membership.poll_notice() {
            match notice {
                Notice::Send { to, packet } => self.send(to, Frame::Swim(&packet), FIRST_WRITE),
                Notice::Up(node) => {
                    tracing::info!(%node, name = self.name_of(node), "member up");
                    if self.directory.get(node).is_none() {
                        self.sync.hasten(now);
                    }
                }
                Notice::Down(node) => {
                    tracing::info!(%node, name = self.name_of(node), "member down");
                }
                Notice::Renewed(identity) => {
                    tracing::debug!(?identity.incarnation, "identity renewed");
                    self.sync.unsettle(now);
                }
            }
        }
    }

    /// Writes what changed: at once and durably, or lazily in one batch with whatever else comes.
    fn write_changes(&mut self, now: Time) {
        if self.dirty.keys.is_empty() {
            return;
        }
        let due = *self.dirty.lazy_at.get_or_insert(now + LAZY_WRITE);
        if !self.dirty.durable && now < due {
            return;
        }
        let Dirty { keys, durable, .. } = std::mem::take(&mut self.dirty);
        let seq = durable.then(|| {
            self.writes += 1;
            self.writes
        });
        let records = keys.into_iter().filter_map(|key| Some((key, self.record(key)?.encode())));
        let records = records.collect();
        self.outputs.push_back(Output::Write { records, seq });
    }

    fn record(&self, key: Key) -> Option<Record> {
        match key {
            Key::Starts => Some(Record::Starts(self.me.version.starts)),
            Key::Cluster => Some(Record::Cluster(self.home.as_ref()?.cluster)),
            Key::Slots(bucket) => {
                Some(Record::Slots(self.home.as_ref()?.slots.bucket(usize::from(bucket))))
            }
            Key::Member(node) => self.directory.get(node).cloned().map(Record::Member),
        }
    }

    /// Asks for the kernel to be made equal to the view, if the view changed. What this node says it
    /// owns is used only once that is on its own disk.
    fn program(&mut self) {
        let sweep_is_new = self.programmed.as_ref().is_some_and(|v| v.sweep != self.may_sweep());
        if !std::mem::take(&mut self.view_stale) && !sweep_is_new {
            return;
        }
        let Some(view) = self.view() else { return };
        if self.programmed.as_ref() != Some(&view) {
            self.programmed = Some(view.clone());
            self.outputs.push_back(Output::Program { view, after: self.lease_write });
        }
    }

    fn view(&self) -> Option<View> {
        let me = self.me.node;
        let Home { cluster, slots, .. } = self.home.as_ref()?;
        let pool = cluster.settings.pool;
        let mut leases: BTreeMap<NodeId, Vec<(Slot, Ipv4Net)>> = BTreeMap::new();
        for run in slots.runs().iter().filter(|run| run.record.state == SlotState::Leased) {
            let subnets = run.slots().map(|slot| (slot, pool.subnet(slot)));
            leases.entry(run.record.owner).or_default().extend(subnets);
        }
        let (slot, subnet) = *leases.get(&me)?.first()?;
        let peer = |record: &MemberRecord| {
            let leases = leases.get(&record.node)?.clone();
            Some((record.node, Peer { name: record.name.clone(), vtep: record.vtep, leases }))
        };
        Some(View {
            settings: cluster.settings,
            own: Own { slot, subnet, vtep: self.me.vtep },
            peers: self.directory.peers(me).filter_map(peer).collect(),
            sweep: self.may_sweep(),
        })
    }

    fn may_sweep(&self) -> bool {
        self.sync.synced() || self.is_alone()
    }

    /// The number of the write that everything known by now will be part of.
    fn after(&self) -> WriteSeq {
        self.writes + u64::from(self.dirty.durable)
    }

    fn send(&mut self, to: NodeId, frame: Frame<'_>, after: WriteSeq) {
        let (Some(cluster), Some(record)) = (self.cluster_id(), self.directory.get(to)) else {
            return;
        };
        let address = record.address;
        self.outputs.push_back(Output::Send { to, address, bytes: frame.encode(cluster), after });
    }

    fn call(&mut self, to: Target, purpose: Purpose, request: &Request, after: WriteSeq) {
        let cluster = self.cluster_id().or(self.config.cluster).unwrap_or(ClusterId::UNKNOWN);
        let bytes = Frame::Request(&request.encode()).encode(cluster);
        self.calls.next += 1;
        let call = CallId(self.calls.next);
        self.calls.open.insert(call, purpose);
        self.outputs.push_back(Output::Call { call, to, bytes, after });
    }

    fn call_member(&mut self, node: NodeId, purpose: Purpose, request: &Request, after: WriteSeq) {
        if let Some(record) = self.directory.get(node) {
            let to = Target::Member { node, address: record.address };
            self.call(to, purpose, request, after);
        }
    }

    fn cluster_id(&self) -> Option<ClusterId> {
        self.home.as_ref().map(|home| home.cluster.id)
    }

    /// Nobody else has ever been here, or all have left.
    fn is_alone(&self) -> bool {
        self.directory.peers(self.me.node).next().is_none()
    }

    fn name_of(&self, node: NodeId) -> &str {
        self.directory.get(node).map_or("?", |record| record.name.as_str())
    }

    /// A span between `base` and `base` and a quarter, so that nodes do not act in step.
    fn jittered(&mut self, base: Duration) -> Duration {
        base + base.mul_f64(self.rng.random_range(0.0..0.25))
    }

    fn note_malformed(&mut self, from: NodeId, error: &dyn std::fmt::Display) {
        self.counters.malformed += 1;
        tracing::warn!(peer = %from, name = self.name_of(from), %error, "unreadable message ignored");
    }

    fn note_foreign(&mut self, from: NodeId, theirs: ClusterId) {
        self.counters.malformed += 1;
        let ours = self.cluster_id();
        tracing::warn!(peer = %from, ?ours, %theirs, "message of another cluster ignored");
    }
}

impl Dirty {
    /// Has what has gathered written now.
    fn hasten(&mut self, now: Time) {
        self.lazy_at = self.lazy_at.map(|at| at.min(now));
    }

    fn mark(&mut self, key: Key, durable: bool) {
        self.keys.insert(key);
        self.durable |= durable;
    }
}

fn read_response(bytes: &[u8]) -> Result<Response, String> {
    match Frame::decode(bytes) {
        Ok((_, Frame::Response(payload))) => {
            Response::decode(payload).map_err(|error| error.to_string())
        }
        Ok(_) => Err("the answer is not a response".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
