//! A node that cannot begin yet: it waits for its disk, its subnet or an underlay, and says for which.
//!
//! Nothing can be agreed with peers before, and a member record without an address would mislead them. A
//! node that is known already does not wait for an underlay: it serves the pods of its host at once.

use std::{
    fmt::Display,
    future::Future,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    LoopEvent, StartFailure,
    listeners::ListenerProblems,
    service::Service,
    signals::Signals,
    status::Waiter,
    underlay::{self, ChosenUnderlay, UnderlayError},
};
use crate::{
    api::{AgentStatus, CheckStatus, KernelStatus, PodError, PodErrorKind, Question},
    config::Config,
    core::NodeStatus,
    dataplane::kernel::KernelError,
    docker,
    model::{NodeId, NodeName},
    netlink::Netlink,
    transport::{BindError, Handshakes},
};

/// What an earlier process still holds is waited for so long: one whose disk hangs keeps its files and
/// sockets for a while after it was killed.
pub(super) const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(10);
/// The interfaces are looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// The problem of an agent that has not begun to wait.
const STARTING: &str = "the agent is starting";
/// The service manager and questions with a deadline are looked after this often.
const TICK: Duration = Duration::from_millis(500);

/// Answers questions and follows signals while the node waits.
pub(super) struct Waiting<'a> {
    name: NodeName,
    node: NodeId,
    closed: ListenerProblems,
    signals: &'a mut Signals,
    questions: &'a mut mpsc::UnboundedReceiver<LoopEvent>,
    service: Service,
    /// Questions for convergence wait on.
    waiters: Vec<Waiter>,
    /// So does Docker.
    docker: Vec<(Instant, docker::Request)>,
    problem: String,
}

impl<'a> Waiting<'a> {
    pub(super) fn new(
        name: NodeName,
        closed: ListenerProblems,
        signals: &'a mut Signals,
        questions: &'a mut mpsc::UnboundedReceiver<LoopEvent>,
    ) -> Self {
        let service = Service::new(Instant::now());
        let problem = STARTING.to_owned();
        let (waiters, docker) = (Vec::new(), Vec::new());
        let node = NodeId::UNKNOWN;
        Self { name, node, closed, signals, questions, service, waiters, docker, problem }
    }

    /// The node's key was read.
    pub(super) const fn identify(&mut self, node: NodeId) {
        self.node = node;
    }

    /// Where no questions come in that should.
    pub(super) fn closed(&self) -> ListenerProblems {
        self.closed.clone()
    }

    /// Questions that have had no answer: for convergence, and Docker's.
    pub(super) fn into_questions(self) -> (Vec<Waiter>, Vec<(Instant, docker::Request)>) {
        (self.waiters, self.docker)
    }

    /// Says in the status what is waited for, and in the log if that is news.
    pub(super) fn say(&mut self, problem: String) {
        if self.problem != problem {
            tracing::error!("{problem}");
            self.problem = problem;
        }
    }

    /// Says what a process holds that may be an earlier one of this agent, on its way out.
    pub(super) fn say_predecessor(&mut self, error: &impl Display) {
        let patience = PREDECESSOR_PATIENCE.as_secs();
        self.say(format!("waiting up to {patience} s for an earlier process to end: {error}"));
    }

    /// Says in the status alone what is under way.
    pub(super) fn begin(&mut self, what: &str) {
        what.clone_into(&mut self.problem);
    }

