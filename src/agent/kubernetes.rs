//! What Kubernetes says of this node: its subnet (`spec.podCIDR`), and where the others are.
//!
//! Read once at the start, with the pod's own service account, and kept on disk: whoever starts while the API
//! server is away goes on with what it was given. Nothing is written there.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::{
    config::PodCidr,
    store::{StateDir, StoreError},
};

/// Where Kubernetes puts what a pod needs to speak to it.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(2);
/// Longest answer that is read, in bytes.
const ANSWER_MAX: usize = 16 << 20;
/// So many other nodes are enough to find all by.
const SEEDS_MAX: usize = 100;

/// What a node has been given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub subnet: IpNet,
    /// Addresses of other nodes.
    pub others: Vec<IpAddr>,
}

/// Finds out what this node has been given; waits for it if need be.
pub async fn find(source: &PodCidr, name: &str, state: &StateDir) -> Result<Given, StoreError> {
    let mut said = String::new();
    loop {
        let found = match source {
            PodCidr::Value(subnet) => Ok(Given { subnet: *subnet, others: Vec::new() }),
            PodCidr::File(path) => read_file(path).map_err(Unknown::No),
            PodCidr::Api => ask(name).await,
        };
        let (why, saved) = match found {
            Ok(given) => {
                state.save_pod_cidr(given.subnet)?;
                return Ok(given);
            }
            Err(Unknown::Away(why)) => (why, state.pod_cidr()?),
            // What it had may have been given to another node meanwhile.
            Err(Unknown::No(why)) => (why, None),
        };
        match saved {
            Some(subnet) => {
                tracing::warn!(%why, %subnet, "Kubernetes was not asked: the subnet of the last run");
                return Ok(Given { subnet, others: Vec::new() });
            }
            None => {
                if why != said {
                    tracing::error!(%why, "this node's subnet is not known yet: trying again");
                    said = why;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn read_file(path: &Path) -> Result<Given, String> {
    let field = format!("pod_cidr_file {}", path.display());
    let text = fs::read_to_string(path).map_err(|error| format!("{field}: {error}"))?;
    let subnet =
        text.trim().parse().map_err(|_| format!("{field}: {:?} is no subnet", text.trim()))?;
    Ok(Given { subnet, others: Vec::new() })
}

/// Why a subnet is not known.
enum Unknown {
    /// Who was asked says so.
    No(String),
    /// Nobody could be asked.
    Away(String),
}

async fn ask(name: &str) -> Result<Given, Unknown> {
    let api = Api::of_this_pod().map_err(Unknown::No)?;
    let node = api.get(&format!("/api/v1/nodes/{name}")).await?;
    let text = node["spec"]["podCIDR"].as_str();
    let text = text.ok_or_else(|| Unknown::No(format!("node {name} has no spec.podCIDR yet")))?;
    let subnet = text
        .parse()
        .map_err(|_| Unknown::No(format!("node {name}: spec.podCIDR {text:?} is no subnet")))?;
    // Those that are known from before will do.
    let nodes = api.get(&format!("/api/v1/nodes?limit={SEEDS_MAX}")).await.unwrap_or_default();
    Ok(Given { subnet, others: others(&nodes, name) })
}

fn others(nodes: &Value, name: &str) -> Vec<IpAddr> {
    let items = nodes["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let others = items.iter().filter(|node| node["metadata"]["name"] != name);
    let internal = |node: &Value| {
        let addresses = node["status"]["addresses"].as_array()?;
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP")?;
        internal["address"].as_str()?.parse().ok()
    };
    others.filter_map(internal).collect()
}

struct Api {
    host: String,
    port: u16,
    token: String,
    tls: Arc<ClientConfig>,
}

impl Api {
    fn of_this_pod() -> Result<Self, String> {
        let missing = |name: &str| format!("{name} is not set: is this a pod of Kubernetes?");
        let variable = |name: &str| std::env::var(name).map_err(|_| missing(name));
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let port =
            port.parse().map_err(|_| format!("KUBERNETES_SERVICE_PORT {port:?}: no port"))?;
        let file = |name: &str| -> (PathBuf, String) {
            let path = Path::new(ACCOUNT).join(name);
            let shown = path.display().to_string();
            (path, shown)
        };
        let (path, shown) = file("token");
        let token = fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
        let (path, shown) = file("ca.crt");
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(path);
        for certificate in certificates.map_err(|error| format!("{shown}: {error}"))? {
            certificate
                .map_err(|error| error.to_string())
                .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()))
                .map_err(|error| format!("{shown}: {error}"))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { host, port, token: token.trim().to_owned(), tls: Arc::new(tls) })
    }

    async fn get(&self, target: &str) -> Result<Value, Unknown> {
        let failed = |error: &dyn std::fmt::Display| {
            format!("https://{}:{}{target}: {error}", self.host, self.port)
        };
        let asked = tokio::time::timeout(PATIENCE, self.request(target));
        let answer = asked.await.map_err(|_| Unknown::Away(failed(&"no answer")))?;
        match answer.map_err(|error| Unknown::Away(failed(&error)))? {
            (status, body) if status.is_success() => {
                serde_json::from_slice(&body).map_err(|error| Unknown::Away(failed(&error)))
            }
            (status, body) => {
                let said = String::from_utf8_lossy(&body);
                let why = failed(&format_args!("{status}: {}", said.trim()));
                Err(if status.is_server_error() { Unknown::Away(why) } else { Unknown::No(why) })
            }
        }
    }

    async fn request(&self, target: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
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
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        Ok((status, body))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_other_nodes_are_found_by_their_internal_addresses() {
        let node = |name: &str, kind: &str, address: &str| {
            let addresses = json!([{ "type": kind, "address": address }]);
            json!({ "metadata": { "name": name }, "status": { "addresses": addresses } })
        };
        let nodes = json!({ "items": [
            node("me", "InternalIP", "10.0.0.1"),
            node("other", "InternalIP", "10.0.0.2"),
            node("outside", "ExternalIP", "203.0.113.3"),
        ] });
        assert_eq!(others(&nodes, "me"), [IpAddr::from([10, 0, 0, 2])]);
        assert!(others(&Value::Null, "me").is_empty());
    }
}
