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
//! - `join`: from non-member to member; `lease`: having exactly one subnet
//! - `push`, `sync`: how a change reaches everybody: at once, and surely
//! - `serve`: answers to peers; `vet`, `horizon`: what of their words is believed; `malformed`: the rest
//! - `leave`: handing over and going; `forget`: reclaiming what others left behind; `vote`: forgetting by
//!   time alone
//! - `ping`, `inquire`: an operator's questions

mod boot;
mod counters;
mod directory;
mod forget;
mod gate;
mod horizon;
mod inquire;
mod introduce;
mod io;
mod join;
mod learn;
mod lease;
mod leave;
mod malformed;
mod membership;
mod partners;
mod ping;
pub mod planted;
mod push;
mod rank;
mod serve;
mod slots;
mod status;
mod sync;
#[cfg(test)]
mod tests;
mod vet;
mod view;
mod vote;
mod writes;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng};

pub use boot::{Bootstrap, NodeConfig, StartError};
pub use counters::Counters;
pub use forget::{CannotForget, Reclaiming};
pub use gate::Gate;
pub use io::{CallError, CallId, Command, Input, Output, ReplyId, Stop, Target, WriteSeq};
pub use membership::Liveness;
pub use slots::Change;
pub use status::{MemberStatus, NodeStatus, Phase, SlotCounts};
pub use view::{Own, Peer, View};

use self::{
    directory::Directory,
    forget::Forgetting,
    horizon::Horizons,
    introduce::Introductions,
    join::Joining,
    lease::LeaseSearch,
    leave::Leaving,
    malformed::{Notes, read_response},
    membership::{Membership, Notice},
    planted::{Bug, planted},
    push::PushQueue,
    slots::SlotTable,
    sync::SyncRound,
    vote::Voting,
    writes::Dirty,
};
use crate::{
    model::{BootId, ClusterId, ClusterRecord, Forget, MemberRecord, NodeId, Run, Slot, Time},
    wire::{Frame, Push, Request, Response, Roots},
};

/// The write of the start itself, the first of each process.
const FIRST_WRITE: WriteSeq = 1;

/// A node. Feed it with [`Node::handle`], then drain [`Node::poll_output`].
pub struct Node {
    /// When the present input came.
    clock: Time,
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
    forgetting: Forgetting,
    horizons: Horizons,
    notes: Notes,
    introductions: Introductions,
    /// Before that this node does not go above what others tell of it again.
    outbid_at: Option<Time>,
    voting: Voting,
    push: PushQueue,
    sync: SyncRound,
    calls: Calls,
    dirty: Dirty,
    /// The number of the latest write asked for, and of the latest that this node's word depends on.
    writes: WriteSeq,
    needed_write: WriteSeq,
    /// Another process that lives with this node's key, if it was heard of lately.
    duplicate: Option<DuplicateSeen>,
    /// Whether this node's memory was beyond doubt after the last input.
    could_write: bool,
    /// Processes with this node's key that it has gone above; bounded by what peers remember of it.
    outranked: BTreeSet<BootId>,
    /// The write that holds the present start. Nothing leaves before it: an incarnation that was seen is
    /// never used a second time.
    identity_write: WriteSeq,
    /// The write that holds the last change of this node's own slots.
    lease_write: WriteSeq,
    /// What the kernel is known to use.
    in_use: InUse,
    asked: Asked,
    /// Whether something that the view is made of has changed since.
    view_stale: bool,
    /// Slots that were leased and then changed hands, since the start.
    moved: BTreeSet<Slot>,
    counters: Counters,
    outputs: VecDeque<Output>,
}

/// The subnet in the kernel: pods live in it, whatever the table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InUse {
    /// Nothing was heard from the kernel since the start.
    Unknown,
    Nothing,
    Subnet(IpNet),
}

/// A copy of this node, as last heard of.
struct DuplicateSeen {
    address: SocketAddr,
    at: Time,
}

/// What was last asked of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Nothing,
    Overlay(View),
    Withdraw,
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

#[derive(Clone, Debug, PartialEq, Eq)]
enum Purpose {
    Hello {
        seed: usize,
    },
    Compare {
        partner: Target,
    },
    Exchange {
        partner: Target,
        with: NodeId,
    },
    Grant {
        donor: NodeId,
    },
    /// Is a suspect alive?
    AreYouThere {
        node: NodeId,
    },
    /// Is the successor there?
    AskSuccessor {
        successor: NodeId,
    },
    Handover {
        keeper: NodeId,
    },
    Acknowledge {
        node: NodeId,
        forgets: Vec<Forget>,
        era: u64,
    },
    /// Has a voter missed a node as well?
    Vote {
        voter: NodeId,
        node: NodeId,
    },
    /// An operator wants to know.
    Ping {
        node: NodeId,
    },
    Inquire {
        node: NodeId,
        number: u64,
    },
}

