//! Members, leases and free subnets in the status.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    core,
    model::{Liveness, Mac, NodeId},
};

/// A member of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Member {
    /// The member's id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Name that commands accept: its name, or its name and the beginning of its id if another one has it.
    pub label: String,
    /// Whether it is an earlier identity of a living member with its name and address.
    pub former_self: bool,
    /// Whether it is this node.
    pub me: bool,
    /// Its liveness; `None` if gossip does not know it: not seen since the start, or down for a day.
    pub liveness: Option<Liveness>,
    /// Whether it left.
    pub left: bool,
    /// Whether it was forgotten.
    pub forgotten: bool,
    /// Whether kernel entries of its slots stay until this node has compared its state with it.
    pub awaited: bool,
    /// The address of its QUIC endpoint.
    pub address: SocketAddr,
    /// The underlay address of its VTEP.
    pub underlay: IpAddr,
    /// The MAC of its VTEP.
    pub vtep_mac: Mac,
    /// The subnets that it leases.
    #[cfg_attr(test, schemars(with = "Vec<String>"))]
    pub subnets: Vec<IpNet>,
    /// Number of free slots that it owns.
    pub free: u32,
}

/// Numbers of slots in the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SlotCounts {
    /// Slots of the pool.
    pub total: u32,
    /// Leased slots.
    pub leased: u32,
    /// Free slots.
    pub free: u32,
    /// Free slots of this node.
    pub own_free: u32,
}

/// Consecutive free subnets of one owner.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FreeRange {
    /// The first subnet.
    #[cfg_attr(test, schemars(with = "String"))]
    pub first: IpNet,
    /// The last subnet.
    #[cfg_attr(test, schemars(with = "String"))]
    pub last: IpNet,
    /// Number of subnets.
    pub count: u32,
    /// The owner.
    pub node: NodeId,
    /// The owner's name, or "?".
    pub name: String,
    /// The owner's liveness.
    pub liveness: Option<Liveness>,
}

/// The progress of reclaiming a forgotten node's slots.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Reclaiming {
    /// The forgotten node.
    pub node: NodeId,
    /// Its name, or its id if the name is not known.
    pub name: String,
    /// The member that reclaims its slots.
    pub successor: NodeId,
    /// Number of slots not reclaimed yet.
    pub slots: u32,
    /// Names of members that have not acknowledged; `None` except on the successor.
    pub waits_for: Option<Vec<String>>,
}

/// A member's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
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

impl Member {
    /// Returns its state. `Forgotten` and `Left` precede its liveness.
    pub const fn state(&self) -> MemberState {
        match self.liveness {
            _ if self.forgotten => MemberState::Forgotten,
            _ if self.left => MemberState::Left,
            Some(Liveness::Alive) => MemberState::Alive,
            Some(Liveness::Suspect) => MemberState::Suspect,
            Some(Liveness::Down) => MemberState::Down,
            None => MemberState::Unknown,
        }
    }

    /// Returns whether it is present, and no earlier identity of a living member.
    pub const fn is_current(&self) -> bool {
        self.is_present() && !self.former_self
    }

    /// Returns whether it has neither left nor been forgotten.
    pub const fn is_present(&self) -> bool {
        !self.state().is_gone()
    }
}

impl MemberState {
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

impl From<core::MemberStatus> for Member {
    fn from(member: core::MemberStatus) -> Self {
        Self {
            node: member.node,
            name: member.name.to_string(),
            label: member.label,
            former_self: member.former_self,
            me: member.me,
            liveness: member.liveness,
            left: member.left,
            forgotten: member.forgotten,
            awaited: member.awaited,
            address: member.address,
            underlay: member.underlay,
            vtep_mac: member.vtep_mac,
            subnets: member.subnets,
            free: member.free,
        }
    }
}

impl From<core::SlotCounts> for SlotCounts {
    fn from(core::SlotCounts { total, leased, free, own_free }: core::SlotCounts) -> Self {
        Self { total, leased, free, own_free }
    }
}

impl From<core::FreeRange> for FreeRange {
    fn from(range: core::FreeRange) -> Self {
        let core::FreeRange { first, last, count, node, name, liveness } = range;
        Self { first, last, count, node, name, liveness }
    }
}

impl From<core::Reclaiming> for Reclaiming {
    fn from(reclaiming: core::Reclaiming) -> Self {
        let core::Reclaiming { node, name, successor, slots, waits_for } = reclaiming;
        Self { node, name, successor, slots, waits_for }
    }
}
