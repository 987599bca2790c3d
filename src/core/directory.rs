//! The newest member record of every node ever known, and the records of forgotten nodes.
//!
//! Only the node that a member record describes writes it. Records of nodes that left stay, so that an
//! outdated copy cannot restore them.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Bound,
};

use crate::{
    model::{Forget, MemberRecord, NodeId, bounded::MAX_MEMBERS},
    wire::{Buckets, Record},
};

use super::rank::state_hash;

/// Limit of forgotten nodes without a member record.
const MAX_STRAY: usize = 1 << 10;

/// Member records and forget records.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    records: BTreeMap<NodeId, MemberRecord>,
    /// Forgotten nodes: all with a member record, and at most `MAX_STRAY` others.
    forgets: BTreeMap<NodeId, Forget>,
    /// Nodes whose member record says that they have left.
    left: BTreeSet<NodeId>,
    /// Hashes of the buckets, kept consistent with `records` and `forgets`.
    hashes: [u64; Buckets::COUNT],
}

impl Directory {
    /// Takes the record over if it is newer than the known one. Returns whether it was.
    pub fn merge(&mut self, record: &MemberRecord) -> bool {
        let full = self.records.len() >= MAX_MEMBERS;
        let taken = match self.records.entry(record.node) {
            Entry::Vacant(_) if full => false,
            Entry::Vacant(entry) => {
                self.hashes[Buckets::of_node(record.node)] ^= member_hash(record);
                entry.insert(record.clone());
                true
            }
            Entry::Occupied(mut entry) => {
                let newer = precedence(record) > precedence(entry.get());
                if newer {
                    let before = entry.insert(record.clone());
                    self.hashes[Buckets::of_node(record.node)] ^=
                        member_hash(&before) ^ member_hash(record);
                }
                newer
            }
        };
        if taken && record.has_left() {
            self.left.insert(record.node);
        } else if taken {
            self.left.remove(&record.node);
        }
        taken
    }

    /// Returns the nodes that left or were forgotten, each once.
    pub fn gone(&self) -> impl Iterator<Item = NodeId> {
        let left = self.left.iter().filter(|node| !self.forgets.contains_key(node));
        self.forgets.keys().chain(left).copied()
    }

    /// Returns whether a record of this node can be stored.
    pub fn has_room_for(&self, node: NodeId) -> bool {
        self.records.len() < MAX_MEMBERS || self.records.contains_key(&node)
    }

    /// Returns a node's record.
    pub fn get(&self, node: NodeId) -> Option<&MemberRecord> {
        self.records.get(&node)
    }

    /// Returns all records, by node id.
    pub fn iter(&self) -> impl Iterator<Item = &MemberRecord> {
        self.records.values()
    }

    /// Returns the records before and after this node's, by node id. No other id shares more leading digits.
    pub fn neighbors(&self, node: NodeId) -> impl Iterator<Item = &MemberRecord> {
        let before = self.records.range(..node).next_back();
        let after = self.records.range((Bound::Excluded(node), Bound::Unbounded)).next();
        before.into_iter().chain(after).map(|(_, record)| record)
    }

    /// Returns the records of all members except `me`, without those that left or were forgotten.
    pub fn peers(&self, me: NodeId) -> impl Iterator<Item = &MemberRecord> {
        self.records.values().filter(move |record| {
            record.node != me && !record.has_left() && !self.forgets.contains_key(&record.node)
        })
    }

    /// Takes a forget record over unless a greater one is known. Returns whether it was new.
    pub fn merge_forget(&mut self, forget: &Forget) -> bool {
        // Nodes without a member record have a limit of their own, to leave room for those with one.
        let has_record = self.records.contains_key(&forget.node);
        let full = !has_record && self.forgets.len() >= MAX_STRAY && {
            let stray = |node: &&NodeId| !self.records.contains_key(node);
            self.forgets.keys().filter(stray).count() >= MAX_STRAY
        };
        match self.forgets.entry(forget.node) {
            Entry::Vacant(_) if full => false,
            Entry::Vacant(entry) => {
                self.hashes[Buckets::of_node(forget.node)] ^= forget_hash(forget);
                entry.insert(*forget);
                true
            }
            Entry::Occupied(mut entry) => {
                let newer = forget > entry.get();
                if newer {
                    let before = entry.insert(*forget);
                    self.hashes[Buckets::of_node(forget.node)] ^=
                        forget_hash(&before) ^ forget_hash(forget);
                }
                newer
            }
        }
    }

    /// Returns a node's forget record.
    pub fn forgotten(&self, node: NodeId) -> Option<&Forget> {
        self.forgets.get(&node)
    }

    /// Returns all forget records.
    pub fn forgets(&self) -> impl Iterator<Item = &Forget> {
        self.forgets.values()
    }

    /// Returns the forget records in a bucket.
    pub fn forgets_in(&self, bucket: usize) -> impl Iterator<Item = &Forget> {
        self.forgets.range(Buckets::nodes(bucket)).map(|(_, forget)| forget)
    }

    /// Returns the member records in a bucket.
    pub fn bucket(&self, bucket: usize) -> impl Iterator<Item = &MemberRecord> {
        self.records.range(Buckets::nodes(bucket)).map(|(_, record)| record)
    }

    /// Returns one hash per bucket; they do not depend on the order of arrival.
    pub const fn hashes(&self) -> [u64; Buckets::COUNT] {
        self.hashes
    }
}

fn member_hash(record: &MemberRecord) -> u64 {
    state_hash(&Record::Member(record.clone()).encode())
}

fn forget_hash(forget: &Forget) -> u64 {
    state_hash(&Record::Forget(*forget).encode())
}

/// Returns the key by which records of one node are ordered; the greatest is kept. Two different records of
/// one version come from a copied state directory; the rest of the key makes all nodes keep the same one.
fn precedence(record: &MemberRecord) -> impl Ord {
    let address = (record.address, record.vtep, record.name.clone());
    (record.version, record.left_to, record.boot, address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::model::{BootId, Mac, Version, Vtep};

    use super::*;

    fn record(seed: u8, starts: u32, boot: u8, left: bool) -> MemberRecord {
        let node = NodeId::of_public_key(&[seed; 32]);
        MemberRecord {
            node,
            version: Version { starts, change: 0 },
            boot: BootId::from_bytes([boot; 8]),
            name: "n".parse().expect("name"),
            address: "192.0.2.1:1".parse().expect("address"),
            vtep: Vtep { mac: Mac::of_node(node), underlay: [192, 0, 2, 1].into() },
            left_to: left.then_some(node),
        }
    }

    #[test]
    fn member_that_left_is_no_peer_and_older_record_does_not_restore_it() {
        let mut directory = Directory::default();
        assert!(directory.merge(&record(1, 2, 0, true)));
        assert!(!directory.merge(&record(1, 1, 0, false)));
        assert_eq!(directory.peers(NodeId::of_public_key(&[9; 32])).count(), 0);
    }

    proptest! {
        #[test]
        fn order_of_arrival_makes_no_difference(
            parts in prop::collection::vec((0_u8..3, 0_u32..3, 0_u8..3, any::<bool>()), 0..20),
        ) {
            let records: Vec<_> = parts.iter().map(|&(s, v, b, l)| record(s, v, b, l)).collect();
            let (mut forth, mut back) = (Directory::default(), Directory::default());
            for record in &records {
                forth.merge(record);
            }
            for record in records.iter().rev().chain(&records) {
                back.merge(record);
            }
            prop_assert_eq!(forth.hashes(), back.hashes());
            prop_assert_eq!(forth.records, back.records);
        }
    }
}
