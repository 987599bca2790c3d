//! The acknowledgements that this node has as the successor of gone nodes. `forget` requests them.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Forget, NodeId, Time};

/// A successor's record of acknowledgements.
#[derive(Default)]
pub(super) struct Forgetting {
    pub(super) acknowledged: BTreeMap<Forget, BTreeSet<NodeId>>,
    pub(super) pending: BTreeSet<NodeId>,
    /// Grows whenever a member departs; acknowledgements requested in an earlier era do not count.
    pub(super) era: u64,
    pub(super) retry_at: Option<Time>,
}

impl Forgetting {
    /// Discards acknowledgements if a member departs that had not acknowledged: it may have passed its facts
    /// to members that acknowledged before.
    pub(super) fn note_departure(&mut self, gone: NodeId) {
        self.era += 1;
        for (forget, acknowledged_by) in &mut self.acknowledged {
            if forget.node != gone && !acknowledged_by.contains(&gone) {
                acknowledged_by.clear();
            }
        }
    }
}
