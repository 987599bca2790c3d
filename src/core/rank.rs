//! Rendezvous hashing, and the hashes that comparisons of states use.
//!
//! All nodes and all releases must compute the same values, so the function is fixed: SipHash-1-3 with
//! constant keys. It protects against no attack: members are trusted.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::model::{NodeId, Slot};

/// Returns the preference of a node for a slot. A granter offers the free slot with the highest score, so
/// nodes that join through different granters rarely get the same slot.
pub fn slot_score(node: NodeId, slot: Slot) -> u64 {
    let mut hasher = hasher(1);
    hasher.write(node.as_bytes());
    hasher.write_u32(slot.0);
    hasher.finish()
}

/// Returns the preference of a node for a peer as granter or successor; spreads requests over the cluster.
pub fn peer_score(node: NodeId, peer: NodeId) -> u64 {
    let mut hasher = hasher(2);
    hasher.write(node.as_bytes());
    hasher.write(peer.as_bytes());
    hasher.finish()
}

/// Returns the position of a node on one of the rings of the neighborhood.
pub fn ring_position(ring: usize, node: NodeId) -> u64 {
    let mut hasher = hasher(4);
    hasher.write_u64(ring as u64);
    hasher.write(node.as_bytes());
    hasher.finish()
}

/// Returns the hash of encoded state.
pub fn state_hash(bytes: &[u8]) -> u64 {
    let mut hasher = hasher(3);
    hasher.write(bytes);
    hasher.finish()
}

fn hasher(purpose: u64) -> SipHasher13 {
    SipHasher13::new_with_keys(0x676f_7373_616d_6572, purpose)
}
