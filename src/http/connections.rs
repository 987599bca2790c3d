//! Serves HTTP/1 on the connections of a listener.
//!
//! The number of connections is limited, and so is the time to send a request and to read the response.
//! Each listener has its own limit, so that clients of one cannot occupy the connections of another, and
//! all limits together leave file descriptors for the rest of the agent.

use std::{
    convert::Infallible,
    error::Error,
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse as _, Response},
    serve::Listener,
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::{
    Request,
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch},
    time::{sleep, timeout},
};
use tower::ServiceExt as _;

use super::paced::StallTimeout;

/// Most connections of one listener.
pub const MAX_CONNECTIONS: usize = 128;
/// Most connections with an endless response. They may stay, so part of the connections is reserved for
/// others.
const MAX_STREAMS: usize = MAX_CONNECTIONS / 2;
/// Time to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to send the body of a request, from the end of its head on.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest body, in bytes.
const MAX_BODY: usize = 2 << 20;
/// Longest body, in bytes, that counts as small. Their number is not limited.
const MAX_SMALL_BODY: usize = 64 << 10;
/// Most bodies that are not small, at once, of all connections of a listener.
const MAX_LARGE_BODIES: usize = 8;
/// Lifetime of a connection that any client may open, unless its response is a stream.
const LIFETIME: Duration = Duration::from_secs(20);
/// On closing, a listener still accepts connections and requests for this time: some may wait in the
/// kernel.
const CLOSING_DELAY: Duration = Duration::from_millis(10);
/// Most bytes of a request that are buffered, and most unread bytes of a response.
const MAX_BUFFER: usize = 64 << 10;

/// What happens to a connection beyond the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// It stays in the kernel's queue until another connection ends: the clients are this host's own and
    /// may wait long for an answer.
    Waits,
    /// It is closed immediately. No connection lasts longer than [`LIFETIME`].
    Refused,
}

/// Signals a listener's connections to end after their current responses.
#[derive(Clone, Debug)]
pub struct Closing(Option<watch::Receiver<bool>>);

impl Closing {
    /// For a listener that is never closed.
    const NEVER: Self = Self(None);

    /// Closes when the value becomes true. Each open connection has a receiver.
    pub const fn when(closing: watch::Receiver<bool>) -> Self {
        Self(Some(closing))
    }

    /// Waits for the signal, and then for [`CLOSING_DELAY`], in which earlier requests are accepted.
    async fn wait(&mut self) {
        let Some(closing) = &mut self.0 else { return std::future::pending().await };
        if closing.wait_for(|is_closing| *is_closing).await.is_err() {
            return std::future::pending().await;
        }
        sleep(CLOSING_DELAY).await;
    }
}

/// Serves forever. `prepare` may add data of the connection to each of its requests.
pub async fn serve<L, P>(listener: L, excess: Excess, router: Router, prepare: impl Fn(&L::Io) -> P)
where
    L: Listener,
    P: Fn(&mut Request<Body>) + Send + Sync + 'static,
{
    serve_until(Closing::NEVER, listener, excess, router, prepare).await;
}

