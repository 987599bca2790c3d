//! The thread that owns the kernel: it makes it equal to the latest view, and says how that went.
//!
//! Netlink calls block, so they have a thread of their own. Only the newest goal counts: those that
//! piled up behind a slow kernel are skipped.

use std::{io, sync::mpsc, thread};

use crate::dataplane::{
    desired::Desired,
    kernel::{Kernel, KernelError, Report},
};

/// What to make the kernel equal to; the number tells the answers apart.
pub struct Goal {
    pub number: u64,
    pub state: State,
}

pub enum State {
    Overlay(Desired),
    /// No device of this name, and so no entry on it.
    Nothing(String),
}

/// How a goal was reached, or not.
#[derive(Debug)]
pub struct Outcome {
    pub number: u64,
    pub result: Result<Report, KernelError>,
}

pub struct Programmer {
    goals: Option<mpsc::Sender<Goal>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Programmer {
    pub fn start(
        mut kernel: Kernel,
        report: impl Fn(Outcome) + Send + 'static,
    ) -> io::Result<Self> {
        let (goals, queue) = mpsc::channel::<Goal>();
        let thread = thread::Builder::new().name("kernel".to_owned()).spawn(move || {
            while let Ok(first) = queue.recv() {
                let Goal { number, state } = queue.try_iter().last().unwrap_or(first);
                let result = match state {
                    State::Overlay(desired) => kernel.reconcile(&desired),
                    State::Nothing(device) => kernel.remove(&device).map(|_| Report::default()),
                };
                report(Outcome { number, result });
            }
        })?;
        Ok(Self { goals: Some(goals), thread: Some(thread) })
    }

    pub fn program(&self, goal: Goal) {
        if let Some(goals) = &self.goals {
            // The thread ends only when this sender is dropped.
            let _ = goals.send(goal);
        }
    }
}

/// Waits for the pass under way: afterwards nothing touches the kernel any more.
impl Drop for Programmer {
    fn drop(&mut self) {
        drop(self.goals.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
