//! The journal for operators: a bounded list of events, and samples of the last hour.
//!
//! Members, paths and problems are compared with an earlier snapshot, so code that changes them need not
//! report the change. The agent never reads the journal for its own decisions.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::broadcast;

use crate::{
    agent::Agent,
    api::{Event, EventFeed, EventKind, EventLevel, MemberState, SAMPLE_INTERVAL, Sample},
    model::{NodeId, PathState},
    wire::visible,
};

/// Limit of stored events.
const MAX_EVENTS: usize = 500;
/// Limit of events that wait for one slow reader; it misses further ones.
const LIVE_QUEUE_LEN: usize = 128;
/// Limit of concurrent readers.
const MAX_READERS: usize = 64;
/// Limit of simultaneous changes of one kind that become one event each; the rest become one event with their
/// number.
const MAX_SEPARATE_EVENTS: usize = 20;
/// Least time between two comparisons. A sleeping loop is woken for samples only.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Least time between two log lines about repairs of one kind.
const REPAIR_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Limit of stored samples: one hour at [`SAMPLE_INTERVAL`].
const MAX_SAMPLES: usize = 360;

/// Stored events and samples, and the snapshot that the next comparison uses.
pub(in crate::agent) struct Journal {
    events: VecDeque<Event>,
    /// Number of the last event.
    number: u64,
    /// Sends new events to the readers.
    live: broadcast::Sender<Event>,
    samples: VecDeque<Sample>,
    /// When to compare next.
    check_at: Instant,
    /// When to take the next sample.
    sample_at: Instant,
    snapshot: Snapshot,
}

/// The state at the last comparison.
#[derive(Default)]
struct Snapshot {
    /// Version of the members: desired state, hash of gossip's opinions, number of peers.
    members_version: Option<(u64, u64, usize)>,
    members: BTreeMap<NodeId, (String, MemberState)>,
    paths: BTreeMap<NodeId, PathState>,
    /// Problems by their text without numbers, so that a changed measurement is not a new problem.
    problems: BTreeMap<String, BTreeSet<String>>,
    converged: bool,
}

impl Journal {
    /// Returns an empty journal whose first comparison and sample are due now.
    pub(in crate::agent) fn new(now: Instant) -> Self {
        Self {
            events: VecDeque::new(),
            number: 0,
            live: broadcast::Sender::new(LIVE_QUEUE_LEN),
            samples: VecDeque::new(),
            check_at: now,
            sample_at: now,
            snapshot: Snapshot::default(),
        }
    }

    /// Returns when the loop has to wake for the next sample.
    pub(in crate::agent) const fn next(&self) -> Instant {
        self.sample_at
    }

    /// Adds an event.
    pub(in crate::agent) fn note(&mut self, kind: EventKind, level: EventLevel, text: String) {
        self.number += 1;
        let (number, at, text) = (self.number, wall_clock().as_secs_f64(), visible(&text));
        let event = Event { number, at, kind, level, text };
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event.clone());
        // Fails only when there is no reader.
        let _ = self.live.send(event);
    }

    /// Adds an event for each text, up to [`MAX_SEPARATE_EVENTS`], and one for the rest.
    pub(super) fn note_all(&mut self, kind: EventKind, level: EventLevel, texts: Vec<String>) {
        let more = texts.len().saturating_sub(MAX_SEPARATE_EVENTS);
        for text in texts.into_iter().take(MAX_SEPARATE_EVENTS) {
            self.note(kind, level, text);
        }
        if more > 0 {
            self.note(kind, level, format!("and {more} more of this kind at the same moment"));
        }
    }

    /// Returns the stored events, oldest first.
    pub(in crate::agent) fn past(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }

    /// Returns the stored events and a receiver of new ones.
    ///
    /// # Errors
    /// Fails when there are too many readers.
    pub(in crate::agent) fn feed(&self) -> Result<EventFeed, String> {
        if self.live.receiver_count() >= MAX_READERS {
            return Err(format!("{MAX_READERS} readers of events already: end one of them"));
        }
        Ok(EventFeed { past: self.past(), live: self.live.subscribe() })
    }

    /// Returns the stored samples, oldest first.
    pub(in crate::agent) fn samples(&self) -> Vec<Sample> {
        self.samples.iter().cloned().collect()
    }
}

