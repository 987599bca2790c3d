//! The state of one round of trials.

use std::collections::BTreeMap;

use super::{REPORT_REQUEST_TIME, REPORT_TIMEOUT, SEND_TIMES, target::Target};
use crate::model::{NodeId, Time};

/// A round of trials with a few peers.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) begun: Time,
    /// How many times packets were sent.
    pub(super) sent: usize,
    pub(super) report_requested: Option<Time>,
    pub(super) ends_at: Option<Time>,
    pub(super) targets: BTreeMap<NodeId, Target>,
}

impl Round {
    pub(super) fn is_answered(&self) -> bool {
        self.targets.values().all(Target::is_answered)
    }

    pub(super) fn next_due(&self) -> Time {
        if self.is_answered() {
            return self.begun;
        }
        match (SEND_TIMES.get(self.sent), self.report_requested) {
            (Some(at), _) => self.begun + *at,
            (None, None) => self.begun + REPORT_REQUEST_TIME,
            (None, Some(report_requested)) => {
                self.ends_at.unwrap_or(report_requested + REPORT_TIMEOUT)
            }
        }
    }
}
