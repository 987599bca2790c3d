//! A new node on a host without a network: it waits for an underlay, and says what it waits for.
//!
//! Nothing can be agreed with peers before, and a member record without an address would mislead them. A
//! node that is known already does not come here: it serves the pods of its host at once.

use std::time::{Duration, Instant};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{
    News, StartFailure,
    service::Service,
    status::Waiter,
    underlay::{self, Chosen, UnderlayError},
};
use crate::{
    api::{AgentStatus, CheckStatus, KernelStatus, PodError, PodErrorKind, Question},
    config::Config,
    core::NodeStatus,
    model::NodeId,
    netlink::Netlink,
};

/// The interfaces are looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Waits until an interface can carry tunnels; none if a signal ends the agent first. Questions are answered
/// meanwhile. Those for convergence wait on.
///
/// # Errors
/// A setting that no network can satisfy, or no netlink socket.
pub(super) async fn wait_for_underlay(
    config: &Config,
    node: NodeId,
    questions: &mut mpsc::UnboundedReceiver<News>,
) -> Result<Option<(Chosen, Vec<Waiter>)>, StartFailure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut netlink = Netlink::open()?;
    let mut service = Service::new(Instant::now());
    let mut waiters: Vec<Waiter> = Vec::new();
    let mut told: Option<UnderlayError> = None;
    loop {
        let error = match underlay::choose(&mut netlink, config, std::iter::empty()) {
            Ok(chosen) => return Ok(Some((chosen, waiters))),
            Err(error @ UnderlayError::NoMatch { .. }) => error,
            Err(error) => return Err(error.into()),
        };
        let problem = format!("waiting for the network: {error}");
        if told.as_ref() != Some(&error) {
            tracing::error!("{problem}");
            told = Some(error);
        }
        let now = Instant::now();
        if service.is_due(now) {
            service.report(now, problem.clone());
        }
        let status = status(config, node, problem);
        waiters.retain(|waiter| !waiter.reply.is_closed());
        for waiter in waiters.extract_if(.., |waiter| waiter.deadline <= now) {
            let _ = waiter.reply.send(status.clone());
        }
        tokio::select! {
            _ = terminate.recv() => return Ok(None),
            _ = interrupt.recv() => return Ok(None),
            Some(news) = questions.recv() => {
                if let News::Api(question) = news {
                    waiters.extend(answer(question, &status));
                }
            }
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

fn status(config: &Config, node: NodeId, problem: String) -> AgentStatus {
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
        strangers_dropped: 0,
        peers_in_use: None,
        misses_answered: 0,
        misses_unknown: 0,
        routing: CheckStatus::default(),
        forwarding: CheckStatus::default(),
    };
    AgentStatus {
        version: env!("CARGO_PKG_VERSION"),
        converged: false,
        node: NodeStatus::waiting(node, config.name.clone(), problem),
        kernel,
        paths: Vec::new(),
        pods: 0,
        pods_outside: 0,
        connections: 0,
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
        Question::Token { reply } => _ = reply.send(None),
        Question::Leave { reply } => _ = reply.send(Err(why())),
        Question::Forget { reply, .. } | Question::Secret { reply, .. } => {
            let _ = reply.send(Err(why()));
        }
        Question::ResetIdentity { reply } => _ = reply.send(Err(why())),
        Question::Ping { reply, .. } => _ = reply.send(Err(why())),
        Question::History { reply } => _ = reply.send(Ok(Vec::new())),
        Question::Attach { reply, .. } => _ = reply.send(Err(not_ready())),
        Question::Detach { reply, .. } => _ = reply.send(Ok(false)),
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
