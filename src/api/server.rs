//! The agent's end of the control socket.

use std::{
    io,
    net::{IpAddr, TcpListener},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, Query, State},
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot::{self, Sender};

use crate::wire::{Secret, SecretId, Token};

use super::{
    AgentStatus, AttachRequest, Attached, AttachmentName, ClientError, Event, EventFeed,
    KernelEntry, MatrixRow, PingReport, PodError, PodErrorKind, PodStatus, SAMPLE_INTERVAL, Sample,
    Socket, SocketError,
    connections::{Excess, serve as serve_connections},
    dashboard,
    descriptor::{CarrierListener, Received},
    metrics::{self, Page},
};

/// Longest wait for convergence that can be asked for, in seconds.
const MAX_WAIT: u64 = 3600;
/// A loop that does not answer for so long does nothing else either.
const ALIVE_WITHIN: Duration = Duration::from_secs(2);

/// What is asked over the socket, with the way back for the answer.
#[derive(Debug)]
pub enum Question {
    Status {
        reply: Sender<AgentStatus>,
    },
    /// Whether the loop answers.
    Alive {
        reply: Sender<()>,
    },
    /// Status once it has converged with this many members, or when the time is over.
    Wait {
        seconds: u64,
        members: usize,
        reply: Sender<AgentStatus>,
    },
    Token {
        reply: Sender<Option<String>>,
    },
    /// Answered with the successor, or why it cannot leave.
    Leave {
        reply: Sender<Result<Option<String>, String>>,
    },
    Forget {
        node: String,
        force: bool,
        reply: Sender<Result<Value, String>>,
    },
    ResetIdentity {
        reply: Sender<Result<(), String>>,
    },
    /// One round of questions to a member.
    Ping {
        node: String,
        reply: Sender<Result<PingReport, String>>,
    },
    History {
        reply: Sender<Result<Vec<Value>, String>>,
    },
    Attach {
        request: AttachRequest,
        /// The network namespace, where the one who asks has opened it.
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    },
    /// Answered with whether there was anything.
    Detach {
        request: AttachmentName,
        netns: Option<OwnedFd>,
        reply: Sender<Result<bool, PodError>>,
    },
    /// Whether the kernel still has it as it was made; answered with all addresses of its interface.
    Check {
        request: AttachmentName,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Vec<IpAddr>, PodError>>,
    },
    Pods {
        reply: Sender<Vec<PodStatus>>,
    },
    /// Takes back the addresses of pods that are gone; answered with those pods.
    Release {
        reply: Sender<Result<Vec<PodStatus>, PodError>>,
    },
    Events {
        reply: Sender<Result<EventFeed, String>>,
    },
    PastEvents {
        reply: Sender<Vec<Event>>,
    },
    Samples {
        reply: Sender<Vec<Sample>>,
    },
    /// Answered with a [`Matrix`] as JSON, encoded once for all who look at it.
    ///
    /// [`Matrix`]: super::Matrix
    Matrix {
        reply: Sender<Bytes>,
    },
    Routes {
        reply: Sender<Result<Vec<KernelEntry>, String>>,
    },
    /// Answered with who accepts and who uses which.
    Secret {
        step: SecretStep,
        force: bool,
        reply: Sender<Result<Value, String>>,
    },
    /// What a member says of itself.
    Peer {
        node: String,
        reply: Sender<Result<Option<MatrixRow>, String>>,
    },
}

/// A step of changing the cluster's secret.
#[derive(Clone, Debug)]
pub enum SecretStep {
    List,
    /// This one, or those there are to members that lack them.
    Add(Option<Secret>),
    Use(SecretId),
    Drop(SecretId),
}

type Ask = Arc<dyn Fn(Question) -> bool + Send + Sync>;

