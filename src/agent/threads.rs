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

use crate::{
    agent::{
        Agent, Ending, LoopEvent,
        diagnosis::{
            forwarder::{Forwarder, ForwarderEvent, Forwarding},
            pod_answers::{PodAnswerCheck, PodAnswers},
            remote_pods::{RemotePods, RemotePodsEvent, RemotePodsState},
            silence::SilenceDiagnosis,
        },
        workers::{attach_worker::AttachWorker, programmer::Programmer},
    },
    api::{CheckState, CheckStatus},
    model::{Problem, ProblemCode},
    worker::Thread,
};

/// Time between the end of a thread and its restart, so that a repeated panic uses little CPU.
const RESTART_DELAY: Duration = Duration::from_secs(20);

/// Monitoring threads, on which nothing else depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum MonitorThread {
    Forwarding,
    RemotePods,
    PodAnswers,
    Silence,
}

/// Threads that do not run, with the time of their end or of the last attempt to restart them.
#[derive(Debug, Default)]
struct Ended(BTreeMap<MonitorThread, Instant>);

/// What to do about a thread that does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    /// Discard its findings.
    Discard,
    /// Start it again.
    Restart,
}

impl Ended {
    /// Records whether a thread has ended, and returns what to do about it.
    fn on_check(
        &mut self,
        now: Instant,
        thread: MonitorThread,
        has_ended: bool,
    ) -> Option<Response> {
        if !has_ended {
            self.0.remove(&thread);
            return None;
        }
        match self.0.get_mut(&thread) {
            None => {
                self.0.insert(thread, now);
                Some(Response::Discard)
            }
            Some(at) if now.saturating_duration_since(*at) >= RESTART_DELAY => {
                *at = now;
                Some(Response::Restart)
            }
            Some(_) => None,
        }
    }

    /// Returns the problems, with their remedies.
    fn problems(&self) -> impl Iterator<Item = Problem> {
        let pause = RESTART_DELAY.as_secs();
        self.0.keys().map(move |thread| {
            let task = thread.task();
            Problem::new(
                ProblemCode::ThreadEnded,
                task,
                format!(
                    "a thread of this agent has ended because of a bug, so it is unknown {task}; it is \
                     restarted after {pause} s"
                ),
                "if the problem remains, report the thread's log lines",
            )
        })
    }
}

impl MonitorThread {
    const ALL: [Self; 4] = [Self::Forwarding, Self::RemotePods, Self::PodAnswers, Self::Silence];

    /// Returns what the thread determines.
    const fn task(self) -> &'static str {
        match self {
            Self::Forwarding => "whether this host forwards packets of pods",
            Self::RemotePods => "whether packets of pods reach pods of other hosts",
            Self::PodAnswers => "whether pods of this host answer",
            Self::Silence => "why peers are silent",
        }
    }
}

/// Sends events of the threads to the event loop.
pub(super) type Sender = mpsc::UnboundedSender<LoopEvent>;

/// The threads that work for the event loop, except those of the disk.
pub(super) struct Threads {
    /// Programs the kernel.
    pub(super) programmer: Programmer,
    /// Connects pods.
    pub(super) attach_worker: AttachWorker,
    /// Only observe.
    pub(super) monitors: Monitors,
}

/// The monitoring threads.
pub(super) struct Monitors {
    /// Tests whether this host forwards packets of pods.
    pub(super) forwarder: Forwarder,
    /// Tests whether pods of other hosts are reachable.
    pub(super) remote_pods: RemotePods,
    /// Checks whether the pods of this host answer.
    pub(super) answer_check: PodAnswerCheck,
    /// Determines why peers are silent.
    pub(super) silence_diagnosis: SilenceDiagnosis,
    ended: Ended,
    news: Sender,
}

impl Monitors {
    /// Starts all threads, which send their events to `news`.
    ///
    /// # Errors
    /// Fails if the system cannot create a thread.
    pub(super) fn start(news: Sender) -> io::Result<Self> {
        Ok(Self {
            forwarder: start_forwarder(news.clone())?,
            remote_pods: start_remote_pods(news.clone())?,
            answer_check: start_answer_check(news.clone())?,
            silence_diagnosis: start_silence_diagnosis(news.clone())?,
            ended: Ended::default(),
            news,
        })
    }

