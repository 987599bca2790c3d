//! Serves HTTP/1 on the connections of a listener: so many at once, and each has to say what it wants, and to
//! take its answer, in time.
//!
//! Each listener has a budget of its own, so that clients of one do not take the place of another's, and all
//! of them together leave file descriptors for the rest of the agent.

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

use super::paced::Paced;

/// Connections of one listener.
pub const MAX_CONNECTIONS: usize = 128;
/// Connections of them whose answers never end. They may stay, so they leave room for others.
const MAX_STREAMS: usize = MAX_CONNECTIONS / 2;
/// The head of the first request, and of each that follows, has to be there by then.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// So has the body, from the end of the head on.
const BODY_PATIENCE: Duration = Duration::from_secs(5);
/// Longest body, in bytes, and the longest that any number of connections may send at once.
const BODY_MAX: usize = 2 << 20;
const SMALL_BODY: usize = 64 << 10;
/// Longer bodies at once, of all connections of a listener.
const LARGE_BODIES: usize = 8;
/// A connection that anyone may open ends after so long, unless its answer is a stream.
const LIFETIME: Duration = Duration::from_secs(20);
/// Connections and requests that wait in the kernel when a listener is closed are taken until there has been
/// none for so long.
const LAST_LOOK: Duration = Duration::from_millis(10);
/// What a client may send of a request and leave unread of an answer, at most, in bytes.
const BUFFER: usize = 64 << 10;

/// What becomes of a connection beyond the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// It waits in the kernel's queue until another has ended: its client is this host's own, and may wait
    /// long for an answer.
    Waits,
    /// It is closed at once. None lasts longer than [`LIFETIME`].
    Refused,
}

/// Tells a listener's connections to end as soon as they have answered what they were asked.
#[derive(Clone, Debug)]
pub struct Closing(Option<watch::Receiver<bool>>);

impl Closing {
    /// Of a listener that is never closed.
    const NEVER: Self = Self(None);

    /// When the value becomes true. Each connection that is open keeps a receiver.
    pub const fn when(closing: watch::Receiver<bool>) -> Self {
        Self(Some(closing))
    }

    /// Returns when there has been time to take what was there before.
    async fn is_due(&mut self) {
        let Some(closing) = &mut self.0 else { return std::future::pending().await };
        if closing.wait_for(|is_closing| *is_closing).await.is_err() {
            return std::future::pending().await;
        }
        sleep(LAST_LOOK).await;
    }
}

/// Serves for ever. `prepare` may add to each request what its connection carries.
pub async fn serve<L, P>(listener: L, excess: Excess, router: Router, prepare: impl Fn(&L::Io) -> P)
where
    L: Listener,
    P: Fn(&mut Request<Body>) + Send + Sync + 'static,
{
    serve_until(Closing::NEVER, listener, excess, router, prepare).await;
}

