//! Detects threads of the agent that ended unexpectedly: by a panic, or because the system could not
//! create them.
//!
//! A monitoring thread is reported as a problem and restarted. If an essential thread has ended, the
//! agent ends with an error, and the service manager restarts it. Packets of pods are forwarded
//! meanwhile.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    Agent, Asking, Ending, Far, Forwarder, Inquest, LoopEvent,
    answers::Answers,
    far::{FarEvent, FarState},
    forwarder::{ForwarderNews, Forwarding},
};
use crate::api::{CheckState, CheckStatus};

/// Time between the end of a thread and its restart, so that a repeated panic uses little CPU.
const PAUSE: Duration = Duration::from_secs(20);

/// Monitoring threads, on which nothing else depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watcher {
    Forwarding,
    FarPods,
    Answers,
    Inquest,
}

/// Threads that do not run, with the time of their end or of the last attempt to restart them.
#[derive(Debug, Default)]
pub(super) struct Ended(BTreeMap<Watcher, Instant>);

/// What to do about a thread that does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    /// Discard its findings.
    Forget,
    /// Start it again.
    Revive,
}

impl Ended {
    /// Records whether a thread has ended, and returns what to do about it.
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

    /// Returns the problems, with their remedies.
    pub(super) fn problems(&self) -> impl Iterator<Item = String> {
        let pause = PAUSE.as_secs();
        self.0.keys().map(move |watcher| {
            format!(
                "a thread of this agent has ended because of a bug, so it is unknown {}: it is \
                 restarted after {pause} s; if the problem remains, report the thread's log lines",
                watcher.task()
            )
        })
    }
}

impl Watcher {
    const ALL: [Self; 4] = [Self::Forwarding, Self::FarPods, Self::Answers, Self::Inquest];

    /// Returns what the thread determines.
    const fn task(self) -> &'static str {
        match self {
            Self::Forwarding => "whether this host forwards packets of pods",
            Self::FarPods => "whether packets of pods come to pods of other hosts",
            Self::Answers => "whether pods of this host answer",
            Self::Inquest => "why peers are silent",
        }
    }
}

/// Sends events of the threads to the event loop.
pub(super) type Sender = mpsc::UnboundedSender<LoopEvent>;

/// Starts the forwarder thread.
pub(super) fn start_forwarder(news: Sender) -> io::Result<Forwarder> {
    Forwarder::start(move |told| _ = news.send(LoopEvent::Forwarding(told)))
}

/// Starts the thread that tests paths to pods of other hosts.
pub(super) fn start_far(news: Sender) -> io::Result<Far> {
    Far::start(move |told| _ = news.send(LoopEvent::Far(told)))
}

/// Starts the thread that checks whether pods answer.
pub(super) fn start_asking(news: Sender) -> io::Result<Asking> {
    Asking::start(move |state| _ = news.send(LoopEvent::Answers(state)))
}

/// Starts the thread that investigates silent peers.
pub(super) fn start_inquest(news: Sender) -> io::Result<Inquest> {
    Inquest::start(move |found| _ = news.send(LoopEvent::Found(found)))
}

impl Agent {
    /// Detects threads that have ended, and restarts the monitoring threads.
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
            Watcher::Answers => self.asking.worker.has_ended(),
            Watcher::Inquest => self.inquest.worker.has_ended(),
        }
    }

    /// Discards the last findings of a thread.
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
            Watcher::Answers => self.on_answers(Answers::default()),
            Watcher::Inquest => self.inquest.forget(),
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
            Watcher::Answers => start_asking(news).map(|started| self.asking = started),
            Watcher::Inquest => start_inquest(news).map(|started| self.inquest = started),
        };
        match revived {
            Ok(()) => {
                tracing::info!(thread = ?watcher, "thread started again");
                self.update_forwarder();
                self.update_far();
                self.update_roster();
                self.update_inquest();
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
        // It could not be started, or ended immediately.
        assert_eq!(look(PAUSE * 2 + PAUSE / 2, true), None);
        assert_eq!(look(PAUSE * 3, true), Some(Measure::Revive));
        assert_eq!(ended.problems().filter(|problem| problem.contains("forwards")).count(), 1);
        assert_eq!(ended.on_look(begun + PAUSE * 4, Watcher::Forwarding, false), None);
        assert_eq!(ended.problems().count(), 0);
    }
}
