//! Questions to the API server, with the pod's own service account. The account is read each time, for its
//! token is replaced every hour.

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

use super::{Age, RETRY, Unknown, answer};
use crate::{files, worker::resolve};

/// Where Kubernetes puts what a pod needs to speak to it.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest pause that the API server may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Longest answer that is read, in bytes.
const ANSWER_MAX: usize = 16 << 20;
/// So many other nodes are enough to find all by.
const SEEDS_MAX: usize = 100;

/// The subnets of a node.
pub(super) async fn cidrs_of(name: &str, age: Age) -> Result<Vec<IpNet>, Unknown> {
    let api = Api::of_this_pod().map_err(Unknown::unanswered)?;
    let version = match age {
        Age::Cached => "?resourceVersion=0",
        Age::Newest => "",
    };
    let target = format!("/api/v1/nodes/{name}{version}");
    let got = api.get(&target).await.map_err(Unknown::unanswered)?;
    let why = |what: &str| format!("https://{}:{}{target}: {what}", api.host, api.port);
    let body: Value = serde_json::from_slice(&got.body).unwrap_or_default();
    if got.status == StatusCode::NOT_FOUND && answer::says_no_such_node(&body, name) {
        return Err(Unknown::Said(why(&got.reason())));
    }
    if !got.status.is_success() {
        return Err(Unknown::Unanswered { why: why(&got.reason()), pause: got.pause });
    }
    answer::cidrs(&body, name)
        .ok_or_else(|| Unknown::unanswered(why("the answer is not about this node")))?
        .map_err(Unknown::Said)
}

/// Addresses of other nodes: enough of them to find all by.
///
/// # Errors
/// Why they are not known.
pub(super) async fn addresses_of_others(name: &str) -> Result<Vec<IpAddr>, String> {
    let api = Api::of_this_pod()?;
    let target = format!("/api/v1/nodes?limit={SEEDS_MAX}");
    let got = api.get(&target).await?;
    let why = |what: &str| format!("https://{}:{}{target}: {what}", api.host, api.port);
    if !got.status.is_success() {
        return Err(why(&got.reason()));
    }
    let nodes: Value = serde_json::from_slice(&got.body).unwrap_or_default();
    answer::others(&nodes, name).ok_or_else(|| why("the answer is no list"))
}

struct Api {
    host: String,
    port: u16,
    token: String,
    tls: Arc<ClientConfig>,
}

/// What was answered.
struct Got {
    status: StatusCode,
    /// How long to wait before the next question.
    pause: Duration,
    body: Bytes,
}

impl Got {
    fn reason(&self) -> String {
        format!("{}: {}", self.status, answer::reason(&self.body))
    }
}

impl Api {
    fn of_this_pod() -> Result<Self, String> {
        let missing = |name: &str| format!("{name} is not set: is this a pod of Kubernetes?");
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

    async fn get(&self, target: &str) -> Result<Got, String> {
        let failed = |error: &dyn std::fmt::Display| {
            format!("https://{}:{}{target}: {error}", self.host, self.port)
        };
        let asked = tokio::time::timeout(TIMEOUT, self.request(target)).await;
        let waited = format_args!("no answer within {TIMEOUT:?}");
        asked.map_err(|_| failed(&waited))?.map_err(|error| failed(&format_args!("{error:#}")))
    }

    async fn request(&self, target: &str) -> anyhow::Result<Got> {
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
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        Ok(Got { status, pause, body })
    }
}

/// TLS with the certificates of a file as its roots.
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

/// A busy API server says when it is to be asked again.
fn pause_of(response: &Response<Incoming>) -> Duration {
    let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let seconds = asked.and_then(|text| text.parse().ok()).map(Duration::from_secs);
    seconds.map_or(RETRY, |pause| pause.clamp(RETRY, PAUSE_MAX))
}
