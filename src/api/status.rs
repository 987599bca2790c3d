//! The status of an agent, as `gossamer status` and scripts read it.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::Serialize;

use super::Verdict;
use crate::{
    core::{Liveness, MemberStatus, NodeStatus},
    model::{NodeId, PathState, Problem},
    transport::Handshakes,
};

/// The status of an agent.
#[derive(Clone, Debug, Serialize)]
pub struct AgentStatus {
    /// Version of the agent.
    pub version: &'static str,
    /// The verdict on the node.
    pub verdict: Verdict,
    /// Whether the node has its subnet, its state equals a peer's, and the kernel equals its view.
    pub converged: bool,
    /// State of the node's core.
    #[serde(flatten)]
    pub node: NodeStatus,
    /// Conditions that may affect some packets, or that prevent this node from checking whether packets
    /// pass.
    pub notices: Vec<Problem>,
    /// State of kernel programming.
    pub kernel: KernelStatus,
    /// State of the path to each peer with a subnet.
    pub paths: Vec<PathStatus>,
    /// Number of pods of this node.
    pub pods: usize,
    /// Number of pods with addresses outside this node's subnet: no other host reaches them.
    pub pods_outside: usize,
    /// Why no pod can be connected at present.
    pub pods_refused: Option<String>,
    /// Number of open connections to members.
    pub connections: usize,
    /// First packets of handshakes since the start, by outcome.
    pub handshakes: Handshakes,
    /// Packets to the agent's port that it did not read in time, since the start.
    pub gossip_dropped: u64,
}

/// The path to one peer through the overlay.
#[derive(Clone, Debug, Serialize)]
pub struct PathStatus {
    /// Id of the peer.
    pub node: NodeId,
    /// Name of the peer.
    pub name: String,
    /// State of the path.
    pub state: PathState,
    /// Round trip of the last answered request.
    pub round_trip_ms: Option<f64>,
    /// Round trip between the agents over the underlay, while they have a connection.
    pub underlay_round_trip_ms: Option<f64>,
    /// Path MTU in bytes, if it is smaller than the overlay device's.
    pub mtu: Option<u32>,
    /// What is wrong, and a remedy.
    pub problem: Option<Problem>,
    /// Whether the host does not answer, but its pods do.
    pub pods_answer: bool,
}

/// State of kernel programming.
#[derive(Clone, Debug, Serialize)]
pub struct KernelStatus {
    /// Name of the overlay device.
    pub device: Option<String>,
    /// MTU of the overlay device, in bytes.
    pub mtu: u32,
    /// Name of the underlay interface; empty while no network of the host can carry tunnels.
    pub underlay_interface: String,
    /// Address on the underlay. `None` before a new node has had a network.
    pub underlay_address: Option<IpAddr>,
    /// Whether the kernel equals the current view.
    pub in_sync: bool,
    /// Operations executed since the start.
    pub operations: u64,
    /// Repairs of changes by other programs, by kind.
    pub repairs: BTreeMap<&'static str, u64>,
    /// Whether the network card computes checksums of tunneled packets; also false if that was found not
    /// to work. `None` if unknown.
    pub checksum_offload: Option<bool>,
    /// Whether such packets did not arrive, so that the agent has turned checksum offload off.
    pub checksum_offload_fails: bool,
    /// Tunnel packets from non-members that the guard has dropped.
    pub non_members_dropped: u64,
    /// Number of peers with entries in the kernel. `None` if all peers always have entries.
    pub peers_in_use: Option<usize>,
    /// Entries that the kernel requested and got.
    pub misses_answered: u64,
    /// Addresses and MACs of no member that the kernel requested.
    pub misses_unknown: u64,
    /// Whether the kernel routes packets of pods as it should, according to its own answers.
    pub routing: CheckStatus,
    /// Whether this host forwards packets of pods, according to test packets.
    pub forwarding: CheckStatus,
}

/// The result of a periodic check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckStatus {
    /// The result.
    pub state: CheckState,
    /// What was checked, or why nothing was.
    pub detail: String,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// The check passed.
    Ok,
    /// The check failed.
    Failing,
    /// Nothing could or had to be checked.
    #[default]
    Skipped,
}

/// A member's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberState {
    /// Answers probes.
    Alive,
    /// Did not answer, and is not yet considered down.
    Suspect,
    /// Does not answer.
    Down,
    /// Not in gossip, or no longer.
    Unknown,
    /// Has left the cluster.
    Left,
    /// Was forgotten.
    Forgotten,
}

impl MemberState {
    /// Returns the state of a member. `Forgotten` and `Left` precede its liveness.
    pub fn of(member: &MemberStatus) -> Self {
        match member.liveness {
            _ if member.forgotten => Self::Forgotten,
            _ if member.left => Self::Left,
            Some(Liveness::Alive) => Self::Alive,
            Some(Liveness::Suspect) => Self::Suspect,
            Some(Liveness::Down) => Self::Down,
            None => Self::Unknown,
        }
    }

    /// Returns whether the member has left or was forgotten.
    pub const fn is_gone(self) -> bool {
        matches!(self, Self::Left | Self::Forgotten)
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Down => "down",
            Self::Unknown => "unknown",
            Self::Left => "left",
            Self::Forgotten => "forgotten",
        })
    }
}

impl AgentStatus {
    /// Returns the number of members that gossip considers alive, including this node.
    pub fn members_alive(&self) -> usize {
        let members = self.node.members.iter();
        members.filter(|member| MemberState::of(member) == MemberState::Alive).count()
    }
}
