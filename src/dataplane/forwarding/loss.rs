//! How many of the small packets to a peer's pod, and of the answers, are lost by chance.
//!
//! A link that loses every fifth packet lets each sort of packets through in the end, and slows every
//! connection of pods to a crawl. In each round some packets are counted. What is lost is told once enough of
//! them have shown it: at a loss of 5 % the bounds are exceeded by chance in less than one of a million
//! rounds, and at 20 % nearly always.

use std::collections::VecDeque;

use super::{Half, VERDICT};

/// Packets that are counted in one round while all is well, and while some are lost.
const CALM: u16 = 10;
const CLOSE: u16 = 30;
/// The last so many packets tell a loss if so many percent of them are lost.
const VERDICTS: [(u32, u32); 2] = [(120, 18), (PACKETS, 15)];
/// Packets that are remembered, at least, in whole rounds.
const PACKETS: u32 = 240;
/// A loss by chance is seen in nearly every round: so many percent of them. One that is seen in few of them
/// was a moment without a network.
const SPREAD: usize = 80;
/// Below these percent a loss that was told is over, and also after so many rounds without one.
const OVER: u32 = 10;
const CLEAN: usize = 3;
/// So many percent in the last of so many rounds are looked at more closely.
const DOUBTS: [(usize, u32); 2] = [(1, 15), (3, 10)];
/// So many rounds in a row are hurried for that. A loss that is between all bounds is not looked at for ever.
const MAX_HURRIED: u32 = 15;
/// A share that is told is a multiple of this, so that what is said does not change all the time.
const STEP: u32 = 5;

/// Of the packets to one peer.
#[derive(Debug, Default)]
pub struct Losses {
    there: HalfLosses,
    back: HalfLosses,
    hurried: u32,
    /// Rounds in a row of which nothing is known.
    unclear: u32,
}

/// On one half of the way.
#[derive(Debug, Default)]
struct HalfLosses {
    /// Packets sent and lost in each round.
    rounds: VecDeque<(u32, u32)>,
    /// The share that is told, in percent.
    told: Option<u32>,
}

impl Losses {
    /// Takes note of a round: how many were sent, came, and were answered.
    pub fn note(&mut self, sent: u16, came: u16, answered: u16) {
        // A packet may come twice, and what was answered has come.
        let answered = answered.min(sent);
        let came = came.clamp(answered, sent);
        self.there.note(sent, came);
        self.back.note(came, answered);
        self.unclear = 0;
        let is_near = self.there.is_suspicious() || self.back.is_suspicious();
        self.hurried = if is_near { self.hurried.saturating_add(1) } else { 0 };
    }

    /// Takes note of a round of which it is not known what came of the packets.
    pub fn note_unclear(&mut self) {
        self.unclear += 1;
        if self.unclear >= VERDICT {
            *self = Self::default();
        }
    }

    /// Packets that are to be counted in the next round.
    pub const fn samples(&self) -> u16 {
        if self.hurried > 0 || self.is_told() { CLOSE } else { CALM }
    }

    /// Which share is lost, in percent.
    pub const fn told(&self, half: Half) -> Option<u32> {
        match half {
            Half::There => self.there.told,
            Half::Back => self.back.told,
        }
    }

    /// Whether the next round should come soon.
    pub const fn is_in_doubt(&self) -> bool {
        self.hurried > 0 && self.hurried <= MAX_HURRIED && !self.is_told()
    }

    /// Whether it is to be tried before others.
    pub const fn is_unsettled(&self) -> bool {
        self.is_in_doubt() || self.is_told()
    }

    pub const fn is_told(&self) -> bool {
        self.there.told.is_some() || self.back.told.is_some()
    }
}

impl HalfLosses {
    fn note(&mut self, sent: u16, came: u16) {
        if sent == 0 {
            return;
        }
        self.rounds.push_front((sent.into(), (sent - came).into()));
        self.rounds.truncate(self.rounds_of(PACKETS).unwrap_or(self.rounds.len()));
        let all = self.rounds.len();
        match self.told {
            Some(_) if self.share(all) < OVER || all >= CLEAN && self.share(CLEAN) == 0 => {
                self.told = None;
                self.rounds.truncate(CLEAN);
            }
            Some(told) => {
                let share = self.share(all);
                if share.abs_diff(told) >= STEP {
                    self.told = Some(rounded(share));
                }
            }
            None => {
                let proving = |(packets, least)| {
                    let count = self.rounds_of(packets)?;
                    let lossy = self.rounds.iter().take(count).filter(|(_, lost)| *lost > 0);
                    let is_spread = lossy.count() * 100 >= count * SPREAD;
                    (is_spread && self.share(count) >= least).then_some(count)
                };
                if let Some(count) = VERDICTS.into_iter().find_map(proving) {
                    // What was seen before says nothing about how it is now.
                    self.rounds.truncate(count);
                    self.told = Some(rounded(self.share(count)));
                }
            }
        }
    }

