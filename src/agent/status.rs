//! The agent's own part of the status: kernel, disk, connections, and whether all is as it should be.

use std::net::IpAddr;

use serde::Serialize;

use super::Agent;
use crate::core::{Liveness, NodeStatus, Phase};

/// Everything `gossamer status` shows.
#[derive(Clone, Debug, Serialize)]
pub struct AgentStatus {
    pub version: &'static str,
    /// This node has its subnet, its state equals that of a peer, and the kernel equals its view.
    pub converged: bool,
    #[serde(flatten)]
    pub node: NodeStatus,
    pub kernel: KernelStatus,
    pub connections: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct KernelStatus {
    pub device: Option<String>,
    pub mtu: u32,
    pub underlay_interface: String,
    pub underlay_address: IpAddr,
    /// The kernel has been made equal to the present view.
    pub in_sync: bool,
    /// Operations carried out since the start.
    pub operations: u64,
}

impl AgentStatus {
    /// Members that gossip holds as alive, this node included.
    pub fn members_alive(&self) -> usize {
        let alive = |liveness| liveness == Some(Liveness::Alive);
        self.node.members.iter().filter(|m| alive(m.liveness) && !m.left).count()
    }
}

impl Agent {
    pub(super) fn status(&self) -> AgentStatus {
        let mut node = self.node.status();
        let kernel = &self.kernel;
        node.problems.extend(kernel.problem.clone());
        node.problems
            .extend(self.store_problem.iter().map(|why| format!("state directory: {why}")));
        let in_sync = kernel.wanted.is_some()
            && kernel.answered == kernel.goals
            && kernel.programmed_once
            && kernel.problem.is_none();
        let converged = node.phase == Phase::Member && node.settled && in_sync;
        let device = kernel.wanted.as_ref();
        let device = device.map(|v| crate::dataplane::desired::device_name(v.settings.vni));
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
            },
            connections: self.transport.connections(),
            node,
        }
    }
}
