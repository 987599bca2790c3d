//! Notes when a restarted node has had contact with a member that it knew before (rule I7).

use super::world::World;
use crate::{
    core::CallError,
    model::NodeId,
    wire::{Frame, Gossip, Response},
};

impl World {
    /// For rule I7: a node that knew peers when it started grants nothing before one of them has answered.
    pub(super) fn record_contact(
        &mut self,
        index: usize,
        answer: &Result<(NodeId, Vec<u8>), CallError>,
    ) {
        let Some(process) = self.hosts[index].process.as_mut() else { return };
        if process.awaited_peers.is_empty() {
            return;
        }
        let response = answer.as_ref().ok().and_then(|(_, bytes)| match Frame::decode(bytes) {
            Ok((_, Frame::Response(payload))) => Response::decode(payload).ok(),
            _ => None,
        });
        if let Some(Response::Same | Response::Facts { .. } | Response::Acknowledged(_)) = response
        {
            process.awaited_peers.clear();
        }
    }

    /// The same for a gossip packet with the hashes of the receiver's own state.
    pub(super) fn record_contact_by_gossip(&mut self, index: usize, bytes: &[u8]) {
        let Some(process) = self.hosts[index].process.as_mut() else { return };
        if let Ok((_, Frame::Swim(payload))) = Frame::decode(bytes)
            && let Ok(Gossip { roots, .. }) = Gossip::decode(payload)
            && roots == process.node.roots()
        {
            process.awaited_peers.clear();
        }
    }
}
