//! Whether checksums are left to the device, and what follows when that goes wrong.
//!
//! Some network cards and hypervisors send what is in a tunnel with checksums that were never filled in. Then
//! UDP and TCP are lost while ICMP gets through (flannel-io/flannel 1279, 2152). What lets the kernel fill
//! them in is turned off on our device by way of trial. A link that loses packets, or a machine that stood
//! still, looks the same for a while; so a verdict takes a trial and a counter-trial: off, and datagrams
//! arrive; on again, and they are lost again. Then it stays off, and is tried again later, for a machine may
//! be moved to another card. Pure; nothing here asks the kernel.

use std::{collections::BTreeSet, time::Duration};

use super::paths::Tally;
use crate::model::{NodeId, Time};

/// After a trial that changed nothing, and after a verdict; then twice as long each time, up to a day.
const TRY_AGAIN: Duration = Duration::from_secs(3_600);
const TRY_AGAIN_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Datagrams in a trial, of which one may be lost by chance where that helps.
const SAMPLE: u32 = 6;
const HELPED: u32 = SAMPLE - 1;
/// Datagrams that show that nothing has changed since a verdict.
const SAMPLE_AGAIN: u32 = 3;
/// A trial that has no result by then has none.
const TIMEOUT: Duration = Duration::from_secs(90);

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
    Off(Trial),
    /// On again, to see whether these peers, which were reached while it was off, cannot be reached now.
    On(Trial),
    /// Off, since both have been seen.
    Guilty { peers: BTreeSet<NodeId>, again: Time, pause: Duration },
    /// To be turned on, and left alone from then on.
    Innocent,
}

#[derive(Debug, PartialEq, Eq)]
struct Trial {
    peers: BTreeSet<NodeId>,
    begun: Time,
    /// The device is as it should be, and datagrams were asked for: so many to each.
    asked: Option<u32>,
    /// It had been found guilty so long before.
    verdict: Option<Duration>,
}

/// Datagrams that are to be sent and counted.
#[derive(Debug, PartialEq, Eq)]
pub struct Ask {
    pub peers: BTreeSet<NodeId>,
    pub count: u32,
}

impl Offload {
    /// How it should be on the device; none, if that is not our business.
    pub const fn wanted(&self) -> Option<bool> {
        match self.stage {
            Stage::Untouched => None,
            Stage::Off(_) | Stage::Guilty { .. } => Some(false),
            Stage::On(_) | Stage::Innocent => Some(true),
        }
    }

    /// That it destroys packets has been shown, and not disproved since.
    pub const fn is_guilty(&self) -> bool {
        matches!(self.stage, Stage::Guilty { .. } | Stage::On(Trial { verdict: Some(_), .. }))
    }

    /// Draws conclusions, to be called again and again: whether it is on now, as far as is known; peers that
    /// answer echoes and no datagrams; and what became of the datagrams that were last asked for, none for a
    /// peer that is gone. Gives the datagrams that are to be sent next.
    pub fn conclude(
        &mut self,
        now: Time,
        is_on: Option<bool>,
        deaf: BTreeSet<NodeId>,
        tally: impl Fn(NodeId) -> Option<Tally>,
    ) -> Option<Ask> {
        let wanted = self.wanted();
        match &mut self.stage {
            Stage::Untouched => {
                if !deaf.is_empty() && is_on == Some(true) && now >= self.not_before {
                    self.stage = Stage::Off(Trial::new(now, deaf, None));
                }
            }
            Stage::Innocent if is_on == Some(true) => self.stage = Stage::Untouched,
            Stage::Innocent => {}
            Stage::Guilty { peers, again, pause } => {
                if now >= *again {
                    let trial = Trial::new(now, std::mem::take(peers), Some(*pause));
                    self.stage = Stage::On(trial);
                }
            }
            Stage::Off(trial) | Stage::On(trial) if trial.asked.is_none() && is_on == wanted => {
                return Some(trial.ask());
            }
            Stage::Off(trial) => match trial.helped(&tally) {
                Some(helped) if !helped.is_empty() => {
                    self.stage = Stage::On(Trial::new(now, helped, None));
                }
                Some(_) => self.acquit(now),
                None if trial.is_over(now) => self.acquit(now),
                None => {}
            },
            Stage::On(trial) => match trial.failed_again(&tally) {
                Some(true) => self.condemn(now),
                Some(false) => self.acquit(now),
                None if trial.is_over(now) && trial.verdict.is_some() => self.condemn(now),
                None if trial.is_over(now) => self.acquit(now),
                None => {}
            },
        }
        None
    }

