//! How foca orders the identities of a node, and their hashes.

use crate::{
    core::rank::state_hash,
    model::{Identity, NodeId},
};

/// Returns the hash of an active member.
pub(super) fn identity_hash(Identity { node, incarnation }: &Identity) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(node.as_bytes());
    bytes[8..12].copy_from_slice(&incarnation.starts.to_le_bytes());
    bytes[12..].copy_from_slice(&incarnation.renewals.to_le_bytes());
    state_hash(&bytes)
}

impl foca::Identity for Identity {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        let mut renewed = *self;
        renewed.incarnation.renewals = renewed.incarnation.renewals.checked_add(1)?;
        Some(renewed)
    }

    fn addr(&self) -> NodeId {
        self.node
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.incarnation > adversary.incarnation
    }
}
