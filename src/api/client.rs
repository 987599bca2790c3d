//! The client side of the control socket.

use std::{
    fmt::Display,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::net::UnixStream;

use super::{ApiError, Event};
use crate::{config::Instance, http::Carrier, wire::visible};

/// Longest part of a non-JSON response, in characters, that an error message quotes.
const MAX_QUOTED_CHARS: usize = 200;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket.
    #[error(
        "no agent at {}: is it running? start it with `gossamer agent{}`, \
         or name its socket with --socket", path.display(), instance_option(path)
    )]
    NoAgent {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not connect to the socket.
    #[error("not permitted to use {}: run as the user that runs the agent (root?)", path.display())]
    NotPermitted {
        /// The socket.
        path: PathBuf,
    },
    /// The agent dropped the request, or is stopping.
    #[error("{0}")]
    NoAnswer(ApiError),
    /// The agent refused the request.
    #[error("{why}")]
    Refused {
        /// The reason.
        why: String,
        /// The whole response.
        answer: Value,
    },
    /// Client and agent are of different versions, and one of them does not know the request or response
    /// of the other.
    #[error(
        "the agent is version {agent}, this program {}; restart the agent ({why})",
        own_version(agent)
    )]
    OtherVersion {
        /// Version of the agent.
        agent: String,
        /// What was not understood.
        why: String,
    },
    /// The connection failed, or another program listens on the socket.
    #[error("the agent at {} did not answer: {why}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The error.
        why: String,
    },
}

/// Returns the option that names the instance of this socket.
fn instance_option(socket: &Path) -> String {
    Instance::of_socket(socket).map_or_else(String::new, |instance| instance.option())
}

impl ClientError {
    fn broken(socket: &Path, error: &dyn Display) -> Self {
        Self::Broken { path: socket.to_owned(), why: error.to_string() }
    }
}

/// Sends a GET request and returns the JSON of the response.
///
/// # Errors
/// Fails if the agent is not reachable or refuses.
pub async fn get(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::GET, target, Bytes::new(), None).await
}

/// Sends a GET request and returns the response as a type of the API.
///
/// # Errors
/// Fails if the agent is not reachable, refuses, or is of a version whose response is another.
pub async fn get_as<T: DeserializeOwned>(socket: &Path, target: &str) -> Result<T, ClientError> {
    typed(socket, target, get(socket, target).await?).await
}

/// Returns a response as a type of the API.
///
/// # Errors
/// Fails if the agent is of a version whose response is another.
pub async fn typed<T: DeserializeOwned>(
    socket: &Path,
    target: &str,
    value: Value,
) -> Result<T, ClientError> {
    match serde_json::from_value(value) {
        Ok(value) => Ok(value),
        Err(error) => Err(other_version(socket, format!("{target}: {error}")).await),
    }
}

/// Sends a POST request without a body.
///
/// # Errors
/// Fails if the agent is not reachable or refuses.
pub async fn post(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::POST, target, Bytes::new(), None).await
}

/// Sends a POST request without a body and returns the response as a type of the API.
///
/// # Errors
/// Fails if the agent is not reachable, refuses, or is of a version whose response is another.
pub async fn post_as<T: DeserializeOwned>(socket: &Path, target: &str) -> Result<T, ClientError> {
    typed(socket, target, post(socket, target).await?).await
}

/// Sends a POST request with a JSON body and returns the response as a type of the API.
///
/// # Errors
/// Fails if the agent is not reachable, refuses, or is of a version whose response is another.
pub async fn post_json_as<T: DeserializeOwned>(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
) -> Result<T, ClientError> {
    typed(socket, target, post_json(socket, target, body).await?).await
}

/// Sends a POST request with a JSON body.
///
/// # Errors
/// Fails if the agent is not reachable or refuses.
pub async fn post_json(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
) -> Result<Value, ClientError> {
    post_with(socket, target, body, None).await
}

/// Sends a POST request with a JSON body and optionally a file descriptor.
///
/// # Errors
/// Fails if the agent is not reachable or refuses.
pub async fn post_with(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
    descriptor: Option<OwnedFd>,
) -> Result<Value, ClientError> {
    let body = serde_json::to_vec(body).map_err(|error| ClientError::broken(socket, &error))?;
    request(socket, Method::POST, target, body.into(), descriptor).await
}