    fn acquit(&mut self, now: Time) {
        self.stage = Stage::Innocent;
        self.not_before = now + TRY_AGAIN;
    }

    fn condemn(&mut self, now: Time) {
        let Stage::On(Trial { peers, verdict, .. }) = &mut self.stage else { return };
        let pause = verdict.map_or(TRY_AGAIN, |before| (before * 2).min(TRY_AGAIN_MAX));
        self.stage = Stage::Guilty { peers: std::mem::take(peers), again: now + pause, pause };
    }
}

impl Trial {
    const fn new(begun: Time, peers: BTreeSet<NodeId>, verdict: Option<Duration>) -> Self {
        Self { peers, begun, asked: None, verdict }
    }

    fn ask(&mut self) -> Ask {
        let count = if self.verdict.is_some() { SAMPLE_AGAIN } else { SAMPLE };
        self.asked = Some(count);
        Ask { peers: self.peers.clone(), count }
    }

    fn is_over(&self, now: Time) -> bool {
        now.since(self.begun) >= TIMEOUT
    }

    /// The peers that datagrams reach now, as soon as that is clear for all.
    fn helped(&self, tally: impl Fn(NodeId) -> Option<Tally>) -> Option<BTreeSet<NodeId>> {
        let tallies = || self.peers.iter().filter_map(|peer| Some((*peer, tally(*peer)?)));
        let is_clear = |Tally { answered, lost }| Some(answered + lost) >= self.asked;
        let helped = || tallies().filter(|(_, tally)| tally.answered >= HELPED);
        (self.asked.is_some() && tallies().all(|(_, tally)| is_clear(tally)))
            .then(|| helped().map(|(peer, _)| peer).collect())
    }

