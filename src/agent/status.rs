//! Filling in the status: what the core says, and the shell's part: kernel, disk, connections.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{Agent, Source};
use crate::{
    api::{AgentStatus, KernelStatus},
    core::Phase,
    dataplane::desired::device_name,
    transport::Flood,
    wire::visible,
};

/// Who waits for convergence; more are answered at once.
const MAX_WAITERS: usize = 64;
/// A disk that has not answered for longer is a problem.
pub(super) const DISK_PATIENCE: Duration = Duration::from_secs(3);

/// Wants to hear once this node has converged with so many members, or when the time is over.
pub(super) struct Waiter {
    pub(super) members: usize,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<AgentStatus>,
}

impl Agent {
    pub(super) fn add_waiter(&mut self, waiter: Waiter) {
        if self.waiters.len() < MAX_WAITERS {
            self.waiters.push(waiter);
        } else {
            let _ = waiter.reply.send(self.status());
        }
    }

    pub(super) fn serve_waiters(&mut self) {
        self.waiters.retain(|waiter| !waiter.reply.is_closed());
        let now = Instant::now();
        // The status of a large cluster is long: it is made only where it may be an answer.
        let (is_converged, active) = (self.is_converged(), self.node.active_count());
        let may_be_served =
            |waiter: &Waiter| is_converged && active >= waiter.members || waiter.deadline <= now;
        if !self.waiters.iter().any(may_be_served) {
            return;
        }
        let status = self.status();
        for waiter in std::mem::take(&mut self.waiters) {
            let enough = status.members_alive() >= waiter.members;
            if (status.converged && enough) || waiter.deadline <= now {
                let _ = waiter.reply.send(status.clone());
            } else {
                self.waiters.push(waiter);
            }
        }
    }

    pub(super) fn report_to_service(&mut self, now: Instant) {
        if !self.service.is_due(now) {
            return;
        }
        let status = self.status();
        let subnet = status.node.subnet.map_or("no subnet".to_owned(), |subnet| subnet.to_string());
        let (alive, all) = (status.members_alive(), status.node.members.len());
        let problem = status.node.problems.first().map_or_else(String::new, |p| format!("; {p}"));
        self.service.report(now, format!("{subnet}, {alive} of {all} members alive{problem}"));
    }

    pub(super) fn status(&self) -> AgentStatus {
        let mut node = self.node.status();
        node.problems = self.problems();
        let kernel = &self.kernel;
        let device = kernel.wanted.as_ref();
        let device = device.map(|v| device_name(v.settings.vni));
        AgentStatus {
            version: env!("CARGO_PKG_VERSION"),
            converged: self.is_converged(),
            warnings: self.warnings(),
            kernel: KernelStatus {
                device,
                mtu: self.underlay.mtu,
                underlay_interface: self.underlay.name.clone(),
                underlay_address: Some(self.underlay.local),
                in_sync: self.is_in_sync(),
                operations: kernel.operations,
                repairs: kernel.repairs.clone(),
                checksum_offload: kernel.checksum_offload,
                checksum_offload_fails: self.prober.is_offload_guilty(),
                strangers_dropped: kernel.host.dropped,
                peers_in_use: kernel.demand.in_use.as_ref().map(BTreeSet::len),
                misses_answered: kernel.demand.answered,
                misses_unknown: kernel.demand.unknown,
                routing: kernel.routing.status.clone(),
                forwarding: self.far_added_to(kernel.answers.added_to(&kernel.forwarding.status)),
            },
            paths: self.path_statuses(),
            pods: self.pods.table.iter().filter(|pod| self.is_present(pod)).count(),
            pods_outside: self.pods_outside(),
            pods_refused: self.refuses_pods(),
            connections: self.transport.connections(),
            handshakes: self.transport.handshakes(),
            gossip_dropped: self.unread.dropped(),
            node,
        }
    }

    /// Why changes do not get onto the disk.
    pub(super) fn store_problem(&self) -> Option<String> {
        let is_silent = self.writer.silent_for().is_some_and(|silent| silent > DISK_PATIENCE);
        let silence = || {
            let patience = DISK_PATIENCE.as_secs();
            format!(
                "the disk has not answered for more than {patience} s, so pods and leases do not change: \
                 look at it (dmesg)"
            )
        };
        self.store_failure.clone().or_else(|| is_silent.then(silence))
    }

