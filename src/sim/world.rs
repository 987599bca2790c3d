//! The simulated world: every message, timer, disk write and kernel pass is an event in one queue.
//!
//! The nodes are the production core behind the production gate; only their environment is modelled. One seed
//! determines one run: simultaneous events keep their order of creation, and each source of randomness has
//! its own generator.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::Hasher as _,
    net::SocketAddr,
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use siphasher::sip::SipHasher13;

use super::{
    host::{Host, Process, by_address},
    network::Network,
    oracle::Oracle,
};
use crate::{
    core::{CallError, CallId, Command, Gate, Input, Node, Output, ReplyId, StartError},
    model::{ClusterSettings, NodeId, Quorum, Time},
    wire::{Frame, Request, Response},
};

/// Limit of events at one virtual instant. A run that exceeds it loops without advancing time.
const MAX_EVENTS_PER_INSTANT: u32 = 200_000;

/// All hosts, the network between them, the oracle and the event queue.
pub struct World {
    /// Current virtual time.
    pub now: Time,
    /// Hosts by [`Host::index`].
    pub hosts: Vec<Host>,
    /// The underlay.
    pub network: Network,
    /// Checks the safety rules.
    pub oracle: Oracle,
    /// Settings of the cluster that the creator creates.
    pub settings: ClusterSettings,
    /// Randomness of disks and kernels.
    pub environment_rng: StdRng,
    /// Voters that forget by time, if configured.
    pub quorum: Option<Quorum>,
    /// Index of the host whose member sends Byzantine messages, once one is chosen.
    pub byzantine_host: Option<usize>,
    /// Whether some host has lost its database.
    pub disk_lost: bool,
    /// Pending events by time and sequence number.
    queue: BTreeMap<(Time, u64), Event>,
    /// Last sequence number given to an event or a reply.
    sequence: u64,
    /// Powered hosts by their present address.
    pub(super) hosts_by_address: BTreeMap<SocketAddr, usize>,
    /// Requester of each unanswered request: host, process and call.
    pub(super) pending_replies: BTreeMap<u64, (usize, u32, CallId)>,
    /// Hash over all events.
    trace: SipHasher13,
    /// Events dispatched at the present instant.
    events_at_now: u32,
    /// Randomness that [`Host::entropy`] is drawn from.
    host_rng: StdRng,
}

/// An event in the queue. Events name processes by host and [`Host::process_id`]; those of an earlier process
/// are dropped.
pub(super) enum Event {
    /// A datagram or a one-way stream frame arrives.
    Message { from: NodeId, to: usize, bytes: Vec<u8> },
    /// A request arrives on a stream.
    Request {
        from: NodeId,
        from_host: usize,
        process_id: u32,
        call: CallId,
        to: usize,
        bytes: Vec<u8>,
    },
    /// A call ends, with a response or an error.
    Answer {
        to: usize,
        process_id: u32,
        call: CallId,
        result: Result<(NodeId, Vec<u8>), CallError>,
    },
    /// The node's timeout.
    Timer { host: usize, process_id: u32 },
    /// The disk completes a batch.
    Disk { host: usize, process_id: u32 },
    /// A pass of the data plane.
    Kernel { host: usize, process_id: u32 },
    /// A host that was expelled, or whose disk says that it has left, starts again under a new identity.
    IdentityReset { host: usize, process_id: u32 },
}