    fn is_suspicious(&self) -> bool {
        DOUBTS.into_iter().any(|(count, least)| self.share(count) >= least)
    }

    /// The last rounds with so many packets; none if there were fewer.
    fn rounds_of(&self, packets: u32) -> Option<usize> {
        let mut sum = 0;
        let last = self.rounds.iter().position(|(sent, _)| {
            sum += sent;
            sum >= packets
        });
        last.map(|last| last + 1)
    }

    /// Percent lost in the last rounds.
    fn share(&self, count: usize) -> u32 {
        let rounds = self.rounds.iter().take(count);
        let (sent, lost) =
            rounds.fold((0, 0), |(sent, lost), round| (sent + round.0, lost + round.1));
        lost * 100 / sent.max(1)
    }
}

const fn rounded(share: u32) -> u32 {
    (share + STEP / 2) / STEP * STEP
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    /// Rounds in which so many percent are lost by chance on one way or the other.
    fn rounds(losses: &mut Losses, count: usize, there: u32, back: u32, luck: &mut StdRng) {
        for _ in 0..count {
            let mut pass = |count: u16, lost: u32| {
                (0..count).filter(|_| luck.random_range(0..100) >= lost).count() as u16
            };
            let sent = losses.samples();
            let came = pass(sent, there);
            let answered = pass(came, back);
            losses.note(sent, came, answered);
        }
    }

    fn clean(losses: &mut Losses, count: usize) {
        (0..count).for_each(|_| losses.note(CALM, CALM, CALM));
    }

    #[test]
    fn five_percent_are_never_told_and_twenty_nearly_always_soon() {
        let mut luck = StdRng::seed_from_u64(1);
        let mut told_late = 0;
        for _ in 0..300 {
            let mut losses = Losses::default();
            for _ in 0..300 {
                rounds(&mut losses, 1, 5, 5, &mut luck);
                assert!(!losses.is_told());
            }
            rounds(&mut losses, 12, 20, 5, &mut luck);
            told_late += u32::from(losses.told(Half::There).is_none());
            assert_eq!(losses.told(Half::Back), None);
        }
        assert!(told_late < 15, "{told_late}");
    }

    #[test]
    fn the_share_that_is_lost_is_told_with_its_direction_until_it_is_over() {
        let mut luck = StdRng::seed_from_u64(2);
        let mut losses = Losses::default();
        clean(&mut losses, 100);
        rounds(&mut losses, 20, 0, 50, &mut luck);
        assert_eq!(losses.told(Half::There), None);
        let share = losses.told(Half::Back).expect("a loss");
        assert!((40..=60).contains(&share) && share % STEP == 0, "{share}");
        assert!(!losses.is_in_doubt(), "it is known");
        rounds(&mut losses, CLEAN, 0, 0, &mut luck);
        assert!(!losses.is_told());
        rounds(&mut losses, 10, 0, 5, &mut luck);
        assert!(!losses.is_told(), "what was before counts no more");
    }

    #[test]
    fn a_moment_without_a_network_is_looked_at_more_closely_and_not_told() {
        let mut losses = Losses::default();
        clean(&mut losses, 100);
        assert!(!losses.is_in_doubt());
        losses.note(CALM, 0, 0);
        assert!(losses.is_in_doubt());
        assert_eq!(losses.samples(), CLOSE);
        losses.note(CLOSE, 0, 0);
        for _ in 0..10 {
            losses.note(CLOSE, CLOSE, CLOSE);
            assert!(!losses.is_told());
        }
        assert!(!losses.is_in_doubt());
    }

    #[test]
    fn a_loss_between_the_bounds_is_not_hurried_for_ever() {
        let mut losses = Losses::default();
        (0..MAX_HURRIED).for_each(|_| losses.note(CLOSE, CLOSE - 4, CLOSE - 4));
        assert!(losses.is_in_doubt());
        losses.note(CLOSE, CLOSE - 4, CLOSE - 4);
        assert!(!losses.is_in_doubt() && !losses.is_told());
    }

    #[test]
    fn a_loss_of_which_nothing_is_known_any_more_is_not_told() {
        let mut losses = Losses::default();
        (0..20).for_each(|_| losses.note(CLOSE, CLOSE, CLOSE / 2));
        (1..VERDICT).for_each(|_| losses.note_unclear());
        assert_eq!(losses.told(Half::Back), Some(50));
        losses.note_unclear();
        assert!(!losses.is_told());
    }

    #[test]
    fn packets_that_come_twice_are_no_gain_and_none_that_came_is_no_answer_lost() {
        let mut losses = Losses::default();
        (0..20).for_each(|_| losses.note(CLOSE, 2 * CLOSE, 3 * CLOSE));
        assert!(!losses.is_told());
        (0..20).for_each(|_| losses.note(CLOSE, 0, 0));
        assert_eq!((losses.told(Half::There), losses.told(Half::Back)), (Some(100), None));
    }
}
