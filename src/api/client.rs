//! The command line's end of the control socket.

use std::{
    fmt::Display,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;

use super::descriptor::Carrier;
use crate::wire::visible;

/// Characters that are shown of an answer that is no JSON.
const SHOWN: usize = 200;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no agent at {}: is it running? start it with `gossamer agent`, \
         or name its socket with --socket", path.display()
    )]
    NoAgent { path: PathBuf },
    #[error("not permitted to use {}: run as the user that runs the agent (root?)", path.display())]
    NotPermitted { path: PathBuf },
    #[error("the agent gave no answer: it is ending, or has too much to do; ask again")]
    NoAnswer,
    #[error("{why}")]
    Refused {
        why: String,
        /// The whole answer.
        answer: Value,
    },
    /// One of the two does not know what the other one says.
    #[error(
        "the agent is version {agent}, this program {}; restart the agent ({why})",
        own_version(agent)
    )]
    OtherVersion { agent: String, why: String },
    #[error("the agent at {} did not answer: {why}", path.display())]
    Broken { path: PathBuf, why: String },
}

impl ClientError {
    fn broken(socket: &Path, error: &dyn Display) -> Self {
        Self::Broken { path: socket.to_owned(), why: error.to_string() }
    }
}

/// Runs a future on a runtime of this thread alone: clients need no more, and neither does the agent.
pub fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(future);
    // Work that blocks may hang; tasks are dropped in any case, and their sockets with them.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(result)
}

pub async fn get(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::GET, target, Bytes::new(), None).await
}

pub async fn post(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::POST, target, Bytes::new(), None).await
}

pub async fn post_json(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
) -> Result<Value, ClientError> {
    post_with(socket, target, body, None).await
}

/// The same, with a file descriptor for the agent.
pub async fn post_with(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
    descriptor: Option<OwnedFd>,
) -> Result<Value, ClientError> {
    let body = serde_json::to_vec(body).map_err(|error| ClientError::broken(socket, &error))?;
    request(socket, Method::POST, target, body.into(), descriptor).await
}

/// Hands over each event of a stream (server-sent events) until it ends.
pub async fn follow(
    socket: &Path,
    target: &str,
    mut each: impl FnMut(&Value),
) -> Result<(), ClientError> {
    let response = open(socket, Method::GET, target, Bytes::new(), None).await?;
    if !response.status().is_success() {
        return read(socket, target, response).await.map(drop);
    }
    let mut body = response.into_body();
    let mut kept = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::broken(socket, &error))?;
        kept.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = kept.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = kept.drain(..=end).collect();
            let event = line.strip_prefix(b"data: ");
            if let Some(Ok(event)) = event.map(serde_json::from_slice) {
                each(&event);
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

/// What is said where one of the two does not know what the other one says.
pub async fn other_version(socket: &Path, why: String) -> ClientError {
    match version(socket).await {
        Some(agent) => ClientError::OtherVersion { agent, why },
        // What listens there is no agent.
        None => ClientError::broken(socket, &why),
    }
}

/// That of the agent: all versions tell it in their status.
async fn version(socket: &Path) -> Option<String> {
    let response = open(socket, Method::GET, "/v1/status", Bytes::new(), None).await.ok()?;
    let body = response.into_body().collect().await.ok()?.to_bytes();
    let status: Value = serde_json::from_slice(&body).ok()?;
    status["version"].as_str().map(str::to_owned)
}

/// This program's, beside that of an agent.
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
        // The agent itself answers in JSON. In plain text or without a word it says that it does not know
        // the path, or the request.
        Err(_) => {
            let text = String::from_utf8_lossy(&body);
            let text: String = text.chars().take(SHOWN).collect();
            let why = format!("{target}: {status} {}", visible(text.trim()));
            return Err(other_version(socket, why.trim_end().to_owned()).await);
        }
    };
    if status.is_success() {
        return Ok(value);
    }
    if status == StatusCode::SERVICE_UNAVAILABLE && value["ask_again"] == true {
        return Err(ClientError::NoAnswer);
    }
    let why = value["error"].as_str().map_or_else(|| status.to_string(), str::to_owned);
    Err(ClientError::Refused { why, answer: value })
}
