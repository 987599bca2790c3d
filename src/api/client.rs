//! The command line's end of the control socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;

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
    #[error("{why}")]
    Refused {
        why: String,
        /// The whole answer.
        answer: Value,
    },
    #[error("the agent at {} did not answer: {why}", path.display())]
    Broken { path: PathBuf, why: String },
}

/// Runs a future on a runtime of this thread alone: clients need no more, and neither does the agent.
pub fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

pub async fn get(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::GET, target, Bytes::new()).await
}

pub async fn post(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::POST, target, Bytes::new()).await
}

pub async fn post_json(
    socket: &Path,
    target: &str,
    body: &impl Serialize,
) -> Result<Value, ClientError> {
    let body = serde_json::to_vec(body)
        .map_err(|error| ClientError::Broken { path: socket.to_owned(), why: error.to_string() })?;
    request(socket, Method::POST, target, body.into()).await
}

async fn request(
    socket: &Path,
    method: Method,
    target: &str,
    body: Bytes,
) -> Result<Value, ClientError> {
    let path = || socket.to_owned();
    let broken = |error: &dyn std::fmt::Display| ClientError::Broken {
        path: path(),
        why: error.to_string(),
    };
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::NotPermitted { path: path() },
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NoAgent { path: path() }
        }
        _ => broken(&error),
    })?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "gossamer")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|error| broken(&error))?;
    let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
    let value: Value = serde_json::from_slice(&body).map_err(|error| broken(&error))?;
    if status.is_success() {
        return Ok(value);
    }
    let why = value["error"].as_str().map_or_else(|| status.to_string(), str::to_owned);
    Err(ClientError::Refused { why, answer: value })
}
