//! One cluster node as a state machine: `handle(now, input)`, `poll_output()`, `poll_timeout()`.
//!
//! A node's decisions depend on its inputs only: it has no clock, no randomness besides its seed, no sockets,
//! files or tasks. The agent and the simulator run the same code. The core decides neither how bytes travel
//! nor how the kernel is made equal to the view.
//!
//! A node consists of
//!
//! - [`membership`]: which members are alive (SWIM); has no effect on ownership or on the kernel
//! - [`replica`]: its copy of the cluster's state. [`slots`]: the table of slot owners and its rules;
//!   [`directory`]: each node's record about itself; `push`, `sync`: spread a change (`push` sends it at
//!   once, `sync` compares states and closes all gaps); `records`: what is written; `vet`, `horizon`: refuse
//!   facts that cannot be true
//! - [`lifecycle`]: `join` turns a non-member into a member, `lease` keeps exactly one subnet leased, `leave`
//!   hands over all slots
//! - [`key_use`]: other processes with its key
//! - [`outbox`]: what leaves it, and which write each output waits for
//!
//! and of the rules that connect these parts: `learn` merges facts from peers, `serve` answers peers,
//! `forget` reclaims the slots of a lost node, `vote` starts that by timeout, `view` computes what the kernel
//! needs, and `malformed` reports unusable input.

mod acknowledgements;
mod boot;
mod comparisons;
mod counters;
mod directory;
mod forget;
mod gate;
mod horizon;
mod introduce;
mod io;
mod join;
mod key_use;
mod learn;
mod lease;
mod leave;
mod lifecycle;
mod log_budget;
mod lookup;
mod malformed;
mod membership;
mod neighborhood;
mod node_config;
mod outbox;
mod partners;
mod preferred;
mod push;
mod rank;
mod records;
mod replica;
mod serve;
mod slots;
mod status;
mod supply;
mod sync;
#[cfg(test)]
mod tests;
mod vet;
mod view;
mod vote;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use rand::{RngExt as _, rngs::StdRng};

pub use boot::StartError;
pub use counters::Counters;
pub use forget::{CannotForget, Reclaiming, sign_of_host};
pub use gate::Gate;
pub use io::{Command, Delivery, Input, Output, RunningHosts, Stop, Target};
pub use lookup::Labels;
pub use node_config::{Bootstrap, NodeConfig};
pub use slots::Change;
pub use status::{FreeRange, MemberStatus, NodeStatus, Phase, SlotCounts};

use self::{
    introduce::Introductions,
    io::KernelSubnet,
    key_use::KeyUse,
    lifecycle::Lifecycle,
    log_budget::LogBudget,
    lookup::Successions,
    malformed::{Notes, read_response},
    membership::{Membership, Notice},
    outbox::Outbox,
    replica::Replica,
    slots::SlotTable,
    vote::Voting,
};
pub use crate::model::{CallError, CallId, Liveness, Own, Peer, ReplyId, View, WriteSeq};
use crate::{
    model::{ClusterId, ClusterRecord, Forget, NodeId, Run, Time},
    wire::{Buckets, Frame, Gossip, Push, Request, Response, Roots},
};

/// A node. Pass events to [`Node::handle`], then drain [`Node::poll_output`].
pub struct Node {
    /// Time of the input that is being handled.
    clock: Time,
    /// Settings from outside; nothing in them is saved.
    config: NodeConfig,
    rng: StdRng,
    /// Which members are alive, and those that gossip has yet to receive.
    membership: Membership,
    introductions: Introductions,
    replica: Replica,
    /// The last hashes of the state, which each gossip packet carries, with the hashes that they follow from.
    last_roots: Option<(Buckets, Roots)>,
    lifecycle: Lifecycle,
    key_use: KeyUse,
    notes: Notes,
    voting: Voting,
    /// Members whose hosts run although gossip does not hold them as active.
    running_hosts: RunningHosts,
    successions: Successions,
    outbox: Outbox,
    /// Bounds the log lines about members.
    log_budget: LogBudget,
    /// Bounds the log lines about unusable input.
    refusal_log_budget: LogBudget,
    /// Value of [`Node::may_write`] after the previous input.
    may_write_before: bool,
    counters: Counters,
}

