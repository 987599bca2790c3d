//! The replica: this node's copy of the cluster's state, and what spreads it.
//!
//! The rules that need nothing else are its methods, each in the file of its subject: `forget` (reclaiming),
//! `learn` (merging), `records` (what is written), `serve` and `sync` (what peers get), `vet` (what cannot be
//! true), `view` (what is unconfirmed).

use std::{collections::BTreeSet, net::SocketAddr};

use crate::{
    model::{ClusterId, MemberRecord, NodeId, Slot},
    wire::Frame,
};

use super::{
    ClusterState, Target, acknowledgements::Forgetting, comparisons::SyncRound,
    directory::Directory, horizon::Horizons, push::PushQueue,
};

/// This node's copy of the cluster's state.
pub(super) struct Replica {
    /// This node's own record; the directory holds a copy of the newest version.
    pub(super) me: MemberRecord,
    pub(super) directory: Directory,
    /// `None` until this node is in a cluster.
    pub(super) cluster_state: Option<ClusterState>,
    pub(super) forgetting: Forgetting,
    pub(super) horizons: Horizons,
    pub(super) push: PushQueue,
    pub(super) sync: SyncRound,
    /// Slots that were leased and then changed owner or state since the start.
    pub(super) reassigned: BTreeSet<Slot>,
}

impl Replica {
    /// Returns the address of a member's QUIC endpoint.
    pub(super) fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        self.directory.get(node).map(|record| record.address)
    }

    /// Returns a node's name, or "?" if its record is not known.
    pub(super) fn name_of(&self, node: NodeId) -> &str {
        self.directory.get(node).map_or("?", |record| record.name.as_str())
    }

    /// Returns whether the cluster has no other member: none ever joined, or all left or were forgotten.
    pub(super) fn is_alone(&self) -> bool {
        self.directory.peers(self.me.node).next().is_none()
    }

    pub(super) fn target(&self, node: NodeId) -> Option<Target> {
        let address = self.address_of(node)?;
        Some(Target::Member { node, address })
    }

    /// Returns the address of a member and an encoded frame; `None` if the member has no record.
    pub(super) fn frame_to(&self, to: NodeId, frame: Frame<'_>) -> Option<(SocketAddr, Vec<u8>)> {
        Some((self.address_of(to)?, frame.encode(self.cluster_id()?)))
    }

    pub(super) fn cluster_id(&self) -> Option<ClusterId> {
        self.cluster_state.as_ref().map(|cluster_state| cluster_state.cluster.id)
    }
}
