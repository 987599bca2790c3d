//! The event loop's part of the data plane: computes the desired state, and handles the kernel thread's
//! events.
//!
//! The kernel thread (`programmer`) applies and repairs. This module numbers the desired states, turns
//! failures into problems, counts repairs, and passes to the core which subnet the kernel uses and this
//! host's address.

mod state;
mod underlay;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::{
    agent::{
        Agent, Ending,
        diagnosis::forwarder::{ForwarderEvent, Forwarding},
        workers::host_checks::HostState,
        workers::{
            archive::SavedFile,
            kernel_event::{DemandState, KernelEvent, Outcome},
            programmer::{DesiredState, State},
            subnet_env::SubnetFile,
        },
    },
    core::{Command, Input, Labels, Peer},
    dataplane::{
        desired::{Desired, Underlay, device_name},
        firewall::Firewall,
        kernel::{KernelError, RefusedEntry},
        plan::EntryOp,
    },
    model::{NodeId, Problem, ProblemCode},
    underlay::{ChosenUnderlay, UnderlayError},
};

pub(in crate::agent) use state::KernelState;

/// Time limit for a node that cannot use the kernel to return its new subnet before it ends.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

impl Agent {
    /// Returns this host's end of the underlay, and how packets reach peers.
    pub(in crate::agent) fn current_underlay(&self) -> Underlay {
        let routed = self.kernel.diagnoses.routing.routed.clone();
        Underlay { routed, ..self.underlay.with_mode(self.config.mode) }
    }

    /// Like [`Self::current_underlay`], for questions about one peer.
    pub(in crate::agent) fn underlay_to(&self, peer: IpAddr) -> Underlay {
        let routed = self.kernel.diagnoses.routing.routed.get(&peer).copied().into_iter().collect();
        Underlay { routed, ..self.underlay.with_mode(self.config.mode) }
    }

    /// Computes the desired state and passes it to the kernel thread.
    pub(in crate::agent) fn program(&mut self) {
        let state = match (&self.kernel.wanted.view, self.node.cluster()) {
            (Some(view), _) => {
                let mut underlay = self.current_underlay();
                underlay.narrow.clone_from(&self.kernel.wanted.narrow);
                underlay.checksum_offload = self.prober.wanted_offload();
                let desired = Desired::new(view, &underlay, &self.kernel.wanted.withdrawn_peers);
                let mut usable = Cow::Borrowed(view);
                if view
                    .peers
                    .values()
                    .any(|peer| underlay.unusable_peer_reason(peer.vtep.underlay).is_some())
                {
                    let is_usable =
                        |peer: &Peer| underlay.unusable_peer_reason(peer.vtep.underlay).is_none();
                    usable.to_mut().peers.retain(|_, peer| is_usable(peer));
                }
                let bridge = self.config.bridge_name(view.settings.vni);
                let firewall = Firewall::new(&usable, &self.config.firewall, &bridge);
                State::Overlay(Box::new(desired), Box::new(firewall))
            }
            (None, Some(cluster)) if self.kernel.wanted.withdrawn => State::Nothing {
                device: device_name(cluster.settings.vni),
                pool: cluster.settings.pool,
            },
            _ => return,
        };
        self.update_forwarder();
        self.expect_bridge();
        self.kernel.progress.requested += 1;
        self.threads
            .programmer
            .program(DesiredState { number: self.kernel.progress.requested, state });
    }

