//! The journal for operators: a bounded list of events, and samples of the last hour.
//!
//! Members, paths and problems are compared with an earlier snapshot, so code that changes them need not
//! report the change. The agent never reads the journal for its own decisions.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::broadcast;

use crate::{
    agent::{Agent, counted_line::CountedLine},
    api::{
        ApiError, ApiErrorCode, Event, EventFeed, EventKind, EventLevel, Member, MemberChange,
        MemberState, SAMPLE_INTERVAL, Sample,
    },
    model::{NodeId, PathState, Problem, ProblemKey, Severity},
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

/// What an event says.
pub(in crate::agent) struct Note {
    text: String,
    /// The member whose state changed.
    member: Option<MemberChange>,
}

impl From<String> for Note {
    fn from(text: String) -> Self {
        Self { text, member: None }
    }
}

/// The state at the last comparison.
#[derive(Default)]
struct Snapshot {
    /// Version of the members: desired state, hash of gossip's opinions, number of peers.
    members_version: Option<(u64, u64, usize)>,
    members: BTreeMap<NodeId, (String, MemberState)>,
    paths: BTreeMap<NodeId, PathState>,
    /// Problems and notices, with the time of their first record.
    problems: BTreeMap<ProblemKey, Problem>,
    converged: bool,
    /// Whether the node has converged since the start.
    has_converged: bool,
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
    pub(in crate::agent) fn note(
        &mut self,
        kind: EventKind,
        level: EventLevel,
        note: impl Into<Note>,
    ) {
        let Note { text, member } = note.into();
        self.number += 1;
        let (number, at, text) = (self.number, wall_clock().as_secs_f64(), visible(&text));
        let event = Event { number, at, kind, level, text, member };
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event.clone());
        // Fails only when there is no reader.
        let _ = self.live.send(event);
    }

    /// Adds an event for each note, up to [`MAX_SEPARATE_EVENTS`], and one for the rest.
    pub(super) fn note_all(
        &mut self,
        kind: EventKind,
        level: EventLevel,
        notes: Vec<impl Into<Note>>,
    ) {
        let more = notes.len().saturating_sub(MAX_SEPARATE_EVENTS);
        for note in notes.into_iter().take(MAX_SEPARATE_EVENTS) {
            self.note(kind, level, note);
        }
        if more > 0 {
            self.note(kind, level, format!("and {more} more of this kind at the same moment"));
        }
    }

    /// Returns the stored events, oldest first.
    pub(in crate::agent) fn past(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }

    /// Returns the events that are kept, oldest first.
    pub(super) fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// Whether the node had converged at one of the comparisons.
    pub(in crate::agent) const fn has_converged(&self) -> bool {
        self.snapshot.has_converged
    }

    /// Whether a problem or notice was recorded at the last comparison.
    pub(super) fn knows(&self, key: &ProblemKey) -> bool {
        self.snapshot.problems.contains_key(key)
    }

    /// Returns these problems with the time at which each was first recorded.
    pub(super) fn dated(&self, mut problems: Vec<Problem>) -> Vec<Problem> {
        for problem in &mut problems {
            let known = self.snapshot.problems.get(&problem.key());
            problem.since = known.map_or_else(|| Some(wall_clock().as_secs()), |known| known.since);
        }
        problems
    }

    /// Replaces the recorded problems and notices, and adds an event for each problem that began or ended.
    fn record_problems(&mut self, found: Vec<Problem>) {
        let now: BTreeMap<ProblemKey, Problem> =
            self.dated(found).into_iter().map(|problem| (problem.key(), problem)).collect();
        let before = std::mem::replace(&mut self.snapshot.problems, now);
        let only_in = |side: &BTreeMap<ProblemKey, Problem>,
                       other: &BTreeMap<ProblemKey, Problem>| {
            let is_problem = |problem: &Problem| problem.severity == Severity::Problem;
            let problems = side.iter().filter(|(_, problem)| is_problem(problem));
            let new = problems.filter(|(key, _)| !other.get(*key).is_some_and(is_problem));
            new.map(|(_, problem)| problem.clone()).collect::<Vec<_>>()
        };
        let begun = only_in(&self.snapshot.problems, &before);
        let ended = only_in(&before, &self.snapshot.problems);
        let begun = begun.iter().map(Problem::to_string).collect();
        let ended = ended.iter().map(|problem| format!("solved: {problem}")).collect();
        self.note_all(EventKind::Problem, EventLevel::Warn, begun);
        self.note_all(EventKind::Problem, EventLevel::Info, ended);
    }

    /// Returns the stored events and a receiver of new ones.
    ///
    /// # Errors
    /// Fails when there are too many readers.
    pub(in crate::agent) fn feed(&self) -> Result<EventFeed, ApiError> {
        if self.live.receiver_count() >= MAX_READERS {
            let why = format!("{MAX_READERS} readers of events already: end one of them");
            return Err(ApiError::new(ApiErrorCode::Busy, why));
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
        self.log_join(now);
        self.record_member_changes();
        self.record_path_changes();
        self.record_missed_preference();
        self.record_problem_changes();
        if self.journal.sample_at <= now {
            self.journal.sample_at = now + SAMPLE_INTERVAL;
            self.take_sample();
        }
    }

    /// Counts repairs of changes by another program, and adds an event.
    pub(in crate::agent) fn record_repair(&mut self, kind: &'static str, count: u64) {
        *self.kernel.counts.repairs.entry(kind.to_owned()).or_default() += count;
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
        let new = || CountedLine::new(REPAIR_LOG_INTERVAL);
        let line = self.kernel.counts.logged.entry(kind).or_insert_with(new);
        if let Some(count) = line.add(Instant::now(), count) {
            tracing::warn!(kind, count, "repaired changes by another program");
        }
    }

    /// Adds an event for each member whose state changed.
    fn record_member_changes(&mut self) {
        let version =
            (self.kernel.progress.requested, self.node.opinions_hash(), self.node.peers().count());
        if self.journal.snapshot.members_version.replace(version) == Some(version) {
            return;
        }
        let members = self.node.status().members;
        let members = members.into_iter().filter(|member| !member.me);
        let now: BTreeMap<_, _> = members
            .map(Member::from)
            .map(|member| (member.node, (member.name.clone(), member.state())))
            .collect();
        let before = std::mem::replace(&mut self.journal.snapshot.members, now);
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (node, (name, state)) in &self.journal.snapshot.members {
            let is_bad = matches!(state, MemberState::Suspect | MemberState::Down);
            let notes = if is_bad { &mut bad } else { &mut good };
            let before = before.get(node).map(|(_, state)| *state);
            let note = |text| {
                let member = MemberChange { node: *node, name: visible(name), state: *state };
                Note { text, member: Some(member) }
            };
            notes.extend(member_event(name, before, *state).map(note));
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
        self.journal.snapshot.has_converged |= converged;
        if converged != std::mem::replace(&mut self.journal.snapshot.converged, converged) {
            let subnet = self.kernel.wanted.view.as_ref().map(|view| view.own.subnets.first);
            let subnet = subnet.map(|subnet| subnet.to_string()).unwrap_or_default();
            let (level, text) = match converged {
                true => (EventLevel::Info, format!("converged, with {subnet}")),
                false => (EventLevel::Warn, "no longer converged".to_owned()),
            };
            self.journal.note(EventKind::Agent, level, text);
        }
        let paths = self.path_findings();
        let found = self.notices(&paths).into_iter().chain(self.problems(&paths)).collect();
        self.journal.record_problems(found);
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
            repairs: self.kernel.counts.repairs.values().sum(),
        };
        let samples = &mut self.journal.samples;
        if samples.len() >= MAX_SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }
}

/// Describes the change of a member's state, if it is an event. A member that was gone when this node learned
/// of it is none.
fn member_event(name: &str, before: Option<MemberState>, now: MemberState) -> Option<String> {
    match now {
        _ if before == Some(now) => None,
        MemberState::Unknown => None,
        MemberState::Forgotten | MemberState::Left if before.is_none() => None,
        MemberState::Forgotten => Some(format!("{name} was forgotten")),
        MemberState::Left => Some(format!("{name} has left")),
        now => Some(format!("{name} is {now}")),
    }
}

/// Returns the time since 1970. For operators only: no decision depends on it.
pub(super) fn wall_clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ProblemCode;

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
    fn member_that_was_gone_before_it_was_known_is_no_event() {
        for gone in [MemberState::Left, MemberState::Forgotten] {
            assert_eq!(member_event("n1", None, gone), None);
            assert_eq!(member_event("n1", Some(gone), gone), None);
        }
        let told = |before, now| member_event("n1", before, now);
        assert_eq!(told(None, MemberState::Alive).as_deref(), Some("n1 is alive"));
        let left = told(Some(MemberState::Alive), MemberState::Left);
        assert_eq!(left.as_deref(), Some("n1 has left"));
    }

    #[test]
    fn feed_too_many_readers_fails() {
        let journal = Journal::new(Instant::now());
        let feeds: Vec<_> = (0..MAX_READERS).map(|_| journal.feed().expect("a feed")).collect();
        assert!(journal.feed().is_err());
        drop(feeds);
        assert!(journal.feed().is_ok());
    }

    fn problem(subject: &str, what: &str) -> Problem {
        Problem::new(ProblemCode::PathLost, subject, what, "")
    }

    #[test]
    fn problems_are_told_by_code_and_subject() {
        let mut journal = Journal::new(Instant::now());
        let mut told = |found: &[Problem]| {
            let first = journal.number;
            journal.record_problems(found.to_vec());
            let new = journal.events.iter().filter(|event| event.number > first);
            new.map(|event| event.text.clone()).collect::<Vec<_>>()
        };
        assert_eq!(told(&[problem("n2", "n2: 7 of 12 ms")]), ["n2: 7 of 12 ms"]);
        assert_eq!(told(&[problem("n2", "n2: 8 of 1 ms")]), [""; 0], "only a measurement changed");
        // One problem begins in the second in which a similar one ends.
        assert_eq!(
            told(&[problem("n3", "n3: 8 of 1 ms")]),
            ["n3: 8 of 1 ms", "solved: n2: 8 of 1 ms"]
        );
        // A notice is no event, also if a problem becomes one.
        let notice = problem("n3", "n3: 8 of 1 ms").notice();
        assert_eq!(told(std::slice::from_ref(&notice)), ["solved: n3: 8 of 1 ms"]);
        assert_eq!(told(&[notice]), [""; 0]);
    }

    #[test]
    fn problem_keeps_the_time_of_its_first_record() {
        let mut journal = Journal::new(Instant::now());
        let earlier = Problem { since: Some(7), ..problem("n2", "n2 is blocked") };
        journal.snapshot.problems.insert(earlier.key(), earlier);
        let dated =
            journal.dated(vec![problem("n2", "n2 is dead"), problem("n3", "n3 is blocked")]);
        assert_eq!(dated[0].since, Some(7));
        assert!(dated[1].since.is_some_and(|since| since > 7));
    }
}
