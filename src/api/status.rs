//! The answer to "how are you": what `gossamer status` shows and scripts read.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::Serialize;

use crate::{
    core::{Liveness, MemberStatus, NodeStatus},
    model::{NodeId, PathState},
    transport::Handshakes,
};

/// Everything `gossamer status` shows.
#[derive(Clone, Debug, Serialize)]
pub struct AgentStatus {
    pub version: &'static str,
    /// This node has its subnet, its state equals that of a peer, and the kernel equals its view.
    pub converged: bool,
    #[serde(flatten)]
    pub node: NodeStatus,
    /// What may hurt some packets, or keeps this node from knowing whether packets pass: as sentences with
    /// what helps.
    pub warnings: Vec<String>,
    pub kernel: KernelStatus,
    /// Whether packets get through to each peer with a subnet.
    pub paths: Vec<PathStatus>,
    /// Pods of this node.
    pub pods: usize,
    /// Those of them whose addresses are not of this node's subnet: nobody reaches them.
    pub pods_outside: usize,
    /// Why no pod can be connected now.
    pub pods_refused: Option<String>,
    pub connections: usize,
    /// First packets of handshakes since the start, by what became of them.
    pub handshakes: Handshakes,
    /// Packets to the agent's port that it did not read in time, since the start.
    pub gossip_dropped: u64,
}

/// The way to one peer through the overlay.
#[derive(Clone, Debug, Serialize)]
pub struct PathStatus {
    pub node: NodeId,
    pub name: String,
    pub state: PathState,
    /// Of the last request that was answered.
    pub round_trip_ms: Option<f64>,
    /// Over the underlay, between the two agents, as long as they have a connection.
    pub underlay_round_trip_ms: Option<f64>,
    /// MTU of the packets to it in bytes, where its path carries less than the overlay device.
    pub mtu: Option<u32>,
    /// What is wrong, and what helps.
    pub problem: Option<String>,
    /// What is asked of that host is not answered, and its pods answer those of this host.
    pub pods_answer: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct KernelStatus {
    pub device: Option<String>,
    pub mtu: u32,
    /// Empty while the host has no network that could carry tunnels.
    pub underlay_interface: String,
    /// None before the first network of a new node.
    pub underlay_address: Option<IpAddr>,
    /// The kernel has been made equal to the present view.
    pub in_sync: bool,
    /// Operations carried out since the start.
    pub operations: u64,
    /// What other programs had changed and was put right, by kind.
    pub repairs: BTreeMap<&'static str, u64>,
    /// Whether checksums of tunnelled packets are left to the network card, as far as is known; false also
    /// after they were found not to arrive then.
    pub checksum_offload: Option<bool>,
    /// Packets whose checksums are left to the network card do not arrive, so that was turned off.
    pub checksum_offload_fails: bool,
    /// Tunnel packets that came from no member and were dropped by the guard.
    pub non_members_dropped: u64,
    /// Peers that have entries in the kernel; none, if all of them always have.
    pub peers_in_use: Option<usize>,
    /// Entries that the kernel asked for and was given.
    pub misses_answered: u64,
    /// Addresses and MACs of nobody that the kernel asked for.
    pub misses_unknown: u64,
    /// Whether the kernel, when asked, sends packets of pods where they should go.
    pub routing: CheckStatus,
    /// Whether this host forwards packets of pods, by packets that were sent to find out.
    pub forwarding: CheckStatus,
}

/// What has come of something that is tried from time to time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckStatus {
    pub state: CheckState,
    /// What was looked at, or why nothing was.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    Ok,
    Failing,
    /// There was nothing to look at, or no way to.
    #[default]
    Skipped,
}

/// A member in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberState {
    Alive,
    Suspect,
    Down,
    /// Gossip knows nothing of it (any more).
    Unknown,
    Left,
    Forgotten,
}

impl MemberState {
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

    /// For good.
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
    /// Members that gossip holds as alive, this node included.
    pub fn members_alive(&self) -> usize {
        let members = self.node.members.iter();
        members.filter(|member| MemberState::of(member) == MemberState::Alive).count()
    }
}