    /// Whether all datagrams to all peers that are still there were lost, as soon as that is clear.
    fn failed_again(&self, tally: impl Fn(NodeId) -> Option<Tally>) -> Option<bool> {
        let asked = self.asked?;
        let tallies: Vec<Tally> = self.peers.iter().filter_map(|peer| tally(*peer)).collect();
        if tallies.is_empty() || tallies.iter().any(|tally| tally.answered > 0) {
            return Some(false);
        }
        tallies.iter().all(|tally| tally.lost >= asked).then_some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Tally = Tally { answered: 0, lost: 0 };
    const ALL: Tally = Tally { answered: SAMPLE, lost: 0 };
    const ALL_BUT_ONE: Tally = Tally { answered: SAMPLE - 1, lost: 1 };
    const SOME: Tally = Tally { answered: SAMPLE - 2, lost: 2 };
    const NONE: Tally = Tally { answered: 0, lost: SAMPLE };

    fn nodes(numbers: &[u8]) -> BTreeSet<NodeId> {
        numbers.iter().map(|number| NodeId::of_public_key(&[*number; 32])).collect()
    }

    /// A trial of two peers, with the device as it is wanted each time and these results one after another.
    /// A verdict takes a turn in which the device is made so.
    fn after(results: &[Tally]) -> Offload {
        let mut offload = Offload::default();
        assert_eq!(offload.wanted(), None);
        assert_eq!(offload.conclude(Time::ZERO, Some(true), nodes(&[1, 2]), |_| None), None);
        for result in results {
            let wanted = offload.wanted();
            let not_yet = offload.conclude(Time::ZERO, wanted.map(|on| !on), nodes(&[]), |_| None);
            assert_eq!(not_yet, None, "the device is still as it was");
            let ask = offload.conclude(Time::ZERO, wanted, nodes(&[]), |_| Some(NOTHING));
            assert_eq!(ask, Some(Ask { peers: nodes(&[1, 2]), count: SAMPLE }));
            let nothing = offload.conclude(Time::ZERO, wanted, nodes(&[]), |_| Some(NOTHING));
            assert_eq!((nothing, offload.wanted()), (None, wanted), "nothing is known yet");
            offload.conclude(Time::ZERO, wanted, nodes(&[]), |_| Some(*result));
        }
        offload
    }

    #[test]
    fn offload_that_fails_again_in_the_counter_trial_stays_off() {
        for helped in [ALL, ALL_BUT_ONE] {
            let offload = after(&[helped, NONE]);
            assert!(offload.is_guilty());
            assert_eq!(offload.wanted(), Some(false));
        }
    }

    #[test]
    fn offload_is_innocent_where_loss_looked_like_it() {
        for results in [&[SOME][..], &[NONE], &[ALL, SOME], &[ALL, ALL]] {
            let mut offload = after(results);
            assert_eq!((offload.wanted(), offload.is_guilty()), (Some(true), false));
            let deaf = || nodes(&[1]);
            offload.conclude(Time::ZERO, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), None, "the operator's business again");
            let soon = Time::ZERO + Duration::from_secs(600);
            offload.conclude(soon, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), None, "not so soon");
            offload.conclude(Time::ZERO + TRY_AGAIN, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), Some(false));
        }
    }

    #[test]
    fn guilty_offload_is_tried_again_ever_more_rarely_and_stays_on_once_it_works() {
        let mut offload = after(&[ALL, NONE]);
        let mut now = Time::ZERO;
        for pause in [TRY_AGAIN, TRY_AGAIN * 2] {
            now = now + pause;
            offload.conclude(now, Some(false), nodes(&[]), |_| Some(ALL));
            assert_eq!((offload.wanted(), offload.is_guilty()), (Some(true), true));
            let ask = offload.conclude(now, Some(true), nodes(&[]), |_| Some(ALL));
            assert_eq!(ask.map(|ask| ask.count), Some(SAMPLE_AGAIN));
            let lost = Tally { answered: 0, lost: SAMPLE_AGAIN };
            offload.conclude(now, Some(true), nodes(&[]), |_| Some(lost));
            assert_eq!((offload.wanted(), offload.is_guilty()), (Some(false), true));
            let soon = now + pause;
            offload.conclude(soon, Some(false), nodes(&[]), |_| None);
            assert_eq!(offload.wanted(), Some(false), "twice as long");
        }
        now = now + TRY_AGAIN * 4;
        offload.conclude(now, Some(false), nodes(&[]), |_| Some(ALL));
        offload.conclude(now, Some(true), nodes(&[]), |_| Some(ALL));
        offload.conclude(now, Some(true), nodes(&[]), |_| Some(Tally { answered: 1, lost: 1 }));
        assert_eq!((offload.wanted(), offload.is_guilty()), (Some(true), false));
    }

    #[test]
    fn a_trial_without_a_result_is_given_up() {
        let mut offload = after(&[]);
        offload.conclude(Time::ZERO, Some(false), nodes(&[]), |_| Some(NOTHING));
        offload.conclude(Time::ZERO + TIMEOUT, Some(false), nodes(&[]), |_| Some(NOTHING));
        assert_eq!(offload.wanted(), Some(true));
        let mut offload = after(&[ALL]);
        offload.conclude(Time::ZERO, Some(true), nodes(&[]), |_| None);
        offload.conclude(Time::ZERO, Some(true), nodes(&[]), |_| None);
        assert!(!offload.is_guilty(), "all peers are gone");
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
