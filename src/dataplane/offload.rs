//! Whether checksums are left to the device, and what follows when that goes wrong.
//!
//! Some network cards and hypervisors send what is in a tunnel with checksums that nobody has filled in. Then
//! UDP and TCP are lost while ICMP gets through (flannel-io/flannel 1279, 2152). What lets the kernel fill
//! them in is turned off on our device by way of trial: if datagrams arrive then, it stays off, and otherwise
//! it is turned on again, for something else drops them. Pure; nothing here asks the kernel.

use std::{collections::BTreeSet, time::Duration};

use crate::model::{NodeId, Time};

/// After a trial that changed nothing.
const TRY_AGAIN: Duration = Duration::from_secs(3_600);

/// What has been found out.
#[derive(Debug, Default)]
pub struct Offload {
    stage: Stage,
    not_before: Time,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Stage {
    /// As the kernel, or the operator, has it.
    #[default]
    Untouched,
    /// Off, to see whether these peers can be reached then.
    Trial(BTreeSet<NodeId>),
    /// Off for good: it helped.
    Guilty,
    /// On again.
    Innocent,
}

impl Offload {
    /// How it should be on the device; none, if that is not our business.
    pub const fn wanted(&self) -> Option<bool> {
        match self.stage {
            Stage::Untouched => None,
            Stage::Trial(_) | Stage::Guilty => Some(false),
            Stage::Innocent => Some(true),
        }
    }

    /// That it destroyed packets has been shown.
    pub fn is_guilty(&self) -> bool {
        self.stage == Stage::Guilty
    }

    /// Draws conclusions, to be called again and again: whether it is on now, as far as is known; peers that
    /// answer echoes and no datagrams; and what became of a peer's datagrams since it was asked anew, as soon
    /// as that is clear. Gives the peers that are to be asked anew.
    pub fn conclude(
        &mut self,
        now: Time,
        is_on: Option<bool>,
        deaf: BTreeSet<NodeId>,
        answers: impl Fn(NodeId) -> Option<bool>,
    ) -> Option<BTreeSet<NodeId>> {
        match &self.stage {
            Stage::Untouched | Stage::Innocent => {
                if deaf.is_empty() || is_on != Some(true) || now < self.not_before {
                    return None;
                }
                self.stage = Stage::Trial(deaf.clone());
                return Some(deaf);
            }
            Stage::Trial(peers) => {
                let results: Vec<Option<bool>> = peers.iter().map(|peer| answers(*peer)).collect();
                if results.contains(&Some(true)) {
                    self.stage = Stage::Guilty;
                } else if !results.contains(&None) {
                    self.stage = Stage::Innocent;
                    self.not_before = now + TRY_AGAIN;
                }
            }
            Stage::Guilty => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(numbers: &[u8]) -> BTreeSet<NodeId> {
        numbers.iter().map(|number| NodeId::of_public_key(&[*number; 32])).collect()
    }

    fn in_trial() -> Offload {
        let mut offload = Offload::default();
        let none = |_| None;
        assert_eq!(offload.conclude(Time::ZERO, Some(true), nodes(&[]), none), None);
        assert_eq!(offload.wanted(), None);
        let asked = offload.conclude(Time::ZERO, Some(true), nodes(&[1, 2]), none);
        assert_eq!((asked, offload.wanted()), (Some(nodes(&[1, 2])), Some(false)));
        assert_eq!(offload.conclude(Time::ZERO, Some(false), nodes(&[]), none), None);
        assert_eq!(offload.wanted(), Some(false), "nothing is known yet");
        offload
    }

    #[test]
    fn it_stays_off_where_that_helps() {
        let mut offload = in_trial();
        let first = nodes(&[1]).pop_first();
        let answers = |node| (Some(node) == first).then_some(true);
        offload.conclude(Time::ZERO, Some(false), nodes(&[]), answers);
        assert!(offload.is_guilty());
        assert_eq!(offload.wanted(), Some(false));
    }

    #[test]
    fn it_is_turned_on_again_where_that_changes_nothing_and_tried_rarely() {
        let mut offload = in_trial();
        let lost = |_| Some(false);
        offload.conclude(Time::ZERO, Some(false), nodes(&[1, 2]), lost);
        assert_eq!((offload.wanted(), offload.is_guilty()), (Some(true), false));
        let soon = Time::ZERO + Duration::from_secs(600);
        assert_eq!(offload.conclude(soon, Some(true), nodes(&[1]), lost), None);
        let later = Time::ZERO + TRY_AGAIN;
        assert!(offload.conclude(later, Some(true), nodes(&[1]), lost).is_some());
    }

    #[test]
    fn what_the_operator_has_turned_off_is_left_alone() {
        let mut offload = Offload::default();
        for is_on in [Some(false), None] {
            assert_eq!(offload.conclude(Time::ZERO, is_on, nodes(&[1]), |_| None), None);
            assert_eq!(offload.wanted(), None);
        }
    }
}