    /// Everything that is wrong, as sentences with what helps.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = self.node.problems();
        let kernel = &self.kernel;
        problems.extend(kernel.problem.iter().chain(&kernel.underlay_problem).cloned());
        problems.extend(self.closed.problems());
        problems.extend(self.company_problem());
        problems.extend(self.ended.problems());
        problems.extend(self.inquest.claim().cloned());
        problems.extend(self.flood_problem().into_iter().chain(self.crowd_problem()));
        let capped = self.transport.receive_buffer().capped;
        problems.extend(self.unread.problem(self.node.address().port(), capped));
        problems.extend(kernel.flapping.clone());
        problems.extend(kernel.peer_problems.iter().cloned().chain(self.unusable_peers()));
        problems.extend(self.underlay_limits());
        problems.extend(kernel.forwarding.input.iter().cloned());
        // What is sent elsewhere is not forwarded either: one cause, one problem.
        if !self.is_all_astray() {
            problems.extend(kernel.forwarding.problems.iter().cloned());
            problems.extend(self.far_problems());
        }
        // Where no pod gets an answer of this host, what drops that drops answers of pods as well.
        if !kernel.forwarding.lacks_gateway {
            problems.extend(kernel.answers.problems.iter().cloned());
        }
        problems.extend(kernel.routing.problems.iter().chain(&kernel.overlaps).cloned());
        problems.extend(kernel.host.problems.iter().cloned());
        problems.extend(self.pods.refusal.iter().chain(&self.pods.problems).cloned());
        if !kernel.host.refuses_routers {
            problems.extend(self.pods.open.iter().cloned());
        }
        let no_other = self.node.is_alone();
        problems.extend(self.source.iter().flat_map(|source| source.problems(no_other)));
        problems.extend(self.store_problem().map(|why| format!("state directory: {why}")));
        problems.extend(self.archive.problems());
        let subnet = kernel.wanted.as_ref().map(|view| view.own.subnets.first);
        if let (Some(subnet), outside @ 1..) = (subnet, self.pods_outside()) {
            problems.push(format!(
                "{outside} pods have addresses outside this node's subnet {subnet}: start them anew"
            ));
        }
        let states = self.path_states();
        problems.extend(states.filter_map(|(node, state, _)| self.path_problem(node, state)));
        // A cause may concern several peers.
        let mut told = BTreeSet::new();
        problems.retain(|problem| told.insert(problem.clone()));
        // Some repeat what others said.
        problems.iter().map(|problem| visible(problem)).collect()
    }

    /// What may hurt some packets, or keeps this node from knowing, as sentences with what helps.
    fn warnings(&self) -> Vec<String> {
        let kernel = &self.kernel;
        let known = kernel.forwarding.warnings.iter().chain(&kernel.answers.warnings);
        let known = known.chain(&self.pods.guests);
        let known = known.cloned().chain(self.path_warnings()).chain(self.far_warnings());
        known.map(|warning| visible(&warning)).collect()
    }

    /// Strangers that flood the gossip port, as a sentence.
    fn flood_problem(&self) -> Option<String> {
        let Flood { packets, example } = self.transport.flood()?;
        let port = self.node.address().port();
        Some(format!(
            "strangers send {packets} first packets of handshakes a minute to UDP {port}, one of them \
             from {example} (which may be forged), and prove no address: joins may take longer; let a \
             firewall drop UDP {port} of hosts that are no members"
        ))
    }

    /// Programs that take the places of handshakes, as a sentence.
    fn crowd_problem(&self) -> Option<String> {
        let Flood { packets, example } = self.transport.crowd()?;
        let port = self.node.address().port();
        Some(format!(
            "{packets} handshakes a minute on UDP {port}, some of them from {example}, find no place or lose \
             it, because earlier ones are not finished, or repeat a first packet: they take CPU time here, \
             and handshakes of hosts with the cluster's secret come first; see which program at {example} \
             sends to UDP {port} (ss -unp), and let a firewall drop UDP {port} of hosts that are no members"
        ))
    }

    /// Whether packets to every peer take a wrong way.
    fn is_all_astray(&self) -> bool {
        let astray = &self.kernel.routing.astray;
        let peers = self.kernel.wanted.iter().flat_map(|view| view.peers.values());
        let mut subnets = peers.filter_map(|peer| Some(peer.leases.first()?.1));
        !astray.is_empty()
            && subnets.all(|subnets| subnets.iter().any(|subnet| astray.contains(&subnet)))
    }

    pub(super) fn is_converged(&self) -> bool {
        self.node.phase() == Phase::Member
            && self.node.is_settled()
            && self.is_in_sync()
            && !self.is_in_the_dark()
            && self.archive.is_subnet_told()
    }

    /// Whether there may be other nodes of which this one has not heard.
    fn is_in_the_dark(&self) -> bool {
        self.node.is_alone() && self.source.as_ref().is_some_and(Source::lacks_list)
    }

    fn is_in_sync(&self) -> bool {
        let kernel = &self.kernel;
        kernel.wanted.is_some()
            && kernel.answered == kernel.goals
            && kernel.programmed_once
            && kernel.problem.is_none()
            // Pods are a part of what the kernel is to reach.
            && self.takes_pods()
    }

    fn pods_outside(&self) -> usize {
        let subnets = self.kernel.wanted.as_ref().map(|view| view.own.subnets);
        let outside = self.pods.table.outside(subnets);
        outside.filter(|pod| self.is_present(pod)).count()
    }
}