    /// Handles an event of the kernel thread.
    pub(in crate::agent) fn on_kernel_event(&mut self, event: KernelEvent) {
        match event {
            KernelEvent::Outcome(outcome) => self.on_kernel(outcome),
            KernelEvent::Underlay(underlay) => self.on_underlay(underlay),
            KernelEvent::Routing(routing) => {
                let known = &self.kernel.diagnoses.routing.problems;
                let new = routing.problems.iter().filter(|problem| !known.contains(problem));
                new.for_each(|problem| tracing::warn!("{problem}"));
                let is_other_way = routing.routed != self.kernel.diagnoses.routing.routed;
                self.kernel.diagnoses.routing = routing;
                if is_other_way {
                    self.program();
                }
                self.follow_path_mtus();
            }
            KernelEvent::Flapping(flapping) => {
                if let (None, Some(problem)) = (&self.kernel.problems.flapping, &flapping) {
                    tracing::warn!("{problem}");
                }
                self.kernel.problems.flapping = flapping;
            }
            KernelEvent::Overlaps(overlaps) => {
                overlaps.iter().for_each(|overlap| tracing::warn!("{overlap}"));
                self.kernel.problems.overlaps = overlaps;
            }
            KernelEvent::Host(state) => self.on_host(state),
            KernelEvent::Demand(state) => self.on_demand(state),
            KernelEvent::Counted(counted) => self.on_packet_counts(counted),
            KernelEvent::PathForgotten { host, told, result } => {
                self.on_path_forgotten(host, told, &result);
            }
        }
    }

    /// Handles the result of programming.
    fn on_kernel(&mut self, Outcome { number, repair, result }: Outcome) {
        self.kernel.progress.answered = number;
        match result {
            Ok(report) => {
                self.kernel.device.index = report.device;
                self.kernel.device.checksum_offload = report.checksum_offload;
                let operations: u64 = report.done.values().sum();
                self.kernel.counts.operations += operations;
                if repair && operations > 0 {
                    for (kind, count) in &report.done {
                        self.record_and_log_repair(kind, *count);
                    }
                } else if operations > 0 {
                    tracing::debug!(operations, "kernel programmed");
                }
                self.note_kernel_failures(&report.failed);
                if self.kernel.progress.retained.as_ref() != Some(&report.retained) {
                    self.kernel.progress.retained = Some(report.retained.clone());
                    self.input(Input::RetainedEntries(report.retained));
                }
                self.report_kernel_subnet();
                if self.kernel.wanted.withdrawn {
                    let path = self.config.subnet_file.clone();
                    self.storage.archive.save(SavedFile::Subnet(path, None));
                    return;
                }
                if !self.kernel.progress.programmed_once {
                    self.kernel.progress.programmed_once = true;
                    tracing::info!("data plane ready");
                }
                self.write_subnet_env();
                self.keep_bridge();
            }
            Err(error) => self.on_kernel_error(&error),
        }
    }

    /// Handles an event of the forwarder thread.
    pub(in crate::agent) fn on_forwarding(&mut self, event: ForwarderEvent) {
        let state = match event {
            ForwarderEvent::State(state) => state,
            ForwarderEvent::PodNamespace(namespace) => {
                return self.threads.monitors.remote_pods.set_namespace(namespace);
            }
        };
        let before = &self.kernel.diagnoses.forwarding;
        let of = |state: &Forwarding| {
            let Forwarding { problems, input, notices, .. } = state.clone();
            [problems, input, notices].concat()
        };
        let (before, told) = (of(before), of(&state));
        let known = |problem: &&Problem| before.contains(problem);
        told.iter()
            .filter(|problem| !known(problem))
            .for_each(|problem| tracing::warn!("{problem}"));
        self.kernel.diagnoses.forwarding = state;
        self.update_remote_pods();
    }

    /// Counts kernel requests for missing entries, and updates the paths if the peers in use have
    /// changed.
    fn on_demand(&mut self, state: DemandState) {
        let before = std::mem::replace(&mut self.kernel.demand, state);
        let now = &self.kernel.demand;
        let missed = now.answered.saturating_sub(before.answered);
        if now.in_use.is_none() && missed > 0 {
            // All peers are programmed, so an entry was removed without a notification.
            self.record_repair("miss", missed);
        }
        if self.kernel.demand.in_use != before.in_use {
            self.update_paths();
        }
    }

    /// Handles a change of the host checks.
    fn on_host(&mut self, state: HostState) {
        let known = &self.kernel.host.problems;
        state.problems.iter().filter(|p| !known.contains(p)).for_each(|p| tracing::error!("{p}"));
        let known = &self.kernel.host.notices;
        state.notices.iter().filter(|p| !known.contains(p)).for_each(|p| tracing::warn!("{p}"));
        for kind in &state.repaired {
            self.record_and_log_repair(kind, 1);
        }
        self.kernel.host = state;
    }

