//! What operators are told about ownership: the audit log, and how far a forgetting has come.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::Agent;
use crate::{
    core::Change,
    model::{NodeId, Slot},
};

impl Agent {
    /// One line per change of owner; this is the only place where a wall clock is read, and nothing depends
    /// on it.
    pub(super) fn note_owners(&mut self, changes: &[Change]) {
        let Some(cluster) = self.node.cluster() else { return };
        let pool = cluster.settings.pool;
        let at =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let line = |(run, before): &Change| {
            let first = pool.subnet(run.start);
            let last = pool.subnet(Slot(run.end().saturating_sub(1)));
            let subnets =
                if first == last { first.to_string() } else { format!("{first} to {last}") };
            json!({
                "at": at,
                "subnets": subnets,
                "from": before.map(|record| self.display(record.owner)),
                "to": self.display(run.record.owner),
                "state": run.record.state,
                "by": self.display(run.record.granter),
                "epoch": run.record.epoch,
            })
        };
        let lines: Vec<Value> = changes.iter().map(line).collect();
        self.history.append(&lines);
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
