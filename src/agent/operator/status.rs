//! Builds the status from the core's part and the agent's: kernel, disk, connections.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::path_status::PathFindings;
use crate::{
    agent::{Agent, PodCidrSource, diagnosis::isolation::former_selves_notice},
    api::{AgentStatus, KernelStatus},
    core::Phase,
    dataplane::desired::device_name,
    log,
    model::{Problem, ProblemCode},
    transport::Flood,
    underlay,
};

/// Maximum number of requests that wait for convergence; further ones are answered immediately.
const MAX_WAITERS: usize = 64;

/// A request that waits until this node has converged with a number of members, or until a deadline.
pub(in crate::agent) struct Waiter {
    /// Number of live members required, including this one.
    pub(in crate::agent) members: usize,
    /// When to answer regardless of convergence.
    pub(in crate::agent) deadline: Instant,
    /// Receives the status.
    pub(in crate::agent) reply: oneshot::Sender<Arc<AgentStatus>>,
}

/// A status that takes less time to build is never repeated.
const MIN_COSTLY: Duration = Duration::from_millis(10);
/// A status is repeated for this many times as long as it took to build.
const STATUS_SHARE: u32 = 8;

/// The last status that was sent to a reader.
pub(in crate::agent) struct RecentStatus {
    status: Arc<AgentStatus>,
    /// When it is built again.
    until: Instant,
}

impl Agent {
    /// Returns the status, or the previous one while that is recent compared with the time to build it. Any
    /// user may request it without end, so it takes a limited share of the loop's time.
    pub(in crate::agent) fn recent_status(&mut self) -> Arc<AgentStatus> {
        let begun = Instant::now();
        if let Some(recent) =
            self.requests.recent_status.as_ref().filter(|recent| begun < recent.until)
        {
            return recent.status.clone();
        }
        let status = Arc::new(self.status());
        let took = begun.elapsed();
        self.requests.recent_status = (took >= MIN_COSTLY)
            .then(|| RecentStatus { status: status.clone(), until: begun + took * STATUS_SHARE });
        status
    }

    /// Stores a request that waits for convergence.
    pub(in crate::agent) fn add_waiter(&mut self, waiter: Waiter) {
        if self.requests.waiters.len() < MAX_WAITERS {
            self.requests.waiters.push(waiter);
        } else {
            let _ = waiter.reply.send(Arc::new(self.status()));
        }
    }

    /// Answers requests whose condition is met or whose deadline has passed.
    pub(in crate::agent) fn serve_waiters(&mut self) {
        self.requests.waiters.retain(|waiter| !waiter.reply.is_closed());
        let now = Instant::now();
        // The status of a large cluster is long, so it is built only if it may be an answer.
        let (is_converged, active) = (self.is_converged(), self.node.active_count());
        let may_be_served =
            |waiter: &Waiter| is_converged && active >= waiter.members || waiter.deadline <= now;
        if !self.requests.waiters.iter().any(may_be_served) {
            return;
        }
        let status = Arc::new(self.status());
        // The next status is not older than the answer.
        self.requests.recent_status = None;
        for waiter in std::mem::take(&mut self.requests.waiters) {
            let enough = status.members_alive() >= waiter.members;
            if (status.converged && enough) || waiter.deadline <= now {
                let _ = waiter.reply.send(status.clone());
            } else {
                self.requests.waiters.push(waiter);
            }
        }
    }

    /// Reports to the service manager if it is time to.
    pub(in crate::agent) fn report_to_service(&mut self, now: Instant) {
        if !self.service.is_due(now) {
            return;
        }
        let status = self.status();
        let subnet = status.subnet.map_or("no subnet".to_owned(), |subnet| subnet.to_string());
        let (alive, all) = (status.members_alive(), status.members.len());
        let verdict = &status.verdict;
        let problem = status.problems.first().map_or_else(String::new, |p| format!("; {p}"));
        let text = format!("{verdict}; {subnet}, {alive} of {all} members alive{problem}");
        self.service.report(now, text);
    }

