//! Finds out whether the network card computes checksums of tunnel packets correctly, and turns checksum
//! offload of the VXLAN device off if not.
//!
//! Some network cards and hypervisors send the packets inside a tunnel with checksums that were never filled
//! in. UDP and TCP are then lost while ICMP arrives (flannel-io/flannel issues 1279 and 2152). A lossy link
//! or a suspended machine looks the same for a while, so the conclusion takes a trial and a counter-trial:
//! offload off, and datagrams arrive; offload on again, and they are lost again. Then it stays off. It is
//! tried again later, because a machine may be moved to another card. Pure.

use std::{collections::BTreeSet, time::Duration};

use super::paths::Tally;
use crate::model::{NodeId, Time};

/// Time to the next trial, after a trial without effect and after the first conclusion that offload is
/// broken. Doubles with each confirmation.
const RETRY_INTERVAL: Duration = Duration::from_secs(3_600);
/// Maximum time to the next trial.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(24 * 3_600);
/// Datagrams sent to each peer in a trial.
const TRIAL_DATAGRAMS: u32 = 6;
/// Answered datagrams from which on the trial counts as successful; one may be lost by chance.
const MIN_ANSWERED: u32 = TRIAL_DATAGRAMS - 1;
/// Datagrams sent to each peer to confirm an earlier conclusion.
const CONFIRM_DATAGRAMS: u32 = 3;
/// A trial without a result after this time is abandoned.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(90);

/// The state of the trials.
#[derive(Debug, Default)]
pub struct OffloadTrials {
    stage: Stage,
    not_before: Time,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Stage {
    /// No trial; offload is as the kernel or the operator set it.
    #[default]
    Untouched,
    /// Trial: offload is off, to see whether datagrams reach these peers.
    Off(Trial),
    /// Counter-trial: offload is on again, to see whether datagrams to the same peers are lost.
    On(Trial),
    /// Offload is broken and stays off; trial and counter-trial have shown it.
    Broken {
        /// The peers of the trial.
        peers: BTreeSet<NodeId>,
        /// When the counter-trial is repeated.
        again: Time,
        /// Time between the conclusion and `again`.
        pause: Duration,
    },
    /// Offload is not the cause: it is turned on and then left alone.
    NotTheCause,
}

#[derive(Debug, PartialEq, Eq)]
struct Trial {
    peers: BTreeSet<NodeId>,
    begun: Time,
    /// Number of datagrams requested per peer; `None` until the device is in the state of the trial.
    requested: Option<u32>,
    /// The retry interval of an earlier conclusion that offload is broken.
    earlier_interval: Option<Duration>,
}

/// Datagrams to send and count.
#[derive(Debug, PartialEq, Eq)]
pub struct DatagramRequest {
    /// The peers to send to.
    pub peers: BTreeSet<NodeId>,
    /// Number of datagrams per peer.
    pub count: u32,
}

impl OffloadTrials {
    /// Returns whether offload must be on; `None` leaves the device as it is.
    pub const fn wanted(&self) -> Option<bool> {
        match self.stage {
            Stage::Untouched => None,
            Stage::Off(_) | Stage::Broken { .. } => Some(false),
            Stage::On(_) | Stage::NotTheCause => Some(true),
        }
    }

    /// Returns whether offload is known to be broken, and not refuted since.
    pub const fn is_broken(&self) -> bool {
        matches!(
            self.stage,
            Stage::Broken { .. } | Stage::On(Trial { earlier_interval: Some(_), .. })
        )
    }

    /// Advances the trial; to be called periodically. Returns datagrams to send next.
    ///
    /// - `is_on`: whether offload is on now; `None` if unknown.
    /// - `deaf`: peers that answer echoes but no datagrams.
    /// - `tally`: the results of the datagrams requested last; `None` for a peer that is gone.
    pub fn advance(
        &mut self,
        now: Time,
        is_on: Option<bool>,
        deaf: BTreeSet<NodeId>,
        tally: impl Fn(NodeId) -> Option<Tally>,
    ) -> Option<DatagramRequest> {
        let wanted = self.wanted();
        match &mut self.stage {
            Stage::Untouched => {
                if !deaf.is_empty() && is_on == Some(true) && now >= self.not_before {
                    self.stage = Stage::Off(Trial::new(now, deaf, None));
                }
            }
            Stage::NotTheCause if is_on == Some(true) => self.stage = Stage::Untouched,
            Stage::NotTheCause => {}
            Stage::Broken { peers, again, pause } => {
                if now >= *again {
                    let trial = Trial::new(now, std::mem::take(peers), Some(*pause));
                    self.stage = Stage::On(trial);
                }
            }
            Stage::Off(trial) | Stage::On(trial)
                if trial.requested.is_none() && is_on == wanted =>
            {
                return Some(trial.request());
            }
            Stage::Off(trial) => match trial.reached_peers(&tally) {
                Some(reached_peers) if !reached_peers.is_empty() => {
                    self.stage = Stage::On(Trial::new(now, reached_peers, None));
                }
                Some(_) => self.conclude_not_the_cause(now),
                None if trial.is_over(now) => self.conclude_not_the_cause(now),
                None => {}
            },
            Stage::On(trial) => match trial.all_lost_again(&tally) {
                Some(true) => self.conclude_broken(now),
                Some(false) => self.conclude_not_the_cause(now),
                None if trial.is_over(now) && trial.earlier_interval.is_some() => {
                    self.conclude_broken(now)
                }
                None if trial.is_over(now) => self.conclude_not_the_cause(now),
                None => {}
            },
        }
        None
    }