impl Agent {
    /// Compares with the last snapshot and takes a sample, each if it is due.
    pub(in crate::agent) fn record_changes(&mut self, now: Instant) {
        // Otherwise a wake for a sample would repeat until the next comparison is due.
        if now < self.journal.check_at.min(self.journal.sample_at) {
            return;
        }
        self.journal.check_at = now + CHECK_INTERVAL;
        self.watch_threads(now);
        self.watch_isolation(now);
        self.record_member_changes();
        self.record_path_changes();
        self.record_problem_changes();
        if self.journal.sample_at <= now {
            self.journal.sample_at = now + SAMPLE_INTERVAL;
            self.take_sample();
        }
    }

    /// Counts repairs of changes by another program, and adds an event.
    pub(in crate::agent) fn record_repair(&mut self, kind: &'static str, count: u64) {
        *self.kernel.repairs.entry(kind).or_default() += count;
        let text = format!("repaired changes by another program: {count} x {kind}");
        self.journal.note(EventKind::Repair, EventLevel::Warn, text);
    }

    /// Counts repairs as [`Agent::record_repair`] does, and logs them: at most once per interval for each
    /// kind, with the number since the last line.
    pub(in crate::agent) fn record_and_log_repair(&mut self, kind: &'static str, count: u64) {
        if count == 0 {
            return;
        }
        self.record_repair(kind, count);
        let (logged_at, unlogged) = self.kernel.logged.entry(kind).or_default();
        *unlogged += count;
        if logged_at.is_none_or(|at| at.elapsed() >= REPAIR_LOG_INTERVAL) {
            tracing::warn!(kind, count = *unlogged, "repaired changes by another program");
            (*logged_at, *unlogged) = (Some(Instant::now()), 0);
        }
    }

