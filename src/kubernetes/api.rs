//! Requests to the API server with the service account of the pod. The account is read for each request, as
//! its token is replaced every hour.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::RETRY_AFTER,
};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::TcpStream;

use super::{Freshness, LookupError, RETRY, answer};
use crate::{files, worker::resolve};

/// Directory of the service account in a pod.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest pause that is granted to the API server.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Limit of an answer, in bytes.
const MAX_ANSWER_LEN: usize = 16 << 20;
/// Limit of other nodes in a list: these are enough to find the rest by gossip.
const MAX_SEEDS: usize = 100;

/// Returns the subnets of a node.
///
/// # Errors
/// Fails when the API server has no answer about the node, or none with a usable subnet.
pub(super) async fn cidrs_of(name: &str, age: Freshness) -> Result<Vec<IpNet>, LookupError> {
    let api = Api::of_this_pod().map_err(LookupError::no_answer)?;
    let version = match age {
        Freshness::Cached => "?resourceVersion=0",
        Freshness::Newest => "",
    };
    let target = format!("/api/v1/nodes/{name}{version}");
    let response = api.get(&target).await.map_err(LookupError::no_answer)?;
    let why = |what: &str| format!("https://{}:{}{target}: {what}", api.host, api.port);
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    if response.status == StatusCode::NOT_FOUND && answer::says_no_such_node(&body, name) {
        return Err(LookupError::NotAssigned(why(&response.reason())));
    }
    if !response.status.is_success() {
        return Err(LookupError::NoAnswer { why: why(&response.reason()), pause: response.pause });
    }
    answer::cidrs(&body, name)
        .ok_or_else(|| LookupError::no_answer(why("the answer is not about this node")))?
        .map_err(LookupError::NotAssigned)
}

/// Returns the addresses of up to [`MAX_SEEDS`] other nodes.
///
/// # Errors
/// Returns why they are unknown.
pub(super) async fn addresses_of_others(name: &str) -> Result<Vec<IpAddr>, String> {
    let api = Api::of_this_pod()?;
    let target = format!("/api/v1/nodes?limit={MAX_SEEDS}");
    let response = api.get(&target).await?;
    let why = |what: &str| format!("https://{}:{}{target}: {what}", api.host, api.port);
    if !response.status.is_success() {
        return Err(why(&response.reason()));
    }
    let nodes: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    answer::others(&nodes, name).ok_or_else(|| why("the answer is no list"))
}

/// The API server, and the credentials for it.
struct Api {
    host: String,
    port: u16,
    token: String,
    tls: Arc<ClientConfig>,
}

/// An answer of the API server.
struct ApiResponse {
    status: StatusCode,
    /// How long to wait before the next request.
    pause: Duration,
    body: Bytes,
}

impl ApiResponse {
    /// Returns the status and reason of an error.
    fn reason(&self) -> String {
        format!("{}: {}", self.status, answer::reason(&self.body))
    }
}

impl Api {
    /// Reads the address from the environment and the credentials from the service account.
    fn of_this_pod() -> Result<Self, String> {
        let missing = |name: &str| {
            format!("{name} is not set: this process does not seem to run in a pod of Kubernetes")
        };
        let variable = |name: &str| std::env::var(name).map_err(|_| missing(name));
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let port =
            port.parse().map_err(|_| format!("KUBERNETES_SERVICE_PORT {port:?}: no port"))?;
        let token = format!("{ACCOUNT}/token");
        let token = files::read_text(Path::new(&token), files::SMALL)
            .map_err(|error| format!("{token}: {error}"))?;
        let tls = trusting(&Path::new(ACCOUNT).join("ca.crt"))?;
        Ok(Self { host, port, token: token.trim().to_owned(), tls: Arc::new(tls) })
    }

    /// Requests a path, within [`TIMEOUT`].
    async fn get(&self, target: &str) -> Result<ApiResponse, String> {
        let failed = |error: &dyn std::fmt::Display| {
            format!("https://{}:{}{target}: {error}", self.host, self.port)
        };
        let answered = tokio::time::timeout(TIMEOUT, self.request(target)).await;
        let waited = format_args!("no answer within {TIMEOUT:?}");
        answered.map_err(|_| failed(&waited))?.map_err(|error| failed(&format_args!("{error:#}")))
    }

    /// Connects and requests a path.
    async fn request(&self, target: &str) -> anyhow::Result<ApiResponse> {
        let addresses = match self.host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, self.port)],
            Err(_) => resolve(format!("{}:{}", self.host, self.port)).await?,
        };
        let tcp = TcpStream::connect(addresses.as_slice()).await?;
        let name = ServerName::try_from(self.host.clone())?;
        let tls = tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, tcp).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        let request = Request::get(target)
            .header("host", &self.host)
            .header("accept", "application/json")
            .header("authorization", format!("Bearer {}", self.token))
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let (status, pause) = (response.status(), pause_of(&response));
        let body = Limited::new(response.into_body(), MAX_ANSWER_LEN).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        Ok(ApiResponse { status, pause, body })
    }
}

/// Returns a TLS configuration with the certificates of a file as its roots.
fn trusting(path: &Path) -> Result<ClientConfig, String> {
    let shown = path.display();
    let mut roots = RootCertStore::empty();
    let text = files::read_text(path, files::SMALL).map_err(|error| format!("{shown}: {error}"))?;
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        certificate
            .map_err(|error| error.to_string())
            .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()))
            .map_err(|error| format!("{shown}: {error}"))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// Returns the pause that the answer asks for (`Retry-After`), within limits.
fn pause_of(response: &Response<Incoming>) -> Duration {
    let header = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = header.and_then(|text| text.parse().ok()).map(Duration::from_secs);
    seconds.map_or(RETRY, |pause| pause.clamp(RETRY, MAX_RETRY_AFTER))
}
