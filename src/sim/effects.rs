//! What the nodes' shells would do: frames onto the network, records onto disks, operations into kernels.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use rand::RngExt as _;

use super::{
    disk::Contents,
    host::{DesiredState, Host, by_address},
    network::CALL_TIMEOUT,
    world::{Event, World},
};
use crate::{
    core::{CallError, CallId, Input, Output, ReplyId, Stop, Target},
    dataplane::{
        fake::Refused,
        plan::{Op, plan},
    },
    model::NodeId,
    wire::Key,
};

/// The kernel is compared with the view at least this often, as in `agent`.
const RECONCILE: Duration = Duration::from_secs(10);
const RECONCILE_RETRY: Duration = Duration::from_secs(1);
/// Addresses that the token file remembers, as in `agent`.
const MAX_SAVED_SEEDS: usize = 8;

impl World {
    pub(super) fn carry_out(&mut self, index: usize, output: Output) {
        match output {
            Output::Send { to, address, bytes, .. } => self.send(index, to, address, bytes),
            Output::Call { call, to, bytes, .. } => self.call(index, call, to, bytes),
            Output::Reply { reply, bytes, .. } => self.reply(index, reply, bytes),
            Output::Write { records, seq } => {
                let host = &mut self.hosts[index];
                let idle = host.disk.is_idle();
                host.disk.queue(records, seq);
                if idle {
                    self.schedule_disk(index);
                }
            }
            Output::Program { view, .. } => {
                self.pursue(index, DesiredState::Overlay(view));
            }
            Output::Withdraw => {
                self.pursue(index, DesiredState::Nothing);
            }
            Output::SlotsChanged(_)
            | Output::PingResult { .. }
            | Output::InquiryReceived { .. }
            | Output::InquiryResult { .. } => {}
            Output::CannotLeave(_) => self.hosts[index].going = false,
            Output::Stop(stop) => self.on_stop(index, stop),
        }
    }

    pub(super) fn on_stop(&mut self, index: usize, stop: Stop) {
        self.hosts[index].process = None;
        self.hosts[index].disk.kill_process();
        match &stop {
            Stop::Left { .. } => {
                self.oracle.reach("left");
                let leaver = self.hosts[index].key;
                let knows = |host: &Host| host.index != index && host.knows_as_left(leaver);
                if matches!(stop, Stop::Left { successor: Some(_) })
                    && !self.oracle.lenient
                    && !self.hosts.iter().any(knows)
                {
                    self.oracle.accuse(|| format!("host {index} left and nobody has it on disk"));
                }
                self.change_kernel(index, |host| host.kernel = Default::default());
                self.oracle.gone.insert(leaver);
                self.hosts[index].new_identity();
                self.hosts[index].power = false;
                self.places = by_address(&self.hosts);
            }
            Stop::Expelled { .. } => {
                self.oracle.reach("expelled");
                self.change_kernel(index, |host| host.kernel = Default::default());
                self.rebirth_soon(index);
            }
            other => {
                let what = format!("host {index} gave up: {other:?}");
                self.oracle.accuse(|| what);
            }
        }
        self.hosts[index].stopped = Some(stop);
    }

    pub(super) fn rebirth_soon(&mut self, index: usize) {
        let life = self.hosts[index].life;
        self.schedule(Duration::from_millis(100), Event::Rebirth { host: index, life });
    }

    pub(super) fn send(&mut self, index: usize, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        let from = self.hosts[index].key;
        self.oracle.on_sent(from, &bytes);
        let Some(host) = self.listener(address, Some(to)) else { return };
        self.network.count(self.now, index, host, bytes.len());
        // What does not fit a datagram takes a stream.
        let arrivals = if bytes.len() > crate::wire::DATAGRAM_MAX {
            self.network.stream(index, host).into_iter().collect()
        } else {
            self.network.datagram(index, host)
        };
        for after in arrivals {
            self.schedule(after, Event::Message { from, to: host, bytes: bytes.clone() });
        }
    }

