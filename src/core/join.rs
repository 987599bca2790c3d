//! From non-member to member.
//!
//! A non-member asks its seeds, a few at a time, until one welcomes it; that answer holds the cluster, all
//! facts and usually a slot. What a member does that got none is in `lease`.

use std::time::Duration;

use crate::{
    model::{NodeId, Time},
    wire::{GrantWish, Hello, Key, Refusal, Request, Response, Welcome},
};

use super::{
    Answer, CallError, Home, Node, Output, Purpose, SlotTable, Stop, Target, lease::LeaseSearch,
};

/// The next seed is tried when the one before has not answered within this time.
const NEXT_SEED_AFTER: Duration = Duration::from_millis(100);
/// Pause after all seeds were tried: the first, and the longest it grows to.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A seed that is in no cluster yet itself is asked again this soon; the pause doubles up to the longest.
const NOT_READY_PAUSE: Duration = Duration::from_millis(20);
/// Greetings on their way at once.
const MAX_OPEN_HELLOS: usize = 4;

/// A non-member's search for somebody who lets it in.
pub(super) struct Joining {
    next_seed: usize,
    next_try: Time,
    pause: Duration,
    not_ready_pause: Duration,
    open: usize,
    /// The last word of each seed.
    said: Vec<Option<Word>>,
    pub(super) refusal: Option<Refusal>,
}

/// Why a seed did not let this node in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    NoAnswer(CallError),
    Refused(Refusal),
}

impl Word {
    /// Its address is this node's own.
    pub(super) const fn is_own(&self) -> bool {
        matches!(self, Self::NoAnswer(CallError::Myself))
    }

    /// Whether it will say so again however often it is asked.
    const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer(CallError::Rejected(_))
                | Self::Refused(Refusal::OtherCluster { .. } | Refusal::Settings(_))
        )
    }
}

impl std::fmt::Display for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoAnswer(error) => error.fmt(f),
            Self::Refused(refusal) => write!(f, "it refused: {refusal}"),
        }
    }
}

impl Joining {
    pub(super) fn new(now: Time, seeds: usize) -> Self {
        Self {
            next_seed: 0,
            next_try: now,
            pause: FIRST_PAUSE,
            not_ready_pause: NOT_READY_PAUSE,
            open: 0,
            said: vec![None; seeds],
            refusal: None,
        }
    }

    /// A seed that is none any more may still have answered.
    fn note(&mut self, seed: usize, word: Option<Word>) {
        if let Some(said) = self.said.get_mut(seed) {
            *said = word;
        }
    }

    /// The last words of seeds, for status.
    pub(super) fn words(&self) -> impl Iterator<Item = (usize, &Word)> {
        self.said.iter().enumerate().filter_map(|(seed, said)| Some((seed, said.as_ref()?)))
    }
}