    /// Returns the status.
    pub(in crate::agent) fn status(&self) -> AgentStatus {
        let mut node = self.node.status();
        let paths = self.path_findings();
        node.problems = self.journal.dated(self.problems(&paths));
        let kernel = &self.kernel;
        let device = kernel.wanted.view.as_ref();
        let device = device.map(|v| device_name(v.settings.vni));
        AgentStatus {
            verdict: self.verdict(&node.problems),
            converged: self.is_converged(),
            notices: self.journal.dated(self.notices(&paths)),
            kernel: KernelStatus {
                device,
                mtu: self.underlay.mtu,
                underlay_interface: self.underlay.name.clone(),
                underlay_address: Some(self.underlay.local),
                in_sync: self.is_in_sync(),
                operations: kernel.counts.operations,
                repairs: kernel.counts.repairs.clone(),
                checksum_offload: kernel.device.checksum_offload,
                checksum_offload_fails: self.prober.is_offload_guilty(),
                non_members_dropped: kernel.host.dropped,
                peers_in_use: kernel.demand.in_use.as_ref().map(BTreeSet::len),
                misses_answered: kernel.demand.answered,
                misses_unknown: kernel.demand.unknown,
                routing: kernel.diagnoses.routing.status.clone(),
                forwarding: self.add_remote_pods_status(
                    kernel.diagnoses.answers.added_to(&kernel.diagnoses.forwarding.status),
                ),
            },
            paths: self.path_statuses(&paths),
            pods: self.pods.table.iter().filter(|pod| self.is_present(pod)).count(),
            pods_outside: self.pods_outside(),
            pods_refused: self.refuses_pods(),
            connections: self.transport.connections(),
            handshakes: self.transport.handshakes().into(),
            gossip_dropped: self.gossip.receive_drops.dropped(),
            log_lines_lost: log::lost(),
            ..AgentStatus::of(node)
        }
    }

    /// Returns all problems, given those of paths.
    pub(super) fn problems(&self, paths: &PathFindings<'_>) -> Vec<Problem> {
        let mut problems = self.join_problems();
        problems.extend(self.node.problems());
        let kernel = &self.kernel;
        problems.extend(kernel.problems.programming.iter().cloned().chain(self.underlay_problem()));
        problems.extend(self.requests.listener_problems.problems());
        problems.extend(self.isolation_problem(&paths.problems, &paths.states, &paths.labels));
        problems.extend(self.threads.monitors.problems());
        problems.extend(self.threads.monitors.silence_diagnosis.claim().cloned());
        problems.extend(self.flood_problem().into_iter().chain(self.handshake_problem()));
        let capped = self.transport.receive_buffer().capped;
        problems.extend(self.gossip.receive_drops.problem(self.node.address().port(), capped));
        problems.extend(kernel.problems.flapping.clone());
        problems.extend(
            kernel.problems.of_peers.iter().cloned().chain(self.unusable_peers(&paths.labels)),
        );
        problems.extend(underlay::limits(
            &self.underlay,
            self.node.cluster().map(|cluster| cluster.settings.pool).as_ref(),
        ));
        problems.extend(kernel.diagnoses.forwarding.input.iter().cloned());
        // Diverted packets are not forwarded either: one cause, one problem.
        if !self.is_all_diverted() {
            problems.extend(kernel.diagnoses.forwarding.problems.iter().cloned());
            problems.extend(self.remote_pod_problems());
        }
        // If pods cannot resolve the gateway, the same cause drops other answers of pods as well.
        if !kernel.diagnoses.forwarding.lacks_gateway {
            problems.extend(kernel.diagnoses.answers.problems.iter().cloned());
        }
        problems.extend(
            kernel.diagnoses.routing.problems.iter().chain(&kernel.problems.overlaps).cloned(),
        );
        problems.extend(kernel.host.problems.iter().cloned());
        problems.extend(self.pods.refusal.iter().chain(&self.pods.problems).cloned());
        if !kernel.host.refuses_routers {
            problems.extend(self.pods.open.iter().cloned());
        }
        let no_other = self.node.is_alone();
        problems
            .extend(self.sources.kubernetes.iter().flat_map(|source| source.problems(no_other)));
        problems.extend(self.storage.problem());
        problems.extend(self.storage.archive.problems());
        let subnet = kernel.wanted.view.as_ref().map(|view| view.own.subnets.first);
        if let (Some(subnet), outside @ 1..) = (subnet, self.pods_outside()) {
            let what = format!("{outside} pods have addresses outside this node's subnet {subnet}");
            problems.push(Problem::new(
                ProblemCode::PodsOutside,
                Problem::HOST,
                what,
                "restart them",
            ));
        }
        problems.extend(paths.problems.values().cloned());
        let down = self.down_members(&problems, &paths.problems, &paths.states, &paths.labels);
        problems.extend(down);
        // One cause may concern several peers.
        let mut told = BTreeSet::new();
        problems.retain(|problem| told.insert((problem.code, problem.to_string())));
        problems.into_iter().map(Problem::visible).collect()
    }

