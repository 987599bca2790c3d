//! What happens at this node, for people: a bounded list of events, and samples of the last hour.
//!
//! Members, paths and problems are compared with how they were a moment ago, so nothing that changes them has
//! to think of telling. Nothing here is ever read by the agent itself.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::broadcast;

use super::Agent;
use crate::{
    api::{Event, EventFeed, EventKind, EventLevel, MemberState, SAMPLE_INTERVAL, Sample},
    model::{NodeId, PathState},
    wire::visible,
};

/// Events that are kept.
const KEPT: usize = 500;
/// Events that wait for a reader who is slow; it misses what is more.
const WAITING: usize = 128;
/// Readers at once.
const MAX_READERS: usize = 64;
/// Changes of one kind at one moment that are told one by one; of more only the number is told.
const ONE_BY_ONE: usize = 20;
/// Between two looks at most; a loop that sleeps is woken for a sample only.
const LOOK: Duration = Duration::from_secs(1);
/// Between two lines of the log about repairs of one kind.
const LOG_GAP: Duration = Duration::from_secs(10);
const SAMPLES: usize = 360;

pub(super) struct Journal {
    kept: VecDeque<Event>,
    number: u64,
    live: broadcast::Sender<Event>,
    samples: VecDeque<Sample>,
    look_at: Instant,
    sample_at: Instant,
    seen: Seen,
}

/// How things were when last looked at.
#[derive(Default)]
struct Seen {
    /// Changes whenever a member does.
    members_at: Option<(u64, u64, usize)>,
    members: BTreeMap<NodeId, (String, MemberState)>,
    paths: BTreeMap<NodeId, PathState>,
    /// By what stays the same while the numbers in them change.
    problems: BTreeMap<String, BTreeSet<String>>,
    converged: bool,
}

impl Journal {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            kept: VecDeque::new(),
            number: 0,
            live: broadcast::Sender::new(WAITING),
            samples: VecDeque::new(),
            look_at: now,
            sample_at: now,
            seen: Seen::default(),
        }
    }

    pub(super) const fn next(&self) -> Instant {
        self.sample_at
    }

    pub(super) fn note(&mut self, kind: EventKind, level: EventLevel, text: String) {
        self.number += 1;
        let (number, at, text) = (self.number, wall_clock().as_secs_f64(), visible(&text));
        let event = Event { number, at, kind, level, text };
        if self.kept.len() >= KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        // Nobody may be listening.
        let _ = self.live.send(event);
    }

    /// Tells each of these, or how many there are.
    pub(super) fn note_all(&mut self, kind: EventKind, level: EventLevel, texts: Vec<String>) {
        let more = texts.len().saturating_sub(ONE_BY_ONE);
        for text in texts.into_iter().take(ONE_BY_ONE) {
            self.note(kind, level, text);
        }
        if more > 0 {
            self.note(kind, level, format!("and {more} more of this kind at the same moment"));
        }
    }

    pub(super) fn past(&self) -> Vec<Event> {
        self.kept.iter().cloned().collect()
    }

    pub(super) fn feed(&self) -> Result<EventFeed, String> {
        if self.live.receiver_count() >= MAX_READERS {
            return Err(format!("{MAX_READERS} readers of events are enough: end one of them"));
        }
        Ok(EventFeed { past: self.past(), live: self.live.subscribe() })
    }

    pub(super) fn samples(&self) -> Vec<Sample> {
        self.samples.iter().cloned().collect()
    }
}

impl Agent {
    /// Looks at what has changed, if it is time to.
    pub(super) fn watch(&mut self, now: Instant) {
        // Woken for a sample, the loop must not turn until the next look is due.
        if now < self.journal.look_at.min(self.journal.sample_at) {
            return;
        }
        self.journal.look_at = now + LOOK;
        self.watch_threads(now);
        self.watch_company(now);
        self.watch_members();
        self.watch_paths();
        self.watch_problems();
        if self.journal.sample_at <= now {
            self.journal.sample_at = now + SAMPLE_INTERVAL;
            self.take_sample();
        }
    }

    /// What another program had changed is as it should be again.
    pub(super) fn count_repair(&mut self, kind: &'static str, count: u64) {
        *self.kernel.repairs.entry(kind).or_default() += count;
        let text = format!("put right what another program had changed: {count} x {kind}");
        self.journal.note(EventKind::Repair, EventLevel::Warn, text);
    }

