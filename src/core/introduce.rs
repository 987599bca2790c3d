//! Telling gossip of members in slices: foca searches its list for each of them.
//!
//! One message can name as many members as a cluster has. What does not fit one turn waits for the next.

use std::collections::VecDeque;

use crate::model::{Identity, Suspicion, Time, bounded::MAX_MEMBERS};

use super::Node;

/// Members that gossip is told of in one turn, alive or down.
const SLICE: usize = 256;

/// What gossip is still to be told. What does not fit comes again with the next comparison.
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

/// Adds what there is room for.
fn queue<T>(waiting: &mut VecDeque<T>, more: Vec<T>) {
    let room = MAX_MEMBERS.saturating_sub(waiting.len());
    waiting.extend(more.into_iter().take(room));
}

impl Node {
    /// Members that a credible peer holds as alive, the first of them at once.
    pub(super) fn introduce(&mut self, now: Time, identities: Vec<Identity>) {
        queue(&mut self.introductions.alive, identities);
        self.step_introductions(now);
    }

    /// Members that a peer holds as down, the first of them at once.
    pub(super) fn suspect(&mut self, now: Time, suspicions: Vec<Suspicion>) {
        queue(&mut self.introductions.down, suspicions);
        self.step_introductions(now);
    }

    pub(super) fn next_introduction(&self) -> Option<Time> {
        (!self.introductions.is_empty()).then_some(self.clock)
    }

    pub(super) fn step_introductions(&mut self, now: Time) {
        let Introductions { alive, down } = &mut self.introductions;
        let (some_alive, some_down) = (alive.len().min(SLICE), down.len().min(SLICE));
        if some_alive > 0 {
            self.membership.introduce(now, alive.drain(..some_alive));
        }
        if some_down > 0 {
            self.membership.suspect(now, down.drain(..some_down));
        }
    }
}
