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
    /// Forgotten nodes: all with a member record, and at most [`MAX_STRAY`] others.
    forgets: BTreeMap<NodeId, Forget>,
    /// Forgotten nodes without a member record, by rank. Those of the lowest ranks are kept, so that members
    /// which learn of more than fit, in any order, keep the same ones.
    stray: BTreeSet<(u64, NodeId)>,
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
                self.stray.remove(&stray_rank(record.node));
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

    /// Returns the number of nodes that left or were forgotten. Those that did both may count twice.
    pub fn gone_count(&self) -> usize {
        self.forgets.len() + self.left.len()
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
        if let Some(known) = self.forgets.get(&forget.node).copied() {
            let newer = *forget > known;
            if newer {
                self.forgets.insert(forget.node, *forget);
                self.hashes[Buckets::of_node(forget.node)] ^=
                    forget_hash(&known) ^ forget_hash(forget);
            }
            return newer;
        }
        // Nodes without a member record have a limit of their own, to leave room for those with one.
        if !self.records.contains_key(&forget.node) {
            let rank = stray_rank(forget.node);
            if self.stray.len() >= MAX_STRAY {
                let Some(last) = self.stray.last().copied().filter(|last| rank < *last) else {
                    return false;
                };
                self.stray.remove(&last);
                if let Some(dropped) = self.forgets.remove(&last.1) {
                    self.hashes[Buckets::of_node(dropped.node)] ^= forget_hash(&dropped);
                }
            }
            self.stray.insert(rank);
        }
        self.hashes[Buckets::of_node(forget.node)] ^= forget_hash(forget);
        self.forgets.insert(forget.node, *forget);
        true
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

/// Returns the place of a node among forgotten nodes without a member record.
fn stray_rank(node: NodeId) -> (u64, NodeId) {
    (state_hash(node.as_bytes()), node)
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

    #[test]
    fn forgets_of_unknown_nodes_beyond_the_limit_are_the_same_ones_in_any_order() {
        let forget = |number: u32| {
            let node =
                NodeId::of_public_key(&[number.to_le_bytes(); 8].concat().try_into().expect("32"));
            Forget { node, round: 1, forced: false, successor: node }
        };
        let forgets: Vec<Forget> = (0..40_000).map(forget).collect();
        let (mut forth, mut back) = (Directory::default(), Directory::default());
        forgets.iter().for_each(|forget| _ = forth.merge_forget(forget));
        forgets.iter().rev().for_each(|forget| _ = back.merge_forget(forget));
        assert_eq!(forth.forgets.len(), MAX_STRAY);
        assert_eq!((&forth.forgets, forth.hashes()), (&back.forgets, back.hashes()));

        // A node with a member record is none of them.
        let known = record(1, 1, 0, false);
        assert!(forth.merge(&known));
        assert!(forth.merge_forget(&Forget { node: known.node, ..forgets[0] }));
        assert_eq!((forth.forgets.len(), forth.stray.len()), (MAX_STRAY + 1, MAX_STRAY));
        let stray = *forth.stray.first().expect("there are some");
        assert!(forth.merge(&MemberRecord { node: stray.1, ..known }));
        assert_eq!(forth.stray.len(), MAX_STRAY - 1);
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