    /// The same, and the log has it too: at most once in a while for each kind, with all that came between.
    pub(super) fn note_repair(&mut self, kind: &'static str, count: u64) {
        if count == 0 {
            return;
        }
        self.count_repair(kind, count);
        let (logged, since) = self.kernel.logged.entry(kind).or_default();
        *since += count;
        if logged.is_none_or(|at| at.elapsed() >= LOG_GAP) {
            tracing::warn!(kind, count = *since, "put right what another program had changed");
            (*logged, *since) = (Some(Instant::now()), 0);
        }
    }

    fn watch_members(&mut self) {
        let at = (self.kernel.requested, self.node.opinions_hash(), self.node.peers().count());
        if self.journal.seen.members_at.replace(at) == Some(at) {
            return;
        }
        let members = self.node.status().members;
        let members = members.iter().filter(|member| !member.me);
        let now: BTreeMap<_, _> = members
            .map(|member| (member.node, (member.name.to_string(), MemberState::of(member))))
            .collect();
        let before = std::mem::replace(&mut self.journal.seen.members, now);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (node, (name, state)) in &self.journal.seen.members {
            if before.get(node).is_some_and(|(_, before)| before == state) {
                continue;
            }
            let is_bad = matches!(state, MemberState::Suspect | MemberState::Down);
            let texts = if is_bad { &mut bad } else { &mut good };
            match state {
                MemberState::Unknown => {}
                MemberState::Forgotten => texts.push(format!("{name} was forgotten")),
                MemberState::Left => texts.push(format!("{name} has left")),
                state => texts.push(format!("{name} is {state}")),
            }
        }
        self.journal.note_all(EventKind::Member, EventLevel::Info, good);
        self.journal.note_all(EventKind::Member, EventLevel::Warn, bad);
    }

    fn watch_paths(&mut self) {
        let states = self.path_states();
        let now: BTreeMap<_, _> = states.map(|(node, state, _)| (node, state)).collect();
        if now == self.journal.seen.paths {
            return;
        }
        let before = std::mem::replace(&mut self.journal.seen.paths, now);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (node, state) in &self.journal.seen.paths {
            let was = before.get(node).copied().unwrap_or(PathState::Unknown);
            let name = self.node.name_of(*node);
            match (was.is_problem(), state.is_problem()) {
                _ if was == *state => {}
                (_, true) => bad.push(format!("packets to {name}: {}", state.text())),
                (true, false) if *state == PathState::Ok => {
                    good.push(format!("packets to {name} get through again"));
                }
                _ => {}
            }
        }
        self.journal.note_all(EventKind::Path, EventLevel::Info, good);
        self.journal.note_all(EventKind::Path, EventLevel::Warn, bad);
    }

    fn watch_problems(&mut self) {
        let converged = self.is_converged();
        if converged != std::mem::replace(&mut self.journal.seen.converged, converged) {
            let subnet = self.kernel.wanted.as_ref().map(|view| view.own.subnets.first);
            let subnet = subnet.map(|subnet| subnet.to_string()).unwrap_or_default();
            let (level, text) = match converged {
                true => (EventLevel::Info, format!("converged, with {subnet}")),
                false => (EventLevel::Warn, "not converged any more".to_owned()),
            };
            self.journal.note(EventKind::Agent, level, text);
        }
        let mut now: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for text in self.problems() {
            now.entry(without_numbers(&text)).or_default().insert(text);
        }
        let before = std::mem::take(&mut self.journal.seen.problems);
        let new = beyond(&now, &before);
        let over =
            beyond(&before, &now).iter().map(|text| format!("no longer so: {text}")).collect();
        self.journal.seen.problems = now;
        self.journal.note_all(EventKind::Problem, EventLevel::Warn, new);
        self.journal.note_all(EventKind::Problem, EventLevel::Info, over);
    }

