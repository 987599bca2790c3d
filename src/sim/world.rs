//! Many nodes under one clock: every message, timer, write and kernel operation is an event in one queue.
//!
//! The nodes are the production core behind the production gate; only what surrounds them is modelled.
//! One seed gives one run: events of one moment keep the order in which they came about, and each source
//! of chance has a generator of its own.

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
    liar::is_twisted,
    network::Network,
    oracle::Oracle,
};
use crate::{
    core::{CallError, CallId, Command, Gate, Input, Node, ReplyId, StartError},
    model::{ClusterSettings, NodeId, Quorum, Time},
    wire::{Frame, Request, Response},
};

/// A node that asks for more turns without time going on would never end.
const MAX_TURNS_A_MOMENT: u32 = 200_000;

pub struct World {
    pub now: Time,
    pub hosts: Vec<Host>,
    pub network: Network,
    pub oracle: Oracle,
    pub settings: ClusterSettings,
    /// Chances of a process's surroundings: disks, kernels.
    pub luck: StdRng,
    /// Who of the cluster forgets by time.
    pub quorum: Option<Quorum>,
    /// The host whose member errs or lies.
    pub liar: Option<usize>,
    /// Some host has lost its database.
    pub disk_lost: bool,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    pub(super) places: BTreeMap<SocketAddr, usize>,
    pub(super) replies: BTreeMap<u64, (usize, u32, CallId)>,
    trace: SipHasher13,
    turns: u32,
    luck_of_hosts: StdRng,
}

/// What can happen. Processes are named by host and life: what was meant for an earlier one is void.
pub(super) enum Event {
    Message {
        from: NodeId,
        to: usize,
        bytes: Vec<u8>,
    },
    Request {
        from: NodeId,
        from_host: usize,
        life: u32,
        call: CallId,
        to: usize,
        bytes: Vec<u8>,
    },
    Answer {
        to: usize,
        life: u32,
        call: CallId,
        result: Result<(NodeId, Vec<u8>), CallError>,
    },
    Timer {
        host: usize,
        life: u32,
    },
    Disk {
        host: usize,
        life: u32,
    },
    Kernel {
        host: usize,
        life: u32,
    },
    /// A host that learned that it is no member any more begins again.
    Rebirth {
        host: usize,
        life: u32,
    },
}

