//! The view: the part of the cluster's state that the kernel needs. The core computes it, and the data plane
//! derives the kernel's entries from it.

use std::{collections::BTreeMap, ops::Range};

use super::{ClusterSettings, NodeId, Slot, Subnets, Vtep};

/// The overlay as one node programs it. Equal views give equal kernel tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The cluster's settings.
    pub settings: ClusterSettings,
    /// This node's endpoint and subnets.
    pub own: Own,
    /// Every member with a lease. Liveness does not matter.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Slot ranges whose kernel entries must stay although no peer is known to lease them, because their
    /// owner is unconfirmed. A killed process may have programmed more than its disk records; removing that
    /// would cut off a working member.
    pub unconfirmed: Vec<Range<u32>>,
}

/// This node's end of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// The subnets that this node leases.
    pub subnets: Subnets,
    /// This node's VXLAN endpoint.
    pub vtep: Vtep,
}

/// A peer's end of its tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The peer's VXLAN endpoint.
    pub vtep: Vtep,
    /// Its leases, lowest slot first; more than one only temporarily.
    pub leases: Vec<(Slot, Subnets)>,
}
