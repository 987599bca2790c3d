//! The configuration of a node.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::model::{
    BootId, ClusterId, ClusterSettings, NodeId, NodeName, Quorum, SettingsWish, Vtep,
};

/// Settings from outside the core. None of them is saved; saved records are passed to [`super::Node::start`].
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This node's id.
    pub node: NodeId,
    /// A random id of this process.
    pub boot: BootId,
    /// This node's name.
    pub name: NodeName,
    /// The address at which peers reach this node's QUIC endpoint.
    pub address: SocketAddr,
    /// This node's VXLAN endpoint.
    pub vtep: Vtep,
    /// What to do if no cluster is saved.
    pub bootstrap: Bootstrap,
    /// The number of seeds; the agent knows their addresses.
    pub seeds: usize,
    /// The cluster id in the join token.
    pub cluster: Option<ClusterId>,
    /// The cluster settings that the operator configured; they must not differ from the cluster's own.
    pub wish: SettingsWish,
    /// An address of the subnet that this node prefers.
    pub prefer_subnet: Option<IpAddr>,
    /// An address of the subnet that Kubernetes assigned to this node. The node leases that subnet and no
    /// other; all nodes of such a cluster have this setting. Nodes grant no slots to each other, and the
    /// cluster needs no creator: its id is `cluster`, which all nodes know.
    pub assigned: Option<IpAddr>,
    /// Networks that this host routes elsewhere. The node leases a subnet in them only if it has no other.
    pub occupied: Vec<IpNet>,
    /// Whether node names are unique. A down member with this node's name is then its predecessor, which this
    /// node forgets.
    pub replace_by_name: bool,
    /// The voters and the timeout for automatic forgetting; `None` turns it off.
    pub quorum: Option<Quorum>,
    /// The seed of all randomness in the node: from the OS in the agent, from the run's seed in the
    /// simulator.
    pub rng_seed: [u8; 32],
}

/// What a node does if no cluster is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// Create a cluster with these settings.
    Create(ClusterSettings),
    /// Join a cluster through the seeds.
    Join,
}
