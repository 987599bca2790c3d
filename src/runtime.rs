//! The tokio runtime of clients and of the agent.

use std::{future::Future, io, time::Duration};

/// Runs a future on a single-threaded runtime, which suffices for clients and for the agent.
///
/// # Errors
/// Fails if the runtime cannot be created.
pub fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(future);
    // Blocking work may hang, so it is not awaited for long. Tasks and their sockets are dropped in any
    // case.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(result)
}