    /// Does some work, and answers questions meanwhile; none if a signal ends the agent first.
    pub(super) async fn until<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let now = Instant::now();
            // A start without anything to wait for is no news to the service manager.
            if self.problem != STARTING && self.service.is_due(now) {
                self.service.report(now, self.problem.clone());
            }
            let mut status = status(&self.name, self.node, self.problem.clone());
            status.node.problems.extend(self.closed.problems());
            self.waiters.retain(|waiter| !waiter.reply.is_closed());
            for waiter in self.waiters.extract_if(.., |waiter| waiter.deadline <= now) {
                let _ = waiter.reply.send(status.clone());
            }
            tokio::select! {
                biased;
                () = self.signals.end() => return None,
                done = &mut work => return Some(done),
                Some(news) = self.questions.recv() => match news {
                    LoopEvent::Api(question) => self.waiters.extend(answer(question, &status)),
                    LoopEvent::Docker(request) => self.docker.push((Instant::now(), request)),
                    _ => {}
                },
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// Waits until an interface can carry tunnels; none if a signal ends the agent first.
    ///
    /// # Errors
    /// A setting that no network can satisfy, or no netlink socket.
    pub(super) async fn for_underlay(
        &mut self,
        config: &Config,
    ) -> Result<Option<ChosenUnderlay>, StartFailure> {
        let mut netlink = Netlink::open()?;
        loop {
            match underlay::choose(&mut netlink, config, std::iter::empty()) {
                Ok(chosen) => return Ok(Some(chosen)),
                Err(error @ (UnderlayError::NoMatch { .. } | UnderlayError::Netlink(_))) => {
                    self.say(format!("waiting for the network: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
            if self.until(tokio::time::sleep(LOOK_AGAIN)).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Binds the port of gossip, and waits a while for a process that has it; none if a signal ends the agent
    /// first.
    ///
    /// # Errors
    /// The port cannot be had.
    pub(super) async fn for_port<T>(
        &mut self,
        bind: impl Fn() -> Result<T, BindError>,
    ) -> Result<Option<T>, BindError> {
        let begun = Instant::now();
        loop {
            match bind() {
                Err(error @ BindError::InUse { .. }) if begun.elapsed() < PREDECESSOR_PATIENCE => {
                    self.say_predecessor(&error);
                }
                bound => return bound.map(Some),
            }
            if self.until(tokio::time::sleep(LOOK_AGAIN)).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Asks the kernel until it is not merely busy; none if a signal ends the agent first.
    ///
    /// # Errors
    /// What the kernel will not do in a moment either.
    pub(super) async fn for_kernel<T>(
        &mut self,
        mut ask: impl FnMut() -> Result<T, KernelError>,
    ) -> Result<Option<T>, KernelError> {
        loop {
            match ask() {
                Err(error) if error.is_transient() => {
                    self.say(format!("waiting for the kernel: {error}"));
                }
                answer => return answer.map(Some),
            }
            if self.until(tokio::time::sleep(LOOK_AGAIN)).await.is_none() {
                return Ok(None);
            }
        }
    }
}

fn status(name: &NodeName, node: NodeId, problem: String) -> AgentStatus {
    let pods_refused = Some(problem.clone());
    let kernel = KernelStatus {
        device: None,
        mtu: 0,
        underlay_interface: String::new(),
        underlay_address: None,
        in_sync: false,
        operations: 0,
        repairs: Default::default(),
        checksum_offload: None,
        checksum_offload_fails: false,
        non_members_dropped: 0,
        peers_in_use: None,
        misses_answered: 0,
        misses_unknown: 0,
        routing: CheckStatus::default(),
        forwarding: CheckStatus::default(),
    };
    AgentStatus {
        warnings: Vec::new(),
        version: env!("CARGO_PKG_VERSION"),
        converged: false,
        node: NodeStatus::waiting(node, name.clone(), problem),
        kernel,
        paths: Vec::new(),
        pods: 0,
        pods_outside: 0,
        pods_refused,
        connections: 0,
        handshakes: Handshakes::default(),
        gossip_dropped: 0,
    }
}

/// Answers what can be answered. A question for convergence is given back.
fn answer(question: Question, status: &AgentStatus) -> Option<Waiter> {
    let why = || status.node.problems.first().cloned().unwrap_or_default();
    let not_ready = || PodError::new(PodErrorKind::NotReady, why());
    // A client that is gone needs no answer.
    match question {
        Question::Wait { seconds, members, reply } => {
            let deadline = Instant::now() + Duration::from_secs(seconds);
            return Some(Waiter { members, deadline, reply });
        }
        Question::Status { reply } => _ = reply.send(status.clone()),
        Question::Alive { reply } => _ = reply.send(()),
        Question::Token { reply } => _ = reply.send(None),
        Question::Leave { reply } => _ = reply.send(Err(why())),
        Question::Forget { reply, .. } | Question::Secret { reply, .. } => {
            let _ = reply.send(Err(why()));
        }
        Question::ResetIdentity { reply } => _ = reply.send(Err(why())),
        Question::Ping { reply, .. } => _ = reply.send(Err(why())),
        Question::History { reply } => _ = reply.send(Ok(Vec::new())),
        Question::Attach { reply, .. } => _ = reply.send(Err(not_ready())),
        // The plugin notes it for later.
        Question::Detach { reply, .. } => _ = reply.send(Err(not_ready())),
        Question::Check { reply, .. } => _ = reply.send(Err(not_ready())),
        Question::Pods { reply } => _ = reply.send(Vec::new()),
        Question::Release { reply } => _ = reply.send(Ok(Vec::new())),
        Question::Events { reply } => _ = reply.send(Err(why())),
        Question::PastEvents { reply } => _ = reply.send(Vec::new()),
        Question::Samples { reply } => _ = reply.send(Vec::new()),
        // Without an answer the client hears that the agent does not answer it.
        Question::Matrix { reply } => drop(reply),
        Question::Routes { reply } => _ = reply.send(Err(why())),
        Question::Peer { reply, .. } => _ = reply.send(Err(why())),
    }
    None
}
