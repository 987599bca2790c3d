//! The signals that an agent follows. They are caught from its first step on: the first process of a
//! container has no other handling of them.

use std::{io, process, thread, time::Duration};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::api::block_on;

/// An agent that has been told to end has ended after so long, whatever hangs.
pub const TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Signals {
    pub(super) terminate: Signal,
    pub(super) interrupt: Signal,
    pub(super) hangup: Signal,
}

impl Signals {
    /// # Errors
    /// A handler cannot be installed.
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Returns when the agent is to end.
    pub(super) async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Ends this process where the agent does not: [`TIMEOUT`] after the first signal to end, and at once at the
/// second. It has a thread of its own, so it does not depend on anything that may hang.
///
/// # Errors
/// The system gives no thread.
pub fn guard() -> io::Result<()> {
    let watch = || {
        let waited = block_on(async {
            let mut signals = Signals::catch()?;
            signals.end().await;
            let is_again = tokio::time::timeout(TIMEOUT, signals.end()).await.is_ok();
            io::Result::Ok(is_again)
        });
        match waited {
            Ok(Ok(true)) => tracing::error!("told to end a second time: ending at once"),
            Ok(Ok(false)) => tracing::error!(
                patience = ?TIMEOUT,
                "something hangs (a disk, the kernel, a runtime): ending without waiting for it"
            ),
            Ok(Err(error)) | Err(error) => {
                tracing::error!(%error, "signals are not watched: ending may take long");
                return;
            }
        }
        process::exit(1);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop)
}