impl World {
    /// Returns an empty world.
    pub fn new(seed: u64, settings: ClusterSettings) -> Self {
        let stream = |purpose: u64| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&seed.to_le_bytes());
            bytes[8..16].copy_from_slice(&purpose.to_le_bytes());
            StdRng::from_seed(bytes)
        };
        Self {
            now: Time::ZERO,
            hosts: Vec::new(),
            network: Network::new(stream(1)),
            oracle: Oracle::new(settings.pool),
            settings,
            environment_rng: stream(2),
            quorum: None,
            byzantine_host: None,
            disk_lost: false,
            queue: BTreeMap::new(),
            sequence: 0,
            hosts_by_address: BTreeMap::new(),
            pending_replies: BTreeMap::new(),
            trace: SipHasher13::new_with_keys(0, 0),
            events_at_now: 0,
            host_rng: stream(3),
        }
    }

    /// Adds a machine without a running agent, and returns its index.
    pub fn add_host(&mut self) -> usize {
        let index = self.hosts.len();
        let mut entropy = [0; 24];
        self.host_rng.fill(&mut entropy);
        let mut host = Host::new(index, entropy);
        host.quorum.clone_from(&self.quorum);
        self.hosts.push(host);
        self.hosts_by_address = by_address(&self.hosts);
        index
    }

    /// Adds a host whose agent creates the cluster.
    pub fn add_creator(&mut self) -> usize {
        let index = self.add_host();
        self.hosts[index].creates = Some(self.settings);
        index
    }

    /// Adds a host whose agent joins at the hosts with these indices.
    pub fn add_joiner(&mut self, seeds: &[usize]) -> usize {
        let index = self.add_host();
        self.hosts[index].seeds = seeds.to_vec();
        index
    }

    /// Starts the agent of a powered host, if none runs.
    pub fn start(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        if host.process.is_some() || !host.is_powered {
            return;
        }
        host.process_id += 1;
        host.stopped = None;
        let config = host.config();
        let records = match host.disk.records() {
            Ok(records) => records,
            Err(error) => return self.oracle.report_violation(|| format!("host {index}: {error}")),
        };
        let me = host.key;
        let is_leaving = host.knows_as_left(me);
        let peers = host.members_on_disk().into_iter().filter(|node| *node != me).collect();
        match Node::start(host.clock.local(now), config, records) {
            Ok(node) => {
                host.process = Some(Process {
                    node,
                    gate: Gate::default(),
                    desired_state: None,
                    next_program_at: None,
                    timer: None,
                    paused: None,
                    open_calls: BTreeSet::new(),
                    comparisons: BTreeMap::new(),
                    last_silent: None,
                    is_leaving,
                    awaited_peers: peers,
                });
                self.drain_outputs(index);
                self.arm_timer(index);
            }
            Err(StartError::HasLeft) => self.schedule_identity_reset(index),
            Err(error) => {
                self.oracle.report_violation(|| format!("host {index} does not start: {error}"))
            }
        }
    }

    /// Kills the agent (SIGKILL). The kernel's state and everything flushed remain; queued writes are lost.
    pub fn kill(&mut self, index: usize) {
        self.hosts[index].process = None;
        self.hosts[index].disk.discard_queued();
    }

    /// Cuts the power. The machine comes back without its kernel's state; of the queued writes a random
    /// number was flushed.
    pub fn cut_power(&mut self, index: usize) {
        let queued_batches = self.hosts[index].disk.queued_batches();
        let completed = self.environment_rng.random_range(0..=queued_batches);
        let host = &mut self.hosts[index];
        let (node, written) = (host.key, host.disk.cut_power(completed));
        let awaited_peers =
            host.process.take().map(|process| process.awaited_peers).unwrap_or_default();
        let has_contacted_peer = (&awaited_peers & &host.members_on_disk()).is_empty();
        self.oracle.on_flushed(node, has_contacted_peer, &written);
        self.change_kernel(index, |host| host.kernel = Default::default());
    }

    /// Switches the machine off for good.
    pub fn destroy(&mut self, index: usize) {
        self.cut_power(index);
        self.hosts[index].is_powered = false;
        self.oracle.departed.insert(self.hosts[index].key);
        self.hosts_by_address = by_address(&self.hosts);
    }

    /// Gives the host another underlay address, which its agent uses from its next start.
    pub fn move_host(&mut self, index: usize, to: std::net::Ipv4Addr) {
        self.hosts[index].underlay = to;
        self.hosts_by_address = by_address(&self.hosts);
    }

    /// Freezes the agent (SIGSTOP).
    pub fn pause(&mut self, index: usize) {
        if let Some(process) = &mut self.hosts[index].process {
            process.paused.get_or_insert_default();
        }
    }

    /// Resumes a frozen agent, which first handles the inputs that arrived meanwhile.
    pub fn resume(&mut self, index: usize) {
        let inputs = self.hosts[index].process.as_mut().and_then(|process| process.paused.take());
        for input in inputs.into_iter().flatten() {
            self.handle(index, input);
        }
        let process_id = self.hosts[index].process_id;
        self.schedule(Duration::ZERO, Event::Timer { host: index, process_id });
        self.schedule(Duration::ZERO, Event::Disk { host: index, process_id });
    }

    /// Delivers random bytes in the name of a random member, some of them behind a valid frame header.
    pub fn send_garbage(&mut self, index: usize, rng: &mut StdRng) {
        let from = self.hosts[rng.random_range(0..self.hosts.len())].key;
        let mut bytes = vec![0; rng.random_range(0..64)];
        rng.fill(&mut bytes[..]);
        if let (Some(cluster), true) = (self.hosts[index].saved_cluster, bytes.len() > 10) {
            bytes[0] = crate::wire::WIRE_VERSION;
            bytes[1] %= 5;
            bytes[2..10].copy_from_slice(cluster.as_bytes());
        }
        self.oracle.record_situation("garbage");
        self.input(index, Input::Message { from, bytes });
    }

    /// Gives a command to the node.
    pub fn command(&mut self, index: usize, command: Command) {
        self.input(index, Input::Command(command));
    }

    /// Dispatches all events up to `until`, or up to the first violation.
    pub fn run_until(&mut self, until: Time) {
        while self.oracle.violation.is_none() {
            let Some(entry) = self.queue.first_entry() else { break };
            let (at, number) = *entry.key();
            if at > until {
                break;
            }
            if at > self.now {
                self.events_at_now = 0;
            }
            self.events_at_now += 1;
            if self.events_at_now > MAX_EVENTS_PER_INSTANT {
                let now = self.now;
                return self
                    .oracle
                    .report_violation(|| format!("time does not advance at {now:?}"));
            }
            let event = entry.remove();
            self.now = at;
            self.trace.write_u64(number);
            self.dispatch(event);
        }
        self.now = self.now.max(until);
    }

    /// Dispatches the events of the next `span`.
    pub fn run_for(&mut self, span: Duration) {
        self.run_until(self.now + span);
    }

    /// Returns the hash over all events so far: equal for two runs only if all their events are.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Message { from, to, bytes } => {
                self.input(to, Input::Message { from, bytes });
            }
            Event::Request { from, from_host, process_id, call, to, bytes } => {
                self.sequence += 1;
                let reply = self.sequence;
                if let Some(process) = &mut self.hosts[to].process {
                    if !process.awaited_peers.is_empty() && is_exchange(&bytes) {
                        process.awaited_peers.clear();
                    }
                    self.pending_replies.insert(reply, (from_host, process_id, call));
                    self.input(to, Input::Request { from, reply: ReplyId(reply), bytes });
                }
            }
            Event::Answer { to, process_id, call, result } => {
                let host = &mut self.hosts[to];
                let process = host.process.as_mut().filter(|_| host.process_id == process_id);
                let is_open = process.is_some_and(|process| process.open_calls.remove(&call));
                if is_open {
                    self.record_contact(to, &result);
                    self.record_unanswered_comparison(to, call, &result);
                    let before =
                        self.hosts[to].node().map(|node| (node.is_settled(), node.roots()));
                    let from =
                        result.as_ref().ok().map(|(from, bytes)| (*from, is_falsified(bytes)));
                    self.input(to, Input::Answer { call, result });
                    if let Some((from, is_falsified)) = from {
                        self.check_settled_after_falsified_answer(to, from, before, is_falsified);
                    }
                }
            }
            Event::Timer { host, process_id } if self.hosts[host].process_id == process_id => {
                self.fire_timer(host)
            }
            Event::Disk { host, process_id } if self.hosts[host].process_id == process_id => {
                self.complete_write(host)
            }
            Event::Kernel { host, process_id } if self.hosts[host].process_id == process_id => {
                self.program_kernel(host)
            }
            Event::IdentityReset { host, process_id }
                if self.hosts[host].process_id == process_id =>
            {
                let host = &mut self.hosts[host];
                host.new_identity();
                let index = host.index;
                self.start(index);
            }
            Event::Timer { .. }
            | Event::Disk { .. }
            | Event::Kernel { .. }
            | Event::IdentityReset { .. } => {}
        }
    }

    /// Delivers the timeout if it is due by the host's own clock, or arms the timer again.
    fn fire_timer(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let local = host.clock.local(now);
        let Some(process) = host.process.as_mut().filter(|process| process.paused.is_none()) else {
            return;
        };
        process.timer = process.timer.filter(|at| *at > now);
        if process.node.poll_timeout().is_some_and(|at| at <= local) {
            self.input(index, Input::Timeout);
        } else {
            self.arm_timer(index);
        }
    }

    /// Delivers an input. A frozen process buffers it.
    pub fn input(&mut self, index: usize, input: Input) {
        let Some(process) = &mut self.hosts[index].process else { return };
        if let Some(waiting) = &mut process.paused {
            // Models the socket's buffer, which drops what does not fit.
            if waiting.len() < 4096 || matches!(input, Input::Answer { .. }) {
                waiting.push(input);
            }
            return;
        }
        if let Input::Message { from, bytes } | Input::Request { from, bytes, .. } = &input {
            process.last_silent.take_if(|silent| silent == from);
            self.trace.write(from.as_bytes());
            self.trace.write(bytes);
        }
        self.handle(index, input);
        self.arm_timer(index);
    }

    fn handle(&mut self, index: usize, input: Input) {
        let now = self.now;
        let _span = tracing::error_span!("", ?now, host = index).entered();
        let host = &mut self.hosts[index];
        let local = host.clock.local(now);
        let Some(process) = &mut host.process else { return };
        process.is_leaving |= matches!(input, Input::Command(Command::Leave));
        let hashes = process.gossiped_hashes(&input);
        process.node.handle(local, input);
        process.record_contact_by_gossip(hashes);
        self.drain_outputs(index);
    }

    /// Executes the outputs that the gate lets pass.
    pub(super) fn drain_outputs(&mut self, index: usize) {
        loop {
            let host = &mut self.hosts[index];
            let Some(process) = &mut host.process else { break };
            let Some(output) = process.node.poll_output() else { break };
            process.is_leaving &= !matches!(output, Output::CannotLeave(_));
            if process.is_leaving {
                self.oracle.on_output_while_leaving(host.key, &output);
            }
            if let Some(output) = process.gate.pass(output) {
                self.execute(index, output);
            }
        }
    }

    /// Schedules the node's next timeout.
    pub(super) fn arm_timer(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let (clock, process_id) = (host.clock, host.process_id);
        let Some(process) = &mut host.process else { return };
        let Some(local) = process.node.poll_timeout() else {
            // An open call or a pending write wakes the node.
            if !process.open_calls.is_empty() || !host.disk.is_idle() {
                return;
            }
            return self.oracle.report_violation(|| {
                format!("R3: host {index} has no timeout and waits for nothing")
            });
        };
        let at = clock.global(local).max(self.now);
        if process.timer.is_none_or(|armed| at < armed) {
            process.timer = Some(at);
            self.schedule(at.since(self.now), Event::Timer { host: index, process_id });
        }
    }

    /// Changes a host, and reports the change of its kernel's subnet to the oracle.
    pub fn change_kernel(&mut self, index: usize, change: impl FnOnce(&mut Host)) {
        let pool = self.settings.pool;
        let before = self.hosts[index].subnet_in_use(&pool);
        change(&mut self.hosts[index]);
        let after = self.hosts[index].subnet_in_use(&pool);
        self.oracle.on_subnet_change(index, before, after);
    }

    /// Queues an event.
    pub(super) fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + after, self.sequence), event);
    }
}

/// Whether a request carries all facts that its sender has beyond those of the receiver.
fn is_exchange(bytes: &[u8]) -> bool {
    let request = match Frame::decode(bytes) {
        Ok((_, Frame::Request(payload))) => Request::decode(payload).ok(),
        _ => None,
    };
    matches!(request, Some(Request::Exchange { .. }))
}

/// Whether an answer carries the unusable record of [`World::falsify_answer`] and reports no member as down.
fn is_falsified(bytes: &[u8]) -> bool {
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