/// The same until the listener is closed.
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
    let bodies = Arc::new(Bodies::of(excess));
    loop {
        let next = async {
            if excess == Excess::Waits {
                // The connection takes the place itself.
                let _ = free.acquire().await;
            }
            listener.accept().await.0
        };
        let stream = tokio::select! {
            biased;
            stream = next => stream,
            () = closing.is_due() => return,
        };
        let Ok(permit) = free.clone().try_acquire_owned() else {
            tracing::debug!(limit = MAX_CONNECTIONS, "connection refused: there are too many");
            continue;
        };
        let prepare = prepare(&stream);
        let (router, bodies) = (router.clone(), bodies.clone());
        let streaming = Arc::new(Streaming { all: streams.clone(), own: OnceLock::new() });
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
                .header_read_timeout(HEAD_PATIENCE)
                .max_buf_size(BUFFER)
                .serve_connection(TokioIo::new(Paced::new(stream)), answer);
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.is_due() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
                () = sleep(LIFETIME / 2), if excess == Excess::Refused => {
                    if streaming.own.get().is_some() {
                        connection.await
                    } else {
                        // What is being answered is answered.
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

/// Answers of one connection that never end.
struct Streaming {
    /// Places for them, of all connections.
    all: Arc<Semaphore>,
    /// The place of this connection, from its first one on.
    own: OnceLock<OwnedSemaphorePermit>,
}

impl Streaming {
    /// Gives an answer back, or what is said where it would be one stream too many.
    fn admit(&self, answer: Response) -> Response {
        let kind = answer.headers().get(CONTENT_TYPE);
        let is_stream = kind.is_some_and(|kind| kind.as_bytes() == b"text/event-stream");
        if !is_stream || self.own.get().is_some() {
            return answer;
        }
        match self.all.clone().try_acquire_owned() {
            Ok(place) => {
                let _ = self.own.set(place);
                answer
            }
            Err(_) => {
                let why = format!("{MAX_STREAMS} streams of events are open: close some\n");
                (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
            }
        }
    }
}

/// How much of the bodies of requests is held at once.
struct Bodies {
    /// Longest of one request.
    max: usize,
    /// Places for those that are not small.
    large: Semaphore,
}

impl Bodies {
    /// Clients that anyone may be send small ones alone.
    fn of(excess: Excess) -> Self {
        let max = if excess == Excess::Refused { SMALL_BODY } else { BODY_MAX };
        Self { max, large: Semaphore::new(LARGE_BODIES) }
    }

    /// Waits for the body of a request.
    async fn read(&self, request: Request<Incoming>) -> Result<Request<Body>, Response> {
        let (head, body) = request.into_parts();
        let size = body.size_hint();
        if size.lower() > self.max as u64 {
            return Err(StatusCode::PAYLOAD_TOO_LARGE.into_response());
        }
        let whole = async {
            let _place = self.place(size.upper()).await;
            Limited::new(body, self.max).collect().await
        };
        match timeout(BODY_PATIENCE, whole).await {
            Ok(Ok(body)) => Ok(Request::from_parts(head, Body::from(body.to_bytes()))),
            Ok(Err(error)) => Err(unread(&*error)),
            Err(_) => {
                let why = format!("no whole body within {} seconds\n", BODY_PATIENCE.as_secs());
                Err((StatusCode::REQUEST_TIMEOUT, why).into_response())
            }
        }
    }

    /// A place for a body of this size, where it needs one.
    async fn place(&self, size: Option<u64>) -> Option<SemaphorePermit<'_>> {
        let is_small = self.max <= SMALL_BODY || size.is_some_and(|size| size <= SMALL_BODY as u64);
        if is_small { None } else { self.large.acquire().await.ok() }
    }
}

fn unread(error: &(dyn Error + Send + Sync + 'static)) -> Response {
    let status = match error.is::<LengthLimitError>() {
        true => StatusCode::PAYLOAD_TOO_LARGE,
        false => StatusCode::BAD_REQUEST,
    };
    (status, format!("the body: {error}\n")).into_response()
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
    use crate::api::block_on;

    /// More than the buffers of two sockets hold.
    const LARGE: usize = 32 << 20;
    /// For a machine under load.
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
        // One that is refused may be closed already.
        let _ = stream.write_all(request.as_bytes()).await;
        stream
    }

    fn get_of(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
    }

    /// The first bytes of an answer; none if the connection was closed.
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
    fn clients_that_never_read_their_answers_make_room_for_others() {
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
    fn body_that_does_not_come_is_refused_in_time_and_a_whole_one_is_read() {
        let statuses = block_on(async {
            let address = serve_some().await;
            let head = "POST /echo HTTP/1.1\r\nhost: here\r\ncontent-length: ";
            let slow = ask(address, &format!("{head}9\r\n\r\nabc")).await;
            let whole = ask(address, &format!("{head}3\r\n\r\nabc")).await;
            let long = ask(address, &format!("{head}{}\r\n\r\nabc", SMALL_BODY + 1)).await;
            [status(slow).await, status(whole).await, status(long).await]
        });
        let expected = ["HTTP/1.1 408", "HTTP/1.1 200", "HTTP/1.1 413"];
        assert_eq!(statuses.expect("a runtime"), expected);
    }

    #[test]
    fn body_that_is_not_small_waits_for_a_place_and_a_small_one_does_not() {
        let is_placed = |bodies: &Bodies, size| {
            let place = block_on(async {
                timeout(Duration::from_millis(1), bodies.place(size)).await.map(|place| {
                    place.into_iter().for_each(SemaphorePermit::forget);
                })
            });
            place.expect("a runtime").is_ok()
        };
        let bodies = Bodies::of(Excess::Waits);
        assert_eq!(bodies.max, BODY_MAX);
        for _ in 0..LARGE_BODIES {
            assert!(is_placed(&bodies, Some(BODY_MAX as u64)));
        }
        assert!(!is_placed(&bodies, Some(BODY_MAX as u64)) && !is_placed(&bodies, None));
        assert!(is_placed(&bodies, Some(SMALL_BODY as u64)));
        assert_eq!(Bodies::of(Excess::Refused).max, SMALL_BODY);
    }

    #[test]
    fn streams_take_no_more_than_their_share_of_the_connections() {
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