    pub(super) fn call(&mut self, index: usize, call: CallId, to: Target, bytes: Vec<u8>) {
        let host = &mut self.hosts[index];
        let (from, life) = (host.key, host.life);
        let Some(process) = &mut host.process else { return };
        process.open_calls.insert(call);
        self.oracle.on_sent(from, &bytes);
        if let Target::Member { node, .. } = to {
            self.judge_partner(index, call, node, &bytes);
        }
        let size = bytes.len();
        let (address, expected) = match to {
            Target::Member { node, address } => (Some(address), Some(node)),
            Target::Seed(seed) => (self.seed(index, seed), None),
        };
        let listener = address.and_then(|address| self.listener(address, expected));
        if listener == Some(index) {
            let result = Err(CallError::Myself);
            return self.schedule(
                Duration::from_millis(1),
                Event::Answer { to: index, life, call, result },
            );
        }
        let arrival = listener.and_then(|to| Some((to, self.network.stream(index, to)?)));
        if let Some(to) = listener {
            self.network.count(self.now, index, to, size);
        }
        if let Some((to, after)) = arrival {
            let request = Event::Request { from, from_host: index, life, call, to, bytes };
            self.schedule(after, request);
        }
        let result = Err(CallError::Unreachable("no answer in time".to_owned()));
        self.schedule(CALL_TIMEOUT, Event::Answer { to: index, life, call, result });
    }

    pub(super) fn reply(&mut self, index: usize, reply: ReplyId, bytes: Vec<u8>) {
        let from = self.hosts[index].key;
        self.oracle.on_sent(from, &bytes);
        let bytes = self.twist(index, bytes);
        let Some((to, life, call)) = self.replies.remove(&reply.0) else { return };
        self.network.count(self.now, index, to, bytes.len());
        match self.network.stream(index, to) {
            Some(after) => {
                self.schedule(after, Event::Answer { to, life, call, result: Ok((from, bytes)) });
            }
            None => self.oracle.reach("answer lost"),
        }
    }

    /// The address behind the n-th seed of a host: names are looked up at each try.
    pub(super) fn seed(&self, index: usize, seed: usize) -> Option<SocketAddr> {
        let host = &self.hosts[index];
        if host.seeds.is_empty() {
            return host.saved_seeds.get(seed).copied();
        }
        host.seeds.get(seed).map(|seed| self.hosts[*seed].address())
    }

    /// The host that answers at an address under the expected identity.
    pub(super) fn listener(&self, address: SocketAddr, expected: Option<NodeId>) -> Option<usize> {
        let host = &self.hosts[*self.places.get(&address)?];
        let answers = host.process.is_some() && expected.is_none_or(|node| node == host.key);
        answers.then_some(host.index)
    }

    /// What `agent` keeps in the token file.
    pub(super) fn remember(&mut self, index: usize) {
        let mut seeds: Vec<_> =
            (0..self.hosts[index].seeds.len()).filter_map(|seed| self.seed(index, seed)).collect();
        let host = &mut self.hosts[index];
        let Some(process) = &host.process else { return };
        let Some(cluster) = process.node.cluster() else { return };
        host.saved_cluster = Some(cluster.id);
        seeds.extend(process.node.member_addresses());
        let mut known = BTreeSet::new();
        seeds.retain(|seed| known.insert(*seed));
        seeds.truncate(MAX_SAVED_SEEDS);
        host.saved_seeds = seeds;
    }

    pub(super) fn schedule_disk(&mut self, index: usize) {
        let host = &self.hosts[index];
        let (least, most) = host.disk_latency;
        let (life, after) = (host.life, self.luck.random_range(least..=most));
        self.schedule(after, Event::Disk { host: index, life });
    }

    pub(super) fn write_next(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let node = host.key;
        let Some(process) = host.process.as_mut().filter(|process| process.paused.is_none()) else {
            return;
        };
        if let Some((seq, news)) = host.disk.write_next() {
            let freed = process.gate.open(seq);
            let unmet = std::mem::take(&mut process.unmet);
            // Of those who have gone meanwhile nobody can be met any more.
            let there = if unmet.is_empty() { unmet } else { &unmet & &host.members_on_disk() };
            self.oracle.on_flushed(node, there.is_empty(), &news);
            if let Some(process) = &mut host.process {
                process.unmet = there;
            }
            if news.keys().any(|key| matches!(key, Key::Cluster | Key::Member(_))) {
                self.remember(index);
            }
            self.judge_vouching(index, &news);
            for output in freed {
                self.carry_out(index, output);
            }
        }
        if !self.hosts[index].disk.is_idle() {
            self.schedule_disk(index);
        }
    }

