//! The threads that plug pods in and pull them out: the loop never waits for them.

use std::{collections::BTreeSet, io, sync::mpsc, thread};

use tokio::sync::oneshot::Sender;

use crate::{
    api::{PodError, PodStatus},
    model::{Attachment, Pod},
    pods::wiring::{Bridge, Connected, Wiring, WiringError},
};

/// What is to be done, and the number under which it is answered.
#[derive(Debug)]
pub enum Job {
    Connect {
        number: u64,
        bridge: Bridge,
        pod: Pod,
    },
    Disconnect {
        number: u64,
        attachment: Attachment,
    },
    /// Removes what an agent that ended in the middle has left.
    Sweep {
        bridge: String,
        keep: BTreeSet<String>,
    },
    /// Answered by the thread itself, for nothing follows from it.
    Check {
        pod: Pod,
        reply: Sender<Result<(), PodError>>,
    },
    /// The same.
    List {
        pods: Vec<PodStatus>,
        reply: Sender<Vec<PodStatus>>,
    },
}

/// How it went.
#[derive(Debug)]
pub enum Wired {
    Connected { number: u64, result: Result<Connected, WiringError> },
    Disconnected { number: u64, attachment: Attachment, result: io::Result<bool> },
}

pub struct Wirer {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Wirer {
    pub fn start(report: impl Fn(Wired) + Send + Sync + 'static) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let (wiring, reaper) = (Wiring::open()?, Wiring::open()?);
        let thread = thread::Builder::new().name("pods".to_owned()).spawn(move || {
            let (doomed, reaping) = mpsc::channel();
            thread::scope(|scope| {
                scope.spawn(|| reap(reaper, reaping, &report));
                work(wiring, queue, &doomed, &report);
                drop(doomed);
            });
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    pub fn ask(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread ends only when this sender is dropped.
            let _ = jobs.send(job);
        }
    }
}

/// Waits for what is under way.
impl Drop for Wirer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An interface that is to be removed, by its index: its name may be another's by then.
struct Doomed {
    number: u64,
    attachment: Attachment,
    index: u32,
}

fn work(
    mut wiring: Wiring,
    queue: mpsc::Receiver<Job>,
    doomed: &mpsc::Sender<Doomed>,
    report: &impl Fn(Wired),
) {
    for job in queue {
        match job {
            Job::Connect { number, bridge, pod } => {
                let result = wiring.connect(&bridge, &pod);
                report(Wired::Connected { number, result });
            }
            Job::Disconnect { number, attachment } => match wiring.index(&attachment) {
                // The other thread lives as long as this one.
                Ok(Some(index)) => _ = doomed.send(Doomed { number, attachment, index }),
                Ok(None) => report(Wired::Disconnected { number, attachment, result: Ok(false) }),
                Err(error) => {
                    report(Wired::Disconnected { number, attachment, result: Err(error) });
                }
            },
            Job::Sweep { bridge, keep } => match wiring.sweep(&bridge, &keep) {
                Ok(0) => {}
                Ok(count) => tracing::warn!(count, "removed interfaces of pods that nobody knows"),
                Err(error) => tracing::error!(%error, "interfaces of pods not looked at"),
            },
            Job::Check { pod, reply } => {
                let _ = reply.send(wiring.check(&pod).map_err(PodError::from));
            }
            Job::List { mut pods, reply } => {
                match wiring.links() {
                    Ok(links) => {
                        pods.iter_mut().for_each(|pod| pod.orphan = !links.contains(&pod.link));
                    }
                    Err(error) => tracing::warn!(%error, "links not listed"),
                }
                let _ = reply.send(pods);
            }
        }
    }
}

/// The kernel takes ten times as long to remove an interface as to make one: nobody waits behind that.
fn reap(mut wiring: Wiring, doomed: mpsc::Receiver<Doomed>, report: &impl Fn(Wired)) {
    for Doomed { number, attachment, index } in doomed {
        let result = wiring.delete(index);
        report(Wired::Disconnected { number, attachment, result });
    }
}