    fn conclude_not_the_cause(&mut self, now: Time) {
        self.stage = Stage::NotTheCause;
        self.not_before = now + RETRY_INTERVAL;
    }

    fn conclude_broken(&mut self, now: Time) {
        let Stage::On(Trial { peers, earlier_interval, .. }) = &mut self.stage else { return };
        let pause =
            earlier_interval.map_or(RETRY_INTERVAL, |before| (before * 2).min(MAX_RETRY_INTERVAL));
        self.stage = Stage::Broken { peers: std::mem::take(peers), again: now + pause, pause };
    }
}

impl Trial {
    const fn new(begun: Time, peers: BTreeSet<NodeId>, earlier_interval: Option<Duration>) -> Self {
        Self { peers, begun, requested: None, earlier_interval }
    }

    fn request(&mut self) -> DatagramRequest {
        let count =
            if self.earlier_interval.is_some() { CONFIRM_DATAGRAMS } else { TRIAL_DATAGRAMS };
        self.requested = Some(count);
        DatagramRequest { peers: self.peers.clone(), count }
    }

    fn is_over(&self, now: Time) -> bool {
        now.since(self.begun) >= TRIAL_TIMEOUT
    }

    /// Returns the peers that datagrams reach now; `None` until all results are known.
    fn reached_peers(&self, tally: impl Fn(NodeId) -> Option<Tally>) -> Option<BTreeSet<NodeId>> {
        let tallies = || self.peers.iter().filter_map(|peer| Some((*peer, tally(*peer)?)));
        let is_clear = |Tally { answered, lost }| Some(answered + lost) >= self.requested;
        let reached_peers = || tallies().filter(|(_, tally)| tally.answered >= MIN_ANSWERED);
        (self.requested.is_some() && tallies().all(|(_, tally)| is_clear(tally)))
            .then(|| reached_peers().map(|(peer, _)| peer).collect())
    }

