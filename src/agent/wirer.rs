//! The thread that plugs pods in and pulls them out, one after the other: the loop never waits for it.

use std::{io, path::PathBuf, sync::mpsc, thread};

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
        netns: PathBuf,
    },
    Disconnect {
        number: u64,
        attachment: Attachment,
    },
    /// Answered by the thread itself, for nothing follows from it.
    Check {
        pod: Pod,
        reply: Sender<Result<bool, PodError>>,
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
    Disconnected { number: u64, result: io::Result<bool> },
}

pub struct Wirer {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Wirer {
    pub fn start(report: impl Fn(Wired) + Send + 'static) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let mut wiring = Wiring::open()?;
        let thread = thread::Builder::new().name("pods".to_owned()).spawn(move || {
            for job in queue {
                match job {
                    Job::Connect { number, bridge, pod, netns } => {
                        let result = wiring.connect(&bridge, &pod, &netns);
                        report(Wired::Connected { number, result });
                    }
                    Job::Disconnect { number, attachment } => {
                        let result = wiring.disconnect(&attachment);
                        report(Wired::Disconnected { number, result });
                    }
                    Job::Check { pod, reply } => {
                        let checked = wiring.check(&pod).map_err(PodError::from);
                        let _ = reply.send(checked.map(|()| true));
                    }
                    Job::List { mut pods, reply } => {
                        match wiring.links() {
                            Ok(links) => pods.iter_mut().for_each(|pod| {
                                pod.orphan = !links.contains(&pod.link);
                            }),
                            Err(error) => tracing::warn!(%error, "links not listed"),
                        }
                        let _ = reply.send(pods);
                    }
                }
            }
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
