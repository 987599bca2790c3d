//! The command line's end of the control socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
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
    #[error("{0}")]
    Refused(String),
    #[error("the agent at {} did not answer: {why}", path.display())]
    Broken { path: PathBuf, why: String },
}

pub async fn get(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::GET, target).await
}

pub async fn post(socket: &Path, target: &str) -> Result<Value, ClientError> {
    request(socket, Method::POST, target).await
}

async fn request(socket: &Path, method: Method, target: &str) -> Result<Value, ClientError> {
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
        .body(Empty::<Bytes>::new())
        .map_err(|error| broken(&error))?;
    let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
    let value: Value = serde_json::from_slice(&body).map_err(|error| broken(&error))?;
    if status.is_success() {
        return Ok(value);
    }
    let why = value["error"].as_str().map_or_else(|| status.to_string(), str::to_owned);
    Err(ClientError::Refused(why))
}
