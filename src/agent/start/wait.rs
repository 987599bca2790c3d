//! Waiting at startup for the state directory, the subnet's kernel objects, the gossip port or an
//! underlay.
//!
//! Before that, the node can agree on nothing with peers, and a member record without an address would
//! mislead them. A node that already has a subnet does not wait for an underlay: it serves the pods of
//! its host immediately.

use std::{
    fmt::Display,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use crate::{
    agent::{
        LoopEvent, StartFailure,
        listeners::{ListenerProblems, PREDECESSOR_TIMEOUT},
        operator::status::Waiter,
        service::Service,
        signals::Signals,
    },
    api::{AgentRequest, AgentStatus, ApiError, ApiErrorCode, PodError, PodErrorKind, Verdict},
    config::Config,
    core::NodeStatus,
    dataplane::kernel::KernelError,
    docker, log,
    model::{NodeId, NodeName, Problem, ProblemCode},
    netlink::Netlink,
    transport::BindError,
    underlay::{self, ChosenUnderlay, UnderlayError},
};

/// Time between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The problem shown before the agent waits for something.
const STARTING: &str = "the agent is starting";
/// Interval at which the service manager and requests with a deadline are served.
const SERVE_INTERVAL: Duration = Duration::from_millis(500);

/// Answers requests and handles signals while the node waits.
pub(in crate::agent) struct StartupWait<'a> {
    name: NodeName,
    node: NodeId,
    closed: ListenerProblems,
    signals: &'a mut Signals,
    events: &'a mut mpsc::UnboundedReceiver<LoopEvent>,
    service: Service,
    /// Requests that wait for convergence; they are answered after the start.
    waiters: Vec<Waiter>,
    /// Docker's requests with their time of arrival; they are answered after the start.
    docker: Vec<(Instant, docker::Request)>,
    /// What the agent waits for.
    activity: String,
}

impl<'a> StartupWait<'a> {
    /// Starts to answer requests from `events`.
    pub(in crate::agent) fn new(
        name: NodeName,
        closed: ListenerProblems,
        signals: &'a mut Signals,
        events: &'a mut mpsc::UnboundedReceiver<LoopEvent>,
    ) -> Self {
        let service = Service::new(Instant::now());
        let activity = STARTING.to_owned();
        let (waiters, docker) = (Vec::new(), Vec::new());
        let node = NodeId::UNKNOWN;
        Self { name, node, closed, signals, events, service, waiters, docker, activity }
    }

    /// Sets the node id, once the key has been read.
    pub(super) const fn identify(&mut self, node: NodeId) {
        self.node = node;
    }

    /// Returns the control sockets that could not be opened.
    pub(in crate::agent) fn closed(&self) -> ListenerProblems {
        self.closed.clone()
    }

    /// Returns the unanswered requests: those that wait for convergence, and Docker's.
    pub(super) fn into_requests(self) -> (Vec<Waiter>, Vec<(Instant, docker::Request)>) {
        (self.waiters, self.docker)
    }

    /// Sets the problem in the status, and logs it if it is new.
    pub(in crate::agent) fn report_problem(&mut self, problem: String) {
        if self.activity != problem {
            tracing::error!("{problem}");
            self.activity = problem;
        }
    }

    /// Reports what another process holds, which may be an earlier process of this agent that is ending.
    pub(super) fn report_predecessor(&mut self, error: &impl Display) {
        let timeout_secs = PREDECESSOR_TIMEOUT.as_secs();
        self.report_problem(format!(
            "waiting up to {timeout_secs} s for an earlier process to end: {error}"
        ));
    }

    /// Sets the problem in the status without logging it.
    pub(in crate::agent) fn set_activity(&mut self, what: &str) {
        what.clone_into(&mut self.activity);
    }