/// Like [`serve`], until the listener is closed.
pub async fn serve_until<L, P>(
    mut closing: Closing,
    mut listener: L,
    excess: Excess,
    router: Router,
    prepare: impl Fn(&L::Io) -> P,
) where
    L: Listener,
    P: Fn(&mut Request<Body>) + Send + Sync + 'static,
{
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let streams = Arc::new(Semaphore::new(MAX_STREAMS));
    let bodies = Arc::new(BodyLimits::of(excess));
    loop {
        let next = async {
            if excess == Excess::Waits {
                // Only waits for a free place. The connection takes it below.
                let _ = free.acquire().await;
            }
            listener.accept().await.0
        };
        let stream = tokio::select! {
            biased;
            stream = next => stream,
            () = closing.wait() => return,
        };
        let Ok(permit) = free.clone().try_acquire_owned() else {
            tracing::debug!(limit = MAX_CONNECTIONS, "connection refused: limit reached");
            continue;
        };
        let prepare = prepare(&stream);
        let (router, bodies) = (router.clone(), bodies.clone());
        let streaming = Arc::new(StreamPermit { all: streams.clone(), own: OnceLock::new() });
        let mut closing = closing.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request: Request<Incoming>| {
                let (router, streaming) = (router.clone(), streaming.clone());
                let (bodies, prepare) = (&bodies, &prepare);
                async move {
                    let mut request = match bodies.read(request).await {
                        Ok(request) => request,
                        Err(refusal) => return Ok::<_, Infallible>(refusal),
                    };
                    prepare(&mut request);
                    let Ok(answer) = router.oneshot(request).await;
                    Ok(streaming.admit(answer))
                }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_BUFFER)
                .serve_connection(TokioIo::new(StallTimeout::new(stream)), answer);
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.wait() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
                () = sleep(LIFETIME / 2), if excess == Excess::Refused => {
                    if streaming.own.get().is_some() {
                        connection.await
                    } else {
                        // Finishes the current response.
                        connection.as_mut().graceful_shutdown();
                        timeout(LIFETIME / 2, connection).await.unwrap_or(Ok(()))
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
}

/// State of endless responses of one connection.
struct StreamPermit {
    /// Permits for streams, of all connections.
    all: Arc<Semaphore>,
    /// The permit of this connection, since its first stream.
    own: OnceLock<OwnedSemaphorePermit>,
}

impl StreamPermit {
    /// Returns the response, or an error response if it would be one stream too many.
    fn admit(&self, answer: Response) -> Response {
        let kind = answer.headers().get(CONTENT_TYPE);
        let is_stream = kind.is_some_and(|kind| kind.as_bytes() == b"text/event-stream");
        if !is_stream || self.own.get().is_some() {
            return answer;
        }
        match self.all.clone().try_acquire_owned() {
            Ok(permit) => {
                let _ = self.own.set(permit);
                answer
            }
            Err(_) => {
                let why = format!("{MAX_STREAMS} event streams are open: close some of them\n");
                (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
            }
        }
    }
}

/// Limits the memory for request bodies.
struct BodyLimits {
    /// Longest body of one request, in bytes.
    max: usize,
    /// Permits for bodies that are not small.
    large: Semaphore,
}

impl BodyLimits {
    /// Returns the limits. Arbitrary clients may send only small bodies.
    fn of(excess: Excess) -> Self {
        let max = if excess == Excess::Refused { MAX_SMALL_BODY } else { MAX_BODY };
        Self { max, large: Semaphore::new(MAX_LARGE_BODIES) }
    }

    /// Reads the whole body of a request, or returns an error response.
    async fn read(&self, request: Request<Incoming>) -> Result<Request<Body>, Response> {
        let (head, body) = request.into_parts();
        let size = body.size_hint();
        if size.lower() > self.max as u64 {
            return Err(StatusCode::PAYLOAD_TOO_LARGE.into_response());
        }
        let whole = async {
            let _place = self.permit(size.upper()).await;
            Limited::new(body, self.max).collect().await
        };
        match timeout(BODY_TIMEOUT, whole).await {
            Ok(Ok(body)) => Ok(Request::from_parts(head, Body::from(body.to_bytes()))),
            Ok(Err(error)) => Err(body_error(&*error)),
            Err(_) => {
                let why = format!(
                    "the body was not complete within {} seconds\n",
                    BODY_TIMEOUT.as_secs()
                );
                Err((StatusCode::REQUEST_TIMEOUT, why).into_response())
            }
        }
    }

    /// Waits for the permit of a body of this size. Small bodies need none.
    async fn permit(&self, size: Option<u64>) -> Option<SemaphorePermit<'_>> {
        let is_small =
            self.max <= MAX_SMALL_BODY || size.is_some_and(|size| size <= MAX_SMALL_BODY as u64);
        if is_small { None } else { self.large.acquire().await.ok() }
    }
}

fn body_error(error: &(dyn Error + Send + Sync + 'static)) -> Response {
    let status = match error.is::<LengthLimitError>() {
        true => StatusCode::PAYLOAD_TOO_LARGE,
        false => StatusCode::BAD_REQUEST,
    };
    (status, format!("cannot read the body: {error}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Instant};

    use axum::{
        body::Bytes,
        response::sse::{Event, Sse},
        routing::{get, post},
    };
    use futures_util::stream;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::runtime::block_on;

    /// More bytes than the buffers of two sockets hold.
    const LARGE: usize = 32 << 20;
    /// Long enough for a machine under load.
    const TIMEOUT: Duration = Duration::from_secs(90);

    async fn serve_some() -> SocketAddr {
        let endless = || stream::pending::<Result<Event, Infallible>>();
        let router = Router::new()
            .route("/small", get(|| async { "small" }))
            .route("/large", get(|| async { vec![b'x'; LARGE] }))
            .route("/echo", post(|body: Bytes| async { body }))
            .route("/events", get(move || async move { Sse::new(endless()) }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(serve(listener, Excess::Refused, router, |_| |_: &mut _| {}));
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        // A refused connection may be closed already.
        let _ = stream.write_all(request.as_bytes()).await;
        stream
    }

    fn get_of(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
    }

    /// Returns the first bytes of the response; empty if the connection was closed.
    async fn status(mut stream: TcpStream) -> String {
        let mut bytes = [0; 12];
        let read = timeout(TIMEOUT, stream.read_exact(&mut bytes)).await.expect("in time");
        read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn is_served_in_time(address: SocketAddr) -> bool {
        let begun = Instant::now();
        while status(ask(address, &get_of("/small")).await).await != "HTTP/1.1 200" {
            if begun.elapsed() > TIMEOUT {
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
        true
    }

    #[test]
    fn connection_whose_client_does_not_read_is_closed_in_time() {
        let served = block_on(async {
            let address = serve_some().await;
            let mut silent = Vec::new();
            for _ in 0..MAX_CONNECTIONS {
                silent.push(ask(address, &get_of("/large")).await);
            }
            is_served_in_time(address).await
        });
        assert!(served.expect("a runtime"));
    }

    #[test]
    fn body_incomplete_is_refused_in_time_and_complete_is_read() {
        let statuses = block_on(async {
            let address = serve_some().await;
            let head = "POST /echo HTTP/1.1\r\nhost: here\r\ncontent-length: ";
            let slow = ask(address, &format!("{head}9\r\n\r\nabc")).await;
            let whole = ask(address, &format!("{head}3\r\n\r\nabc")).await;
            let long = ask(address, &format!("{head}{}\r\n\r\nabc", MAX_SMALL_BODY + 1)).await;
            [status(slow).await, status(whole).await, status(long).await]
        });
        let expected = ["HTTP/1.1 408", "HTTP/1.1 200", "HTTP/1.1 413"];
        assert_eq!(statuses.expect("a runtime"), expected);
    }

    #[test]
    fn body_large_waits_for_permit_and_small_does_not() {
        let is_placed = |bodies: &BodyLimits, size| {
            let permit = block_on(async {
                timeout(Duration::from_millis(1), bodies.permit(size)).await.map(|permit| {
                    permit.into_iter().for_each(SemaphorePermit::forget);
                })
            });
            permit.expect("a runtime").is_ok()
        };
        let bodies = BodyLimits::of(Excess::Waits);
        assert_eq!(bodies.max, MAX_BODY);
        for _ in 0..MAX_LARGE_BODIES {
            assert!(is_placed(&bodies, Some(MAX_BODY as u64)));
        }
        assert!(!is_placed(&bodies, Some(MAX_BODY as u64)) && !is_placed(&bodies, None));
        assert!(is_placed(&bodies, Some(MAX_SMALL_BODY as u64)));
        assert_eq!(BodyLimits::of(Excess::Refused).max, MAX_SMALL_BODY);
    }

    #[test]
    fn streams_beyond_limit_are_refused_and_other_requests_served() {
        let (one_more, other) = block_on(async {
            let address = serve_some().await;
            let mut open = Vec::new();
            for _ in 0..MAX_STREAMS {
                let mut stream = ask(address, &get_of("/events")).await;
                let mut first = [0; 12];
                stream.read_exact(&mut first).await.expect("an answer");
                assert_eq!(&first, b"HTTP/1.1 200");
                open.push(stream);
            }
            let one_more = status(ask(address, &get_of("/events")).await).await;
            (one_more, status(ask(address, &get_of("/small")).await).await)
        })
        .expect("a runtime");
        assert_eq!([&*one_more, &*other], ["HTTP/1.1 503", "HTTP/1.1 200"]);
    }
}
