//! Reports on slot ownership for operators: the audit log of changes, and the progress of a forget.

use crate::{
    agent::{Agent, operator::events::wall_clock},
    api::{EventKind, EventLevel, Forgotten},
    core::Change,
    model::{NodeId, OwnerChange, Run, Slot, SlotState},
};

impl Agent {
    /// Appends one line per change of owner to the history, and adds events.
    pub(in crate::agent) fn record_owner_changes(&mut self, changes: &[Change]) {
        let Some(cluster) = self.node.cluster() else { return };
        let pool = cluster.settings.pool;
        let at = wall_clock().as_secs();
        let subnets = |run: &Run| {
            let first = pool.subnet(run.start);
            let last = pool.subnet(Slot(run.end().saturating_sub(1)));
            if first == last { first.to_string() } else { format!("{first} to {last}") }
        };
        let line = |(run, before): &Change| OwnerChange {
            at,
            subnets: subnets(run),
            from: before.map(|record| self.display(record.owner)),
            to: self.display(run.record.owner),
            state: run.record.state,
            by: self.display(run.record.granter),
            epoch: run.record.epoch,
        };
        let lines = changes.iter().map(line).collect();
        // Free slots without an earlier record are no event: a joiner learns of all of them at once.
        let event = |(run, before): &Change| {
            let owner = self.node.name_of(run.record.owner);
            match (run.record.state, before) {
                (SlotState::Leased, _) => {
                    Some(format!("{} is the subnet of {owner}", subnets(run)))
                }
                (SlotState::Free, None) => None,
                (SlotState::Free, Some(before)) => {
                    let before = self.node.name_of(before.owner);
                    Some(format!("{owner} has {} free, from {before}", subnets(run)))
                }
            }
        };
        let events = changes.iter().filter_map(event).collect();
        self.storage.archive.append(lines);
        self.journal.note_all(EventKind::Lease, EventLevel::Info, events);
    }

    /// Returns the progress of forgetting a node: slots to reclaim, and the members that are waited for.
    pub(in crate::agent) fn forget_progress(&self, node: NodeId) -> Forgotten {
        let reclaiming =
            self.node.reclaiming().into_iter().find(|reclaiming| reclaiming.node == node);
        Forgotten {
            node,
            name: self.node.name_of(node).to_owned(),
            label: self.node.labels().of(node),
            slots: reclaiming.as_ref().map_or(0, |reclaiming| reclaiming.slots),
            waits_for: reclaiming.and_then(|reclaiming| reclaiming.waits_for),
        }
    }

    /// Returns `name (id)`, as names need not be unique.
    fn display(&self, node: NodeId) -> String {
        format!("{} ({node})", self.node.name_of(node))
    }
}
