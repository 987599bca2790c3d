//! The server side of the control socket.

use std::{
    io,
    net::{IpAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, Query, State},
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot::Sender;

use crate::{
    http::{self, CarrierListener, Excess, ReceivedDescriptor, Socket, SocketError},
    wire::Token,
};

use super::{
    AgentRequest, AgentStatus, ApiError, ApiErrorCode, AttachRequest, AttachmentName, Checked,
    ClusterToken, Detached, EncodedMatrix, Event, EventFeed, IdentityReset, KernelEntry, Left,
    NewSecret, PastEvents, PodError, PodErrorKind, PodStatus, Pods, Released, Routes,
    SAMPLE_INTERVAL, Sample, Samples, SecretStep, VerdictState, dashboard,
    metrics::{self, Page},
};

/// Longest wait for convergence that a client may request, in seconds.
const MAX_WAIT_SECONDS: u64 = 3600;
/// A loop that does not answer within this time counts as hanging.
const LOOP_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Passes a request to the agent's loop. Returns false if the loop has ended.
type SubmitFn = Arc<dyn Fn(AgentRequest) -> bool + Send + Sync>;

/// Listens on the control socket and serves requests in background tasks. `submit_fn` passes a request to the
/// agent's loop; it returns false if the loop has ended.
///
/// # Errors
/// Fails if the socket cannot be created.
pub fn serve(
    path: &Path,
    submit_fn: impl Fn(AgentRequest) -> bool + Send + Sync + 'static,
) -> Result<Socket, SocketError> {
    let (socket, listener) = Socket::listen(path)?;
    let submit_fn: SubmitFn = Arc::new(submit_fn);
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
        .merge(read_only_routes())
        .route("/v1/pods/attach", post(attach))
        .route("/v1/pods/detach", post(detach))
        .route("/v1/pods/check", post(check))
        .route("/v1/pods/release", post(release))
        .with_state(submit_fn);
    tokio::spawn(http::serve(CarrierListener(listener), Excess::Waits, router, |carrier| {
        let received = carrier.received();
        move |request| _ = request.extensions_mut().insert(ConnectInfo(received.clone()))
    }));
    Ok(socket)
}

/// Serves dashboard, metrics and health over TCP, without end. These requests change nothing and reveal no
/// secrets.
///
/// # Errors
/// Fails if the listener cannot be made asynchronous.
pub async fn serve_http(
    listener: TcpListener,
    submit_fn: impl Fn(AgentRequest) -> bool + Send + Sync + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let submit_fn: SubmitFn = Arc::new(submit_fn);
    let router = dashboard::only_for(
        address,
        read_only_routes()
            .route("/v1/status", get(status_now))
            .merge(dashboard::pages())
            .route("/problems", get(dashboard::problem_codes))
            .with_state(submit_fn),
    );
    http::serve(listener, Excess::Refused, router, |_| |_: &mut _| {}).await;
    Ok(())
}

fn read_only_routes() -> Router<SubmitFn> {
    Router::new()
        .route("/v1/events", get(events))
        .route("/v1/samples", get(samples))
        .route("/v1/matrix", get(matrix))
        .route("/v1/pods", get(pods))
        .route("/metrics", get(prometheus_metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
}

async fn prometheus_metrics(State(submit_fn): State<SubmitFn>, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let render = |status: Arc<AgentStatus>| {
        let Page { content_type, text } = metrics::page(&status, accept);
        ([(CONTENT_TYPE, content_type)], text).into_response()
    };
    respond(&submit_fn, |reply| AgentRequest::Status { reply }, render).await
}

/// Reports whether the loop answers.
async fn healthz(State(submit_fn): State<SubmitFn>) -> Response {
    let request = |reply| AgentRequest::Alive { reply };
    let response = respond(&submit_fn, request, |()| "alive\n".into_response());
    let late = || {
        ApiError::new(ApiErrorCode::Unanswered, "the agent's loop does not answer").into_response()
    };
    tokio::time::timeout(LOOP_ANSWER_TIMEOUT, response).await.unwrap_or_else(|_| late())
}

/// Reports whether the node has its subnet and its pods can be reached.
async fn readyz(State(submit_fn): State<SubmitFn>) -> Response {
    let render = |status: Arc<AgentStatus>| match status.verdict.state {
        VerdictState::NotReady => {
            ApiError::new(ApiErrorCode::NotReady, &*status.verdict.text).into_response()
        }
        _ => format!("{}\n", status.verdict).into_response(),
    };
    respond(&submit_fn, |reply| AgentRequest::Status { reply }, render).await
}

/// Sends past events and then new ones as server-sent events (WHATWG HTML standard).
async fn events(
    State(submit_fn): State<SubmitFn>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Response {
    let seen = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    if query.follow == Some(false) {
        let render = |events: Vec<Event>| Json(PastEvents { events }).into_response();
        return respond(&submit_fn, |reply| AgentRequest::PastEvents { reply }, render).await;
    }
    let render = move |feed: Result<EventFeed, ApiError>| match feed {
        Ok(feed) => dashboard::stream(feed, seen).into_response(),
        Err(error) => error.into_response(),
    };
    respond(&submit_fn, |reply| AgentRequest::Events { reply }, render).await
}

async fn samples(State(submit_fn): State<SubmitFn>) -> Response {
    let render = |samples: Vec<Sample>| {
        Json(Samples { interval_seconds: SAMPLE_INTERVAL.as_secs(), samples }).into_response()
    };
    respond(&submit_fn, |reply| AgentRequest::Samples { reply }, render).await
}

async fn matrix(State(submit_fn): State<SubmitFn>) -> Response {
    let render = |EncodedMatrix(json)| ([(CONTENT_TYPE, "application/json")], json).into_response();
    respond(&submit_fn, |reply| AgentRequest::Matrix { reply }, render).await
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

async fn status(State(submit_fn): State<SubmitFn>, Query(query): Query<WaitQuery>) -> Response {
    let request = |reply| match query.wait {
        Some(seconds) => AgentRequest::Wait {
            seconds: seconds.min(MAX_WAIT_SECONDS),
            members: query.members.unwrap_or(1),
            reply,
        },
        None => AgentRequest::Status { reply },
    };
    respond(&submit_fn, request, |status| Json(&*status).into_response()).await
}

/// Returns the status without waiting, for clients over TCP.
async fn status_now(State(submit_fn): State<SubmitFn>) -> Response {
    respond(
        &submit_fn,
        |reply| AgentRequest::Status { reply },
        |status| Json(&*status).into_response(),
    )
    .await
}

async fn token(State(submit_fn): State<SubmitFn>) -> Response {
    respond(
        &submit_fn,
        |reply| AgentRequest::Token { reply },
        |token| match token {
            Some(token) => Json(ClusterToken { token }).into_response(),
            None => {
                let why = "this node is still joining and has no token yet";
                ApiError::new(ApiErrorCode::NotReady, why).into_response()
            }
        },
    )
    .await
}

async fn leave(State(submit_fn): State<SubmitFn>) -> Response {
    let left = |successor| Left { left: true, successor };
    respond(
        &submit_fn,
        |reply| AgentRequest::Leave { reply },
        |result| json_or_error(result.map(left)),
    )
    .await
}

async fn forget(State(submit_fn): State<SubmitFn>, Query(query): Query<ForgetQuery>) -> Response {
    let ForgetQuery { node, force } = query;
    respond(&submit_fn, |reply| AgentRequest::Forget { node, force, reply }, json_or_error).await
}

async fn reset_identity(State(submit_fn): State<SubmitFn>) -> Response {
    let reset = |()| IdentityReset { reset: true };
    respond(
        &submit_fn,
        |reply| AgentRequest::ResetIdentity { reply },
        |result| json_or_error(result.map(reset)),
    )
    .await
}

#[derive(Deserialize)]
struct SecretQuery {
    secret: String,
    #[serde(default)]
    force: bool,
}

async fn secrets(State(submit_fn): State<SubmitFn>) -> Response {
    change_secret(&submit_fn, Ok(SecretStep::List), false).await
}

async fn add_secret(State(submit_fn): State<SubmitFn>, Json(body): Json<NewSecret>) -> Response {
    let token = body.token.map(|token| token.parse::<Token>()).transpose();
    let step = token.map(|token| SecretStep::Add(token.map(|token| token.secret)));
    change_secret(&submit_fn, step.map_err(|error| error.to_string()), false).await
}

async fn use_secret(
    State(submit_fn): State<SubmitFn>,
    Query(query): Query<SecretQuery>,
) -> Response {
    change_secret(&submit_fn, query.secret.parse().map(SecretStep::Use), query.force).await
}

async fn drop_secret(
    State(submit_fn): State<SubmitFn>,
    Query(query): Query<SecretQuery>,
) -> Response {
    change_secret(&submit_fn, query.secret.parse().map(SecretStep::Drop), query.force).await
}

async fn change_secret(
    submit_fn: &SubmitFn,
    step: Result<SecretStep, String>,
    force: bool,
) -> Response {
    match step {
        Ok(step) => {
            respond(submit_fn, |reply| AgentRequest::Secret { step, force, reply }, json_or_error)
                .await
        }
        Err(why) => ApiError::new(ApiErrorCode::BadRequest, why).into_response(),
    }
}

async fn ping(State(submit_fn): State<SubmitFn>, Query(query): Query<PingQuery>) -> Response {
    let PingQuery { node } = query;
    respond(&submit_fn, |reply| AgentRequest::Ping { node, reply }, json_or_error).await
}

async fn routes(State(submit_fn): State<SubmitFn>) -> Response {
    let entries = |entries: Vec<KernelEntry>| Routes { entries };
    respond(
        &submit_fn,
        |reply| AgentRequest::Routes { reply },
        |result| json_or_error(result.map(entries)),
    )
    .await
}

async fn peer(State(submit_fn): State<SubmitFn>, Query(query): Query<PingQuery>) -> Response {
    let PingQuery { node } = query;
    respond(&submit_fn, |reply| AgentRequest::Peer { node, reply }, json_or_error).await
}

async fn history(State(submit_fn): State<SubmitFn>) -> Response {
    respond(&submit_fn, |reply| AgentRequest::History { reply }, json_or_error).await
}

async fn pods(State(submit_fn): State<SubmitFn>) -> Response {
    let render = |pods: Vec<PodStatus>| Json(Pods { pods }).into_response();
    respond(&submit_fn, |reply| AgentRequest::Pods { reply }, render).await
}

async fn attach(
    State(submit_fn): State<SubmitFn>,
    ConnectInfo(received): ConnectInfo<ReceivedDescriptor>,
    Json(request): Json<AttachRequest>,
) -> Response {
    respond(
        &submit_fn,
        |reply| AgentRequest::Attach { request, netns: received.take(), reply },
        json_or_pod_error,
    )
    .await
}

async fn detach(
    State(submit_fn): State<SubmitFn>,
    ConnectInfo(received): ConnectInfo<ReceivedDescriptor>,
    Json(request): Json<AttachmentName>,
) -> Response {
    let render = |result: Result<bool, PodError>| {
        json_or_pod_error(result.map(|was_there| Detached { was_there }))
    };
    respond(
        &submit_fn,
        |reply| AgentRequest::Detach { request, netns: received.take(), reply },
        render,
    )
    .await
}

async fn check(
    State(submit_fn): State<SubmitFn>,
    ConnectInfo(received): ConnectInfo<ReceivedDescriptor>,
    Json(request): Json<AttachmentName>,
) -> Response {
    let render = |result: Result<Vec<IpAddr>, PodError>| {
        json_or_pod_error(result.map(|addresses| Checked { addresses }))
    };
    respond(
        &submit_fn,
        |reply| AgentRequest::Check { request, netns: received.take(), reply },
        render,
    )
    .await
}

async fn release(State(submit_fn): State<SubmitFn>) -> Response {
    let render = |result: Result<Vec<PodStatus>, PodError>| {
        json_or_pod_error(result.map(|released| Released { released }))
    };
    respond(&submit_fn, |reply| AgentRequest::Release { reply }, render).await
}

fn json_or_pod_error(result: Result<impl Serialize, PodError>) -> Response {
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

async fn respond<T>(
    submit_fn: &SubmitFn,
    request: impl FnOnce(Sender<T>) -> AgentRequest,
    render: impl FnOnce(T) -> Response,
) -> Response {
    match http::submit(&**submit_fn, request).await {
        Ok(value) => render(value),
        Err(dropped) => ApiError::from(dropped).into_response(),
    }
}

fn json_or_error(result: Result<impl Serialize, ApiError>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => error.into_response(),
    }
}