    /// Returns notices about losses of some packets or missing tests.
    pub(super) fn notices(&self, paths: &PathFindings<'_>) -> Vec<Problem> {
        let kernel = &self.kernel;
        let known =
            kernel.diagnoses.forwarding.notices.iter().chain(&kernel.diagnoses.answers.notices);
        let known = known.chain(&kernel.host.notices).chain(&self.pods.notices);
        let former = former_selves_notice(&paths.labels);
        let lost_pods = self.lost_pods_notice();
        let interruptions = self.interruptions_notice();
        let underlay = self.underlay_notice();
        let known = known.chain(&former).chain(&lost_pods).chain(&interruptions).chain(&underlay);
        let known = known.chain(paths.notices.values());
        let known = known.cloned().chain(self.remote_pod_notices());
        let known = known.chain(self.node.missed_preference());
        let known = known.chain(log::notice(Instant::now()));
        known.map(Problem::visible).collect()
    }

    /// Describes non-members that flood the gossip port.
    fn flood_problem(&self) -> Option<Problem> {
        let Flood { packets, example } = self.transport.flood()?;
        let port = self.node.address().port();
        Some(Problem::new(
            ProblemCode::HandshakeFlood,
            format!("UDP {port}"),
            format!(
                "non-members send {packets} first packets of handshakes a minute to UDP {port}, one of them \
                 from {example} (which may be forged), and prove no address: joins may take longer"
            ),
            format!("let a firewall drop UDP {port} from non-members"),
        ))
    }

    /// Describes programs that use up the capacity for handshakes.
    fn handshake_problem(&self) -> Option<Problem> {
        let Flood { packets, example } = self.transport.crowd()?;
        let port = self.node.address().port();
        Some(Problem::new(
            ProblemCode::HandshakeOverload,
            format!("UDP {port}"),
            format!(
                "{packets} handshakes a minute on UDP {port} are refused or ended early, some of them from \
                 {example}: earlier ones are not finished, or a first packet is repeated. They take CPU time \
                 here. Handshakes of hosts with the cluster's secret come first"
            ),
            format!(
                "see which program at {example} sends to UDP {port} (ss -unp), and let a firewall drop UDP \
                 {port} from non-members"
            ),
        ))
    }

    /// Returns whether packets to every peer take a wrong way.
    fn is_all_diverted(&self) -> bool {
        let diverted = &self.kernel.diagnoses.routing.diverted;
        let peers = self.kernel.wanted.view.iter().flat_map(|view| view.peers.values());
        let mut subnets = peers.filter_map(|peer| Some(peer.leases.first()?.1));
        !diverted.is_empty()
            && subnets.all(|subnets| subnets.iter().any(|subnet| diverted.contains(&subnet)))
    }

    /// Returns whether the node has converged (see the glossary).
    pub(super) fn is_converged(&self) -> bool {
        self.node.phase() == Phase::Member
            && self.node.is_settled()
            && self.is_in_sync()
            && !self.may_lack_members()
            && self.storage.archive.is_subnet_file_current()
    }

    /// Returns whether other nodes may exist that this node does not know of.
    fn may_lack_members(&self) -> bool {
        self.node.is_alone()
            && self.sources.kubernetes.as_ref().is_some_and(PodCidrSource::lacks_list)
    }

    /// Returns whether the kernel equals the desired state.
    fn is_in_sync(&self) -> bool {
        let kernel = &self.kernel;
        kernel.programmed_view().is_some()
            && kernel.progress.is_complete()
            && kernel.problems.programming.is_none()
            // Pods are part of the desired state.
            && self.takes_pods()
    }

    /// Returns the number of pods with addresses outside this node's subnet.
    fn pods_outside(&self) -> usize {
        let subnets = self.kernel.wanted.view.as_ref().map(|view| view.own.subnets);
        let outside = self.pods.table.outside(subnets);
        outside.filter(|pod| self.is_present(pod)).count()
    }
}