    /// Runs `work` and answers requests meanwhile. Returns `None` if a signal ends the agent first.
    pub(in crate::agent) async fn run<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let now = Instant::now();
            // A start that waits for nothing is not reported to the service manager.
            if self.activity != STARTING && self.service.is_due(now) {
                self.service.report(now, self.activity.clone());
            }
            let mut status = status(&self.name, self.node, self.activity.clone());
            status.problems.extend(self.closed.problems());
            let status = Arc::new(status);
            self.waiters.retain(|waiter| !waiter.reply.is_closed());
            for waiter in self.waiters.extract_if(.., |waiter| waiter.deadline <= now) {
                let _ = waiter.reply.send(status.clone());
            }
            tokio::select! {
                biased;
                () = self.signals.end.wait() => return None,
                done = &mut work => return Some(done),
                Some(event) = self.events.recv() => match event {
                    LoopEvent::Api(request) => self.waiters.extend(answer(request, &status)),
                    LoopEvent::Docker(request) => self.docker.push((Instant::now(), request)),
                    _ => {}
                },
                () = tokio::time::sleep(SERVE_INTERVAL) => {}
            }
        }
    }

    /// Waits until an interface can carry tunnels. Returns `None` if a signal ends the agent first.
    ///
    /// # Errors
    /// Fails if no network can satisfy the settings, or if no netlink socket can be opened.
    pub(super) async fn wait_for_underlay(
        &mut self,
        config: &Config,
    ) -> Result<Option<ChosenUnderlay>, StartFailure> {
        let mut netlink = Netlink::open()?;
        loop {
            match underlay::choose(&mut netlink, config, std::iter::empty()) {
                Ok(chosen) => return Ok(Some(chosen)),
                Err(
                    error @ (UnderlayError::NoMatch { .. }
                    | UnderlayError::NoListenAddress { .. }
                    | UnderlayError::Netlink(_)),
                ) => {
                    self.report_problem(format!("waiting for the network: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
            if self.run(tokio::time::sleep(RETRY_INTERVAL)).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Binds the gossip port, waiting for a while if another process has it. Returns `None` if a signal
    /// ends the agent first.
    ///
    /// # Errors
    /// Fails if the port cannot be bound.
    pub(super) async fn bind_port<T>(
        &mut self,
        bind: impl Fn() -> Result<T, BindError>,
    ) -> Result<Option<T>, BindError> {
        let begun = Instant::now();
        loop {
            match bind() {
                Err(error @ BindError::InUse { .. }) if begun.elapsed() < PREDECESSOR_TIMEOUT => {
                    self.report_predecessor(&error);
                }
                bound => return bound.map(Some),
            }
            if self.run(tokio::time::sleep(RETRY_INTERVAL)).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Repeats a kernel request while it fails transiently. Returns `None` if a signal ends the agent
    /// first.
    ///
    /// # Errors
    /// Fails if the request fails permanently.
    pub(super) async fn retry_kernel<T>(
        &mut self,
        mut ask: impl FnMut() -> Result<T, KernelError>,
    ) -> Result<Option<T>, KernelError> {
        loop {
            match ask() {
                Err(error) if error.is_transient() => {
                    self.report_problem(format!("waiting for the kernel: {error}"));
                }
                answer => return answer.map(Some),
            }
            if self.run(tokio::time::sleep(RETRY_INTERVAL)).await.is_none() {
                return Ok(None);
            }
        }
    }
}

fn status(name: &NodeName, node: NodeId, activity: String) -> AgentStatus {
    let pods_refused = Some(activity.clone());
    let problem = Problem::new(ProblemCode::Starting, Problem::HOST, activity, "");
    AgentStatus {
        notices: log::notice(Instant::now()).into_iter().collect(),
        verdict: Verdict::new(Some(problem.what.clone()), 1),
        pods_refused,
        log_lines_lost: log::lost(),
        ..AgentStatus::of(NodeStatus::waiting(node, name.clone(), problem))
    }
}

/// Answers a request. Returns a request that waits for convergence to the caller.
fn answer(request: AgentRequest, status: &Arc<AgentStatus>) -> Option<Waiter> {
    let why = || {
        let why = status.problems.first().map(Problem::to_string).unwrap_or_default();
        ApiError::new(ApiErrorCode::NotReady, why)
    };
    let not_ready = || PodError::new(PodErrorKind::NotReady, why().message);
    // A failed reply means that the client is gone.
    match request {
        AgentRequest::Wait { seconds, members, reply } => {
            let deadline = Instant::now() + Duration::from_secs(seconds);
            return Some(Waiter { members, deadline, reply });
        }
        AgentRequest::Status { reply } => _ = reply.send(status.clone()),
        AgentRequest::Alive { reply } => _ = reply.send(()),
        AgentRequest::Token { reply } => _ = reply.send(None),
        AgentRequest::Leave { reply } => _ = reply.send(Err(why())),
        AgentRequest::Forget { reply, .. } => _ = reply.send(Err(why())),
        AgentRequest::Secret { reply, .. } => _ = reply.send(Err(why())),
        AgentRequest::ResetIdentity { reply } => _ = reply.send(Err(why())),
        AgentRequest::Ping { reply, .. } => _ = reply.send(Err(why())),
        AgentRequest::History { reply } => _ = reply.send(Ok(Vec::new())),
        AgentRequest::Attach { reply, .. } => _ = reply.send(Err(not_ready())),
        // The plugin stores a note and repeats the request later.
        AgentRequest::Detach { reply, .. } => _ = reply.send(Err(not_ready())),
        AgentRequest::Check { reply, .. } => _ = reply.send(Err(not_ready())),
        AgentRequest::Pods { reply } => _ = reply.send(Vec::new()),
        AgentRequest::Release { reply } => _ = reply.send(Ok(Vec::new())),
        AgentRequest::Events { reply } => _ = reply.send(Err(why())),
        AgentRequest::PastEvents { reply } => _ = reply.send(Vec::new()),
        AgentRequest::Samples { reply } => _ = reply.send(Vec::new()),
        // Dropping the reply tells the client that the agent does not answer.
        AgentRequest::Matrix { reply } => drop(reply),
        AgentRequest::Routes { reply } => _ = reply.send(Err(why())),
        AgentRequest::Peer { reply, .. } => _ = reply.send(Err(why())),
    }
    None
}