/// How a question ended: who answered, and what.
type Answer = Result<(NodeId, Response), CallError>;

impl Node {
    /// Takes in what happened. Everything that follows from it is in the outputs afterwards.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.clock = now;
        match input {
            Input::Message { from, bytes } => self.handle_message(now, from, &bytes),
            Input::Request { from, reply, bytes } => self.serve(now, from, reply, &bytes),
            Input::Answer { call, result } => self.handle_answer(now, call, result),
            Input::InUse(subnet) => self.on_in_use(now, subnet),
            Input::Moved { underlay } => self.on_moved(now, underlay),
            Input::Timeout => self.membership.handle_timeout(now),
            Input::Command(Command::Leave) => self.start_leaving(),
            Input::Command(Command::Sync) => self.sync.hasten(now),
            Input::Command(Command::Save) => self.dirty.hasten(now),
            Input::Command(Command::SaveAll) => self.write_everything(),
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
            self.next_lease_step(),
            self.next_leave_step(),
            self.next_forget_step(),
            self.next_vote_step(),
            self.next_introduction(),
            self.push.due(),
            self.home.as_ref().map(|_| self.sync.due()),
            self.dirty.lazy_at,
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Everything that is due by time or follows from the last input.
    fn advance(&mut self, now: Time) {
        let may_write = self.may_write();
        if std::mem::replace(&mut self.could_write, may_write) != may_write {
            self.recheck_lease(now);
            self.recheck_forgets(now);
        }
        self.step_join(now);
        self.step_lease(now);
        self.step_leave(now);
        self.step_forget(now);
        self.step_vote(now);
        self.step_sync(now);
        self.step_introductions(now);
        self.drain_membership(now);
        self.write_changes(now);
        self.flush_push(now);
        self.program();
    }

    fn handle_message(&mut self, now: Time, from: NodeId, bytes: &[u8]) {
        let Some(cluster) = self.cluster_id() else { return };
        if self.directory.forgotten(from).is_some() {
            return;
        }
        match Frame::decode(bytes) {
            Ok((theirs, _)) if theirs != cluster => {
                self.note_foreign(from, theirs);
            }
            Ok((_, Frame::Swim(packet))) => self.on_swim(now, from, packet),
            Ok((_, Frame::Push(payload))) => match Push::decode(payload) {
                Ok(push) => _ = self.learn(now, &push.facts, Some(from)),
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
            Ok(_) if self.directory.forgotten(from).is_some() => {
                Err(CallError::Unreachable("it was forgotten meanwhile".to_owned()))
            }
            Ok(response) => Ok((from, response)),
            Err(error) => {
                self.note_malformed(from, &error);
                Err(CallError::Unreachable(error))
            }
        });
        match purpose {
            Purpose::Hello { seed } => self.on_hello_answer(now, seed, answer),
            Purpose::Grant { donor } => self.on_grant_answer(now, donor, answer),
            Purpose::Compare { partner } => self.on_compare_answer(now, partner, answer),
            Purpose::Exchange { partner, with } => {
                self.on_exchange_answer(now, partner, with, answer);
            }
            Purpose::AreYouThere { node } => match answer {
                Ok((from, Response::Here(alive)))
                    if from == node && alive.identity.node == node =>
                {
                    self.membership.absolve(now, &alive);
                }
                Ok((from, other)) => {
                    self.note_unexpected(from, &other, "no answer to a suspicion");
                }
                Err(error) => tracing::debug!(%node, %error, "a suspect does not answer"),
            },
            Purpose::AskSuccessor { successor } => self.on_successor_answer(successor, answer),
            Purpose::Handover { keeper } => self.on_handover_answer(now, keeper, answer),
            Purpose::Acknowledge { node, forgets, era } => {
                self.on_acknowledgement(now, node, &forgets, era, answer);
            }
            Purpose::Vote { voter, node } => self.on_vote(now, voter, node, answer),
            Purpose::Ping { node } => self.on_ping_answer(node, &answer),
            Purpose::Inquire { node, number } => self.on_inquiry_answer(node, number, answer),
        }
    }

    fn on_in_use(&mut self, now: Time, subnet: Option<IpNet>) {
        self.in_use = subnet.map_or(InUse::Nothing, InUse::Subnet);
        match subnet {
            Some(_) => self.recheck_lease(now),
            None => self.on_withdrawn(),
        }
    }

    /// The same node with the same subnet elsewhere: all others are told at once.
    fn on_moved(&mut self, now: Time, underlay: IpAddr) {
        self.me.version.change += 1;
        self.me.address.set_ip(underlay);
        self.me.vtep.underlay = underlay;
        self.view_stale = true;
        if self.home.is_some() {
            self.publish_self(now);
            self.sync.hasten(now);
        }
    }

    fn drain_membership(&mut self, now: Time) {
        while let Some(notice) = self.membership.poll_notice() {
            match notice {
                Notice::Send { to, packet } => {
                    self.send(to, Frame::Swim(&packet), self.identity_write)
                }
                Notice::Up(node) => {
                    tracing::info!(%node, name = self.name_of(node), "member up");
                    self.sync.partners.note_sound(node);
                    if self.directory.get(node).is_none() {
                        self.sync.hasten(now);
                    }
                }
                Notice::Suspect(suspicion) => {
                    let node = suspicion.identity.node;
                    let request = Request::AreYouThere(suspicion);
                    self.call_member(node, Purpose::AreYouThere { node }, &request);
                }
                Notice::Down(node) => {
                    self.counters.downs += 1;
                    tracing::info!(%node, name = self.name_of(node), "member down");
                    self.replace_predecessor(now);
                    if planted(Bug::DownFreesSlots) {
                        self.vouch(now, node, true);
                    }
                }
                Notice::Renewed(identity) => {
                    tracing::debug!(?identity.incarnation, "identity renewed");
                    self.sync.unsettle(now);
                }
            }
        }
    }

    fn send(&mut self, to: NodeId, frame: Frame<'_>, after: WriteSeq) {
        let (Some(cluster), Some(record)) = (self.cluster_id(), self.directory.get(to)) else {
            return;
        };
        let address = record.address;
        self.outputs.push_back(Output::Send { to, address, bytes: frame.encode(cluster), after });
    }

    fn call(&mut self, to: Target, purpose: Purpose, request: &Request) {
        let cluster = self.cluster_id().or(self.config.cluster).unwrap_or(ClusterId::UNKNOWN);
        let bytes = Frame::Request(&request.encode()).encode(cluster);
        self.calls.next += 1;
        let call = CallId(self.calls.next);
        self.calls.open.insert(call, purpose);
        self.outputs.push_back(Output::Call { call, to, bytes, after: self.after() });
    }

    /// Says whether there is anybody to call: a node without a record has no address.
    fn call_member(&mut self, node: NodeId, purpose: Purpose, request: &Request) -> bool {
        let target = self.target(node);
        if let Some(target) = target {
            self.call(target, purpose, request);
        }
        target.is_some()
    }

    /// Where a member's endpoint is.
    pub fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        self.directory.get(node).map(|record| record.address)
    }

