//! Passes members to gossip in batches, because foca's cost per member is linear in its member list.
//!
//! One message can name all members of a cluster. Members beyond a batch wait for the node's next step.

use std::collections::VecDeque;

use crate::model::{Identity, Suspicion, Time, bounded::MAX_MEMBERS};

use super::Node;

/// Limit of members that one step passes to gossip, for alive and for down ones each.
const BATCH_SIZE: usize = 256;

/// Members that gossip has yet to receive. Those beyond `MAX_MEMBERS` come again with the next comparison.
#[derive(Clone, Debug, Default)]
pub(super) struct Introductions {
    alive: VecDeque<Identity>,
    down: VecDeque<Suspicion>,
}

impl Introductions {
    fn is_empty(&self) -> bool {
        self.alive.is_empty() && self.down.is_empty()
    }
}

/// Appends to the queue up to `MAX_MEMBERS`.
fn queue<T>(waiting: &mut VecDeque<T>, more: Vec<T>) {
    let room = MAX_MEMBERS.saturating_sub(waiting.len());
    waiting.extend(more.into_iter().take(room));
}

impl Node {
    /// Queues members that a vetted peer considers alive, and passes the first batch to gossip.
    pub(super) fn introduce(&mut self, now: Time, identities: Vec<Identity>) {
        queue(&mut self.introductions.alive, identities);
        self.step_introductions(now);
    }

    /// Queues members that a peer considers down, and passes the first batch to gossip.
    pub(super) fn suspect(&mut self, now: Time, suspicions: Vec<Suspicion>) {
        queue(&mut self.introductions.down, suspicions);
        self.step_introductions(now);
    }

    pub(super) fn next_introduction(&self) -> Option<Time> {
        (!self.introductions.is_empty()).then_some(self.clock)
    }

    pub(super) fn step_introductions(&mut self, now: Time) {
        let Introductions { alive, down } = &mut self.introductions;
        let (some_alive, some_down) = (alive.len().min(BATCH_SIZE), down.len().min(BATCH_SIZE));
        if some_alive > 0 {
            self.membership.introduce(now, alive.drain(..some_alive));
        }
        if some_down > 0 {
            self.membership.suspect(now, down.drain(..some_down));
        }
    }
}
