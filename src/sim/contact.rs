//! Notes when a restarted node has had contact with a member that it knew before (rule I7).

use super::{host::Process, world::World};
use crate::{
    core::{CallError, Input},
    model::NodeId,
    wire::{Frame, Gossip, Response, Roots},
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
}

impl Process {
    /// Returns the hashes in a gossip packet, if a contact is awaited.
    pub(super) fn gossiped_hashes(&self, input: &Input) -> Option<Roots> {
        let Input::Message { bytes, .. } = input else { return None };
        if self.awaited_peers.is_empty() {
            return None;
        }
        let Ok((_, Frame::Swim(payload))) = Frame::decode(bytes) else { return None };
        Gossip::decode(payload).ok().map(|gossip| gossip.roots)
    }

    /// Notes a contact if the hashes in a gossip packet are those of the node after it has handled the
    /// packet.
    pub(super) fn record_contact_by_gossip(&mut self, hashes: Option<Roots>) {
        if hashes.is_some_and(|hashes| hashes == self.node.roots()) {
            self.awaited_peers.clear();
        }
    }
}