impl World {
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
            luck: stream(2),
            quorum: None,
            liar: None,
            disk_lost: false,
            queue: BTreeMap::new(),
            sequence: 0,
            places: BTreeMap::new(),
            replies: BTreeMap::new(),
            trace: SipHasher13::new_with_keys(0, 0),
            turns: 0,
            luck_of_hosts: stream(3),
        }
    }

    /// A new machine; nothing runs on it yet.
    pub fn add_host(&mut self) -> usize {
        let index = self.hosts.len();
        let mut luck = [0; 24];
        self.luck_of_hosts.fill(&mut luck);
        let mut host = Host::new(index, luck);
        host.quorum.clone_from(&self.quorum);
        self.hosts.push(host);
        self.places = by_address(&self.hosts);
        index
    }

    /// A machine whose agent creates the cluster.
    pub fn add_creator(&mut self) -> usize {
        let index = self.add_host();
        self.hosts[index].creates = Some(self.settings);
        index
    }

    /// A machine whose agent joins at these hosts.
    pub fn add_joiner(&mut self, seeds: &[usize]) -> usize {
        let index = self.add_host();
        self.hosts[index].seeds = seeds.to_vec();
        index
    }

    pub fn start(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        if host.process.is_some() || !host.power {
            return;
        }
        host.life += 1;
        host.stopped = None;
        let config = host.config();
        let records = match host.disk.records() {
            Ok(records) => records,
            Err(error) => return self.oracle.accuse(|| format!("host {index}: {error}")),
        };
        let me = host.key;
        let non_members = host.members_on_disk().into_iter().filter(|node| *node != me).collect();
        match Node::start(host.clock.local(now), config, records) {
            Ok(node) => {
                host.process = Some(Process {
                    node,
                    gate: Gate::default(),
                    desired_state: None,
                    programs_at: None,
                    timer: None,
                    paused: None,
                    open_calls: BTreeSet::new(),
                    comparisons: BTreeMap::new(),
                    last_silent: None,
                    unmet: non_members,
                });
                self.settle(index);
                self.arm(index);
            }
            Err(StartError::HasLeft) => self.rebirth_soon(index),
            Err(error) => self.oracle.accuse(|| format!("host {index} does not start: {error}")),
        }
    }

    /// SIGKILL: the kernel's state and what was handed to the system stay.
    pub fn kill(&mut self, index: usize) {
        self.hosts[index].process = None;
        self.hosts[index].disk.kill_process();
    }

    /// The machine loses power and comes back without its kernel's state and what was not flushed.
    pub fn cut_power(&mut self, index: usize) {
        let under_way = self.hosts[index].disk.under_way();
        let kept = self.luck.random_range(0..=under_way);
        let host = &mut self.hosts[index];
        let (node, news) = (host.key, host.disk.cut_power(kept));
        let unmet = host.process.take().map(|process| process.unmet).unwrap_or_default();
        let met = (&unmet & &host.members_on_disk()).is_empty();
        self.oracle.on_flushed(node, met, &news);
        self.change_kernel(index, |host| host.kernel = Default::default());
    }

    /// The machine is gone for good.
    pub fn destroy(&mut self, index: usize) {
        self.cut_power(index);
        self.hosts[index].power = false;
        self.oracle.gone.insert(self.hosts[index].key);
        self.places = by_address(&self.hosts);
    }

    /// The host has another underlay address from its next start on.
    pub fn move_host(&mut self, index: usize, to: std::net::Ipv4Addr) {
        self.hosts[index].underlay = to;
        self.places = by_address(&self.hosts);
    }

    pub fn pause(&mut self, index: usize) {
        if let Some(process) = &mut self.hosts[index].process {
            process.paused.get_or_insert_default();
        }
    }

    pub fn resume(&mut self, index: usize) {
        let inputs = self.hosts[index].process.as_mut().and_then(|process| process.paused.take());
        for input in inputs.into_iter().flatten() {
            self.handle(index, input);
        }
        let life = self.hosts[index].life;
        self.schedule(Duration::ZERO, Event::Timer { host: index, life });
        self.schedule(Duration::ZERO, Event::Disk { host: index, life });
    }

    /// Bytes from a member that mean nothing: random ones, or sound ones with one byte changed.
    pub fn babble(&mut self, index: usize, rng: &mut StdRng) {
        let from = self.hosts[rng.random_range(0..self.hosts.len())].key;
        let mut bytes = vec![0; rng.random_range(0..64)];
        rng.fill(&mut bytes[..]);
        if let (Some(cluster), true) = (self.hosts[index].saved_cluster, bytes.len() > 10) {
            bytes[0] = crate::wire::WIRE_VERSION;
            bytes[1] %= 5;
            bytes[2..10].copy_from_slice(cluster.as_bytes());
        }
        self.oracle.reach("garbage");
        self.input(index, Input::Message { from, bytes });
    }

    pub fn command(&mut self, index: usize, command: Command) {
        self.input(index, Input::Command(command));
    }

    /// Runs until the queue has nothing before `until`, or a promise is broken.
    pub fn run_until(&mut self, until: Time) {
        while self.oracle.violation.is_none() {
            let Some(entry) = self.queue.first_entry() else { break };
            let (at, number) = *entry.key();
            if at > until {
                break;
            }
            if at > self.now {
                self.turns = 0;
            }
            self.turns += 1;
            if self.turns > MAX_TURNS_A_MOMENT {
                let now = self.now;
                return self.oracle.accuse(|| format!("time stands still at {now:?}"));
            }
            let event = entry.remove();
            self.now = at;
            self.trace.write_u64(number);
            self.happen(event);
        }
        self.now = self.now.max(until);
    }

    pub fn run_for(&mut self, span: Duration) {
        self.run_until(self.now + span);
    }

    /// A number that is the same for two runs only if all their events were.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Message { from, to, bytes } => self.input(to, Input::Message { from, bytes }),
            Event::Request { from, from_host, life, call, to, bytes } => {
                self.sequence += 1;
                let reply = self.sequence;
                if let Some(process) = &mut self.hosts[to].process {
                    if !process.unmet.is_empty() && is_exchange(&bytes) {
                        process.unmet.clear();
                    }
                    self.replies.insert(reply, (from_host, life, call));
                    self.input(to, Input::Request { from, reply: ReplyId(reply), bytes });
                }
            }
            Event::Answer { to, life, call, result } => {
                let host = &mut self.hosts[to];
                let process = host.process.as_mut().filter(|_| host.life == life);
                let waits = process.is_some_and(|process| process.open_calls.remove(&call));
                if waits {
                    self.note_meeting(to, &result);
                    self.note_silence(to, call, &result);
                    let before =
                        self.hosts[to].node().map(|node| (node.is_settled(), node.roots()));
                    let from = result.as_ref().ok().map(|(from, bytes)| (*from, is_twisted(bytes)));
                    self.input(to, Input::Answer { call, result });
                    if let Some((from, is_twisted)) = from {
                        self.judge_odd_answer(to, from, before, is_twisted);
                    }
                }
            }
            Event::Timer { host, life } if self.hosts[host].life == life => self.wake(host),
            Event::Disk { host, life } if self.hosts[host].life == life => self.write_next(host),
            Event::Kernel { host, life } if self.hosts[host].life == life => self.program(host),
            Event::Rebirth { host, life } if self.hosts[host].life == life => {
                let host = &mut self.hosts[host];
                host.new_identity();
                let index = host.index;
                self.start(index);
            }
            Event::Timer { .. }
            | Event::Disk { .. }
            | Event::Kernel { .. }
            | Event::Rebirth { .. } => {}
        }
    }

    /// I7: whoever started with peers on its disk grants nothing before one of them has answered it.
    fn note_meeting(&mut self, index: usize, answer: &Result<(NodeId, Vec<u8>), CallError>) {
        let Some(process) = self.hosts[index].process.as_mut() else { return };
        if process.unmet.is_empty() {
            return;
        }
        let response = answer.as_ref().ok().and_then(|(_, bytes)| match Frame::decode(bytes) {
            Ok((_, Frame::Response(payload))) => Response::decode(payload).ok(),
            _ => None,
        });
        if let Some(Response::Same | Response::Facts { .. } | Response::Acknowledged(_)) = response
        {
            process.unmet.clear();
        }
    }

    fn wake(&mut self, index: usize) {
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
            self.arm(index);
        }
    }

    pub fn input(&mut self, index: usize, input: Input) {
        let Some(process) = &mut self.hosts[index].process else { return };
        if let Some(waiting) = &mut process.paused {
            // The socket's buffer: what does not fit is lost.
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
        self.arm(index);
    }

    fn handle(&mut self, index: usize, input: Input) {
        let now = self.now;
        let _span = tracing::error_span!("", ?now, host = index).entered();
        let host = &mut self.hosts[index];
        let local = host.clock.local(now);
        let Some(process) = &mut host.process else { return };
        process.node.handle(local, input);
        self.settle(index);
    }

    /// Carries out what a node asked for, and sees to its next wake-up.
    pub(super) fn settle(&mut self, index: usize) {
        while let Some(process) = &mut self.hosts[index].process {
            let Some(output) = process.node.poll_output() else { break };
            if let Some(output) = process.gate.pass(output) {
                self.carry_out(index, output);
            }
        }
    }

    pub(super) fn arm(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let (clock, life) = (host.clock, host.life);
        let Some(process) = &mut host.process else { return };
        let Some(local) = process.node.poll_timeout() else {
            // Something else will come: an answer, or the disk.
            if !process.open_calls.is_empty() || !host.disk.is_idle() {
                return;
            }
            return self.oracle.accuse(|| format!("R3: host {index} sleeps for ever"));
        };
        let at = clock.global(local).max(self.now);
        if process.timer.is_none_or(|armed| at < armed) {
            process.timer = Some(at);
            self.schedule(at.since(self.now), Event::Timer { host: index, life });
        }
    }

    /// Any change of a kernel, seen by the judge.
    pub fn change_kernel(&mut self, index: usize, change: impl FnOnce(&mut Host)) {
        let pool = self.settings.pool;
        let before = self.hosts[index].subnet_in_use(&pool);
        change(&mut self.hosts[index]);
        let after = self.hosts[index].subnet_in_use(&pool);
        self.oracle.on_use(index, before, after);
    }

    pub(super) fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + after, self.sequence), event);
    }
}

/// Whether a request brings all that its sender has beyond the one it asks.
fn is_exchange(bytes: &[u8]) -> bool {
    let request = match Frame::decode(bytes) {
        Ok((_, Frame::Request(payload))) => Request::decode(payload).ok(),
        _ => None,
    };
    matches!(request, Some(Request::Exchange { .. }))
}
