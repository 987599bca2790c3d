//! Random loss of the small packets to a peer's pod, and of the answers.
//!
//! A link that loses every fifth packet lets every sort of packets pass sooner or later, but makes
//! connections of pods extremely slow. So each round counts some packets. A loss is reported once enough
//! packets show it: a loss of 5 % exceeds the thresholds by chance in less than one of a million rounds, a
//! loss of 20 % nearly always.

use std::collections::VecDeque;

use super::{super::TRIALS_UNTIL_VERDICT, Half};

/// Number of packets counted per round while no loss is suspected.
const SAMPLES: u16 = 10;
/// Number of packets counted per round while a loss is suspected or reported.
const SAMPLES_WHEN_SUSPECT: u16 = 30;
/// A loss is reported if, of the last packets (first number), at least this percentage (second number) is
/// lost.
const LOSS_THRESHOLDS: [(u32, u32); 2] = [(120, 18), (MIN_HISTORY, 15)];
/// Minimum number of packets that are stored, in whole rounds.
const MIN_HISTORY: u32 = 240;
/// Random loss occurs in nearly every round: the minimum percentage of rounds with a loss. Losses in a few
/// rounds only mean that the network was interrupted for a moment.
const MIN_LOSSY_ROUNDS_PERCENT: usize = 80;
/// Percentage below which a reported loss ends.
const END_PERCENT: u32 = 10;
/// Consecutive rounds without a loss after which a reported loss ends.
const CLEAN_ROUNDS: usize = 3;
/// A loss is suspected if, in the last rounds (first number), at least this percentage (second number) is
/// lost.
const SUSPICION_THRESHOLDS: [(usize, u32); 2] = [(1, 15), (3, 10)];
/// Maximum number of consecutive rounds at the short interval, for a loss between all thresholds.
const MAX_HURRIED_ROUNDS: u32 = 15;
/// A reported percentage is a multiple of this, so that the report does not change all the time.
const PERCENT_STEP: u32 = 5;

/// The losses of packets to one peer.
#[derive(Debug, Default)]
pub struct Losses {
    there: HalfLosses,
    back: HalfLosses,
    /// Consecutive rounds with a suspected loss.
    hurried: u32,
    /// Consecutive rounds without a result.
    unclear: u32,
}

/// The losses on one half of the path.
#[derive(Debug, Default)]
struct HalfLosses {
    /// Numbers of packets sent and lost per round; the newest round comes first.
    rounds: VecDeque<(u32, u32)>,
    /// The reported loss in percent.
    reported: Option<u32>,
}

impl Losses {
    /// Records a round: how many packets were sent, arrived and were answered.
    pub fn note(&mut self, sent: u16, came: u16, answered: u16) {
        // A packet may arrive twice, and an answered packet has arrived.
        let answered = answered.min(sent);
        let came = came.clamp(answered, sent);
        self.there.note(sent, came);
        self.back.note(came, answered);
        self.unclear = 0;
        let is_suspect = self.there.is_suspicious() || self.back.is_suspicious();
        self.hurried = if is_suspect { self.hurried.saturating_add(1) } else { 0 };
    }

    /// Records a round whose result is unknown.
    pub fn note_unclear(&mut self) {
        self.unclear += 1;
        if self.unclear >= TRIALS_UNTIL_VERDICT {
            *self = Self::default();
        }
    }

    /// Returns the number of packets to count in the next round.
    pub const fn samples(&self) -> u16 {
        if self.hurried > 0 || self.is_reported() { SAMPLES_WHEN_SUSPECT } else { SAMPLES }
    }

    /// Returns the reported loss in percent.
    pub const fn reported(&self, half: Half) -> Option<u32> {
        match half {
            Half::There => self.there.reported,
            Half::Back => self.back.reported,
        }
    }

    /// Returns whether the next round must follow soon.
    pub const fn is_suspect(&self) -> bool {
        self.hurried > 0 && self.hurried <= MAX_HURRIED_ROUNDS && !self.is_reported()
    }

    /// Returns whether the peer is tried before others.
    pub const fn has_priority(&self) -> bool {
        self.is_suspect() || self.is_reported()
    }

    /// Returns whether a loss is reported.
    pub const fn is_reported(&self) -> bool {
        self.there.reported.is_some() || self.back.reported.is_some()
    }
}

impl HalfLosses {
    fn note(&mut self, sent: u16, came: u16) {
        if sent == 0 {
            return;
        }
        self.rounds.push_front((sent.into(), (sent - came).into()));
        self.rounds.truncate(self.rounds_holding(MIN_HISTORY).unwrap_or(self.rounds.len()));
        let all = self.rounds.len();
        match self.reported {
            Some(_)
                if self.share(all) < END_PERCENT
                    || all >= CLEAN_ROUNDS && self.share(CLEAN_ROUNDS) == 0 =>
            {
                self.reported = None;
                self.rounds.truncate(CLEAN_ROUNDS);
            }
            Some(reported) => {
                let share = self.share(all);
                if share.abs_diff(reported) >= PERCENT_STEP {
                    self.reported = Some(rounded(share));
                }
            }
            None => {
                let proves_loss = |(packets, least)| {
                    let count = self.rounds_holding(packets)?;
                    let lossy = self.rounds.iter().take(count).filter(|(_, lost)| *lost > 0);
                    let is_spread = lossy.count() * 100 >= count * MIN_LOSSY_ROUNDS_PERCENT;
                    (is_spread && self.share(count) >= least).then_some(count)
                };
                if let Some(count) = LOSS_THRESHOLDS.into_iter().find_map(proves_loss) {
                    // Older rounds say nothing about the present state.
                    self.rounds.truncate(count);
                    self.reported = Some(rounded(self.share(count)));
                }
            }
        }
    }

