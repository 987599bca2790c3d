//! Executes the outputs of nodes, as the agent's loop does: frames to the network, records to disks,
//! operations to kernels.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use rand::RngExt as _;

use super::{
    disk::Contents,
    host::{DesiredState, Host, by_address},
    network::CALL_TIMEOUT,
    world::{Event, World},
};
use crate::{
    core::{CallError, CallId, Delivery, Input, Output, ReplyId, Stop, Target},
    dataplane::{
        fake::RefusedOp,
        plan::{DeviceOp, Op, plan},
    },
    model::NodeId,
    wire::Key,
};

/// Longest time between two passes of the data plane, as in `agent`.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(10);
/// Time from a failed or deferred pass to the next one.
const RECONCILE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Number of addresses that the token file keeps, as in `agent`.
const MAX_SAVED_SEEDS: usize = 8;

impl World {
    /// Executes one output of a node.
    pub(super) fn execute(&mut self, index: usize, output: Output) {
        match output {
            Output::Send { to, address, bytes, delivery, .. } => {
                self.send(index, (to, address), bytes, delivery);
            }
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
                self.set_desired_state(index, DesiredState::Overlay(view));
            }
            Output::Withdraw => {
                self.set_desired_state(index, DesiredState::Nothing);
            }
            Output::SlotsChanged(changes) => {
                let host = &self.hosts[index];
                let pool = &self.settings.pool;
                let subnet = host.subnet_in_use(pool);
                let used = subnet.and_then(|subnet| pool.slot_at(subnet.network()));
                self.oracle.on_slots_changed(host.key, used, &changes);
            }
            Output::CannotLeave(_) => self.hosts[index].is_departing = false,
            Output::Stop(stop) => self.on_stop(index, stop),
        }
    }

    /// Handles the end of a process by the node's own decision. Checks that a leave is on another host's
    /// disk.
    pub(super) fn on_stop(&mut self, index: usize, stop: Stop) {
        self.hosts[index].process = None;
        self.hosts[index].disk.discard_queued();
        match &stop {
            Stop::Left { .. } => {
                self.oracle.record_situation("left");
                let leaver = self.hosts[index].key;
                let knows = |host: &Host| host.index != index && host.knows_as_left(leaver);
                if matches!(stop, Stop::Left { successor: Some(_) })
                    && !self.oracle.lenient
                    && !self.hosts.iter().any(knows)
                {
                    self.oracle.report_violation(|| {
                        format!("host {index} left and no other host has its leave on disk")
                    });
                }
                self.change_kernel(index, |host| host.kernel = Default::default());
                self.oracle.departed.insert(leaver);
                self.hosts[index].new_identity();
                self.hosts[index].is_powered = false;
                self.hosts_by_address = by_address(&self.hosts);
            }
            Stop::Expelled { .. } => {
                self.oracle.record_situation("expelled");
                self.change_kernel(index, |host| host.kernel = Default::default());
                self.schedule_identity_reset(index);
            }
            other => {
                let what = format!("host {index} stopped: {other:?}");
                self.oracle.report_violation(|| what);
            }
        }
        self.hosts[index].stopped = Some(stop);
    }

    /// Schedules the restart of a host under a new identity.
    pub(super) fn schedule_identity_reset(&mut self, index: usize) {
        let process_id = self.hosts[index].process_id;
        self.schedule(Duration::from_millis(100), Event::IdentityReset { host: index, process_id });
    }

    /// Sends a message to the host at an address, if `to` listens there.
    pub(super) fn send(
        &mut self,
        index: usize,
        (to, address): (NodeId, SocketAddr),
        bytes: Vec<u8>,
        delivery: Delivery,
    ) {
        let from = self.hosts[index].key;
        self.oracle.on_sent(from, &bytes);
        let Some(host) = self.host_listening_at(address, Some(to)) else { return };
        self.network.record_traffic(self.now, index, host, bytes.len());
        let takes_stream = delivery == Delivery::Stream || bytes.len() > crate::wire::DATAGRAM_MAX;
        let arrivals = if takes_stream {
            self.network.stream(index, host).into_iter().collect()
        } else {
            self.network.datagram(index, host)
        };
        for after in arrivals {
            self.schedule(after, Event::Message { from, to: host, bytes: bytes.clone() });
        }
    }

    /// Sends a request. Its answer or a timeout ends the call.
    pub(super) fn call(&mut self, index: usize, call: CallId, to: Target, bytes: Vec<u8>) {
        let host = &mut self.hosts[index];
        let (from, process_id) = (host.key, host.process_id);
        let Some(process) = &mut host.process else { return };
        process.open_calls.insert(call);
        self.oracle.on_sent(from, &bytes);
        if let Target::Member { node, .. } = to {
            self.check_comparison_partner(index, call, node, &bytes);
        }
        let size = bytes.len();
        let (address, expected) = match to {
            Target::Member { node, address } => (Some(address), Some(node)),
            Target::Seed(seed) => (self.seed_address(index, seed), None),
        };
        let listener = address.and_then(|address| self.host_listening_at(address, expected));
        if listener == Some(index) {
            let result = Err(CallError::Myself);
            return self.schedule(
                Duration::from_millis(1),
                Event::Answer { to: index, process_id, call, result },
            );
        }
        let arrival = listener.and_then(|to| Some((to, self.network.stream(index, to)?)));
        if let Some(to) = listener {
            self.network.record_traffic(self.now, index, to, size);
        }
        if let Some((to, after)) = arrival {
            let request = Event::Request { from, from_host: index, process_id, call, to, bytes };
            self.schedule(after, request);
        }
        let result = Err(CallError::Unreachable("no answer in time".to_owned()));
        self.schedule(CALL_TIMEOUT, Event::Answer { to: index, process_id, call, result });
    }

    /// Sends the response to a request. A Byzantine host falsifies it.
    pub(super) fn reply(&mut self, index: usize, reply: ReplyId, bytes: Vec<u8>) {
        let from = self.hosts[index].key;
        self.oracle.on_sent(from, &bytes);
        let bytes = self.falsify_answer(index, bytes);
        let Some((to, process_id, call)) = self.pending_replies.remove(&reply.0) else { return };
        self.network.record_traffic(self.now, index, to, bytes.len());
        match self.network.stream(index, to) {
            Some(after) => {
                self.schedule(
                    after,
                    Event::Answer { to, process_id, call, result: Ok((from, bytes)) },
                );
            }
            None => self.oracle.record_situation("answer lost"),
        }
    }

    /// Returns the present address of a host's n-th seed. Host names are resolved at each attempt.
    pub(super) fn seed_address(&self, index: usize, seed: usize) -> Option<SocketAddr> {
        let host = &self.hosts[index];
        if host.seeds.is_empty() {
            return host.saved_seeds.get(seed).copied();
        }
        host.seeds.get(seed).map(|seed| self.hosts[*seed].address())
    }

    /// Returns the host whose agent listens at an address, with the expected identity if one is given.
    pub(super) fn host_listening_at(
        &self,
        address: SocketAddr,
        expected: Option<NodeId>,
    ) -> Option<usize> {
        let host = &self.hosts[*self.hosts_by_address.get(&address)?];
        let answers = host.process.is_some() && expected.is_none_or(|node| node == host.key);
        answers.then_some(host.index)
    }

    /// Saves cluster and seeds, as `agent` does in the token file.
    pub(super) fn save_token_file(&mut self, index: usize) {
        let mut seeds: Vec<_> = (0..self.hosts[index].seeds.len())
            .filter_map(|seed| self.seed_address(index, seed))
            .collect();
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

    /// Schedules the completion of the next batch.
    pub(super) fn schedule_disk(&mut self, index: usize) {
        let host = &self.hosts[index];
        let (least, most) = host.disk_latency;
        let (process_id, after) =
            (host.process_id, self.environment_rng.random_range(least..=most));
        self.schedule(after, Event::Disk { host: index, process_id });
    }

    /// Completes the first queued batch and executes the outputs that waited for it.
    pub(super) fn complete_write(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let node = host.key;
        let Some(process) = host.process.as_mut().filter(|process| process.paused.is_none()) else {
            return;
        };
        if let Some((seq, written)) = host.disk.write_next() {
            let freed = process.gate.open(seq);
            let awaited_peers = std::mem::take(&mut process.awaited_peers);
            // Members that have departed since the start cannot be contacted any more.
            let remaining = if awaited_peers.is_empty() {
                awaited_peers
            } else {
                &awaited_peers & &host.members_on_disk()
            };
            self.oracle.on_flushed(node, remaining.is_empty(), &written);
            if let Some(process) = &mut host.process {
                process.awaited_peers = remaining;
            }
            if written.keys().any(|key| matches!(key, Key::Cluster | Key::Member(_))) {
                self.save_token_file(index);
            }
            self.check_replacement(index, &written);
            for output in freed {
                self.execute(index, output);
            }
        }
        if !self.hosts[index].disk.is_idle() {
            self.schedule_disk(index);
        }
    }

    /// Makes the oracle lenient if a host with `replace_by_name` forgets its predecessor although
    /// [`World::is_forgettable`] does not hold. The agent cannot check this precondition.
    fn check_replacement(&mut self, index: usize, written: &Contents) {
        for key in written.keys() {
            let Key::Forget(victim) = *key else { continue };
            let destroyed =
                |host: &Host| host.key == victim && !host.is_powered && host.stopped.is_none();
            if self.hosts[index].replaces
                && self.hosts.iter().any(destroyed)
                && !self.is_forgettable(victim, index)
            {
                self.oracle.record_situation("replaced outside the preconditions");
                self.oracle.lenient = true;
            }
        }
    }

    /// Sets the desired state and schedules the pass that programs it.
    fn set_desired_state(&mut self, index: usize, desired_state: DesiredState) {
        let host = &mut self.hosts[index];
        let latency = host.kernel_latency;
        if let Some(process) = &mut host.process {
            process.desired_state = Some(desired_state);
            self.schedule_kernel(index, latency);
        }
    }

    /// Schedules a pass of the data plane, unless an earlier one is scheduled.
    pub(super) fn schedule_kernel(&mut self, index: usize, after: Duration) {
        let at = self.now + after;
        let process_id = self.hosts[index].process_id;
        let Some(process) = &mut self.hosts[index].process else { return };
        if process.next_program_at.is_none_or(|due| at < due) {
            process.next_program_at = Some(at);
            self.schedule(after, Event::Kernel { host: index, process_id });
        }
    }

    /// Executes one pass of the data plane: dump, plan, apply. The pass may be interrupted; a later one
    /// completes it.
    pub(super) fn program_kernel(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(process) = &mut host.process else { return };
        if process.next_program_at.take_if(|due| *due == now).is_none() {
            return;
        }
        if process.paused.is_some() {
            return self.schedule_kernel(index, RECONCILE_RETRY_INTERVAL);
        }
        let Some(desired_state) = process.desired_state.take() else { return };
        let host = &self.hosts[index];
        let mut retained = BTreeSet::new();
        let ops: Vec<Op> = match &desired_state {
            DesiredState::Overlay(view) => {
                let mut plan = plan(&host.desired(view), &host.kernel.dump());
                retained = std::mem::take(&mut plan.retained);
                plan.into_ops().collect()
            }
            DesiredState::Nothing => vec![Op::Device(DeviceOp::DeleteDevice)],
        };
        let mut retry_after = None;
        // One pass in eight stops at a random operation.
        let end = if self.environment_rng.random_ratio(1, 8) && !ops.is_empty() {
            retry_after = Some(Duration::from_micros(500));
            self.environment_rng.random_range(0..ops.len())
        } else {
            ops.len()
        };
        for op in &ops[..end] {
            if self.hosts[index].kernel_refuses > 0 {
                self.hosts[index].kernel_refuses -= 1;
                self.oracle.record_situation("kernel refused an operation");
                retry_after = Some(RECONCILE_RETRY_INTERVAL);
                continue;
            }
            let result = self.apply(index, op);
            if let Err(refused) = result
                && retry_after.is_none()
            {
                self.oracle.report_violation(|| {
                    format!("host {index}: the kernel refused a planned operation: {refused}")
                });
            }
        }
        let Some(process) = &mut self.hosts[index].process else { return };
        let subnet = match process.desired_state.get_or_insert(desired_state) {
            DesiredState::Overlay(view) => Some(view.own.subnets.first),
            DesiredState::Nothing => None,
        };
        self.schedule_kernel(index, retry_after.unwrap_or(RECONCILE_INTERVAL));
        if retry_after.is_none() {
            self.input(index, Input::RetainedEntries(retained));
            self.input(index, Input::KernelSubnet(subnet));
        }
    }

    /// Applies one operation to the kernel, after the oracle has checked it.
    pub(super) fn apply(&mut self, index: usize, op: &Op) -> Result<(), RefusedOp> {
        let hosts = &self.hosts;
        let is_in_use = |user: usize, subnet| {
            let peer = &hosts[user];
            let arrives = hosts[index].kernel.forward(subnet) == peer.tunnel_end();
            peer.is_powered && !peer.is_departing && arrives
        };
        self.oracle.on_kernel_op(index, op, is_in_use);
        let mut result = Ok(());
        self.change_kernel(index, |host| result = host.kernel.apply(op));
        result
    }
}
