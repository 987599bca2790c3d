//! The signals that the agent handles. Handlers are installed first: for the first process of a
//! container, the kernel ignores signals without a handler.

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::Duration,
};

use signal_hook::{consts::SIGXFSZ, flag, low_level::exit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use crate::{log, runtime::block_on};

/// The agent ends this long after the first signal, even if something hangs.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long this end waits for the log's reader.
const LOG_TIMEOUT: Duration = Duration::from_millis(200);

/// The request of SIGTERM or SIGINT to end this process. It also holds a signal that arrived before the agent
/// started.
#[derive(Clone, Debug)]
pub struct EndRequest(watch::Receiver<bool>);

impl EndRequest {
    /// Returns once a signal has arrived.
    pub(super) async fn wait(&mut self) {
        if self.0.wait_for(|has_arrived| *has_arrived).await.is_err() {
            // The guard could not install its handlers: a signal ends the process.
            std::future::pending().await
        }
    }
}

/// The handled signals.
pub(super) struct Signals {
    /// SIGTERM and SIGINT: end the agent.
    pub(super) end: EndRequest,
    /// SIGHUP: re-reads settings.
    pub(super) hangup: Signal,
}

impl Signals {
    /// Installs the handler of SIGHUP.
    ///
    /// # Errors
    /// Fails if the handler cannot be installed.
    pub(super) fn catch(end: EndRequest) -> io::Result<Self> {
        Ok(Self { end, hangup: signal(SignalKind::hangup())? })
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
/// and immediately at the second. Runs in its own thread, so it depends on nothing that may hang. Returns the
/// request to end, for [`super::run`].
///
/// # Errors
/// Fails if the thread cannot be created.
pub fn guard() -> io::Result<EndRequest> {
    let (requests, request) = watch::channel(false);
    let guard = move || {
        let waited = block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            next().await;
            requests.send_replace(true);
            let is_again = tokio::time::timeout(TIMEOUT, next()).await.is_ok();
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
    thread::Builder::new().name("signals".to_owned()).spawn(guard)?;
    Ok(EndRequest(request))
}
