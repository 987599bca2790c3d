//! Keeps free slots at hand on a node that grants them.
//!
//! A joiner whose seed has no free slot needs a second connection, to another granter. So a node that
//! has granted slots and has few left asks the member with the most free slots for half of them, before
//! the next joiner comes.

use std::time::Duration;

use crate::{
    model::{NodeId, Time},
    wire::{Facts, Refusal, Request, Response},
};

use super::{Answer, Node, Purpose};

/// A granter with fewer free slots than this asks for more.
pub(super) const LOW: u32 = 8;
/// Pause after a supplier did not answer or refused.
const PAUSE: Duration = Duration::from_secs(1);

/// Requests for free slots.
#[derive(Default)]
pub(super) struct Supplies {
    /// When to look at the number of free slots; `None` until this node grants one.
    next_try: Option<Time>,
    is_open: bool,
}

impl Supplies {
    /// Notes that this node has granted a slot.
    pub(super) fn note_grant(&mut self, now: Time) {
        self.next_try.get_or_insert(now);
    }

    /// Returns when the next step is due.
    pub(super) fn next_step(&self) -> Option<Time> {
        self.next_try.filter(|_| !self.is_open)
    }
}

impl Node {
    /// Asks for free slots if this node grants them and has few left.
    pub(super) fn step_supply(&mut self, now: Time) {
        if self.lifecycle.supplies.next_step().is_none_or(|due| now < due) {
            return;
        }
        self.lifecycle.supplies.next_try = None;
        let (me, active) = (self.replica.me.node, self.membership.identities());
        let Some(cluster_state) =
            self.replica.cluster_state.as_ref().filter(|_| !self.lifecycle.is_leaving())
        else {
            return;
        };
        let own = cluster_state.slots.free_count(me);
        if own >= LOW {
            return;
        }
        let free_slots = cluster_state.slots.census().free.into_iter();
        let others = free_slots.filter(|(node, _)| *node != me && active.contains_key(node));
        // A supplier keeps at least as many as this node gets.
        let useful = others.filter(|(_, count)| *count > 2 * own + 1);
        let supplier = useful.max_by_key(|(_, count)| *count).map(|(node, _)| node);
        // Without a supplier the next grant looks again.
        let Some(supplier) = supplier else { return };
        self.lifecycle.supplies.is_open =
            self.call_member(supplier, Purpose::Supply { supplier }, &Request::Supply);
        self.lifecycle.supplies.next_try = Some(now + PAUSE);
    }

    /// Gives half of this node's free slots to a member that has few.
    pub(super) fn supply(&mut self, now: Time, to: NodeId) -> Result<Facts, Refusal> {
        let me = self.replica.me.node;
        let is_member = self.replica.directory.get(to).is_some();
        let slots = &mut self.slots_to_give()?.slots;
        // This node may not know yet that the member has granted some.
        if !is_member || slots.free_count(to) >= 2 * LOW {
            return Err(slots.no_free_slot());
        }
        let changes = slots.supply(me, to);
        let slots = changes.iter().map(|(run, _)| *run).collect();
        self.note_own_change(now, &changes);
        Ok(Facts { slots, ..Facts::default() })
    }

    pub(super) fn handle_supply_answer(&mut self, now: Time, supplier: NodeId, answer: Answer) {
        let is_useful = match answer {
            Ok((_, Response::Granted(facts))) => self.learn(now, &facts, Some(supplier)).new,
            Ok((from, other)) => {
                self.note_unexpected(
                    from,
                    &other,
                    "no free slots in response to a request for them",
                );
                false
            }
            Err(error) => {
                tracing::debug!(%supplier, %error, "supplier did not answer");
                false
            }
        };
        self.lifecycle.supplies.is_open = false;
        self.lifecycle.supplies.next_try = Some(if is_useful { now } else { now + PAUSE });
    }
}
