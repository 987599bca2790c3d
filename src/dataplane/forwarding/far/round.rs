//! What is under way in one round of trials.

use std::collections::BTreeMap;

use super::{ASK, SENDS, TIMEOUT, target::Target};
use crate::model::{NodeId, Time};

/// A trial of a few peers at once.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) begun: Time,
    /// How often packets were sent.
    pub(super) sent: usize,
    pub(super) asked: Option<Time>,
    pub(super) judged_at: Option<Time>,
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
        match (SENDS.get(self.sent), self.asked) {
            (Some(at), _) => self.begun + *at,
            (None, None) => self.begun + ASK,
            (None, Some(asked)) => self.judged_at.unwrap_or(asked + TIMEOUT),
        }
    }
}
