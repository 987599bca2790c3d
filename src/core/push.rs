//! Push: sends new facts at once.
//!
//! A node sends its own new facts to all neighbors. Each of them passes them on to its neighbors, except to
//! those that receive facts from enough others: a node that receives facts which it knows already asks the
//! sender to stop, as long as [`MIN_SOURCES`] neighbors push to it. So each member receives each fact a few
//! times, on several paths, however many neighbors it has (compare Plumtree: Leitao, Pereira, Rodrigues,
//! "Epidemic Broadcast Trees", 2007). If all paths break, the hashes in gossip packets show it; the two nodes
//! compare their states (`sync`), and push to each other again. Push does not check facts.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Run, Time},
    wire::{Facts, Frame, Push},
};

use super::Node;

/// Changes within this time after a push wait for the next one and travel together.
const BATCH_DELAY: Duration = Duration::from_millis(5);

/// Number of neighbors whose pushes a node always accepts.
const MIN_SOURCES: usize = 3;

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
    last: Option<Time>,
}

/// Which neighbors push to each other.
#[derive(Default)]
pub(super) struct PushLinks {
    /// Neighbors that have asked this node not to push facts of others to them.
    stopped: BTreeSet<NodeId>,
    /// Neighbors that this node has asked the same.
    asked: BTreeSet<NodeId>,
}

impl PushLinks {
    /// Ends pushes to a node.
    pub(super) fn stop(&mut self, node: NodeId) {
        self.stopped.insert(node);
    }

    /// Resumes pushes between this node and another one, because one of them lacked facts.
    pub(super) fn resume(&mut self, node: NodeId) {
        self.stopped.remove(&node);
        self.asked.remove(&node);
    }

    /// Forgets nodes that are no neighbors.
    fn retain(&mut self, neighbors: &BTreeSet<NodeId>) {
        self.stopped.retain(|node| neighbors.contains(node));
        self.asked.retain(|node| neighbors.contains(node));
    }

    /// Returns whether to ask a neighbor that pushed nothing new to stop, and notes it.
    fn asks_to_stop(&mut self, node: NodeId, neighbors: &BTreeSet<NodeId>) -> bool {
        self.retain(neighbors);
        let sources = neighbors.len() - self.asked.len();
        neighbors.contains(&node) && sources > MIN_SOURCES && self.asked.insert(node)
    }
}

impl PushQueue {
    pub(super) fn add(&mut self, now: Time, news: &Facts, from: Option<NodeId>) {
        if self.members.len() + self.slots.len() + news.members.len() + news.slots.len()
            > MAX_PENDING
        {
            return;
        }
        self.members.extend(news.members.iter().map(|record| record.node));
        self.slots.extend_from_slice(&news.slots);
        self.forgets.extend(news.forgets.iter().map(|forget| forget.node));
        self.sources.insert(from);
        let earliest = self.last.map_or(now, |last| now.max(last + BATCH_DELAY));
        self.due.get_or_insert(earliest);
    }

    pub(super) fn due(&self) -> Option<Time> {
        self.due
    }
}

impl Node {
    /// Handles pushed facts.
    pub(super) fn handle_push(&mut self, now: Time, from: NodeId, facts: &Facts) {
        let merged = self.learn(now, facts, Some(from));
        let neighbors = self.membership.neighbors();
        if !merged.new
            && !merged.refused
            && self.replica.push_links.asks_to_stop(from, neighbors)
            && let Some((address, bytes)) = self.replica.frame_to(from, Frame::Prune)
        {
            self.outbox.send_facts(from, address, bytes);
        }
    }

    /// Sends the queued facts, if due.
    pub(super) fn flush_push(&mut self, now: Time) {
        if self.replica.push.due.is_none_or(|due| now < due) {
            return;
        }
        let last = Some(now);
        let queue =
            std::mem::replace(&mut self.replica.push, PushQueue { last, ..PushQueue::default() });
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
        let neighbors = self.membership.neighbors();
        self.replica.push_links.retain(neighbors);
        let stopped = &self.replica.push_links.stopped;
        let is_new_to = |to: &&NodeId| {
            (has_own || !stopped.contains(*to))
                && Some(**to) != only_source
                && !self.replica.is_gone(**to)
        };
        for &to in neighbors.iter().filter(is_new_to) {
            if let Some((address, bytes)) = self.replica.frame_to(to, Frame::Push(&payload)) {
                self.outbox.send_facts(to, address, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_neighbors_are_never_asked_to_stop_and_a_comparison_resumes_both_directions() {
        let neighbors: BTreeSet<NodeId> = (1..=8).map(|n| NodeId::from_bytes([n; 8])).collect();
        let mut links = PushLinks::default();
        let asked = neighbors.iter().filter(|node| links.asks_to_stop(**node, &neighbors)).count();
        assert_eq!(asked, neighbors.len() - MIN_SOURCES);
        let first = NodeId::from_bytes([1; 8]);
        assert!(!links.asks_to_stop(first, &neighbors), "once is enough");
        links.stop(first);
        links.resume(first);
        assert!(links.stopped.is_empty() && links.asks_to_stop(first, &neighbors));
        links.retain(&BTreeSet::new());
        assert!(links.asked.is_empty());
        assert!(!links.asks_to_stop(NodeId::from_bytes([9; 8]), &neighbors), "no neighbor");
    }
}