    /// Returns the problems about threads that do not run.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.ended.problems()
    }

    /// Ends all threads, and returns them to be awaited.
    pub(super) fn end(self) -> [Thread; 4] {
        [
            self.forwarder.end(),
            self.remote_pods.end(),
            self.answer_check.end(),
            self.silence_diagnosis.end(),
        ]
    }

    /// Returns the threads that need a response.
    fn check(&mut self, now: Instant) -> Vec<(MonitorThread, Response)> {
        let all = MonitorThread::ALL.into_iter();
        all.filter_map(|thread| {
            let has_ended = self.has_ended(thread);
            Some((thread, self.ended.on_check(now, thread, has_ended)?))
        })
        .collect()
    }

    fn has_ended(&self, thread: MonitorThread) -> bool {
        match thread {
            MonitorThread::Forwarding => self.forwarder.worker.has_ended(),
            MonitorThread::RemotePods => self.remote_pods.worker.has_ended(),
            MonitorThread::PodAnswers => self.answer_check.worker.has_ended(),
            MonitorThread::Silence => self.silence_diagnosis.worker.has_ended(),
        }
    }

    /// Starts a thread in place of one that has ended.
    fn restart(&mut self, thread: MonitorThread) -> io::Result<()> {
        let news = self.news.clone();
        match thread {
            MonitorThread::Forwarding => self.forwarder = start_forwarder(news)?,
            MonitorThread::RemotePods => {
                let mut started = start_remote_pods(news)?;
                started.set_namespace(self.remote_pods.namespace());
                self.remote_pods = started;
            }
            MonitorThread::PodAnswers => self.answer_check = start_answer_check(news)?,
            MonitorThread::Silence => self.silence_diagnosis = start_silence_diagnosis(news)?,
        }
        Ok(())
    }
}

fn start_forwarder(news: Sender) -> io::Result<Forwarder> {
    Forwarder::start(move |told| _ = news.send(LoopEvent::Forwarding(told)))
}

fn start_remote_pods(news: Sender) -> io::Result<RemotePods> {
    RemotePods::start(move |told| _ = news.send(LoopEvent::RemotePods(told)))
}

fn start_answer_check(news: Sender) -> io::Result<PodAnswerCheck> {
    PodAnswerCheck::start(move |state| _ = news.send(LoopEvent::PodAnswers(state)))
}

fn start_silence_diagnosis(news: Sender) -> io::Result<SilenceDiagnosis> {
    SilenceDiagnosis::start(move |findings| _ = news.send(LoopEvent::SilenceFindings(findings)))
}

impl Agent {
    /// Detects threads that have ended, and restarts the monitoring threads.
    pub(super) fn watch_threads(&mut self, now: Instant) {
        let essential = [
            ("kernel", self.threads.programmer.worker.has_ended()),
            ("pods", self.threads.attach_worker.worker.has_ended()),
            ("store", self.storage.writer.has_ended()),
            ("archive", self.storage.archive.worker.has_ended()),
        ];
        if let Some((name, _)) = essential.iter().find(|(_, has_ended)| *has_ended) {
            self.lifetime.ending.get_or_insert(Ending::Broken(format!(
                "the thread {name:?} has ended because of a bug, and the agent cannot work without it: start \
                 the agent again (the kernel keeps forwarding), and report the log"
            )));
        }
        for (thread, response) in self.threads.monitors.check(now) {
            match response {
                Response::Discard => {
                    tracing::error!(thread = ?thread, "thread ended");
                    self.discard_findings(thread);
                }
                Response::Restart => self.restart_monitor(thread),
            }
        }
    }

    /// Discards the last findings of a thread.
    fn discard_findings(&mut self, thread: MonitorThread) {
        match thread {
            MonitorThread::Forwarding => {
                let detail = "the thread that tries it has ended".to_owned();
                let status = CheckStatus { state: CheckState::Skipped, detail };
                let nothing = Forwarding { status, ..Forwarding::default() };
                self.on_forwarding(ForwarderEvent::PodNamespace(None));
                self.on_forwarding(ForwarderEvent::State(nothing));
            }
            MonitorThread::RemotePods => {
                self.on_remote_pods(RemotePodsEvent::State(RemotePodsState::default()))
            }
            MonitorThread::PodAnswers => self.on_answers(PodAnswers::default()),
            MonitorThread::Silence => self.threads.monitors.silence_diagnosis.forget(),
        }
    }

    fn restart_monitor(&mut self, thread: MonitorThread) {
        match self.threads.monitors.restart(thread) {
            Ok(()) => {
                tracing::info!(thread = ?thread, "thread started again");
                self.update_forwarder();
                self.update_remote_pods();
                self.update_roster();
                self.update_silence_diagnosis();
            }
            Err(error) => tracing::warn!(thread = ?thread, %error, "thread not started again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_thread_is_problem_until_it_runs_and_is_restarted_after_delay() {
        let (mut ended, begun) = (Ended::default(), Instant::now());
        let mut check =
            |after, has_ended| ended.on_check(begun + after, MonitorThread::Forwarding, has_ended);
        assert_eq!(check(Duration::ZERO, false), None);
        assert_eq!(check(RESTART_DELAY, true), Some(Response::Discard));
        assert_eq!(check(RESTART_DELAY + RESTART_DELAY / 2, true), None);
        assert_eq!(check(RESTART_DELAY * 2, true), Some(Response::Restart));
        // It could not be started, or ended immediately.
        assert_eq!(check(RESTART_DELAY * 2 + RESTART_DELAY / 2, true), None);
        assert_eq!(check(RESTART_DELAY * 3, true), Some(Response::Restart));
        assert_eq!(ended.problems().filter(|problem| problem.contains("forwards")).count(), 1);
        assert_eq!(
            ended.on_check(begun + RESTART_DELAY * 4, MonitorThread::Forwarding, false),
            None
        );
        assert_eq!(ended.problems().count(), 0);
    }
}