    fn target(&self, node: NodeId) -> Option<Target> {
        let address = self.address_of(node)?;
        Some(Target::Member { node, address })
    }

    /// The cluster this node is in.
    pub fn cluster(&self) -> Option<&ClusterRecord> {
        self.home.as_ref().map(|home| &home.cluster)
    }

    /// Addresses of other members, for a host that has to find them again without its database.
    pub fn member_addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.directory.peers(self.me.node).map(|record| record.address)
    }

    /// Members that gossip holds as alive or suspect, this node included.
    pub fn active_count(&self) -> usize {
        self.membership.others().count() + 1
    }

    /// Where peers reach this node.
    pub fn address(&self) -> SocketAddr {
        self.me.address
    }

    /// Who owns which slot, as far as this node knows.
    pub fn slots(&self) -> Option<&[Run]> {
        self.home.as_ref().map(|home| home.slots.runs())
    }

    /// Hashes of everything that members agree on.
    pub fn roots(&self) -> Roots {
        self.buckets().roots()
    }

    fn cluster_id(&self) -> Option<ClusterId> {
        self.home.as_ref().map(|home| home.cluster.id)
    }

    /// Nobody else has ever been here, or all have left.
    pub fn is_alone(&self) -> bool {
        self.directory.peers(self.me.node).next().is_none()
    }

    /// "?" for one that is not known.
    pub fn name_of(&self, node: NodeId) -> &str {
        self.directory.get(node).map_or("?", |record| record.name.as_str())
    }

    /// A span between `base` and `base` and a quarter, so that nodes do not act in step.
    fn jittered(&mut self, base: Duration) -> Duration {
        base + base.mul_f64(self.rng.random_range(0.0..0.25))
    }
}