/// Calls `each` for every event of a stream (server-sent events) until the stream ends.
///
/// # Errors
/// Fails if the agent is not reachable or refuses, if it is of a version with other events, or if the
/// connection breaks.
pub async fn follow(
    socket: &Path,
    target: &str,
    mut each: impl FnMut(&Event),
) -> Result<(), ClientError> {
    let response = open(socket, Method::GET, target, Bytes::new(), None).await?;
    if !response.status().is_success() {
        return read(socket, target, response).await.map(drop);
    }
    let mut body = response.into_body();
    let mut buffered = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::broken(socket, &error))?;
        buffered.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = buffered.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffered.drain(..=end).collect();
            match line.strip_prefix(b"data: ").map(serde_json::from_slice) {
                Some(Ok(event)) => each(&event),
                Some(Err(error)) => {
                    return Err(other_version(socket, format!("{target}: {error}")).await);
                }
                // An empty line or a comment.
                None => {}
            }
        }
    }
    Ok(())
}

async fn request(
    socket: &Path,
    method: Method,
    target: &str,
    body: Bytes,
    descriptor: Option<OwnedFd>,
) -> Result<Value, ClientError> {
    read(socket, target, open(socket, method, target, body, descriptor).await?).await
}

async fn open(
    socket: &Path,
    method: Method,
    target: &str,
    body: Bytes,
    descriptor: Option<OwnedFd>,
) -> Result<Response<Incoming>, ClientError> {
    let broken = |error: &dyn Display| ClientError::broken(socket, error);
    let path = || socket.to_owned();
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::NotPermitted { path: path() },
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NoAgent { path: path() }
        }
        _ => broken(&error),
    })?;
    let stream = TokioIo::new(Carrier::new(stream, descriptor));
    let (mut sender, connection) =
        http1::handshake(stream).await.map_err(|error| broken(&error))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "gossamer")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|error| broken(&error))?;
    sender.send_request(request).await.map_err(|error| broken(&error))
}

/// Returns the id of the process that listens on the socket; `None` if no process does, or if it is not
/// visible from this PID namespace.
pub fn listener_pid(socket: &Path) -> Option<Pid> {
    let stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
    let pid = getsockopt(&stream, PeerCredentials).ok()?.pid();
    (pid > 0).then(|| Pid::from_raw(pid))
}

/// Returns the error for a response that this version does not understand.
pub async fn other_version(socket: &Path, why: String) -> ClientError {
    match version(socket).await {
        Some(agent) => ClientError::OtherVersion { agent, why },
        // The listener is not an agent.
        None => ClientError::broken(socket, &why),
    }
}

/// The field that the status has in every version.
#[derive(Deserialize)]
struct Versioned {
    version: String,
}

/// Queries the agent's version.
async fn version(socket: &Path) -> Option<String> {
    let response = open(socket, Method::GET, "/v1/status", Bytes::new(), None).await.ok()?;
    let body = response.into_body().collect().await.ok()?.to_bytes();
    serde_json::from_slice(&body).ok().map(|Versioned { version }| version)
}

/// Returns this program's version, for a message that also has the agent's.
pub fn own_version(agent: &str) -> String {
    let own = env!("CARGO_PKG_VERSION");
    if own == agent { format!("{own}, of another build") } else { own.to_owned() }
}

async fn read(
    socket: &Path,
    target: &str,
    response: Response<Incoming>,
) -> Result<Value, ClientError> {
    let broken = |error: &dyn Display| ClientError::broken(socket, error);
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
    let value: Value = match serde_json::from_slice(&body) {
        Ok(value) => value,
        // The agent answers in JSON. Plain text or an empty body comes from the HTTP library, for an
        // unknown path or request.
        Err(_) => {
            let text = String::from_utf8_lossy(&body);
            let text: String = text.chars().take(MAX_QUOTED_CHARS).collect();
            let why = format!("{target}: {status} {}", visible(text.trim()));
            return Err(other_version(socket, why.trim_end().to_owned()).await);
        }
    };
    if status.is_success() {
        return Ok(value);
    }
    match serde_json::from_value::<ApiError>(value.clone()) {
        Ok(error) if error.code.is_transient() => Err(ClientError::NoAnswer(error)),
        Ok(error) => Err(ClientError::Refused { why: error.message, answer: value }),
        Err(_) => Err(ClientError::Refused { why: status.to_string(), answer: value }),
    }
}