    /// Handles a change of the underlay interface, its address or MTU.
    fn on_underlay(&mut self, underlay: Result<ChosenUnderlay, UnderlayError>) {
        let chosen = match underlay {
            Ok(chosen) => chosen,
            Err(error) => return self.on_lost_underlay(error),
        };
        self.kernel.problems.underlay = None;
        let before = std::mem::replace(&mut self.underlay, chosen);
        let now = &self.underlay;
        if before == *now {
            return;
        }
        let what = |chosen: &ChosenUnderlay| {
            format!("{} ({}, MTU {})", chosen.local, chosen.name, chosen.mtu)
        };
        if before.is_present() && what(&before) == what(now) {
            tracing::debug!(?before, ?now, "underlay interface changed");
        } else if before.is_present() {
            tracing::warn!(before = what(&before), now = what(now), "underlay changed");
        } else {
            tracing::info!(underlay = what(now), "underlay available");
        }
        if before.local != now.local && self.config.advertise.is_none() {
            self.gossip.isolation.on_address_change(before.local, now.local);
        }
        self.save_underlay();
        let now = &self.underlay;
        if before.local != now.local && self.config.advertise.is_none() {
            let input = Input::UnderlayChanged { underlay: now.local };
            self.transport.moved();
            self.input(input);
        } else {
            self.input(Input::Command(Command::Sync));
        }
        self.program();
    }

    /// Saves the underlay, by which a host that starts without a network serves its pods. The saved
    /// address is the one that members know, so that a start with another address is noticed.
    pub(in crate::agent) fn save_underlay(&mut self) {
        let ChosenUnderlay { local, mtu, .. } = self.underlay;
        let local = self.gossip.isolation.previous_address().unwrap_or(local);
        self.storage.archive.save(SavedFile::Underlay(local, mtu));
    }

    /// Passes to the core which subnet the kernel uses. The core gives a subnet away only when it is not
    /// in use.
    fn report_kernel_subnet(&mut self) {
        if !self.kernel.progress.is_complete() {
            return;
        }
        let in_use = self.kernel.wanted.view.as_ref().map(|view| view.own.subnets.first);
        if self.kernel.progress.in_use.replace(in_use) != Some(in_use) {
            self.input(Input::KernelSubnet(in_use));
        }
    }

    /// Turns refused entries into problems. A refusal of one peer's entries is a problem of that peer. A
    /// refusal because of this host, of its own entries, or of entries of all of several peers is a
    /// problem of the kernel.
    fn note_kernel_failures(&mut self, failed: &[RefusedEntry]) {
        let peers = self.kernel.wanted.view.as_ref().map(|view| &view.peers);
        let owner = |entry: &RefusedEntry| {
            let mut peers = peers.into_iter().flatten();
            let found = peers.find(|(_, peer)| concerns(&entry.op, peer)).map(|(node, _)| *node);
            found.filter(|_| !entry.is_of_host())
        };
        let owned: Vec<_> = failed.iter().map(|entry| (owner(entry), entry)).collect();
        let refused: BTreeSet<NodeId> = owned.iter().filter_map(|(node, _)| *node).collect();
        let is_of_all = refused.len() > 1 && Some(refused.len()) == peers.map(BTreeMap::len);
        let is_whole = |node: &Option<NodeId>| node.is_none() || is_of_all;
        let whole: Vec<_> = owned.iter().filter(|(node, _)| is_whole(node)).collect();
        let problem = whole.first().map(|(_, first)| {
            let what = match whole.len() {
                1 => format!("a kernel entry was refused: {first}"),
                count => format!("{count} kernel entries were refused, the first: {first}"),
            };
            Problem::new(ProblemCode::KernelRefused, Problem::HOST, what, "")
        });
        let mut told = BTreeSet::new();
        let of_peers = owned.iter().filter(|(node, _)| !is_whole(node) && told.insert(*node));
        let of_peers: Vec<Problem> = of_peers
            .filter_map(|(node, entry)| {
                let name = self.node.label((*node)?);
                let what = format!("packets to {name}: {entry}");
                Some(Problem::new(ProblemCode::PeerRefused, name, what, ""))
            })
            .collect();
        let new =
            of_peers.iter().filter(|problem| !self.kernel.problems.of_peers.contains(problem));
        new.for_each(|problem| tracing::warn!("{problem}"));
        if let Some(problem) =
            problem.as_ref().filter(|p| self.kernel.problems.programming.as_ref() != Some(p))
        {
            tracing::error!("{problem}");
        }
        self.kernel.problems.of_peers = of_peers;
        self.kernel.problems.programming = problem;
    }

