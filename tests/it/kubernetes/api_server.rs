//! A simulated API server: nodes, errors and delays as the real one has them.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};

/// The lab's router.
const ADDRESS: &str = "10.99.0.1";
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";
/// Longer than any client waits for an answer.
const SILENT_DURATION: Duration = Duration::from_secs(60);

/// How requests of one kind are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    Well,
    /// An error of the API server itself, with this status.
    Fails(u16),
    /// No answer for a long time.
    Silent,
    /// The page of a proxy in front of the server, with status 404.
    ProxyPage,
    /// The object of another node.
    Mistaken,
    /// The connection ends in the middle of the answer.
    Cut,
}

struct Shared {
    nodes: BTreeMap<String, Value>,
    /// The state of nodes in the server's cache.
    cached: BTreeMap<String, Value>,
    get: Behavior,
    list: Behavior,
    /// Number of requests about one node.
    asked: usize,
}

/// Serves until the process of the test ends.
#[derive(Clone)]
pub struct ApiServer {
    pub port: u16,
    shared: Arc<Mutex<Shared>>,
}

impl ApiServer {
    /// Starts a server without nodes, and writes a service account to the place where pods have theirs.
    pub fn start() -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed([ADDRESS.to_owned()])?;
        fs::create_dir_all(ACCOUNT)?;
        let certificate = data_encoding::BASE64.encode(made.cert.der());
        let certificate =
            format!("-----BEGIN CERTIFICATE-----\n{certificate}\n-----END CERTIFICATE-----\n");
        fs::write(Path::new(ACCOUNT).join("ca.crt"), certificate)?;
        fs::write(Path::new(ACCOUNT).join("token"), "a-token\n")?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.map_err(anyhow::Error::msg)?)?;
        let tls = Arc::new(tls);
        let listener = TcpListener::bind((ADDRESS, 0))?;
        let (nodes, cached) = (BTreeMap::new(), BTreeMap::new());
        let shared = Shared { nodes, cached, get: Behavior::Well, list: Behavior::Well, asked: 0 };
        let server =
            Self { port: listener.local_addr()?.port(), shared: Arc::new(Mutex::new(shared)) };
        let serving = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (serving, tls) = (serving.clone(), tls.clone());
                thread::spawn(move || {
                    if let Ok(session) = rustls::ServerConnection::new(tls) {
                        let _ = serving.serve(rustls::StreamOwned::new(session, stream));
                    }
                });
            }
        });
        Ok(server)
    }

    /// Registers a node, and replaces an existing one of that name.
    pub fn register(&self, name: &str, ip: &str, cidrs: &[&str]) {
        let mut spec = json!({});
        if let [first, ..] = cidrs {
            spec = json!({ "podCIDR": first, "podCIDRs": cidrs });
        }
        let node = json!({
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": { "name": name },
            "spec": spec,
            "status": { "addresses": [
                { "type": "Hostname", "address": name },
                { "type": "InternalIP", "address": ip },
            ] },
        });
        self.lock().nodes.insert(name.to_owned(), node);
    }

    pub fn delete(&self, name: &str) {
        self.lock().nodes.remove(name);
    }

    /// Keeps the current nodes as the answer to requests that allow a stale one.
    pub fn freeze_cache(&self) {
        let mut shared = self.lock();
        shared.cached = shared.nodes.clone();
    }

    pub fn answer(&self, get: Behavior, list: Behavior) {
        let mut shared = self.lock();
        (shared.get, shared.list) = (get, list);
    }

    /// Returns how often it was queried about a node.
    pub fn count(&self) -> usize {
        self.lock().asked
    }

    /// Returns the environment variables of a pod.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        variables(self.port)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve<S: Read + Write>(&self, stream: S) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut lines = Vec::new();
        let mut line = String::new();
        while stream.read_line(&mut line)? > 2 {
            lines.push(std::mem::take(&mut line).trim().to_owned());
        }
        let first = lines.first().cloned().unwrap_or_default();
        let target = first.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let name = path.strip_prefix("/api/v1/nodes/");
        let allowed = lines.iter().any(|line| line == "authorization: Bearer a-token");
        let (mood, (status, body)) = {
            let mut shared = self.lock();
            shared.asked += usize::from(name.is_some());
            let mood = if name.is_some() { shared.get } else { shared.list };
            let answer = match (mood, name) {
                _ if !allowed => failure(401, "Unauthorized", ""),
                (Behavior::Fails(code), _) => failure(code, "the test says no", ""),
                (Behavior::ProxyPage, _) => (404, "<html>no such page</html>".to_owned()),
                (Behavior::Mistaken, _) => (200, json!({ "kind": "Node", "spec": {} }).to_string()),
                (_, Some(name)) => {
                    let old = shared.cached.get(name).filter(|_| query == "resourceVersion=0");
                    let found = old.or_else(|| shared.nodes.get(name));
                    let missing = || failure(404, &format!("nodes {name:?} not found"), name);
                    found.map_or_else(missing, |node| (200, node.to_string()))
                }
                (_, None) => {
                    let items: Vec<&Value> = shared.nodes.values().collect();
                    (200, json!({ "kind": "NodeList", "items": items }).to_string())
                }
            };
            (mood, answer)
        };
        if mood == Behavior::Silent {
            thread::sleep(SILENT_DURATION);
        }
        let length = body.len();
        let head = format!("HTTP/1.1 {status} Some\r\ncontent-length: {length}\r\n\r\n");
        let sent = if mood == Behavior::Cut { &body[..length / 2] } else { &body };
        let stream = stream.get_mut();
        stream.write_all((head + sent).as_bytes())?;
        stream.flush()
    }
}

/// Returns the environment of a pod whose API server is at this port.
pub fn variables(port: u16) -> [(&'static str, String); 2] {
    [("KUBERNETES_SERVICE_HOST", ADDRESS.to_owned()), ("KUBERNETES_SERVICE_PORT", port.to_string())]
}

/// Returns a port at which no program listens.
pub fn closed_port() -> u16 {
    let listener = TcpListener::bind((ADDRESS, 0)).expect("a port");
    let address = listener.local_addr().expect("its address");
    drop(listener);
    assert!(TcpStream::connect(address).is_err());
    address.port()
}

/// Returns an error in the API server's format.
fn failure(code: u16, message: &str, name: &str) -> (u16, String) {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": { "name": name, "kind": "nodes" },
        "code": code,
    });
    (code, status.to_string())
}
