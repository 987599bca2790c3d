//! The listeners of an agent: the control socket, the socket of Docker's plugin and the `http` address.
//!
//! An agent does not start without the control socket. The other two are opened later if they cannot be
//! opened at start, because any user may take a TCP port while no agent runs. The control socket is created
//! again when its file is gone: cleaners of temporary files remove files that no process has opened for a
//! long time.
//!
//! The `http` listener has a thread and a runtime of its own. Any user may read from it without end, and the
//! answers of a large cluster are long: writing them must not delay gossip.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    os::unix::net,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
};

use crate::{
    agent::{LoopEvent, StartFailure, signals::Signals},
    api,
    config::Config,
    docker,
    http::{Socket, SocketError},
    model::{Problem, ProblemCode},
    runtime,
    worker::Thread,
};

/// Pause after the first failed attempt to open a listener. It doubles up to [`MAX_RETRY_PAUSE`].
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between attempts to open a listener.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(30);
/// Pause between attempts to open the control socket.
const CONTROL_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait for resources that an earlier process still holds: it removes what it has in the kernel
/// before it ends, and a process whose disk hangs keeps its files and sockets after it was killed.
pub(super) const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the end of the thread that serves `http`.
const HTTP_END_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between checks that the file of the control socket exists.
const SOCKET_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// The open listeners. They are opened before the agent waits for its disk or for other hosts, so that an
/// agent that cannot start can report why. Dropping them removes the socket files.
pub(super) struct Listeners {
    _control: Arc<Mutex<Socket>>,
    _plugin: Option<Socket>,
    /// The socket of the plugin, once a later attempt has opened it.
    _pending_plugin: Option<oneshot::Receiver<Socket>>,
    /// Why listeners are not open.
    problems: watch::Receiver<Problems>,
    /// Set to stop accepting requests of Docker.
    closing_plugin: watch::Sender<bool>,
    http: Option<HttpThread>,
}

/// The thread that serves the `http` address.
struct HttpThread {
    thread: Thread,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

/// Why listeners are not open, updated while the agent runs.
#[derive(Clone, Debug)]
pub(super) struct ListenerProblems(watch::Receiver<Problems>);

/// Key of the control socket in [`Problems`].
const CONTROL: &str = "control";

/// Problems by the name of the listener.
type Problems = BTreeMap<&'static str, Problem>;

impl ListenerProblems {
    /// Returns one problem for each listener that is not open.
    pub(super) fn problems(&self) -> Vec<Problem> {
        self.0.borrow().values().cloned().collect()
    }
}

/// Opens the control socket, and sends requests to `events`. Waits for a while if an agent listens on it,
/// which may be an earlier one that is ending. Returns `None` if a signal ends the agent first.
///
/// # Errors
/// Fails if another agent keeps listening, if the path is not a socket, or if the kernel refuses.
pub(super) async fn open_control(
    config: &Config,
    signals: &mut Signals,
    events: &mpsc::UnboundedSender<LoopEvent>,
) -> Result<Option<Socket>, SocketError> {
    let begun = Instant::now();
    let mut is_told = false;
    loop {
        match api::serve(&config.socket, request_sender(events)) {
            Err(error @ SocketError::InUse(_)) if begun.elapsed() < PREDECESSOR_TIMEOUT => {
                if !std::mem::replace(&mut is_told, true) {
                    let seconds = PREDECESSOR_TIMEOUT.as_secs();
                    tracing::warn!(
                        "waiting up to {seconds} s for an earlier agent to end: {error}"
                    );
                }
            }
            opened => return opened.map(Some),
        }
        tokio::select! {
            () = signals.end.wait() => return Ok(None),
            () = tokio::time::sleep(CONTROL_RETRY_PAUSE) => {}
        }
    }
}

impl Listeners {
    /// Opens the other listeners, and sends requests to `events`. `plugin` is the socket of Docker's plugin,
    /// if the service manager has opened it.
    ///
    /// # Errors
    /// Fails where waiting does not help: a file that is not a socket has the path of Docker's, or the `http`
    /// address may not be used.
    pub(super) fn open(
        config: &Config,
        control: Socket,
        plugin: Option<net::UnixListener>,
        events: &mpsc::UnboundedSender<LoopEvent>,
    ) -> Result<Self, StartFailure> {
        let control = Arc::new(Mutex::new(control));
        let (problems, reader) = watch::channel(Problems::new());
        tokio::spawn(keep_control(
            config.socket.clone(),
            Arc::downgrade(&control),
            problems.clone(),
            events.clone(),
        ));
        let mut pending_plugin = None;
        let closing_plugin = watch::Sender::new(false);
        let plugin = match (plugin, &config.docker_plugin) {
            (Some(listener), _) => {
                let listener = UnixListener::from_std(listener)?;
                docker::handle(listener, closing_plugin.subscribe(), docker_sender(events));
                None
            }
            (None, Some(path)) => match Socket::listen(path) {
                Ok((socket, listener)) => {
                    docker::handle(listener, closing_plugin.subscribe(), docker_sender(events));
                    Some(socket)
                }
                Err(error @ SocketError::NotASocket(_)) => return Err(error.into()),
                Err(error) => {
                    let first = plugin_problem(path, &error);
                    let (opened, socket) = oneshot::channel();
                    let (path, problems, events) = (path.clone(), problems.clone(), events.clone());
                    let closing = closing_plugin.clone();
                    tokio::spawn(async move {
                        let socket = open_plugin(&path, first, &problems, &closing, &events).await;
                        let _ = opened.send(socket);
                    });
                    pending_plugin = Some(socket);
                    None
                }
            },
            (None, None) => None,
        };
        let http = config.http.map(|address| HttpThread::start(address, problems, events));
        Ok(Self {
            _control: control,
            _plugin: plugin,
            _pending_plugin: pending_plugin,
            problems: reader,
            closing_plugin,
            http: http.transpose()?,
        })
    }

