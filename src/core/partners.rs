//! Results of comparisons by member. A member that does not answer is compared with ever more rarely; one
//! whose differences never resolve does not keep this node unsettled.

use std::{collections::BTreeMap, time::Duration};

use crate::model::{NodeId, Time};

/// Pause before a silent member is tried again; doubles from the first to the last.
const MIN_RETRY_PAUSE: Duration = Duration::from_secs(1);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(16);
/// Limit of successive fruitless comparisons with one member: its state differed, but it sent nothing new.
/// Beyond it, the member holds facts that cannot be exchanged, and its differences are ignored.
const MAX_FRUITLESS: u32 = 3;

/// Results of comparisons by member.
#[derive(Clone, Debug, Default)]
pub(super) struct Partners {
    silent: BTreeMap<NodeId, Silence>,
    /// The last partner, if it did not answer.
    last_silent: Option<NodeId>,
    /// Numbers of successive fruitless comparisons.
    fruitless: BTreeMap<NodeId, u32>,
}

/// The backoff of a member that does not answer.
#[derive(Clone, Copy, Debug)]
struct Silence {
    until: Time,
    pause: Duration,
}

impl Partners {
    /// Notes that a member did not answer, and doubles its pause.
    pub(super) fn note_silence(&mut self, now: Time, node: NodeId) {
        let before = self.silent.get(&node).map(|silence| silence.pause);
        let pause = before.map_or(MIN_RETRY_PAUSE, |pause| (pause * 2).min(MAX_RETRY_PAUSE));
        self.silent.insert(node, Silence { until: now + pause, pause });
        self.last_silent = Some(node);
    }

    /// Ends a member's pause, because it is up or has published a new record.
    pub(super) fn end_pause(&mut self, node: NodeId) {
        self.silent.remove(&node);
    }

    /// Notes a successful comparison.
    pub(super) fn note_answer(&mut self, node: NodeId) {
        self.end_pause(node);
        self.last_silent = None;
    }

    /// Returns whether a comparison with a member may start now. The last partner, if silent, is excluded
    /// unless it is the only member.
    pub(super) fn may_compare(&self, now: Time, node: NodeId, is_only: bool) -> bool {
        (is_only || self.last_silent != Some(node))
            && self.silent.get(&node).is_none_or(|silence| now >= silence.until)
    }

    pub(super) fn note_agreement(&mut self, node: NodeId) {
        self.fruitless.remove(&node);
    }

    /// Counts a comparison that found a difference. Returns whether too many in a row were fruitless, so that
    /// the difference says nothing about this node.
    pub(super) fn count_fruitless(&mut self, node: NodeId, has_news: bool) -> bool {
        if has_news {
            self.fruitless.remove(&node);
            return false;
        }
        let times = self.fruitless.entry(node).or_default();
        *times = times.saturating_add(1);
        *times > MAX_FRUITLESS
    }

    /// Returns whether the differences to a member never resolve.
    pub(super) fn is_irreconcilable(&self, node: NodeId) -> bool {
        self.fruitless.get(&node).is_some_and(|times| *times > MAX_FRUITLESS)
    }

    /// Returns the members whose differences never resolve.
    pub(super) fn irreconcilable(&self) -> impl Iterator<Item = NodeId> {
        self.fruitless.iter().filter(|(_, times)| **times > MAX_FRUITLESS).map(|(node, _)| *node)
    }

    /// Drops the results of nodes that are no members.
    pub(super) fn retain(&mut self, is_member: impl Fn(NodeId) -> bool) {
        self.silent.retain(|node, _| is_member(*node));
        self.fruitless.retain(|node, _| is_member(*node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_member_is_tried_more_rarely_and_at_once_when_it_is_up() {
        let node = |seed| NodeId::from_bytes([seed; 8]);
        let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
        let mut partners = Partners::default();
        partners.note_silence(at(0), node(1));
        assert!(!partners.may_compare(at(100), node(1), false), "it was the last partner");
        assert!(
            partners.may_compare(at(1), node(1), true)
                && !partners.may_compare(at(0), node(1), true)
        );
        partners.note_silence(at(1), node(2));
        assert!(
            partners.may_compare(at(1), node(1), false)
                && !partners.may_compare(at(1), node(2), false)
        );
        for (tried, pause) in [(1, 2), (10, 4), (20, 8), (30, 16), (50, 16)] {
            partners.note_silence(at(tried), node(1));
            assert!(!partners.may_compare(at(tried + pause - 1), node(1), true));
            assert!(partners.may_compare(at(tried + pause), node(1), true));
        }
        partners.end_pause(node(1));
        assert!(partners.may_compare(at(50), node(1), true));
        partners.note_answer(node(2));
        assert!(partners.may_compare(at(50), node(1), false));
    }

    #[test]
    fn member_is_irreconcilable_only_after_several_fruitless_comparisons() {
        let node = NodeId::from_bytes([1; 8]);
        let mut partners = Partners::default();
        for has_news in [false, false, true, false, false, false] {
            assert!(!partners.count_fruitless(node, has_news));
        }
        assert!(partners.count_fruitless(node, false));
        assert_eq!(partners.irreconcilable().collect::<Vec<_>>(), [node]);
        partners.note_agreement(node);
        assert_eq!(partners.irreconcilable().count(), 0);
    }
}
