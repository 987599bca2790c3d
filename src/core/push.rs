//! Push: sends new facts at once.
//!
//! A node sends its own new facts to all neighbors. A node that learns facts passes them on to its
//! relays, which are the neighbors on two of the rings. So each member receives each fact at most four
//! times from others, on several paths. If all paths are broken, the hashes in gossip packets show it,
//! and the two nodes compare their states (`sync`). Push does not check facts.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Run, Time},
    wire::{Facts, Frame, Push},
};

use super::Node;

/// Bounds of [`batch_delay`], and its growth for each member.
const MIN_BATCH_DELAY: Duration = Duration::from_millis(5);
const MAX_BATCH_DELAY: Duration = Duration::from_millis(50);
const BATCH_DELAY_PER_MEMBER: Duration = Duration::from_micros(250);

/// Limit of queued changes; further ones are left to comparison.
const MAX_PENDING: usize = 4096;

/// New facts that wait for the next push.
#[derive(Default)]
pub(super) struct PushQueue {
    members: BTreeSet<NodeId>,
    slots: Vec<Run>,
    forgets: BTreeSet<NodeId>,
    /// The senders of the queued facts; a single sender does not get them back.
    sources: BTreeSet<Option<NodeId>>,
    due: Option<Time>,
    /// The earliest time of the next push.
    earliest: Option<Time>,
}

/// Returns the time within which changes that follow a push, or a view for the kernel, wait and travel
/// together. The first change after a pause does not wait. When many nodes start, each receives several
/// changes of each other one, so the delay grows with their number.
pub(super) fn batch_delay(members: usize) -> Duration {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    BATCH_DELAY_PER_MEMBER.saturating_mul(members).clamp(MIN_BATCH_DELAY, MAX_BATCH_DELAY)
}

impl PushQueue {
    pub(super) fn add(&mut self, now: Time, news: &Facts, from: Option<NodeId>) {
        let queued = self.members.len() + self.slots.len() + self.forgets.len();
        if queued + news.members.len() + news.slots.len() + news.forgets.len() > MAX_PENDING {
            return;
        }
        self.members.extend(news.members.iter().map(|record| record.node));
        self.slots.extend_from_slice(&news.slots);
        self.forgets.extend(news.forgets.iter().map(|forget| forget.node));
        self.sources.insert(from);
        let due = self.earliest.map_or(now, |earliest| now.max(earliest));
        self.due.get_or_insert(due);
    }

    pub(super) fn due(&self) -> Option<Time> {
        self.due
    }
}

impl Node {
    /// Sends the queued facts, if due.
    pub(super) fn flush_push(&mut self, now: Time) {
        if self.replica.push.due.is_none_or(|due| now < due) {
            return;
        }
        let earliest = Some(now + batch_delay(self.active_count()));
        let next = PushQueue { earliest, ..PushQueue::default() };
        let queue = std::mem::replace(&mut self.replica.push, next);
        let members: Vec<_> = queue
            .members
            .iter()
            .filter_map(|node| self.replica.directory.get(*node).cloned())
            .collect();
        let me = self.membership.identity();
        let identity =
            |node| if node == me.node { Some(me) } else { self.membership.active_as(node) };
        let known = members.iter().filter_map(|record| identity(record.node));
        let known = known
            .filter(|identity| identity.node == me.node || !self.replica.is_gone(identity.node));
        let forgets =
            queue.forgets.iter().filter_map(|node| self.replica.directory.forgotten(*node));
        let facts = Facts {
            active: known.collect(),
            forgets: forgets.copied().collect(),
            members,
            slots: queue.slots,
        };
        let only_source = match queue.sources.iter().collect::<Vec<_>>()[..] {
            [Some(source)] => Some(*source),
            _ => None,
        };
        let has_own = queue.sources.contains(&None);
        let payload = Push { facts }.encode();
        let membership = &self.membership;
        let recipients = if has_own { membership.neighbors() } else { membership.relays() };
        let is_new_to = |to: &&NodeId| Some(**to) != only_source && !self.replica.is_gone(**to);
        for &to in recipients.iter().filter(is_new_to) {
            if let Some((address, bytes)) = self.replica.frame_to(to, Frame::Push(&payload)) {
                self.outbox.send_facts(to, address, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Forget;

    /// Regression: forgets did not count.
    #[test]
    fn queued_forgets_are_limited_like_other_changes() {
        let forget = |number: u32| {
            let mut id = [0; 8];
            id[..4].copy_from_slice(&number.to_be_bytes());
            let node = NodeId::from_bytes(id);
            Forget { node, round: 1, forced: false, successor: node }
        };
        let mut queue = PushQueue::default();
        for first in (0..10 * MAX_PENDING as u32).step_by(1_000) {
            let forgets = (first..first + 1_000).map(forget).collect();
            queue.add(Time::ZERO, &Facts { forgets, ..Facts::default() }, None);
        }
        assert_eq!(queue.forgets.len(), 4_000, "the next batch would exceed the limit");
    }

    #[test]
    fn batches_of_large_clusters_are_collected_for_longer_within_bounds() {
        let millis = [1, 20, 40, 100, 10_000].map(|members| batch_delay(members).as_millis());
        assert_eq!(millis, [5, 5, 10, 25, 50]);
    }
}
