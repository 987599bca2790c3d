//! How comparisons with each member went: a member that does not answer is asked ever later, and one that
//! never agrees is left to itself.

use std::{collections::BTreeMap, time::Duration};

use crate::model::{NodeId, Time};

/// A member that did not answer is asked again after this, doubling from the first to the last.
const SILENT_FIRST: Duration = Duration::from_secs(1);
const SILENT_LAST: Duration = Duration::from_secs(16);
/// A member whose state differed so often in a row, and that had nothing to tell each time, holds what cannot
/// be taken over: that is its own problem.
const FRUITLESS: u32 = 3;

#[derive(Clone, Debug, Default)]
pub(super) struct Partners {
    silent: BTreeMap<NodeId, Silence>,
    /// The member that did not answer the last comparison.
    last_silent: Option<NodeId>,
    /// How often in a row a member's state differed and it had nothing to tell that was new.
    fruitless: BTreeMap<NodeId, u32>,
}

/// A member that does not answer.
#[derive(Clone, Copy, Debug)]
struct Silence {
    until: Time,
    pause: Duration,
}

impl Partners {
    /// A member does not answer: it is asked again ever later.
    pub(super) fn note_silence(&mut self, now: Time, node: NodeId) {
        let before = self.silent.get(&node).map(|silence| silence.pause);
        let pause = before.map_or(SILENT_FIRST, |pause| (pause * 2).min(SILENT_LAST));
        self.silent.insert(node, Silence { until: now + pause, pause });
        self.last_silent = Some(node);
    }

    /// A member is up again, or there is something new of it.
    pub(super) fn note_sound(&mut self, node: NodeId) {
        self.silent.remove(&node);
    }

    /// A member was compared with.
    pub(super) fn note_answer(&mut self, node: NodeId) {
        self.note_sound(node);
        self.last_silent = None;
    }

    /// Whether a member may be asked now: never the same silent one twice running, unless it is the only one.
    pub(super) fn may_ask(&self, now: Time, node: NodeId, is_only: bool) -> bool {
        (is_only || self.last_silent != Some(node))
            && self.silent.get(&node).is_none_or(|silence| now >= silence.until)
    }

    pub(super) fn note_agreement(&mut self, node: NodeId) {
        self.fruitless.remove(&node);
    }

    /// A member's state differed, and it had something to tell, or not. Says whether it was the latter too
    /// often: then comparisons with it say nothing of this node.
    pub(super) fn is_fruitless(&mut self, node: NodeId, has_told: bool) -> bool {
        if has_told {
            self.fruitless.remove(&node);
            return false;
        }
        let times = self.fruitless.entry(node).or_default();
        *times = times.saturating_add(1);
        *times > FRUITLESS
    }

    /// Members whose states differ whatever they are told.
    pub(super) fn odd(&self) -> impl Iterator<Item = NodeId> {
        self.fruitless.iter().filter(|(_, times)| **times > FRUITLESS).map(|(node, _)| *node)
    }

    /// Forgets those who are no members.
    pub(super) fn keep_only(&mut self, is_there: impl Fn(NodeId) -> bool) {
        self.silent.retain(|node, _| is_there(*node));
        self.fruitless.retain(|node, _| is_there(*node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_member_is_asked_ever_later_and_at_once_when_it_is_heard() {
        let node = |seed| NodeId::from_bytes([seed; 8]);
        let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
        let mut partners = Partners::default();
        partners.note_silence(at(0), node(1));
        assert!(!partners.may_ask(at(100), node(1), false), "it is the last one that was asked");
        assert!(partners.may_ask(at(1), node(1), true) && !partners.may_ask(at(0), node(1), true));
        partners.note_silence(at(1), node(2));
        assert!(
            partners.may_ask(at(1), node(1), false) && !partners.may_ask(at(1), node(2), false)
        );
        for (asked, pause) in [(1, 2), (10, 4), (20, 8), (30, 16), (50, 16)] {
            partners.note_silence(at(asked), node(1));
            assert!(!partners.may_ask(at(asked + pause - 1), node(1), true));
            assert!(partners.may_ask(at(asked + pause), node(1), true));
        }
        partners.note_sound(node(1));
        assert!(partners.may_ask(at(50), node(1), true));
        partners.note_answer(node(2));
        assert!(partners.may_ask(at(50), node(1), false));
    }

    #[test]
    fn member_is_odd_only_after_several_comparisons_without_any_news() {
        let node = NodeId::from_bytes([1; 8]);
        let mut partners = Partners::default();
        for has_told in [false, false, true, false, false, false] {
            assert!(!partners.is_fruitless(node, has_told));
        }
        assert!(partners.is_fruitless(node, false));
        assert_eq!(partners.odd().collect::<Vec<_>>(), [node]);
        partners.note_agreement(node);
        assert_eq!(partners.odd().count(), 0);
    }
}