    /// A host re-created vouches for its predecessor without asking an operator, who would not have done so
    /// while somebody might know more: from then on the proviso is broken.
    fn judge_vouching(&mut self, index: usize, news: &Contents) {
        for key in news.keys() {
            let Key::Forget(victim) = *key else { continue };
            let destroyed =
                |host: &Host| host.key == victim && !host.power && host.stopped.is_none();
            if self.hosts[index].replaces
                && self.hosts.iter().any(destroyed)
                && !self.is_forgettable(victim, index)
            {
                self.oracle.reach("replaced outside the promise");
                self.oracle.lenient = true;
            }
        }
    }

    fn pursue(&mut self, index: usize, desired_state: DesiredState) {
        let host = &mut self.hosts[index];
        let latency = host.kernel_latency;
        if let Some(process) = &mut host.process {
            process.desired_state = Some(desired_state);
            self.schedule_kernel(index, latency);
        }
    }

    pub(super) fn schedule_kernel(&mut self, index: usize, after: Duration) {
        let at = self.now + after;
        let life = self.hosts[index].life;
        let Some(process) = &mut self.hosts[index].process else { return };
        if process.programs_at.is_none_or(|due| at < due) {
            process.programs_at = Some(at);
            self.schedule(after, Event::Kernel { host: index, life });
        }
    }

    /// One pass of the data plane: dump, plan, apply. A pass may be cut short, and goes on later.
    pub(super) fn program(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(process) = &mut host.process else { return };
        if process.programs_at.take_if(|due| *due == now).is_none() {
            return;
        }
        if process.paused.is_some() {
            return self.schedule_kernel(index, RECONCILE_RETRY);
        }
        let Some(desired_state) = process.desired_state.take() else { return };
        let host = &self.hosts[index];
        let ops = match &desired_state {
            DesiredState::Overlay(view) => plan(&host.desired(view), &host.kernel.dump()),
            DesiredState::Nothing => vec![Op::DeleteDevice],
        };
        let mut again = None;
        // Now and then the thread is interrupted in the middle.
        let until = if self.luck.random_ratio(1, 8) && !ops.is_empty() {
            again = Some(Duration::from_micros(500));
            self.luck.random_range(0..ops.len())
        } else {
            ops.len()
        };
        for op in &ops[..until] {
            if self.hosts[index].kernel_refuses > 0 {
                self.hosts[index].kernel_refuses -= 1;
                self.oracle.reach("kernel refused an operation");
                again = Some(RECONCILE_RETRY);
                continue;
            }
            let done = self.apply(index, op);
            if let Err(refused) = done
                && again.is_none()
            {
                self.oracle.accuse(|| format!("host {index}: the plan is impossible: {refused}"));
            }
        }
        let Some(process) = &mut self.hosts[index].process else { return };
        let subnet = match process.desired_state.get_or_insert(desired_state) {
            DesiredState::Overlay(view) => Some(view.own.subnets.first),
            DesiredState::Nothing => None,
        };
        self.schedule_kernel(index, again.unwrap_or(RECONCILE));
        if again.is_none() {
            self.input(index, Input::KernelSubnet(subnet));
        }
    }

    pub(super) fn apply(&mut self, index: usize, op: &Op) -> Result<(), Refused> {
        let hosts = &self.hosts;
        let works = |user: usize, subnet| {
            let end = &hosts[user];
            let arrives = hosts[index].kernel.forward(subnet) == end.tunnel_end();
            end.power && !end.going && arrives
        };
        self.oracle.on_op(index, op, works);
        let mut done = Ok(());
        self.change_kernel(index, |host| done = host.kernel.apply(op));
        done
    }
}