    /// Returns whether all datagrams to all remaining peers were lost; `None` until all results are known.
    fn all_lost_again(&self, tally: impl Fn(NodeId) -> Option<Tally>) -> Option<bool> {
        let requested = self.requested?;
        let tallies: Vec<Tally> = self.peers.iter().filter_map(|peer| tally(*peer)).collect();
        if tallies.is_empty() || tallies.iter().any(|tally| tally.answered > 0) {
            return Some(false);
        }
        tallies.iter().all(|tally| tally.lost >= requested).then_some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_RESULT: Tally = Tally { answered: 0, lost: 0 };
    const ALL_ANSWERED: Tally = Tally { answered: TRIAL_DATAGRAMS, lost: 0 };
    const ALL_BUT_ONE_ANSWERED: Tally = Tally { answered: TRIAL_DATAGRAMS - 1, lost: 1 };
    const FOUR_ANSWERED: Tally = Tally { answered: TRIAL_DATAGRAMS - 2, lost: 2 };
    const ALL_LOST: Tally = Tally { answered: 0, lost: TRIAL_DATAGRAMS };

    fn nodes(numbers: &[u8]) -> BTreeSet<NodeId> {
        numbers.iter().map(|number| NodeId::of_public_key(&[*number; 32])).collect()
    }

    /// Runs a trial with two peers. The device takes the wanted state, then each result applies in turn.
    fn after(results: &[Tally]) -> OffloadTrials {
        let mut offload = OffloadTrials::default();
        assert_eq!(offload.wanted(), None);
        assert_eq!(offload.advance(Time::ZERO, Some(true), nodes(&[1, 2]), |_| None), None);
        for result in results {
            let wanted = offload.wanted();
            let not_yet = offload.advance(Time::ZERO, wanted.map(|on| !on), nodes(&[]), |_| None);
            assert_eq!(not_yet, None, "the device has not changed yet");
            let request = offload.advance(Time::ZERO, wanted, nodes(&[]), |_| Some(NO_RESULT));
            assert_eq!(
                request,
                Some(DatagramRequest { peers: nodes(&[1, 2]), count: TRIAL_DATAGRAMS })
            );
            let nothing = offload.advance(Time::ZERO, wanted, nodes(&[]), |_| Some(NO_RESULT));
            assert_eq!((nothing, offload.wanted()), (None, wanted), "no results yet");
            offload.advance(Time::ZERO, wanted, nodes(&[]), |_| Some(*result));
        }
        offload
    }

    #[test]
    fn offload_that_fails_in_counter_trial_stays_off() {
        for reached_peers in [ALL_ANSWERED, ALL_BUT_ONE_ANSWERED] {
            let offload = after(&[reached_peers, ALL_LOST]);
            assert!(offload.is_broken());
            assert_eq!(offload.wanted(), Some(false));
        }
    }

    #[test]
    fn offload_is_not_the_cause_when_trials_disagree() {
        for results in [
            &[FOUR_ANSWERED][..],
            &[ALL_LOST],
            &[ALL_ANSWERED, FOUR_ANSWERED],
            &[ALL_ANSWERED, ALL_ANSWERED],
        ] {
            let mut offload = after(results);
            assert_eq!((offload.wanted(), offload.is_broken()), (Some(true), false));
            let deaf = || nodes(&[1]);
            offload.advance(Time::ZERO, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), None, "left to the operator");
            let soon = Time::ZERO + Duration::from_secs(600);
            offload.advance(soon, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), None, "too early");
            offload.advance(Time::ZERO + RETRY_INTERVAL, Some(true), deaf(), |_| None);
            assert_eq!(offload.wanted(), Some(false));
        }
    }

    #[test]
    fn broken_offload_is_retried_at_growing_intervals_and_stays_on_once_it_works() {
        let mut offload = after(&[ALL_ANSWERED, ALL_LOST]);
        let mut now = Time::ZERO;
        for pause in [RETRY_INTERVAL, RETRY_INTERVAL * 2] {
            now = now + pause;
            offload.advance(now, Some(false), nodes(&[]), |_| Some(ALL_ANSWERED));
            assert_eq!((offload.wanted(), offload.is_broken()), (Some(true), true));
            let request = offload.advance(now, Some(true), nodes(&[]), |_| Some(ALL_ANSWERED));
            assert_eq!(request.map(|request| request.count), Some(CONFIRM_DATAGRAMS));
            let lost = Tally { answered: 0, lost: CONFIRM_DATAGRAMS };
            offload.advance(now, Some(true), nodes(&[]), |_| Some(lost));
            assert_eq!((offload.wanted(), offload.is_broken()), (Some(false), true));
            let soon = now + pause;
            offload.advance(soon, Some(false), nodes(&[]), |_| None);
            assert_eq!(offload.wanted(), Some(false), "the interval has doubled");
        }
        now = now + RETRY_INTERVAL * 4;
        offload.advance(now, Some(false), nodes(&[]), |_| Some(ALL_ANSWERED));
        offload.advance(now, Some(true), nodes(&[]), |_| Some(ALL_ANSWERED));
        offload.advance(now, Some(true), nodes(&[]), |_| Some(Tally { answered: 1, lost: 1 }));
        assert_eq!((offload.wanted(), offload.is_broken()), (Some(true), false));
    }

    #[test]
    fn trial_without_a_result_is_abandoned() {
        let mut offload = after(&[]);
        offload.advance(Time::ZERO, Some(false), nodes(&[]), |_| Some(NO_RESULT));
        offload.advance(Time::ZERO + TRIAL_TIMEOUT, Some(false), nodes(&[]), |_| Some(NO_RESULT));
        assert_eq!(offload.wanted(), Some(true));
        let mut offload = after(&[ALL_ANSWERED]);
        offload.advance(Time::ZERO, Some(true), nodes(&[]), |_| None);
        offload.advance(Time::ZERO, Some(true), nodes(&[]), |_| None);
        assert!(!offload.is_broken(), "all peers are gone");
    }

    #[test]
    fn offload_turned_off_by_the_operator_is_left_alone() {
        let mut offload = OffloadTrials::default();
        for is_on in [Some(false), None] {
            assert_eq!(offload.advance(Time::ZERO, is_on, nodes(&[1]), |_| None), None);
            assert_eq!(offload.wanted(), None);
        }
    }
}
