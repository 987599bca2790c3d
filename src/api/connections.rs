//! Serves HTTP/1 on the connections of a listener: so many at once, and each has to say what it wants in
//! time.
//!
//! Each listener has a budget of its own, so that clients of one do not take the place of another's, and all
//! of them together leave file descriptors for the rest of the agent.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body, serve::Listener};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tower::ServiceExt as _;

/// Connections of one listener.
pub const MAX_CONNECTIONS: usize = 128;
/// The head of the first request, and of each that follows, has to be there by then.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// What a client may send of a request and leave unread of an answer, at most, in bytes.
const BUFFER: usize = 64 << 10;

/// What becomes of a connection beyond the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// It waits in the kernel's queue until another has ended: its client is this host's own.
    Waits,
    /// It is closed at once.
    Refused,
}

/// Serves for ever. `prepare` may add to each request what its connection carries.
pub async fn serve<L, P>(
    mut listener: L,
    excess: Excess,
    router: Router,
    prepare: impl Fn(&L::Io) -> P,
) where
    L: Listener,
    P: Fn(&mut Request<Body>) + Send + Sync + 'static,
{
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        if excess == Excess::Waits && free.acquire().await.is_err() {
            return;
        }
        let (stream, _) = listener.accept().await;
        let Ok(permit) = free.clone().try_acquire_owned() else {
            tracing::debug!(limit = MAX_CONNECTIONS, "connection refused: there are too many");
            continue;
        };
        let prepare = prepare(&stream);
        let router = router.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request: Request<Incoming>| {
                let mut request = request.map(Body::new);
                prepare(&mut request);
                router.clone().oneshot(request)
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .max_buf_size(BUFFER)
                .serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
}