    /// Adds an event for each member whose state changed.
    fn record_member_changes(&mut self) {
        let version = (self.kernel.requested, self.node.opinions_hash(), self.node.peers().count());
        if self.journal.snapshot.members_version.replace(version) == Some(version) {
            return;
        }
        let members = self.node.status().members;
        let members = members.iter().filter(|member| !member.me);
        let now: BTreeMap<_, _> = members
            .map(|member| (member.node, (member.name.to_string(), MemberState::of(member))))
            .collect();
        let before = std::mem::replace(&mut self.journal.snapshot.members, now);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (node, (name, state)) in &self.journal.snapshot.members {
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

    /// Adds an event for each path that became, or ceased to be, a problem.
    fn record_path_changes(&mut self) {
        let states = self.path_states();
        let now: BTreeMap<_, _> = states.map(|(node, state, _)| (node, state)).collect();
        if now == self.journal.snapshot.paths {
            return;
        }
        let before = std::mem::replace(&mut self.journal.snapshot.paths, now);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (node, state) in &self.journal.snapshot.paths {
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

    /// Adds an event for a change of convergence, and for each new or ended problem.
    fn record_problem_changes(&mut self) {
        let converged = self.is_converged();
        if converged != std::mem::replace(&mut self.journal.snapshot.converged, converged) {
            let subnet = self.kernel.wanted.as_ref().map(|view| view.own.subnets.first);
            let subnet = subnet.map(|subnet| subnet.to_string()).unwrap_or_default();
            let (level, text) = match converged {
                true => (EventLevel::Info, format!("converged, with {subnet}")),
                false => (EventLevel::Warn, "no longer converged".to_owned()),
            };
            self.journal.note(EventKind::Agent, level, text);
        }
        let mut now: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for text in self.problems() {
            now.entry(without_numbers(&text)).or_default().insert(text);
        }
        let before = std::mem::take(&mut self.journal.snapshot.problems);
        let new = added_texts(&now, &before);
        let ended =
            added_texts(&before, &now).iter().map(|text| format!("no longer so: {text}")).collect();
        self.journal.snapshot.problems = now;
        self.journal.note_all(EventKind::Problem, EventLevel::Warn, new);
        self.journal.note_all(EventKind::Problem, EventLevel::Info, ended);
    }

    /// Stores a sample of members, paths and repairs.
    fn take_sample(&mut self) {
        let mut spans: Vec<f64> = Vec::new();
        let (mut paths_ok, mut paths_bad) = (0, 0);
        for (_, state, round_trip) in self.path_states() {
            paths_ok += usize::from(state == PathState::Ok);
            paths_bad += usize::from(state.is_problem());
            let measured = round_trip.filter(|_| state == PathState::Ok);
            spans.extend(measured.map(|span| span.as_secs_f64() * 1000.0));
        }
        spans.sort_by(f64::total_cmp);
        let known = self.journal.snapshot.members.values();
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
        if samples.len() >= MAX_SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }
}

/// Returns the time since 1970. For operators only: no decision depends on it.
pub(super) fn wall_clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Returns the texts of `side` that `other` lacks, of each kind of which `side` has more texts.
fn added_texts(
    side: &BTreeMap<String, BTreeSet<String>>,
    other: &BTreeMap<String, BTreeSet<String>>,
) -> Vec<String> {
    let none = BTreeSet::new();
    let kinds = side.iter().map(|(kind, texts)| (texts, other.get(kind).unwrap_or(&none)));
    let more = kinds.filter(|(texts, others)| texts.len() > others.len());
    more.flat_map(|(texts, others)| texts.difference(others).cloned()).collect()
}

/// Returns a sentence without its measurements, which identifies its subject. Digits in names, addresses and
/// subnets stay.
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
    fn note_many_events_numbers_bounds_and_sends_them() {
        let mut journal = Journal::new(Instant::now());
        let mut feed = journal.feed().expect("a feed");
        assert!(feed.past.is_empty());
        let texts = (0..25).map(|n| format!("n{n} is alive")).collect();
        journal.note_all(EventKind::Member, EventLevel::Info, texts);
        let sent: Vec<String> =
            std::iter::from_fn(|| feed.live.try_recv().ok()).map(|event| event.text).collect();
        assert_eq!(sent.len(), MAX_SEPARATE_EVENTS + 1);
        assert_eq!(sent[MAX_SEPARATE_EVENTS], "and 5 more of this kind at the same moment");
        for number in 0..MAX_EVENTS {
            journal.note(EventKind::Pod, EventLevel::Info, number.to_string());
        }
        let past = journal.feed().expect("a feed").past;
        assert_eq!(past.len(), MAX_EVENTS);
        assert_eq!(past[MAX_EVENTS - 1].number, (MAX_EVENTS + MAX_SEPARATE_EVENTS + 1) as u64);
    }

    #[test]
    fn feed_too_many_readers_fails() {
        let journal = Journal::new(Instant::now());
        let feeds: Vec<_> = (0..MAX_READERS).map(|_| journal.feed().expect("a feed")).collect();
        assert!(journal.feed().is_err());
        drop(feeds);
        assert!(journal.feed().is_ok());
    }

    #[test]
    fn added_texts_changed_numbers_are_ignored_other_subjects_are_not() {
        let kinds = |texts: &[&str]| {
            let mut kinds: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for text in texts {
                kinds.entry(without_numbers(text)).or_default().insert((*text).to_owned());
            }
            kinds
        };
        let before = kinds(&["7 of 12.5 ms", "n2 is blocked"]);
        assert_eq!(added_texts(&kinds(&["8 of 1 ms", "n2 is blocked"]), &before), [""; 0]);
        let after = kinds(&["8 of 1 ms", "n2 is blocked", "n3 is blocked"]);
        assert_eq!(added_texts(&after, &before), ["n3 is blocked"]);
        assert_eq!(added_texts(&before, &after), [""; 0]);
        assert_eq!(added_texts(&before, &kinds(&["n2 is blocked"])), ["7 of 12.5 ms"]);
        // One problem begins in the second in which the other ends.
        let later = kinds(&["7 of 12.5 ms", "n3 is blocked"]);
        assert_eq!(added_texts(&later, &before), ["n3 is blocked"]);
        assert_eq!(added_texts(&before, &later), ["n2 is blocked"]);
        let [one, other] =
            ["10.42.1.0/24 is closed", "10.42.2.0/24 is closed"].map(without_numbers);
        assert_ne!(one, other);
    }
}
