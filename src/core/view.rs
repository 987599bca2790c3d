//! What the kernel must know: the converged state, boiled down to tunnels and subnets.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use crate::model::{ClusterSettings, NodeId, NodeName, Slot, Vtep};

/// One node's picture of the overlay. Equal views mean equal kernel tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub settings: ClusterSettings,
    pub own: Own,
    /// Every member with a lease, whether it is alive or not: being down is an opinion.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Whether entries of nobody's may be removed: not before the first comparison with a peer since
    /// the start, lest an old database sweeps away a newer member.
    pub sweep: bool,
}

/// This node's end of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    pub slot: Slot,
    pub subnet: Ipv4Net,
    pub vtep: Vtep,
}

/// A peer's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: NodeName,
    pub vtep: Vtep,
    /// Its leases, lowest slot first; more than one only for moments.
    pub leases: Vec<(Slot, Ipv4Net)>,
}
