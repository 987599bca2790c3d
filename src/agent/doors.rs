//! Where questions come in: the control socket, Docker's plugin and the `http` listener.
//!
//! Without the control socket an agent does not begin. The others are not worth that: any user may take a TCP
//! port while no agent runs. What they need is tried again until it is there. The control socket is made
//! again when its file is gone: cleaners of temporary files remove what no process has opened for long.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    os::unix::net,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
};

use super::{LoopEvent, StartFailure};
use crate::{
    api::{self, SocketError},
    config::Config,
    docker,
};

/// A door that cannot be opened is tried again after so long, then twice as long each time, up to this.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// The file of the control socket is looked at so often.
const LOOK: Duration = Duration::from_secs(10);

/// The listeners of an agent. They are open before the agent waits for anything outside, its disk included:
/// an agent that cannot begin says why. The socket files are removed with it.
pub(super) struct Doors {
    _control: Arc<Mutex<api::Socket>>,
    _plugin: Option<api::Socket>,
    /// The same, once it could be opened.
    _later: Option<oneshot::Receiver<api::Socket>>,
    closed: watch::Receiver<Problems>,
    /// Whether Docker is answered no more.
    closing_plugin: watch::Sender<bool>,
}

/// What keeps doors closed.
#[derive(Clone, Debug)]
pub(super) struct Closed(watch::Receiver<Problems>);

/// The name of the control socket among the problems.
const CONTROL: &str = "control";

type Problems = BTreeMap<&'static str, String>;

impl Closed {
    /// As sentences with what helps.
    pub(super) fn problems(&self) -> Vec<String> {
        self.0.borrow().values().cloned().collect()
    }
}

impl Doors {
    /// Opens them; questions are sent to `news`. `plugin` is the socket of Docker's plugin, if the service
    /// manager has opened it.
    ///
    /// # Errors
    /// Fails where no time helps: if another agent answers at the control socket, if a socket's place is
    /// taken by something else, or if an address must not be had.
    pub(super) fn open(
        config: &Config,
        plugin: Option<net::UnixListener>,
        news: &mpsc::UnboundedSender<LoopEvent>,
    ) -> Result<Self, StartFailure> {
        let control = api::serve(&config.socket, questions(news))?;
        let control = Arc::new(Mutex::new(control));
        let (problems, closed) = watch::channel(Problems::new());
        tokio::spawn(keep_control(
            config.socket.clone(),
            Arc::downgrade(&control),
            problems.clone(),
            news.clone(),
        ));
        let mut later = None;
        let closing_plugin = watch::Sender::new(false);
        let plugin = match (plugin, &config.docker_plugin) {
            (Some(listener), _) => {
                let listener = UnixListener::from_std(listener)?;
                docker::handle(listener, closing_plugin.subscribe(), requests(news));
                None
            }
            (None, Some(path)) => match api::Socket::listen(path) {
                Ok((socket, listener)) => {
                    docker::handle(listener, closing_plugin.subscribe(), requests(news));
                    Some(socket)
                }
                Err(error @ SocketError::NotASocket(_)) => return Err(error.into()),
                Err(error) => {
                    let first = no_plugin(path, &error);
                    let (opened, socket) = oneshot::channel();
                    let (path, problems, news) = (path.clone(), problems.clone(), news.clone());
                    let closing = closing_plugin.clone();
                    tokio::spawn(async move {
                        let socket = open_plugin(&path, first, &problems, &closing, &news).await;
                        let _ = opened.send(socket);
                    });
                    later = Some(socket);
                    None
                }
            },
            (None, None) => None,
        };
        if let Some(address) = config.http {
            match listen(address, news) {
                Ok(()) => {}
                Err(error) if gets_better(&error) => {
                    let first = no_http(address, &error);
                    tokio::spawn(open_http(address, first, problems, news.clone()));
                }
                Err(error) => return Err(StartFailure::Http { address, error }),
            }
        }
        Ok(Self { _control: control, _plugin: plugin, _later: later, closed, closing_plugin })
    }