    /// Returns the problems of peers whose underlay addresses this host cannot send to. An earlier identity
    /// of this host has its address; a notice names it.
    pub(in crate::agent) fn unusable_peers(&self, labels: &Labels<'_>) -> Vec<Problem> {
        let underlay = self.current_underlay();
        let peers = self.kernel.wanted.view.iter().flat_map(|view| &view.peers);
        let problem = |(node, peer): (&NodeId, &Peer)| {
            let address = peer.vtep.underlay;
            let why = underlay.unusable_peer_reason(address)?;
            let is_own = address == self.underlay.local;
            let is_namesake = self.node.name_of(*node) == self.node.name_of(self.node.id());
            // An earlier identity of this host may still count as alive.
            if labels.former_selves().contains(node) || is_own && is_namesake {
                return None;
            }
            let name = labels.of(*node);
            let what = format!("packets to {name}: its tunnels end at {address}, {why}");
            let fix = match is_own {
                true => format!(
                    "correct its underlay address; or if it is this host before a reinstallation, once it \
                     is down: gossamer forget {name}"
                ),
                false => "correct its underlay address".to_owned(),
            };
            Some(Problem::new(ProblemCode::UnusableAddress, name, what, fix))
        };
        peers.filter_map(problem).collect()
    }

    /// Handles a kernel error. Before the first success this host cannot be a member, so the agent ends
    /// with the reason. Later errors and transient ones are retried.
    fn on_kernel_error(&mut self, error: &KernelError) {
        let why = error.to_string();
        let problem = Problem::new(ProblemCode::KernelRefused, Problem::HOST, why.as_str(), "");
        if self.kernel.problems.programming.as_ref() != Some(&problem) {
            tracing::error!("{why}");
        }
        self.kernel.problems.programming = Some(problem);
        if self.kernel.progress.programmed_once
            || self.lifetime.giving_up.is_some()
            || error.is_transient()
        {
            return;
        }
        if self.lifetime.fresh {
            tracing::info!("returning the subnet");
            self.lifetime.giving_up = Some((why, Instant::now() + LEAVE_TIMEOUT));
            // The refused entries do not exist.
            self.input(Input::KernelSubnet(None));
            self.input(Input::Command(Command::Leave));
        } else {
            self.lifetime.ending = Some(Ending::Failed(why));
        }
    }

    /// Writes `subnet.env`.
    fn write_subnet_env(&mut self) {
        let Some(view) = &self.kernel.wanted.view else { return };
        let networks = view.settings.pool.networks();
        let subnets = self.underlay.subnets_of_pods(view.own.subnets);
        let (mtu, masquerade) = (self.underlay.mtu, self.config.firewall.masquerade);
        let file = SubnetFile::new(networks, subnets, mtu, masquerade);
        self.storage.archive.save(SavedFile::Subnet(self.config.subnet_file.clone(), Some(file)));
    }
}

/// Returns whether the operation concerns an entry of this peer.
fn concerns(op: &EntryOp, peer: &Peer) -> bool {
    let contains = |address: IpAddr| {
        let mut subnets = peer.leases.iter().flat_map(|(_, subnets)| subnets.iter());
        subnets.any(|subnet| subnet.contains(&address))
    };
    match op {
        EntryOp::SetFdb(mac, _) | EntryOp::RemoveFdb(mac, _) => *mac == peer.vtep.mac,
        EntryOp::SetNeighbor(address, _)
        | EntryOp::Resolve(address, _)
        | EntryOp::RemoveNeighbor(address) => contains(*address),
        EntryOp::AddRoute(subnet, _)
        | EntryOp::ReplaceRoute(subnet, _)
        | EntryOp::RemoveRoute(subnet, _) => contains(subnet.network()),
    }
}
