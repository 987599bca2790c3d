//! Tells operators once that this node did not get the subnet that they prefer.

use crate::{
    agent::Agent,
    api::{EventKind, EventLevel},
};

impl Agent {
    /// Logs that this node has another subnet than the preferred one, and adds an event.
    pub(super) fn record_missed_preference(&mut self) {
        let Some(notice) = self.node.missed_preference() else { return };
        if !self.journal.knows(&notice.key()) {
            tracing::warn!("{}", notice.what);
            self.journal.note(EventKind::Lease, EventLevel::Warn, notice.what);
        }
    }
}
