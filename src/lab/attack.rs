//! The common part of attacks by non-members: their credentials, and the thread that runs the attack.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::{
    transport::{Credentials, NodeKey},
    wire::Secret,
};

/// Returns the credentials of a host without the cluster's secret.
///
/// # Errors
/// Fails if the credentials cannot be created.
pub(super) fn non_member() -> anyhow::Result<Credentials> {
    let key = NodeKey::from_seed([66; 32])?;
    Ok(Credentials::new(&[Secret::new(vec![66; 32])?], &key)?)
}

/// A thread that repeats something. It ends on drop.
pub(super) struct Attack {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread of an attack shares with its owner.
#[derive(Default)]
pub(super) struct Progress {
    is_stopped: AtomicBool,
    successes: AtomicU64,
}

impl Progress {
    /// Whether the thread has to end.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    /// Counts an attempt that has succeeded.
    pub(super) fn count(&self, has_succeeded: bool) {
        self.successes.fetch_add(u64::from(has_succeeded), Ordering::Relaxed);
    }
}

impl Attack {
    /// Starts the thread. It stays in the network namespace of the caller.
    ///
    /// # Errors
    /// Fails if the system starts no thread.
    pub(super) fn start(work: impl FnOnce(&Progress) + Send + 'static) -> io::Result<Self> {
        let progress = Arc::new(Progress::default());
        let of_thread = progress.clone();
        let thread = thread::Builder::new().spawn(move || work(&of_thread))?;
        Ok(Self { progress, thread: Some(thread) })
    }

    /// Returns the number of successful attempts so far.
    pub(super) fn successes(&self) -> u64 {
        self.progress.successes.load(Ordering::Relaxed)
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.progress.is_stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