/// Listens and serves in tasks of its own. `ask` hands a request to the agent's loop.
pub fn serve(
    path: &Path,
    ask: impl Fn(Question) -> bool + Send + Sync + 'static,
) -> Result<Socket, SocketError> {
    let (socket, listener) = Socket::listen(path)?;
    let ask: Ask = Arc::new(ask);
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/token", get(token))
        .route("/v1/leave", post(leave))
        .route("/v1/forget", post(forget))
        .route("/v1/reset-identity", post(reset_identity))
        .route("/v1/secrets", get(secrets))
        .route("/v1/secrets/add", post(add_secret))
        .route("/v1/secrets/use", post(use_secret))
        .route("/v1/secrets/drop", post(drop_secret))
        .route("/v1/ping", get(ping))
        .route("/v1/routes", get(routes))
        .route("/v1/peer", get(peer))
        .route("/v1/history", get(history))
        .merge(observed())
        .route("/v1/pods", get(pods))
        .route("/v1/pods/attach", post(attach))
        .route("/v1/pods/detach", post(detach))
        .route("/v1/pods/check", post(check))
        .route("/v1/pods/release", post(release))
        .with_state(ask);
    tokio::spawn(serve_connections(CarrierListener(listener), Excess::Waits, router, |carrier| {
        let received = carrier.received();
        move |request| _ = request.extensions_mut().insert(ConnectInfo(received.clone()))
    }));
    Ok(socket)
}

/// The dashboard, and what collectors and probes ask, over TCP: nothing here changes anything or tells a
/// secret.
pub fn observe(
    listener: TcpListener,
    ask: impl Fn(Question) -> bool + Send + Sync + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let ask: Ask = Arc::new(ask);
    let router = dashboard::only_for(
        address,
        observed().route("/v1/status", get(status_now)).merge(dashboard::pages()).with_state(ask),
    );
    tokio::spawn(serve_connections(listener, Excess::Refused, router, |_| |_: &mut _| {}));
    Ok(())
}

fn observed() -> Router<Ask> {
    Router::new()
        .route("/v1/events", get(events))
        .route("/v1/samples", get(samples))
        .route("/v1/matrix", get(matrix))
        .route("/metrics", get(collect))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
}

async fn collect(State(ask): State<Ask>, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let render = |status: AgentStatus| {
        let Page { content_type, text } = metrics::page(&status, accept);
        ([(CONTENT_TYPE, content_type)], text).into_response()
    };
    answer(&ask, |reply| Question::Status { reply }, render).await
}

/// The loop answers.
async fn healthz(State(ask): State<Ask>) -> Response {
    let question = |reply| Question::Alive { reply };
    let asked = answer(&ask, question, |()| "alive\n".into_response());
    let late = || problem(StatusCode::SERVICE_UNAVAILABLE, "the agent's loop does not answer");
    tokio::time::timeout(ALIVE_WITHIN, asked).await.unwrap_or_else(|_| late())
}

/// It has its subnet, and its pods can be reached.
async fn readyz(State(ask): State<Ask>) -> Response {
    let render = |status: AgentStatus| {
        if status.converged {
            return "ready\n".into_response();
        }
        let why = status.node.problems.join("; ");
        let why = if why.is_empty() { "it has not converged yet".to_owned() } else { why };
        problem(StatusCode::SERVICE_UNAVAILABLE, &why)
    };
    answer(&ask, |reply| Question::Status { reply }, render).await
}