    fn is_suspicious(&self) -> bool {
        SUSPICION_THRESHOLDS.into_iter().any(|(count, least)| self.share(count) >= least)
    }

    /// Returns how many of the last rounds hold this many packets; `None` if all rounds hold fewer.
    fn rounds_holding(&self, packets: u32) -> Option<usize> {
        let mut sum = 0;
        let last = self.rounds.iter().position(|(sent, _)| {
            sum += sent;
            sum >= packets
        });
        last.map(|last| last + 1)
    }

    /// Returns the percentage of lost packets in the last rounds.
    fn share(&self, count: usize) -> u32 {
        let rounds = self.rounds.iter().take(count);
        let (sent, lost) =
            rounds.fold((0, 0), |(sent, lost), round| (sent + round.0, lost + round.1));
        lost * 100 / sent.max(1)
    }
}

const fn rounded(share: u32) -> u32 {
    (share + PERCENT_STEP / 2) / PERCENT_STEP * PERCENT_STEP
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    /// Simulates rounds with random losses of `there` and `back` percent.
    fn rounds(losses: &mut Losses, count: usize, there: u32, back: u32, rng: &mut StdRng) {
        for _ in 0..count {
            let mut pass = |count: u16, lost: u32| {
                (0..count).filter(|_| rng.random_range(0..100) >= lost).count() as u16
            };
            let sent = losses.samples();
            let came = pass(sent, there);
            let answered = pass(came, back);
            losses.note(sent, came, answered);
        }
    }

    fn clean(losses: &mut Losses, count: usize) {
        (0..count).for_each(|_| losses.note(SAMPLES, SAMPLES, SAMPLES));
    }

    #[test]
    fn loss_of_five_percent_is_never_reported_and_of_twenty_nearly_always() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut reported_late = 0;
        for _ in 0..300 {
            let mut losses = Losses::default();
            for _ in 0..300 {
                rounds(&mut losses, 1, 5, 5, &mut rng);
                assert!(!losses.is_reported());
            }
            rounds(&mut losses, 12, 20, 5, &mut rng);
            reported_late += u32::from(losses.reported(Half::There).is_none());
            assert_eq!(losses.reported(Half::Back), None);
        }
        assert!(reported_late < 15, "{reported_late}");
    }

    #[test]
    fn loss_is_reported_with_its_direction_until_it_ends() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut losses = Losses::default();
        clean(&mut losses, 100);
        rounds(&mut losses, 20, 0, 50, &mut rng);
        assert_eq!(losses.reported(Half::There), None);
        let share = losses.reported(Half::Back).expect("a loss");
        assert!((40..=60).contains(&share) && share % PERCENT_STEP == 0, "{share}");
        assert!(!losses.is_suspect(), "it is reported");
        rounds(&mut losses, CLEAN_ROUNDS, 0, 0, &mut rng);
        assert!(!losses.is_reported());
        rounds(&mut losses, 10, 0, 5, &mut rng);
        assert!(!losses.is_reported(), "earlier rounds no longer count");
    }

    #[test]
    fn short_network_interruption_is_suspected_and_not_reported() {
        let mut losses = Losses::default();
        clean(&mut losses, 100);
        assert!(!losses.is_suspect());
        losses.note(SAMPLES, 0, 0);
        assert!(losses.is_suspect());
        assert_eq!(losses.samples(), SAMPLES_WHEN_SUSPECT);
        losses.note(SAMPLES_WHEN_SUSPECT, 0, 0);
        for _ in 0..10 {
            losses.note(SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT);
            assert!(!losses.is_reported());
        }
        assert!(!losses.is_suspect());
    }

    #[test]
    fn loss_between_thresholds_is_hurried_for_a_limited_time() {
        let mut losses = Losses::default();
        (0..MAX_HURRIED_ROUNDS).for_each(|_| {
            losses.note(SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT - 4, SAMPLES_WHEN_SUSPECT - 4)
        });
        assert!(losses.is_suspect());
        losses.note(SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT - 4, SAMPLES_WHEN_SUSPECT - 4);
        assert!(!losses.is_suspect() && !losses.is_reported());
    }

    #[test]
    fn loss_with_unclear_rounds_is_not_reported() {
        let mut losses = Losses::default();
        (0..20).for_each(|_| {
            losses.note(SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT, SAMPLES_WHEN_SUSPECT / 2)
        });
        (1..TRIALS_UNTIL_VERDICT).for_each(|_| losses.note_unclear());
        assert_eq!(losses.reported(Half::Back), Some(50));
        losses.note_unclear();
        assert!(!losses.is_reported());
    }

    #[test]
    fn duplicates_do_not_hide_losses_and_total_loss_has_no_answer_loss() {
        let mut losses = Losses::default();
        (0..20).for_each(|_| {
            losses.note(SAMPLES_WHEN_SUSPECT, 2 * SAMPLES_WHEN_SUSPECT, 3 * SAMPLES_WHEN_SUSPECT)
        });
        assert!(!losses.is_reported());
        (0..20).for_each(|_| losses.note(SAMPLES_WHEN_SUSPECT, 0, 0));
        assert_eq!((losses.reported(Half::There), losses.reported(Half::Back)), (Some(100), None));
    }
}
