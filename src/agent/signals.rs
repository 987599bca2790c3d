//! The signals that the agent handles. Handlers are installed first: for the first process of a
//! container, the kernel ignores signals without a handler.

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Duration,
};

use signal_hook::{consts::SIGXFSZ, flag, low_level::exit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{log, runtime::block_on};

/// The agent ends this long after the first signal, even if something hangs.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long this end waits for the log's reader.
const LOG_TIMEOUT: Duration = Duration::from_millis(200);

/// Streams of the handled signals.
pub(super) struct Signals {
    /// SIGTERM: ends the agent.
    pub(super) terminate: Signal,
    /// SIGINT: ends the agent.
    pub(super) interrupt: Signal,
    /// SIGHUP: re-reads settings.
    pub(super) hangup: Signal,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// Fails if a handler cannot be installed.
    pub(super) fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Returns at the next SIGTERM or SIGINT.
    pub(super) async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Makes a write beyond the limit of file sizes (`ulimit -f`) fail like one to a full disk. Without a
/// handler, the kernel's signal would end this process.
///
/// # Errors
/// Fails if the handler cannot be installed.
pub fn survive_file_size_limit() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map(drop)
}

/// Ends this process if the agent does not end itself: [`TIMEOUT`] after the first SIGTERM or SIGINT,
/// and immediately at the second. Runs in its own thread, so it depends on nothing that may hang.
///
/// # Errors
/// Fails if the thread cannot be created.
pub fn guard() -> io::Result<()> {
    let watch = || {
        let waited = block_on(async {
            let mut signals = Signals::catch()?;
            signals.end().await;
            let is_again = tokio::time::timeout(TIMEOUT, signals.end()).await.is_ok();
            io::Result::Ok(is_again)
        });
        match waited {
            Ok(Ok(true)) => tracing::error!("second signal received, exiting immediately"),
            Ok(Ok(false)) => tracing::error!(
                timeout = ?TIMEOUT,
                "shutdown timed out (disk, kernel or runtime hangs), exiting"
            ),
            Ok(Err(error)) | Err(error) => {
                tracing::error!(%error, "signals not watched, shutdown may take long");
                return;
            }
        }
        log::flush(LOG_TIMEOUT);
        // Without exit handlers, which the main thread may be running.
        exit(1);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop)
}