    /// Stops accepting requests of Docker, and returns when all accepted ones are answered.
    pub(super) async fn close_plugin(&self) {
        self.closing_plugin.send_replace(true);
        self.closing_plugin.closed().await;
    }

    /// Closes the listeners. The `http` address is free again afterwards, for an agent that starts again.
    pub(super) async fn close(self) {
        let Some(HttpThread { thread, _stop: stop }) = self.http else { return };
        drop(stop);
        if let Err(name) = thread.join(Instant::now() + HTTP_END_TIMEOUT).await {
            tracing::warn!(thread = name, "thread has not ended");
        }
    }

    /// Returns the reasons why listeners are not open, now and later.
    pub(super) fn problems(&self) -> ListenerProblems {
        ListenerProblems(self.problems.clone())
    }
}

/// Returns a function that sends a request of the API to the event loop; false once the loop has ended.
fn request_sender(
    events: &mpsc::UnboundedSender<LoopEvent>,
) -> impl Fn(api::AgentRequest) -> bool + Send + Sync + 'static {
    let report = events.clone();
    move |request| report.send(LoopEvent::Api(request)).is_ok()
}

/// Returns a function that sends a request of Docker to the event loop; false once the loop has ended.
fn docker_sender(
    events: &mpsc::UnboundedSender<LoopEvent>,
) -> impl Fn(docker::Request) -> bool + Send + Sync + 'static {
    let report = events.clone();
    move |request| report.send(LoopEvent::Docker(request)).is_ok()
}