impl Node {
    /// Seeds whose address is this node's own, as long as it looks for one that lets it in.
    pub fn own_seeds(&self) -> impl Iterator<Item = usize> + '_ {
        let words = self.joining.words().filter(|_| self.home.is_none());
        words.filter(|(_, word)| word.is_own()).map(|(seed, _)| seed)
    }

    /// The operator names other seeds: so many. What is under way to the old ones has no place among them:
    /// their answers are ignored.
    pub fn set_seeds(&mut self, now: Time, seeds: usize) {
        self.config.seeds = seeds;
        let to_a_seed = |purpose: &Purpose| match purpose {
            Purpose::Hello { .. } => true,
            Purpose::Compare { partner } | Purpose::Exchange { partner, .. } => {
                matches!(partner, Target::Seed(_))
            }
            _ => false,
        };
        self.calls.open.retain(|_, purpose| !to_a_seed(purpose));
        self.joining.open = 0;
        self.joining.said = vec![None; seeds];
        self.joining.next_seed = 0;
        self.joining.next_try = now;
        self.sync.set_seeds(seeds);
    }

    pub(super) fn next_join_step(&self) -> Option<Time> {
        let may_ask = self.home.is_none() && self.joining.open < MAX_OPEN_HELLOS;
        may_ask.then_some(self.joining.next_try)
    }

    /// Greets the next seed when it is its turn.
    pub(super) fn step_join(&mut self, now: Time) {
        let seeds = self.config.seeds;
        let joining = &mut self.joining;
        if self.home.is_some()
            || seeds == 0
            || now < joining.next_try
            || joining.open >= MAX_OPEN_HELLOS
        {
            return;
        }
        let seed = joining.next_seed;
        joining.open += 1;
        joining.next_seed = (seed + 1) % seeds;
        if joining.next_seed == 0 {
            let pause = joining.pause;
            joining.pause = (pause * 2).min(LONGEST_PAUSE);
            self.joining.next_try = now + self.jittered(pause);
        } else {
            joining.next_try = now + NEXT_SEED_AFTER;
        }
        let hello = Hello {
            member: self.me.clone(),
            identity: self.membership.identity(),
            settings: self.config.wish,
            grant: GrantWish { prefer: self.config.prefer_subnet },
        };
        self.call(Target::Seed(seed), Purpose::Hello { seed }, &Request::Hello(hello));
    }

    pub(super) fn on_hello_answer(&mut self, now: Time, seed: usize, answer: Answer) {
        self.joining.open = self.joining.open.saturating_sub(1);
        match answer {
            Ok((from, Response::Welcome(welcome))) => {
                self.sync.note_seed(seed, from);
                self.joining.note(seed, None);
                self.enter(now, from, *welcome);
            }
            Ok((from, Response::Refused(refusal))) => self.on_refusal(now, seed, from, refusal),
            Ok((from, _)) => self.note_malformed(from, &"no answer to a greeting"),
            Err(error) => self.on_no_welcome(now, seed, error),
        }
    }

    fn enter(&mut self, now: Time, from: NodeId, welcome: Welcome) {
        let Welcome { cluster, facts, returning, no_slot } = welcome;
        match &self.home {
            // A second seed answered too. What it granted is ours by the table and is given back.
            Some(home) if home.cluster.id == cluster.id => {
                self.learn(now, &facts, Some(from));
            }
            Some(_) => {
                self.note_foreign(from, cluster.id);
            }
            None => {
                tracing::info!(cluster = %cluster.id, members = facts.members.len(), "joined");
                let search = LeaseSearch::new(now, &cluster, &self.config);
                let slots = SlotTable::empty(cluster.settings.pool);
                self.home = Some(Home { cluster, slots, search });
                self.dirty.mark(Key::Cluster, true);
                self.directory.merge(&self.me);
                self.dirty.mark(Key::Member(self.me.node), false);
                // The seed passes on what is new; all the rest is old news to everybody else.
                facts.members.iter().for_each(|record| self.horizons.begin_with_member(record));
                facts.slots.iter().for_each(|run| self.horizons.begin_with_run(run));
                facts.forgets.iter().for_each(|forget| self.horizons.begin_with_forget(forget));
                self.absorb(now, &facts, Some(from));
                if returning {
                    self.doubt_memory();
                }
                self.compared(now, from, false);
                if let Some(home) = &mut self.home {
                    home.search.refusal = no_slot;
                }
            }
        }
    }

    fn on_refusal(&mut self, now: Time, seed: usize, from: NodeId, refusal: Refusal) {
        let joining = &mut self.joining;
        if joining.refusal.as_ref() != Some(&refusal) {
            tracing::warn!(peer = %from, %refusal, "a seed refused this node");
            joining.refusal = Some(refusal.clone());
        }
        joining.note(seed, Some(Word::Refused(refusal.clone())));
        match refusal {
            _ if self.home.is_some() => {}
            Refusal::OtherCluster { .. } | Refusal::Settings(_) => self.give_up_if_hopeless(seed),
            Refusal::Left | Refusal::Forgotten { .. } => self.on_expulsion(&refusal),
            Refusal::NotReady => {
                let pause = joining.not_ready_pause;
                joining.not_ready_pause = (pause * 2).min(LONGEST_PAUSE);
                joining.next_try = joining.next_try.min(now + pause);
            }
            _ => {}
        }
    }

    /// The cluster holds this node as gone: its state is from before, or it was written off.
    pub(super) fn on_expulsion(&mut self, refusal: &Refusal) {
        let successor = match refusal {
            _ if self.leaving.is_some() => return,
            Refusal::Forgotten { successor } => Some(*successor),
            Refusal::Left => None,
            _ => return,
        };
        self.outputs.push_back(Output::Stop(Stop::Expelled { successor }));
    }

    fn on_no_welcome(&mut self, now: Time, seed: usize, error: CallError) {
        tracing::debug!(seed, %error, "seed did not answer");
        if matches!(error, CallError::Myself) {
            self.sync.note_seed(seed, self.me.node);
        }
        self.joining.note(seed, Some(Word::NoAnswer(error)));
        self.give_up_if_hopeless(seed);
        if self.joining.next_seed != 0 {
            self.joining.next_try = now;
        }
    }

    /// Stops where every seed has refused this node for a reason that will not go away: one of them may be
    /// wrong while the others are right.
    fn give_up_if_hopeless(&mut self, seed: usize) {
        let said = &self.joining.said;
        let is_final = |word: &Option<Word>| word.as_ref().is_some_and(Word::is_final);
        if self.home.is_some() || said.is_empty() || !said.iter().all(is_final) {
            return;
        }
        let stop = match said.get(seed).and_then(Option::as_ref) {
            Some(Word::Refused(refusal)) => Stop::Refused(refusal.clone()),
            Some(Word::NoAnswer(error)) => Stop::Rejected { seed, why: error.to_string() },
            None => return,
        };
        self.outputs.push_back(Output::Stop(stop));
    }
}