    /// Lets Docker ask nothing more; returns when all that it has asked is answered.
    pub(super) async fn close_plugin(&self) {
        self.closing_plugin.send_replace(true);
        self.closing_plugin.closed().await;
    }

    /// What keeps some of them closed, now and later.
    pub(super) fn closed(&self) -> Closed {
        Closed(self.closed.clone())
    }
}

fn questions(
    news: &mpsc::UnboundedSender<LoopEvent>,
) -> impl Fn(api::Question) -> bool + Send + Sync + 'static {
    let report = news.clone();
    move |question| report.send(LoopEvent::Api(question)).is_ok()
}

fn requests(
    news: &mpsc::UnboundedSender<LoopEvent>,
) -> impl Fn(docker::Request) -> bool + Send + Sync + 'static {
    let report = news.clone();
    move |request| report.send(LoopEvent::Docker(request)).is_ok()
}

fn listen(address: SocketAddr, news: &mpsc::UnboundedSender<LoopEvent>) -> std::io::Result<()> {
    TcpListener::bind(address).and_then(|listener| api::serve_http(listener, questions(news)))
}

/// The port may be given up, and the address may come to this host.
fn gets_better(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable)
}

fn no_http(address: SocketAddr, error: &std::io::Error) -> String {
    let port = address.port();
    format!(
        "http: {address}: {error}: metrics, health and the dashboard are not served; see who has the port \
         (ss -ltnp sport = :{port}), or choose another address; it is tried again"
    )
}

fn no_plugin(path: &Path, error: &SocketError) -> String {
    let path = path.display();
    format!("docker_plugin: {path}: Docker cannot reach this agent: {error}; it is tried again")
}

/// Listens again where the file of the control socket is gone, for as long as the socket is wanted.
async fn keep_control(
    path: PathBuf,
    control: Weak<Mutex<api::Socket>>,
    problems: watch::Sender<Problems>,
    news: mpsc::UnboundedSender<LoopEvent>,
) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(control) = control.upgrade() else { return };
        let mut socket = control.lock().unwrap_or_else(PoisonError::into_inner);
        if socket.still_exists() {
            continue;
        }
        match api::serve(&path, questions(&news)) {
            Ok(new) => {
                tracing::warn!(path = %path.display(), "control socket was removed; made again");
                *socket = new;
                problems.send_modify(|problems| _ = problems.remove(CONTROL));
            }
            Err(error) => {
                let why = format!("{error}: the control socket was removed; it is tried again");
                if problems.borrow().get(CONTROL) != Some(&why) {
                    tracing::error!("{why}");
                }
                problems.send_modify(|problems| _ = problems.insert(CONTROL, why));
            }
        }
    }
}

async fn open_http(
    address: SocketAddr,
    first: String,
    problems: watch::Sender<Problems>,
    news: mpsc::UnboundedSender<LoopEvent>,
) {
    let again = || listen(address, &news).map_err(|error| no_http(address, &error));
    open_later("http", first, &problems, again).await;
}

async fn open_plugin(
    path: &Path,
    first: String,
    problems: &watch::Sender<Problems>,
    closing: &watch::Sender<bool>,
    news: &mpsc::UnboundedSender<LoopEvent>,
) -> api::Socket {
    let again = || api::Socket::listen(path).map_err(|error| no_plugin(path, &error));
    let (socket, listener) = open_later("docker_plugin", first, problems, again).await;
    docker::handle(listener, closing.subscribe(), requests(news));
    socket
}

/// Tries again until it is open, and says meanwhile why it is not.
async fn open_later<T>(
    door: &'static str,
    first: String,
    problems: &watch::Sender<Problems>,
    mut open: impl FnMut() -> Result<T, String>,
) -> T {
    let (mut why, mut pause) = (first, AGAIN);
    loop {
        let is_news = problems.borrow().get(door) != Some(&why);
        if is_news {
            tracing::error!("{why}");
            problems.send_modify(|problems| _ = problems.insert(door, why));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_MAX);
        match open() {
            Ok(opened) => {
                tracing::info!(door, "it is open now");
                problems.send_modify(|problems| _ = problems.remove(door));
                return opened;
            }
            Err(error) => why = error,
        }
    }
}