impl HttpThread {
    /// Listens at the address, now or in later attempts, and starts the thread.
    ///
    /// # Errors
    /// Fails if the address may not be used, or if the system cannot create a thread.
    fn start(
        address: SocketAddr,
        problems: watch::Sender<Problems>,
        events: &mpsc::UnboundedSender<LoopEvent>,
    ) -> Result<Self, StartFailure> {
        let bound = match TcpListener::bind(address) {
            Ok(listener) => Ok(listener),
            Err(error) if is_temporary(&error) => Err(http_problem(address, &error)),
            Err(error) => return Err(StartFailure::Http { address, error }),
        };
        let sender = request_sender(events);
        let serve = async move {
            let listener = match bound {
                Ok(listener) => listener,
                Err(first) => {
                    let open = || {
                        TcpListener::bind(address).map_err(|error| http_problem(address, &error))
                    };
                    retry_until_open("http", first, &problems, open).await
                }
            };
            if let Err(error) = api::serve_http(listener, sender).await {
                tracing::error!(%address, %error, "http listener failed");
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let work = async move {
            tokio::select! {
                // No value is ever sent: the channel closes.
                _ = stopped => {}
                () = serve => {}
            }
        };
        let run = move || {
            if let Err(error) = runtime::block_on(work) {
                tracing::error!(%address, %error, "http listener has no runtime");
            }
        };
        Ok(Self { thread: Thread::start("http", run)?, _stop: stop })
    }
}

/// Whether a later attempt may succeed: the port is in use, or the address is not on this host yet.
fn is_temporary(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable)
}

fn http_problem(address: SocketAddr, error: &std::io::Error) -> Problem {
    let port = address.port();
    let what = format!(
        "http: {address}: {error}: metrics, health and the dashboard are not served; retrying"
    );
    let fix = format!(
        "find the program that has the port (ss -ltnp sport = :{port}), or choose another address"
    );
    Problem::new(ProblemCode::Listener, "http", what, fix)
}

fn plugin_problem(path: &Path, error: &SocketError) -> Problem {
    let path = path.display();
    let what = format!("docker_plugin: {path}: Docker cannot reach this agent: {error}; retrying");
    Problem::new(ProblemCode::Listener, "docker_plugin", what, "")
}

/// Creates the control socket again when its file is gone, until the socket is dropped.
async fn keep_control(
    path: PathBuf,
    control: Weak<Mutex<Socket>>,
    problems: watch::Sender<Problems>,
    events: mpsc::UnboundedSender<LoopEvent>,
) {
    loop {
        tokio::time::sleep(SOCKET_CHECK_INTERVAL).await;
        let Some(control) = control.upgrade() else { return };
        let mut socket = control.lock().unwrap_or_else(PoisonError::into_inner);
        if socket.still_exists() {
            continue;
        }
        match api::serve(&path, request_sender(&events)) {
            Ok(new) => {
                tracing::warn!(path = %path.display(), "control socket created again: its file was gone");
                *socket = new;
                problems.send_modify(|problems| _ = problems.remove(CONTROL));
            }
            Err(error) => {
                let what = format!(
                    "{error}: the file of the control socket is gone, and cannot be created again; retrying"
                );
                let why = Problem::new(ProblemCode::Listener, CONTROL, what, "");
                if problems.borrow().get(CONTROL) != Some(&why) {
                    tracing::error!("{why}");
                }
                problems.send_modify(|problems| _ = problems.insert(CONTROL, why));
            }
        }
    }
}

/// Repeats the attempt to open the socket of the plugin until it succeeds.
async fn open_plugin(
    path: &Path,
    first: Problem,
    problems: &watch::Sender<Problems>,
    closing: &watch::Sender<bool>,
    events: &mpsc::UnboundedSender<LoopEvent>,
) -> Socket {
    let open = || Socket::listen(path).map_err(|error| plugin_problem(path, &error));
    let (socket, listener) = retry_until_open("docker_plugin", first, problems, open).await;
    docker::handle(listener, closing.subscribe(), docker_sender(events));
    socket
}

/// Calls `open` until it succeeds, and publishes meanwhile why it fails.
async fn retry_until_open<T>(
    listener: &'static str,
    first: Problem,
    problems: &watch::Sender<Problems>,
    mut open: impl FnMut() -> Result<T, Problem>,
) -> T {
    let (mut why, mut pause) = (first, FIRST_RETRY_PAUSE);
    loop {
        let is_news = problems.borrow().get(listener) != Some(&why);
        if is_news {
            tracing::error!("{why}");
            problems.send_modify(|problems| _ = problems.insert(listener, why));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_RETRY_PAUSE);
        match open() {
            Ok(opened) => {
                tracing::info!(listener, "listener opened");
                problems.send_modify(|problems| _ = problems.remove(listener));
                return opened;
            }
            Err(error) => why = error,
        }
    }
}