/// Server-sent events, as the WHATWG's HTML standard has them: those that are kept, then what happens.
async fn events(
    State(ask): State<Ask>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Response {
    let seen = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    if query.follow == Some(false) {
        let render = |past: Vec<Event>| Json(json!({ "events": past })).into_response();
        return answer(&ask, |reply| Question::PastEvents { reply }, render).await;
    }
    let render = move |feed: Result<EventFeed, String>| match feed {
        Ok(feed) => dashboard::stream(feed, seen).into_response(),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    };
    answer(&ask, |reply| Question::Events { reply }, render).await
}

async fn samples(State(ask): State<Ask>) -> Response {
    let render = |samples: Vec<Sample>| {
        let interval = SAMPLE_INTERVAL.as_secs();
        Json(json!({ "interval_seconds": interval, "samples": samples })).into_response()
    };
    answer(&ask, |reply| Question::Samples { reply }, render).await
}

async fn matrix(State(ask): State<Ask>) -> Response {
    let render = |json: Bytes| ([(CONTENT_TYPE, "application/json")], json).into_response();
    answer(&ask, |reply| Question::Matrix { reply }, render).await
}

#[derive(Deserialize)]
struct WaitQuery {
    wait: Option<u64>,
    members: Option<usize>,
}

#[derive(Deserialize)]
struct EventsQuery {
    follow: Option<bool>,
}

#[derive(Deserialize)]
struct PingQuery {
    node: String,
}

#[derive(Deserialize)]
struct ForgetQuery {
    node: String,
    #[serde(default)]
    force: bool,
}

async fn status(State(ask): State<Ask>, Query(query): Query<WaitQuery>) -> Response {
    let question = |reply| match query.wait {
        Some(seconds) => Question::Wait {
            seconds: seconds.min(MAX_WAIT),
            members: query.members.unwrap_or(1),
            reply,
        },
        None => Question::Status { reply },
    };
    answer(&ask, question, |status| Json(status).into_response()).await
}

/// For whoever may look and not wait.
async fn status_now(State(ask): State<Ask>) -> Response {
    answer(&ask, |reply| Question::Status { reply }, |status| Json(status).into_response()).await
}

async fn token(State(ask): State<Ask>) -> Response {
    answer(
        &ask,
        |reply| Question::Token { reply },
        |token| match token {
            Some(token) => Json(json!({ "token": token })).into_response(),
            None => {
                problem(StatusCode::CONFLICT, "this node is in no cluster yet: it is still joining")
            }
        },
    )
    .await
}

async fn leave(State(ask): State<Ask>) -> Response {
    let left = |successor| json!({ "left": true, "successor": successor });
    answer(&ask, |reply| Question::Leave { reply }, |result| done(result.map(left))).await
}

async fn forget(State(ask): State<Ask>, Query(query): Query<ForgetQuery>) -> Response {
    let ForgetQuery { node, force } = query;
    answer(&ask, |reply| Question::Forget { node, force, reply }, done).await
}

async fn reset_identity(State(ask): State<Ask>) -> Response {
    let reset = |()| json!({ "reset": true });
    answer(&ask, |reply| Question::ResetIdentity { reply }, |result| done(result.map(reset))).await
}

/// A token carries the new secret; without one, those there are go to whoever lacks them.
#[derive(Deserialize)]
struct SecretBody {
    token: Option<String>,
}

#[derive(Deserialize)]
struct SecretQuery {
    secret: String,
    #[serde(default)]
    force: bool,
}

async fn secrets(State(ask): State<Ask>) -> Response {
    change_secret(&ask, Ok(SecretStep::List), false).await
}

async fn add_secret(State(ask): State<Ask>, Json(body): Json<SecretBody>) -> Response {
    let token = body.token.map(|token| token.parse::<Token>()).transpose();
    let step = token.map(|token| SecretStep::Add(token.map(|token| token.secret)));
    change_secret(&ask, step.map_err(|error| error.to_string()), false).await
}

async fn use_secret(State(ask): State<Ask>, Query(query): Query<SecretQuery>) -> Response {
    change_secret(&ask, query.secret.parse().map(SecretStep::Use), query.force).await
}

async fn drop_secret(State(ask): State<Ask>, Query(query): Query<SecretQuery>) -> Response {
    change_secret(&ask, query.secret.parse().map(SecretStep::Drop), query.force).await
}

async fn change_secret(ask: &Ask, step: Result<SecretStep, String>, force: bool) -> Response {
    match step {
        Ok(step) => answer(ask, |reply| Question::Secret { step, force, reply }, done).await,
        Err(why) => problem(StatusCode::BAD_REQUEST, &why),
    }
}

async fn ping(State(ask): State<Ask>, Query(query): Query<PingQuery>) -> Response {
    let PingQuery { node } = query;
    let render = |result: Result<PingReport, String>| match result {
        Ok(report) => Json(report).into_response(),
        Err(why) => problem(StatusCode::NOT_FOUND, &why),
    };
    answer(&ask, |reply| Question::Ping { node, reply }, render).await
}

async fn routes(State(ask): State<Ask>) -> Response {
    let entries = |entries: Vec<KernelEntry>| json!({ "entries": entries });
    answer(&ask, |reply| Question::Routes { reply }, |result| done(result.map(entries))).await
}

async fn peer(State(ask): State<Ask>, Query(query): Query<PingQuery>) -> Response {
    let PingQuery { node } = query;
    let render = |result: Result<Option<MatrixRow>, String>| match result {
        Ok(row) => Json(row).into_response(),
        Err(why) => problem(StatusCode::NOT_FOUND, &why),
    };
    answer(&ask, |reply| Question::Peer { node, reply }, render).await
}

async fn history(State(ask): State<Ask>) -> Response {
    answer(&ask, |reply| Question::History { reply }, |result| done(result.map(Value::Array))).await
}

async fn pods(State(ask): State<Ask>) -> Response {
    let render = |pods: Vec<PodStatus>| Json(json!({ "pods": pods })).into_response();
    answer(&ask, |reply| Question::Pods { reply }, render).await
}

async fn attach(
    State(ask): State<Ask>,
    ConnectInfo(received): ConnectInfo<Received>,
    Json(request): Json<AttachRequest>,
) -> Response {
    answer(&ask, |reply| Question::Attach { request, netns: received.take(), reply }, outcome).await
}

async fn detach(
    State(ask): State<Ask>,
    ConnectInfo(received): ConnectInfo<Received>,
    Json(request): Json<AttachmentName>,
) -> Response {
    let render = |result: Result<bool, PodError>| {
        outcome(result.map(|was_there| json!({ "was_there": was_there })))
    };
    answer(&ask, |reply| Question::Detach { request, netns: received.take(), reply }, render).await
}

async fn check(
    State(ask): State<Ask>,
    ConnectInfo(received): ConnectInfo<Received>,
    Json(request): Json<AttachmentName>,
) -> Response {
    let render = |result: Result<Vec<IpAddr>, PodError>| {
        outcome(result.map(|addresses| json!({ "addresses": addresses })))
    };
    answer(&ask, |reply| Question::Check { request, netns: received.take(), reply }, render).await
}

async fn release(State(ask): State<Ask>) -> Response {
    let render = |result: Result<Vec<PodStatus>, PodError>| {
        outcome(result.map(|released| json!({ "released": released })))
    };
    answer(&ask, |reply| Question::Release { reply }, render).await
}

fn outcome(result: Result<impl Serialize, PodError>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => {
            let status = match error.kind {
                PodErrorKind::NotReady => StatusCode::SERVICE_UNAVAILABLE,
                PodErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::CONFLICT,
            };
            (status, Json(error)).into_response()
        }
    }
}

async fn answer<T>(
    ask: &Ask,
    question: impl FnOnce(Sender<T>) -> Question,
    render: impl FnOnce(T) -> Response,
) -> Response {
    match put(&**ask, question).await {
        Some(value) => render(value),
        None => {
            let why = ClientError::NoAnswer.to_string();
            let body = Json(json!({ "error": why, "ask_again": true }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

/// Puts a question to the agent's loop, and waits for the answer; none, if the loop dropped it.
pub async fn put<Q, T>(
    ask: &(dyn Fn(Q) -> bool + Send + Sync),
    question: impl FnOnce(Sender<T>) -> Q,
) -> Option<T> {
    let (sender, receiver) = oneshot::channel();
    let accepted = ask(question(sender));
    receiver.await.ok().filter(|_| accepted)
}

fn done(result: Result<Value, String>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(why) => problem(StatusCode::CONFLICT, &why),
    }
}

fn problem(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}