    fn take_sample(&mut self) {
        let mut spans: Vec<f64> = Vec::new();
        let (mut paths_ok, mut paths_bad) = (0, 0);
        for (_, state, round_trip) in self.path_states() {
            paths_ok += usize::from(state == PathState::Ok);
            paths_bad += usize::from(state.is_problem());
            let answers = round_trip.filter(|_| state == PathState::Ok);
            spans.extend(answers.map(|span| span.as_secs_f64() * 1000.0));
        }
        spans.sort_by(f64::total_cmp);
        let known = self.journal.seen.members.values();
        let known = known.filter(|(_, state)| !state.is_gone());
        let alive = known.clone().filter(|(_, state)| *state == MemberState::Alive).count();
        let sample = Sample {
            at: wall_clock().as_secs(),
            members: 1 + known.count(),
            alive: 1 + alive,
            converged: self.is_converged(),
            round_trip_ms: spans.get(spans.len() / 2).copied(),
            worst_round_trip_ms: spans.last().copied(),
            paths_ok,
            paths_bad,
            repairs: self.kernel.repairs.values().sum(),
        };
        let samples = &mut self.journal.samples;
        if samples.len() >= SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }
}

/// Since 1970. For people only: nothing depends on it.
pub(super) fn wall_clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Sentences of one side where the other has fewer of their kind.
fn beyond(
    side: &BTreeMap<String, BTreeSet<String>>,
    other: &BTreeMap<String, BTreeSet<String>>,
) -> Vec<String> {
    let none = BTreeSet::new();
    let kinds = side.iter().map(|(kind, texts)| (texts, other.get(kind).unwrap_or(&none)));
    let more = kinds.filter(|(texts, others)| texts.len() > others.len());
    more.flat_map(|(texts, others)| texts.difference(others).cloned()).collect()
}

/// A sentence without its measurements: with others it is about the same thing. Digits in names, addresses
/// and subnets stay, for they say what it is about.
fn without_numbers(text: &str) -> String {
    let is_number = |word: &str| {
        let word = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        word.matches('.').count() <= 1 && word.chars().all(|c| c.is_ascii_digit() || c == '.')
    };
    let words = text.split(' ').filter(|word| word.is_empty() || !is_number(word));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_bounded_numbered_and_told_to_those_who_listen() {
        let mut journal = Journal::new(Instant::now());
        let mut feed = journal.feed().expect("a feed");
        assert!(feed.past.is_empty());
        let texts = (0..25).map(|n| format!("n{n} is alive")).collect();
        journal.note_all(EventKind::Member, EventLevel::Info, texts);
        let told: Vec<String> =
            std::iter::from_fn(|| feed.live.try_recv().ok()).map(|event| event.text).collect();
        assert_eq!(told.len(), ONE_BY_ONE + 1);
        assert_eq!(told[ONE_BY_ONE], "and 5 more of this kind at the same moment");
        for number in 0..KEPT {
            journal.note(EventKind::Pod, EventLevel::Info, number.to_string());
        }
        let past = journal.feed().expect("a feed").past;
        assert_eq!(past.len(), KEPT);
        assert_eq!(past[KEPT - 1].number, (KEPT + ONE_BY_ONE + 1) as u64);
    }

    #[test]
    fn readers_are_not_without_number() {
        let journal = Journal::new(Instant::now());
        let feeds: Vec<_> = (0..MAX_READERS).map(|_| journal.feed().expect("a feed")).collect();
        assert!(journal.feed().is_err());
        drop(feeds);
        assert!(journal.feed().is_ok());
    }

    #[test]
    fn a_sentence_is_the_same_with_other_numbers_and_another_beside_it_is_not() {
        let kinds = |texts: &[&str]| {
            let mut kinds: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for text in texts {
                kinds.entry(without_numbers(text)).or_default().insert((*text).to_owned());
            }
            kinds
        };
        let before = kinds(&["7 of 12.5 ms", "n2 is blocked"]);
        assert_eq!(beyond(&kinds(&["8 of 1 ms", "n2 is blocked"]), &before), [""; 0]);
        let after = kinds(&["8 of 1 ms", "n2 is blocked", "n3 is blocked"]);
        assert_eq!(beyond(&after, &before), ["n3 is blocked"]);
        assert_eq!(beyond(&before, &after), [""; 0]);
        assert_eq!(beyond(&before, &kinds(&["n2 is blocked"])), ["7 of 12.5 ms"]);
        // One begins in the second in which the other ends.
        let later = kinds(&["7 of 12.5 ms", "n3 is blocked"]);
        assert_eq!(beyond(&later, &before), ["n3 is blocked"]);
        assert_eq!(beyond(&before, &later), ["n2 is blocked"]);
        let [one, other] =
            ["10.42.1.0/24 is closed", "10.42.2.0/24 is closed"].map(without_numbers);
        assert_ne!(one, other);
    }
}
