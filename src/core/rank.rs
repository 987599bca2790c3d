//! Rendezvous hashing and the hashes by which states are compared.
//!
//! Every node must compute the same numbers, in this release and in the next, so the function is fixed:
//! SipHash-1-3 under constant keys. None of it is a defence: members are trusted.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::model::{NodeId, Slot};

/// How well a slot suits a node. The free slot with the highest score is the one it is offered, so
/// nodes that join at different donors rarely want the same one.
pub fn slot_score(node: NodeId, slot: Slot) -> u64 {
    let mut hasher = hasher(1);
    hasher.write(node.as_bytes());
    hasher.write_u32(slot.0);
    hasher.finish()
}

/// How well a peer suits a node as its donor or successor: spreads requests over the cluster.
pub fn peer_score(node: NodeId, peer: NodeId) -> u64 {
    let mut hasher = hasher(2);
    hasher.write(node.as_bytes());
    hasher.write(peer.as_bytes());
    hasher.finish()
}

/// The hash of some encoded state.
pub fn state_hash(bytes: &[u8]) -> u64 {
    let mut hasher = hasher(3);
    hasher.write(bytes);
    hasher.finish()
}

fn hasher(purpose: u64) -> SipHasher13 {
    SipHasher13::new_with_keys(0x676f_7373_616d_6572, purpose)
}
