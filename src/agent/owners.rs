//! What operators are told about ownership: the audit log, and how far a forgetting has come.

use serde_json::{Value, json};

use super::{Agent, events::wall_clock};
use crate::{
    api::{EventKind, EventLevel},
    core::Change,
    model::{NodeId, Run, Slot, SlotState},
};

impl Agent {
    /// One line per change of owner.
    pub(super) fn note_owners(&mut self, changes: &[Change]) {
        let Some(cluster) = self.node.cluster() else { return };
        let pool = cluster.settings.pool;
        let at = wall_clock().as_secs();
        let subnets = |run: &Run| {
            let first = pool.subnet(run.start);
            let last = pool.subnet(Slot(run.end().saturating_sub(1)));
            if first == last { first.to_string() } else { format!("{first} to {last}") }
        };
        let line = |(run, before): &Change| {
            json!({
                "at": at,
                "subnets": subnets(run),
                "from": before.map(|record| self.display(record.owner)),
                "to": self.display(run.record.owner),
                "state": run.record.state,
                "by": self.display(run.record.granter),
                "epoch": run.record.epoch,
            })
        };
        let lines: Vec<Value> = changes.iter().map(line).collect();
        // Who comes into a cluster learns of all free subnets at once, which is no news.
        let told = |(run, before): &Change| {
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
        let told = changes.iter().filter_map(told).collect();
        self.archive.append(lines);
        self.journal.note_all(EventKind::Lease, EventLevel::Info, told);
    }

    pub(super) fn forget_progress(&self, node: NodeId) -> Value {
        let reclaiming =
            self.node.reclaiming().into_iter().find(|reclaiming| reclaiming.node == node);
        json!({
            "node": node,
            "name": self.node.name_of(node),
            "slots": reclaiming.as_ref().map_or(0, |reclaiming| reclaiming.slots),
            "waits_for": reclaiming.and_then(|reclaiming| reclaiming.waits_for),
        })
    }

    /// `name (id)`: names need not be unique.
    fn display(&self, node: NodeId) -> String {
        format!("{} ({node})", self.node.name_of(node))
    }
}
