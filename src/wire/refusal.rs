//! Why a node refuses a request of another one.

use serde::{Deserialize, Serialize};

use crate::model::{ClusterId, Difference, NodeId, Text};

/// Why a node refuses a request. The text of each variant names the cause and, where there is one, the
/// remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The requester belongs to another cluster than the responder.
    #[error(
        "the node belongs to cluster {theirs}, this one to {ours}: clusters never merge; \
         join with a token of cluster {theirs}, or remove the state directory first"
    )]
    OtherCluster {
        /// The requester's cluster.
        ours: ClusterId,
        /// The responder's cluster.
        theirs: ClusterId,
    },
    /// A setting of the joiner contradicts the cluster.
    #[error("{0}: change the joiner's setting or leave it out")]
    Settings(Difference),
    /// The responder has not joined yet.
    #[error("the node is not in a cluster yet")]
    NotReady,
    /// The responder's memory is unverified.
    #[error(
        "the node has not compared its state with a peer since it started, so it grants nothing"
    )]
    NotSynced,
    /// No slot of the cluster is free.
    #[error(
        "all {total} subnets are leased: free one (gossamer forget a member that is gone, gossamer forget \
         --former-selves); the pool cannot be enlarged"
    )]
    Exhausted {
        /// Number of slots of the pool.
        total: u32,
        /// Number of leased slots.
        leased: u32,
    },
    /// The responder has no free slot; other nodes have.
    #[error("the node has no free subnet: {free_elsewhere} are free at other nodes")]
    NoFreeSlotHere {
        /// Number of free slots of other nodes.
        free_elsewhere: u32,
    },
    /// The requester's id has left the cluster.
    #[error("this node has left the cluster, and can join again only under a new identity")]
    Left,
    /// The responder is leaving.
    #[error("the node is leaving the cluster")]
    Leaving,
    /// The cluster has reached its limit of member records.
    #[error("the cluster knows {limit} members, departed ones included, and records no more")]
    Full {
        /// Greatest number of member records.
        limit: u32,
    },
    /// The request cannot be decoded or contradicts itself.
    #[error("the request is malformed: {0}")]
    Malformed(Text),
    /// The requester was forgotten.
    #[error("this node was forgotten: its subnets belong to {successor} now")]
    Forgotten {
        /// The member that took over its slots.
        successor: NodeId,
    },
    /// The responder has detected a duplicate identity of its own.
    #[error("another running agent has this node's key, so neither of them grants slots")]
    DuplicateIdentity,
    /// The joiner's member record is unusable.
    #[error("this node's member record is unusable: {0}: correct its settings")]
    UnusableRecord(Text),
}
