//! Filling in the status: what the core says, and the shell's part: kernel, disk, connections.

use std::{collections::BTreeSet, time::Instant};

use super::Agent;
use crate::{
    api::{AgentStatus, KernelStatus},
    core::Phase,
    dataplane::desired::device_name,
};

impl Agent {
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
        let kernel = &self.kernel;
        node.problems.extend(kernel.problem.clone());
        node.problems.extend(kernel.underlay_problem.clone());
        node.problems.extend(kernel.rivals.iter().chain(&kernel.host.problems).cloned());
        node.problems
            .extend(self.store_problem.iter().map(|why| format!("state directory: {why}")));
        let subnets = kernel.wanted.as_ref().map(|view| view.own.subnets);
        let pods_outside = self.pods.table.outside(subnets).count();
        if let (Some(subnets), 1..) = (subnets, pods_outside) {
            node.problems.push(format!(
                "{pods_outside} pods have addresses outside this node's subnet {}: start them anew",
                subnets.first
            ));
        }
        let paths = self.path_statuses();
        node.problems.extend(paths.iter().filter_map(|path| path.problem.clone()));
        let in_sync = kernel.wanted.is_some()
            && kernel.answered == kernel.goals
            && kernel.programmed_once
            && kernel.problem.is_none();
        let converged = node.phase == Phase::Member && node.settled && in_sync;
        let device = kernel.wanted.as_ref();
        let device = device.map(|v| device_name(v.settings.vni));
        AgentStatus {
            version: env!("CARGO_PKG_VERSION"),
            converged,
            kernel: KernelStatus {
                device,
                mtu: self.underlay.mtu,
                underlay_interface: self.underlay.name.clone(),
                underlay_address: self.underlay.local,
                in_sync,
                operations: kernel.operations,
                repairs: kernel.repairs.clone(),
                checksum_offload: kernel.checksum_offload,
                strangers_dropped: kernel.host.dropped,
                peers_in_use: kernel.demand.in_use.as_ref().map(BTreeSet::len),
                misses_answered: kernel.demand.answered,
                misses_unknown: kernel.demand.unknown,
            },
            paths,
            pods: self.pods.table.iter().count(),
            pods_outside,
            connections: self.transport.connections(),
            node,
        }
    }
}
