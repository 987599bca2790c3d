//! The status of an agent, as `gossamer status` and scripts read it.
//!
//! These types are apart from those of the core, so that a change there changes nothing for scripts. A test
//! compares them with the JSON schema.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Verdict,
    members::{FreeRange, Member, MemberState, Reclaiming, SlotCounts},
};
use crate::{
    core::{self, NodeStatus},
    model::{ClusterId, ClusterSettings, NodeId, PathState, Problem},
    transport,
};

/// The status of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AgentStatus {
    /// Version of the agent.
    pub version: String,
    /// The verdict on the node.
    pub verdict: Verdict,
    /// Whether the node has its subnet, its state equals a peer's, and the kernel equals the desired state.
    pub converged: bool,
    /// Id of this node.
    pub node: NodeId,
    /// Name of this node.
    pub name: String,
    /// The phase of its membership.
    pub phase: Phase,
    /// Id of its cluster.
    pub cluster: Option<ClusterId>,
    /// Settings of its cluster.
    pub settings: Option<ClusterSettings>,
    /// Its subnet.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub subnet: Option<IpNet>,
    /// Its IPv6 subnet in a dual-stack overlay.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub subnet6: Option<IpNet>,
    /// Numbers of slots.
    pub slots: SlotCounts,
    /// Whether the last comparison found no difference, or there is no member to compare with.
    pub settled: bool,
    /// Whether memory is verified, or there is no other member.
    pub synced: bool,
    /// All known members, also those that left or were forgotten, by name.
    pub members: Vec<Member>,
    /// Free subnets, as ranges.
    pub free_slots: Vec<FreeRange>,
    /// Forgotten nodes whose subnets are not reclaimed yet.
    pub reclaiming: Vec<Reclaiming>,
    /// What keeps the node or its pods from working.
    pub problems: Vec<Problem>,
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
    /// Log lines that were lost, since the start.
    pub log_lines_lost: u64,
    /// Counts since the start.
    pub counters: Counters,
}

/// The phase of a node's membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waiting to start: for a network to join over, or for Kubernetes to assign a subnet.
    Waiting,
    /// Searching for a member that admits it.
    Joining,
    /// In the cluster, searching for a subnet.
    Leaseless,
    /// In the cluster with a subnet.
    Member,
    /// Handing over its slots.
    Leaving,
}

/// Defines a struct of counters that is copied from one with the same fields.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident from $source:path {
        $($(#[doc = $text:literal])+ $field:ident),* $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[cfg_attr(test, derive(schemars::JsonSchema))]
        pub struct $name {
            $($(#[doc = $text])+ pub $field: u64),*
        }

        impl From<$source> for $name {
            fn from(source: $source) -> Self {
                Self { $($field: source.$field),* }
            }
        }
    };
}

counters! {
    /// Counts since the start of the agent.
    Counters from core::Counters {
        /// Slots for which two records of one epoch were received (ownership conflicts).
        ownership_conflicts,
        /// Records received from another process with this node's key.
        duplicates,
        /// Frames and responses that could not be decoded or were of the wrong kind or cluster.
        malformed,
        /// Facts of peers that were refused because they cannot be true.
        refused,
        /// Records in the name of this process that it did not write.
        forged,
        /// Slot grants to other nodes.
        grants,
        /// Forgotten nodes whose slots this node reclaimed.
        reclaims,
        /// Members that this node forgot by a vote.
        voted_gone,
        /// Own records that peers hold and this node lost: its state directory was rolled back.
        rollbacks,
        /// Transitions of members to down.
        downs,
        /// Surplus leases that this node turned into free slots.
        surplus,
        /// Late grants of forgotten nodes that this node passed on to their successors.
        declined,
        /// Comparisons that found equal states.
        syncs_same,
        /// Comparisons that found a difference.
        syncs_different,
    }
}

counters! {
    /// First packets of handshakes since the start, by outcome.
    Handshakes from transport::Handshakes {
        /// Handshakes that have begun.
        begun,
        /// First packets whose sender had to prove its address.
        retried,
        /// Refused: too many handshakes of the source were in progress, or too many non-members began one in
        /// this second.
        refused,
        /// Not answered: the packet had already begun a handshake.
        repeated,
        /// Handshakes that a newer one displaced: all places, or all of their source, were taken.
        displaced,
        /// Answers to unproven addresses that were not sent, because there were too many.
        unanswered,
    }
}

/// The path to one peer through the overlay.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    pub repairs: BTreeMap<String, u64>,
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CheckStatus {
    /// The result.
    pub state: CheckState,
    /// What was checked, or why nothing was.
    pub detail: String,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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

impl AgentStatus {
    /// Returns the number of members that gossip considers alive, including this node.
    pub fn members_alive(&self) -> usize {
        self.members.iter().filter(|member| member.state() == MemberState::Alive).count()
    }

    /// Returns the status of a node's core. What the core does not know is empty.
    pub fn of(node: NodeStatus) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            verdict: Verdict::new(None, node.problems.len()),
            converged: false,
            node: node.node,
            name: node.name.to_string(),
            phase: node.phase.into(),
            cluster: node.cluster,
            settings: node.settings,
            subnet: node.subnet,
            subnet6: node.subnet6,
            slots: node.slots.into(),
            settled: node.settled,
            synced: node.synced,
            members: node.members.into_iter().map(Into::into).collect(),
            free_slots: node.free_slots.into_iter().map(Into::into).collect(),
            reclaiming: node.reclaiming.into_iter().map(Into::into).collect(),
            problems: node.problems,
            notices: Vec::new(),
            kernel: KernelStatus::default(),
            paths: Vec::new(),
            pods: 0,
            pods_outside: 0,
            pods_refused: None,
            connections: 0,
            handshakes: Handshakes::default(),
            gossip_dropped: 0,
            log_lines_lost: 0,
            counters: node.counters.into(),
        }
    }
}

impl From<core::Phase> for Phase {
    fn from(phase: core::Phase) -> Self {
        match phase {
            core::Phase::Waiting => Self::Waiting,
            core::Phase::Joining => Self::Joining,
            core::Phase::Leaseless => Self::Leaseless,
            core::Phase::Member => Self::Member,
            core::Phase::Leaving => Self::Leaving,
        }
    }
}

impl Phase {
    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Joining => "joining",
            Self::Leaseless => "leaseless",
            Self::Member => "member",
            Self::Leaving => "leaving",
        }
    }
}
