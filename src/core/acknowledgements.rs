//! The acknowledgements that this node has as the successor of gone nodes. `forget` requests them.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Forget, NodeId, Time};

/// A successor's record of acknowledgements.
#[derive(Default)]
pub(super) struct Forgetting {
    /// The present forget record of each gone node, and the members that have acknowledged it.
    acknowledged: BTreeMap<NodeId, (Forget, BTreeSet<NodeId>)>,
    /// Members that have departed since the acknowledgements were last checked.
    departed: BTreeSet<NodeId>,
    pub(super) pending: BTreeSet<NodeId>,
    /// Grows whenever a member departs; acknowledgements requested in an earlier era do not count.
    pub(super) era: u64,
    pub(super) retry_at: Option<Time>,
    /// No step is due before this time.
    pub(super) not_before: Time,
}

impl Forgetting {
    /// Notes that a member has departed. [`Self::check_departures`] handles all departures of one message at
    /// once, because a message may contain thousands.
    pub(super) fn note_departure(&mut self, gone: NodeId) {
        self.era += 1;
        self.departed.insert(gone);
    }

    /// Discards acknowledgements if a member has departed that had not acknowledged: it may have passed its
    /// facts to members that acknowledged before.
    pub(super) fn check_departures(&mut self) {
        let departed = std::mem::take(&mut self.departed);
        for (node, (_, acknowledged_by)) in &mut self.acknowledged {
            if departed.iter().any(|gone| gone != node && !acknowledged_by.contains(gone)) {
                acknowledged_by.clear();
            }
        }
    }

    /// Notes an acknowledgement of a forget record. A record of a later round starts without any.
    pub(super) fn acknowledge(&mut self, forget: &Forget, by: NodeId) {
        self.check_departures();
        let (present, acknowledged_by) =
            self.acknowledged.entry(forget.node).or_insert_with(|| (*forget, BTreeSet::new()));
        if present != forget {
            *present = *forget;
            acknowledged_by.clear();
        }
        acknowledged_by.insert(by);
    }

    /// Returns whether a member has acknowledged a forget record.
    pub(super) fn has_acknowledged(&self, forget: &Forget, by: NodeId) -> bool {
        debug_assert!(self.departed.is_empty(), "departures are checked before");
        let present = self.acknowledged.get(&forget.node).filter(|(present, _)| present == forget);
        present.is_some_and(|(_, acknowledged_by)| acknowledged_by.contains(&by))
    }

    /// Drops the acknowledgements of a node's forget record.
    pub(super) fn drop_acknowledgements(&mut self, node: NodeId) {
        self.acknowledged.remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 8])
    }

    fn forget(number: u8, round: u32) -> Forget {
        Forget { node: node(number), round, forced: false, successor: node(0) }
    }

    #[test]
    fn departure_of_a_member_discards_what_others_acknowledged_unless_it_had_acknowledged() {
        let mut forgetting = Forgetting::default();
        for member in 1..=3 {
            forgetting.acknowledge(&forget(9, 1), node(member));
        }
        forgetting.note_departure(node(3));
        forgetting.note_departure(node(9));
        forgetting.check_departures();
        assert!(
            forgetting.has_acknowledged(&forget(9, 1), node(1)),
            "all that departed are covered"
        );
        forgetting.note_departure(node(3));
        forgetting.note_departure(node(4));
        forgetting.check_departures();
        assert!(
            !forgetting.has_acknowledged(&forget(9, 1), node(1)),
            "node 4 had not acknowledged"
        );
    }

    #[test]
    fn departure_counts_against_an_acknowledgement_that_arrived_before() {
        let mut forgetting = Forgetting::default();
        forgetting.acknowledge(&forget(9, 1), node(1));
        forgetting.note_departure(node(4));
        forgetting.acknowledge(&forget(9, 1), node(2));
        assert!(!forgetting.has_acknowledged(&forget(9, 1), node(1)));
        assert!(forgetting.has_acknowledged(&forget(9, 1), node(2)), "it is newer");
    }

    /// Regression: the acknowledgements of each round were kept, and each departure walked all of them: one
    /// message stopped the loop for 25 s.
    #[test]
    fn later_round_of_a_forget_record_replaces_the_acknowledgements_of_the_earlier_one() {
        let mut forgetting = Forgetting::default();
        for round in 1..1_000 {
            forgetting.acknowledge(&forget(9, round), node(1));
            forgetting.acknowledge(&forget(9, round), node(2));
        }
        assert_eq!(forgetting.acknowledged.len(), 1);
        assert!(forgetting.has_acknowledged(&forget(9, 999), node(1)));
        assert!(!forgetting.has_acknowledged(&forget(9, 998), node(1)));
    }
}
