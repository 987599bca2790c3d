//! Threads of the agent that have ended though nothing told them to: by a panic, or where the system gave
//! them no thread of their own.
//!
//! A thread that only watches is named as a problem and started again. Without one of the others the agent
//! does nothing of what it is for: it ends with an error, and the service manager starts it again. Packets
//! of pods pass meanwhile.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Agent, Ending, Far, Forwarder, LoopEvent, PodAnswerCheck, SilenceDiagnosis,
    far::{FarEvent, FarState},
    forwarder::{ForwarderNews, Forwarding},
    pod_answers::PodAnswers,
};
use crate::api::{CheckState, CheckStatus};

/// From the end of a thread to its next start: a panic that comes again takes little of a CPU.
const PAUSE: Duration = Duration::from_secs(20);

/// Threads that watch, and on which nothing else depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watcher {
    Forwarding,
    FarPods,
    PodAnswers,
    Silence,
}

/// Since when these do not run, or when they were last tried to be started.
#[derive(Debug, Default)]
pub(super) struct Ended(BTreeMap<Watcher, Instant>);

/// What is to be done about a thread that does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    /// What it found is not known any more.
    Forget,
    Revive,
}

impl Ended {
    fn on_look(&mut self, now: Instant, watcher: Watcher, has_ended: bool) -> Option<Measure> {
        if !has_ended {
            self.0.remove(&watcher);
            return None;
        }
        match self.0.get_mut(&watcher) {
            None => {
                self.0.insert(watcher, now);
                Some(Measure::Forget)
            }
            Some(at) if now.saturating_duration_since(*at) >= PAUSE => {
                *at = now;
                Some(Measure::Revive)
            }
            Some(_) => None,
        }
    }

    /// As sentences with what helps.
    pub(super) fn problems(&self) -> impl Iterator<Item = String> {
        let pause = PAUSE.as_secs();
        self.0.keys().map(move |watcher| {
            format!(
                "a thread of this agent has ended by an error in this program, so it is not known {}: it is \
                 started again after {pause} s; if this stays, report what the log says of the thread",
                watcher.task()
            )
        })
    }
}

impl Watcher {
    const ALL: [Self; 4] = [Self::Forwarding, Self::FarPods, Self::PodAnswers, Self::Silence];

    /// What it finds out.
    const fn task(self) -> &'static str {
        match self {
            Self::Forwarding => "whether this host forwards packets of pods",
            Self::FarPods => "whether packets of pods come to pods of other hosts",
            Self::PodAnswers => "whether pods of this host answer",
            Self::Silence => "why peers are silent",
        }
    }
}

/// What a thread tells goes to the loop.
pub(super) type Sender = mpsc::UnboundedSender<LoopEvent>;

pub(super) fn start_forwarder(news: Sender) -> io::Result<Forwarder> {
    Forwarder::start(move |told| _ = news.send(LoopEvent::Forwarding(told)))
}

pub(super) fn start_far(news: Sender) -> io::Result<Far> {
    Far::start(move |told| _ = news.send(LoopEvent::Far(told)))
}

pub(super) fn start_answer_check(news: Sender) -> io::Result<PodAnswerCheck> {
    PodAnswerCheck::start(move |state| _ = news.send(LoopEvent::PodAnswers(state)))
}

pub(super) fn start_silence_diagnosis(news: Sender) -> io::Result<SilenceDiagnosis> {
    SilenceDiagnosis::start(move |findings| _ = news.send(LoopEvent::SilenceFindings(findings)))
}

impl Agent {
    /// Looks for threads that have ended, and starts again what can be.
    pub(super) fn watch_threads(&mut self, now: Instant) {
        let needed = [
            ("kernel", self.programmer.worker.has_ended()),
            ("pods", self.wirer.worker.has_ended()),
            ("store", self.writer.has_ended()),
            ("archive", self.archive.worker.has_ended()),
        ];
        if let Some((name, _)) = needed.iter().find(|(_, has_ended)| *has_ended) {
            self.ending.get_or_insert(Ending::Broken(format!(
                "the thread {name:?} has ended by an error in this program, and without it the agent \
                 cannot work: start it again (packets of pods pass meanwhile), and report what the log says"
            )));
        }
        for watcher in Watcher::ALL {
            let has_ended = self.has_ended(watcher);
            match self.ended.on_look(now, watcher, has_ended) {
                Some(Measure::Forget) => {
                    tracing::error!(thread = ?watcher, "thread ended");
                    self.forget_findings(watcher);
                }
                Some(Measure::Revive) => self.revive(watcher),
                None => {}
            }
        }
    }

    fn has_ended(&self, watcher: Watcher) -> bool {
        match watcher {
            Watcher::Forwarding => self.forwarder.worker.has_ended(),
            Watcher::FarPods => self.far.worker.has_ended(),
            Watcher::PodAnswers => self.answer_check.worker.has_ended(),
            Watcher::Silence => self.silence_diagnosis.worker.has_ended(),
        }
    }

    /// What it told last is not known any more.
    fn forget_findings(&mut self, watcher: Watcher) {
        match watcher {
            Watcher::Forwarding => {
                let detail = "the thread that tries it has ended".to_owned();
                let status = CheckStatus { state: CheckState::Skipped, detail };
                let nothing = Forwarding { status, ..Forwarding::default() };
                self.on_forwarding(ForwarderNews::Room(None));
                self.on_forwarding(ForwarderNews::State(nothing));
            }
            Watcher::FarPods => self.on_far(FarEvent::State(FarState::default())),
            Watcher::PodAnswers => self.on_answers(PodAnswers::default()),
            Watcher::Silence => self.silence_diagnosis.forget(),
        }
    }

    fn revive(&mut self, watcher: Watcher) {
        let news = self.news.clone();
        let revived = match watcher {
            Watcher::Forwarding => start_forwarder(news).map(|started| self.forwarder = started),
            Watcher::FarPods => start_far(news).map(|mut started| {
                started.set_room(self.far.room());
                self.far = started;
            }),
            Watcher::PodAnswers => {
                start_answer_check(news).map(|started| self.answer_check = started)
            }
            Watcher::Silence => {
                start_silence_diagnosis(news).map(|started| self.silence_diagnosis = started)
            }
        };
        match revived {
            Ok(()) => {
                tracing::info!(thread = ?watcher, "thread started again");
                self.update_forwarder();
                self.update_far();
                self.update_roster();
                self.update_silence_diagnosis();
            }
            Err(error) => tracing::warn!(thread = ?watcher, %error, "thread not started again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_that_ended_is_a_problem_until_it_runs_again_and_is_revived_after_a_pause() {
        let (mut ended, begun) = (Ended::default(), Instant::now());
        let mut look =
            |after, has_ended| ended.on_look(begun + after, Watcher::Forwarding, has_ended);
        assert_eq!(look(Duration::ZERO, false), None);
        assert_eq!(look(PAUSE, true), Some(Measure::Forget));
        assert_eq!(look(PAUSE + PAUSE / 2, true), None);
        assert_eq!(look(PAUSE * 2, true), Some(Measure::Revive));
        // It could not be started, or has ended at once.
        assert_eq!(look(PAUSE * 2 + PAUSE / 2, true), None);
        assert_eq!(look(PAUSE * 3, true), Some(Measure::Revive));
        assert_eq!(ended.problems().filter(|problem| problem.contains("forwards")).count(), 1);
        assert_eq!(ended.on_look(begun + PAUSE * 4, Watcher::Forwarding, false), None);
        assert_eq!(ended.problems().count(), 0);
    }
}
