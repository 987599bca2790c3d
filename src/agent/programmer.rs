//! The thread that owns the kernel: it makes it equal to the latest view, and says how that went.
//!
//! Netlink calls block, so they have a thread of their own. Only the newest wish counts: those that
//! piled up behind a slow kernel are skipped.

use std::{io, sync::mpsc, thread};

use crate::dataplane::{
    desired::Desired,
    kernel::{Kernel, KernelError, Report},
};

/// What to make the kernel equal to; the number tells the answers apart.
pub struct Wish {
    pub number: u64,
    pub desired: Desired,
}

/// How a wish went.
#[derive(Debug)]
pub struct Outcome {
    pub number: u64,
    pub result: Result<Report, KernelError>,
}

pub struct Programmer {
    wishes: mpsc::Sender<Wish>,
}

impl Programmer {
    pub fn start(
        mut kernel: Kernel,
        report: impl Fn(Outcome) + Send + 'static,
    ) -> io::Result<Self> {
        let (wishes, queue) = mpsc::channel::<Wish>();
        thread::Builder::new().name("kernel".to_owned()).spawn(move || {
            while let Ok(first) = queue.recv() {
                let Wish { number, desired } = queue.try_iter().last().unwrap_or(first);
                report(Outcome { number, result: kernel.reconcile(&desired) });
            }
        })?;
        Ok(Self { wishes })
    }

    pub fn program(&self, wish: Wish) {
        // The thread ends only when this sender is dropped.
        let _ = self.wishes.send(wish);
    }
}