/// The cluster this node belongs to.
struct ClusterState {
    cluster: ClusterRecord,
    slots: SlotTable,
}

/// Why a call is made, which decides how its answer is handled.
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
        granter: NodeId,
    },
    /// To ask a suspect whether it is alive.
    AreYouThere {
        node: NodeId,
    },
    /// To ask a member whether it will be the successor.
    QuerySuccessor {
        successor: NodeId,
    },
    /// To obtain free slots for joiners.
    Supply {
        supplier: NodeId,
    },
    Handover {
        keeper: NodeId,
    },
    Acknowledge {
        node: NodeId,
        forgets: Vec<Forget>,
        era: u64,
    },
    /// To ask another voter whether it has missed `node` for as long.
    Vote {
        voter: NodeId,
        node: NodeId,
    },
}

/// The result of a call: the node that answered, and its response.
type Answer = Result<(NodeId, Response), CallError>;

impl Node {
    /// Handles one input. All effects are in the outputs afterwards.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.clock = now;
        if let Input::Message { from, .. }
        | Input::Request { from, .. }
        | Input::Answer { result: Ok((from, _)), .. } = &input
        {
            self.membership.meet(*from);
        }
        match input {
            Input::Message { from, bytes } => self.handle_message(now, from, &bytes),
            Input::Request { from, reply, bytes } => self.serve(now, from, reply, &bytes),
            Input::Answer { call, result } => self.handle_answer(now, call, result),
            Input::KernelSubnet(subnet) => self.record_kernel_subnet(now, subnet),
            Input::RetainedEntries(slots) => self.record_retained_entries(now, slots),
            Input::UnderlayChanged { underlay } => self.change_underlay(now, underlay),
            Input::RunningHosts(hosts) => self.running_hosts = hosts,
            Input::Timeout => self.membership.handle_timeout(now),
            Input::Command(Command::Leave) => self.start_leaving(),
            Input::Command(Command::Sync) => self.replica.sync.hasten(now),
            Input::Command(Command::Save) => self.outbox.hasten_writes(now),
            Input::Command(Command::SaveAll) => self.replica.mark_everything(&mut self.outbox),
        }
        self.advance(now);
    }

    /// Returns the next output, oldest first.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outbox.poll()
    }

    /// Returns when [`Input::Timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Time> {
        let deadlines = [
            self.membership.next_timeout(),
            self.next_join_step(),
            self.lifecycle.next_lease_step(),
            self.lifecycle.next_leave_step(),
            self.lifecycle.supplies.next_step(),
            self.next_forget_step(),
            self.next_vote_step(),
            self.next_introduction(),
            self.replica.push.due(),
            self.replica.cluster_state.as_ref().map(|_| self.replica.sync.due()),
            self.outbox.write_due(),
            self.outbox.next_view(),
        ];
        deadlines.into_iter().flatten().min()
    }

    /// Runs all steps that are due or that follow from the last input.
    fn advance(&mut self, now: Time) {
        let may_write = self.may_write();
        if std::mem::replace(&mut self.may_write_before, may_write) != may_write {
            self.lifecycle.recheck_lease(now);
            self.recheck_forgets(now);
        }
        self.step_join(now);
        self.step_lease(now);
        self.step_supply(now);
        self.step_leave(now);
        self.step_forget(now);
        self.step_vote(now);
        self.step_sync(now);
        self.step_introductions(now);
        self.drain_membership(now);
        let encoded = |key| self.replica.record(key).map(|record| record.encode());
        self.outbox.write_changes(now, encoded);
        self.flush_push(now);
        self.program_kernel(now);
    }

    fn handle_message(&mut self, now: Time, from: NodeId, bytes: &[u8]) {
        let Some(cluster) = self.replica.cluster_id() else { return };
        if self.replica.directory.forgotten(from).is_some() {
            return;
        }
        match Frame::decode(bytes) {
            Ok((theirs, _)) if theirs != cluster => {
                self.note_foreign(from, theirs);
            }
            Ok((_, Frame::Swim(payload))) => match Gossip::decode(payload) {
                Ok(Gossip { roots, packet }) => {
                    self.handle_swim_packet(now, from, packet);
                    self.note_roots(now, from, roots);
                }
                Err(error) => self.note_malformed(from, &error),
            },
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
        let Some(purpose) = self.outbox.end_call(call) else { return };
        let answer = result.and_then(|(from, bytes)| match read_response(&bytes) {
            Ok(_) if self.replica.directory.forgotten(from).is_some() => {
                Err(CallError::Unreachable("the node was forgotten meanwhile".to_owned()))
            }
            Ok(response) => Ok((from, response)),
            Err(error) => {
                self.note_malformed(from, &error);
                Err(CallError::Unreachable(error))
            }
        });
        match purpose {
            Purpose::Hello { seed } => self.handle_hello_answer(now, seed, answer),
            Purpose::Grant { granter } => self.handle_grant_answer(now, granter, answer),
            Purpose::Supply { supplier } => self.handle_supply_answer(now, supplier, answer),
            Purpose::Compare { partner } => self.handle_compare_answer(now, partner, answer),
            Purpose::Exchange { partner, with } => {
                self.handle_exchange_answer(now, partner, with, answer);
            }
            Purpose::AreYouThere { node } => match answer {
                Ok((from, Response::Here(alive)))
                    if from == node && alive.identity.node == node =>
                {
                    self.membership.clear_suspicion(now, &alive);
                }
                Ok((from, other)) => {
                    self.note_unexpected(from, &other, "no answer to a suspicion");
                }
                Err(error) => tracing::debug!(%node, %error, "suspect did not answer"),
            },
            Purpose::QuerySuccessor { successor } => {
                self.handle_successor_answer(successor, answer)
            }
            Purpose::Handover { keeper } => self.handle_handover_answer(now, keeper, answer),
            Purpose::Acknowledge { node, forgets, era } => {
                self.handle_acknowledgement(now, node, &forgets, era, answer);
            }
            Purpose::Vote { voter, node } => self.handle_vote(now, voter, node, answer),
        }
    }

    /// Handles the kernel's report of the subnet that it uses.
    fn record_kernel_subnet(&mut self, now: Time, subnet: Option<IpNet>) {
        self.lifecycle.kernel_subnet = subnet.map_or(KernelSubnet::Nothing, KernelSubnet::Subnet);
        match subnet {
            Some(_) => self.lifecycle.recheck_lease(now),
            None => self.continue_leave_after_withdrawal(),
        }
    }

    /// Takes a new underlay address and publishes it; node and subnet stay the same.
    fn change_underlay(&mut self, now: Time, underlay: IpAddr) {
        self.replica.me.version.change += 1;
        self.replica.me.address.set_ip(underlay);
        self.replica.me.vtep.underlay = underlay;
        self.outbox.invalidate_view();
        if self.replica.cluster_state.is_some() {
            self.replica.publish_self(&mut self.outbox, now);
            self.replica.sync.hasten(now);
        }
    }

    fn drain_membership(&mut self, now: Time) {
        let mut is_member_down = false;
        while let Some(notice) = self.membership.poll_notice() {
            match notice {
                Notice::Send { to, packet } => {
                    let gossip = Gossip { roots: self.present_roots(), packet: &packet }.encode();
                    if let Some((address, bytes)) = self.replica.frame_to(to, Frame::Swim(&gossip))
                    {
                        self.outbox.send_packet(to, address, bytes);
                    }
                }
                Notice::Up(node) => {
                    if self.log_budget.take(now) {
                        tracing::info!(%node, name = self.name_of(node), "member up");
                    }
                    self.replica.sync.partners.end_pause(node);
                    self.note_succession(node);
                    if self.replica.directory.get(node).is_none() {
                        self.replica.sync.hasten(now);
                    }
                }
                Notice::Suspect(suspicion) => {
                    let node = suspicion.identity.node;
                    let request = Request::AreYouThere(suspicion);
                    self.call_member(node, Purpose::AreYouThere { node }, &request);
                }
                Notice::Down(node) => {
                    self.counters.downs += 1;
                    let has_ended = self.replica.is_gone(node);
                    let what = if has_ended { "member ended" } else { "member down" };
                    if self.log_budget.take(now) {
                        tracing::info!(%node, name = self.name_of(node), "{what}");
                    }
                    self.note_succession(node);
                    is_member_down = true;
                }
                Notice::Renewed(identity) => {
                    tracing::debug!(?identity.incarnation, "identity renewed");
                    self.replica.sync.unsettle(now);
                }
            }
        }
        if is_member_down {
            self.replace_predecessor(now);
        }
        let budgets = [&mut self.log_budget, &mut self.refusal_log_budget];
        let left_out = budgets.into_iter().filter_map(|budget| budget.take_left_out(now)).sum();
        if let lines @ 1_u64.. = left_out {
            tracing::info!(lines, "further log lines about members left out");
        }
    }

    fn call(&mut self, to: Target, purpose: Purpose, request: &Request) {
        let cluster =
            self.replica.cluster_id().or(self.config.cluster).unwrap_or(ClusterId::UNKNOWN);
        self.outbox.call(to, purpose, Frame::Request(&request.encode()).encode(cluster));
    }

    /// Calls a member. Returns false if the node has no record and so no known address.
    fn call_member(&mut self, node: NodeId, purpose: Purpose, request: &Request) -> bool {
        let target = self.replica.target(node);
        if let Some(target) = target {
            self.call(target, purpose, request);
        }
        target.is_some()
    }

    /// Returns this node's id.
    pub const fn id(&self) -> NodeId {
        self.replica.me.node
    }

    /// Returns all members except this one, without those that left or were forgotten.
    pub fn peers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.replica.directory.peers(self.replica.me.node).map(|record| record.node)
    }

    /// Returns the address of a member's QUIC endpoint.
    pub fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        self.replica.address_of(node)
    }

    /// Returns the cluster that this node is in.
    pub fn cluster(&self) -> Option<&ClusterRecord> {
        self.replica.cluster_state.as_ref().map(|cluster_state| &cluster_state.cluster)
    }

    /// Returns the addresses of the other members. A host saves them to rejoin without its database.
    pub fn member_addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.replica.directory.peers(self.replica.me.node).map(|record| record.address)
    }

    /// Returns the members with which this node keeps connections.
    pub fn neighbors(&self) -> &BTreeSet<NodeId> {
        self.membership.neighbors()
    }

    /// Counts the members that gossip considers alive or suspect, this node included.
    pub fn active_count(&self) -> usize {
        self.membership.identities().len() + 1
    }

    /// Returns the address at which peers reach this node.
    pub fn address(&self) -> SocketAddr {
        self.replica.me.address
    }

    /// Returns the slot records that this node knows, or `None` outside a cluster.
    pub fn slots(&self) -> Option<&[Run]> {
        self.replica.cluster_state.as_ref().map(|cluster_state| cluster_state.slots.runs())
    }

    /// Returns the hashes of all state that members agree on.
    pub fn roots(&self) -> Roots {
        self.replica.buckets(&self.membership).roots()
    }

    /// Returns whether the cluster has no other member: none ever joined, or all left or were forgotten.
    pub fn is_alone(&self) -> bool {
        self.replica.is_alone()
    }

    /// Returns the node's name, or "?" if its record is not known.
    pub fn name_of(&self, node: NodeId) -> &str {
        self.replica.name_of(node)
    }

    /// Returns a span between `base` and 1.25 * `base`, so that nodes do not act in step.
    fn jittered(&mut self, base: Duration) -> Duration {
        base + base.mul_f64(self.rng.random_range(0.0..0.25))
    }
}
