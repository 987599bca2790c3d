//! One round of `gossamer ping`: requests to a member in three ways at once, and the round-trip times.
//!
//! Its agent over the underlay (QUIC); its kernel through the overlay, at the address of the VTEP; and the
//! first address of its subnet, the gateway of its pods once there are any.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::inquiries::Purpose;
use crate::{
    agent::Agent,
    api::{ApiError, ApiErrorCode, PingReport, Reach},
    icmp,
    model::NodeId,
    pods::gateway,
    wire::Inquiry,
};

/// Time after which a missing answer counts as none.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Limit of concurrent rounds.
const MAX_ROUNDS: usize = 64;

/// A round that waits for answers.
pub(in crate::agent) struct PingRound {
    /// What is known so far.
    report: PingReport,
    begun: Instant,
    /// Sequence numbers of the echo requests to the VTEP and to the gateway.
    sequences: [Option<u16>; 2],
    /// Whether the agent has answered, or cannot be reached.
    agent_done: bool,
    reply: oneshot::Sender<Result<PingReport, ApiError>>,
}

impl PingRound {
    /// Returns when the round ends without further answers.
    pub(in crate::agent) fn deadline(&self) -> Instant {
        self.begun + TIMEOUT
    }

    /// Whether all answers are here, or the time is up.
    fn is_over(&self, now: Instant) -> bool {
        let PingReport { overlay, pods, .. } = &self.report;
        let answered = [overlay, pods].iter().all(|reach| reach.has_answered());
        answered && self.agent_done || now >= self.deadline()
    }
}

impl Agent {
    /// Starts a round to a member, given by name or id.
    pub(in crate::agent) fn begin_ping(
        &mut self,
        member: &str,
        reply: oneshot::Sender<Result<PingReport, ApiError>>,
    ) {
        if self.requests.ping_rounds.len() >= MAX_ROUNDS {
            let busy = ApiError::new(ApiErrorCode::Busy, "too many pings in progress");
            let _ = reply.send(Err(busy));
            return;
        }
        let begun = Instant::now();
        let node = match self.ping_target(member) {
            Ok(node) => node,
            Err(why) => return drop(reply.send(Err(why))),
        };
        let view = self.kernel.wanted.view.as_ref();
        let peer = view.and_then(|view| view.peers.get(&node));
        let subnet = peer.and_then(|peer| Some(peer.leases.first()?.1.first));
        let kernels = [subnet.map(|subnet| subnet.network()), subnet.map(gateway)];
        let sequences = kernels.map(|to| to.map(|to| self.send_echo(node, to)));
        let [overlay, pods] = kernels.map(Reach::unanswered);
        let report = PingReport {
            node,
            name: self.node.name_of(node).to_owned(),
            underlay: Reach::unanswered(self.node.address_of(node)),
            overlay,
            pods,
            path: None,
            problem: None,
        };
        self.requests.ping_rounds.push(PingRound {
            report,
            begun,
            sequences,
            agent_done: false,
            reply,
        });
    }

    /// Sends an inquiry to the agent of a member, given by name or id. Returns the member.
    fn ping_target(&mut self, member: &str) -> Result<NodeId, ApiError> {
        let not_found = |why| ApiError::new(ApiErrorCode::NotFound, why);
        let node = self.node.find(member).map_err(not_found)?;
        if node == self.node.id() {
            return Err(not_found("the member is this node itself".to_owned()));
        }
        match self.inquire(node, Purpose::Ping, &Inquiry::Ping) {
            true => Ok(node),
            false => Err(not_found(format!("the address of {member} is not known"))),
        }
    }

    /// Sends an echo request to an address of a peer, and returns its sequence number.
    fn send_echo(&mut self, node: NodeId, to: IpAddr) -> u16 {
        let sequence = self.prober.next_sequence();
        // An unsent request stays without answer.
        let _ = self.prober.send(to, self.probe_source(node), sequence, icmp::SMALL);
        sequence
    }

    /// Records that the agent of a member answered over the underlay, or cannot be reached.
    pub(in crate::agent) fn on_answered(&mut self, node: NodeId, answered: bool) {
        for round in self.requests.ping_rounds.iter_mut().filter(|round| round.report.node == node)
        {
            if answered && !round.agent_done {
                round.report.underlay.round_trip_ms = Some(milliseconds(round.begun.elapsed()));
            }
            round.agent_done = true;
        }
    }

    /// Records an echo reply, and returns whether it belonged to a round.
    pub(in crate::agent) fn on_ping_answer(&mut self, from: IpAddr, number: u16) -> bool {
        for PingRound { report, begun, sequences, .. } in &mut self.requests.ping_rounds {
            for (reach, sequence) in
                [&mut report.overlay, &mut report.pods].into_iter().zip(sequences)
            {
                if *sequence == Some(number) && reach.to == Some(from) {
                    reach.round_trip_ms.get_or_insert(milliseconds(begun.elapsed()));
                    return true;
                }
            }
        }
        false
    }

    /// Replies to the rounds that are over, with the state of the path.
    pub(in crate::agent) fn finish_pings(&mut self) {
        let now = Instant::now();
        let over: Vec<PingRound> =
            self.requests.ping_rounds.extract_if(.., |round| round.is_over(now)).collect();
        // Each turn of the event loop comes here.
        if over.is_empty() {
            return;
        }
        let paths = self.path_statuses(&self.path_findings());
        for mut round in over {
            let path = paths.iter().find(|path| path.node == round.report.node);
            round.report.path = path.map(|path| path.state);
            round.report.problem = path.and_then(|path| path.problem.clone());
            let _ = round.reply.send(Ok(round.report));
        }
    }
}

/// Returns a span in milliseconds.
pub(in crate::agent) fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1_000.0
}
