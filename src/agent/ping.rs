//! One round of `gossamer ping`: the same member asked in three ways at once, and who answers how fast.
//!
//! Over the underlay its agent (QUIC), through the overlay its kernel, at the VTEP's address, and the first
//! address of its subnet, which its pods have as their gateway once there are any.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::Agent;
use crate::{
    api::{PingReport, Reach},
    icmp,
    model::NodeId,
    pods::gateway,
};

/// What has not answered by then does not answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Rounds under way at once.
const MAX_ROUNDS: usize = 64;

/// A round that waits for answers.
pub(super) struct Round {
    report: PingReport,
    begun: Instant,
    /// Numbers of the requests through the overlay, and to the pods' gateway.
    sequences: [Option<u16>; 2],
    /// The agent has answered, or cannot be asked.
    agent_done: bool,
    reply: oneshot::Sender<Result<PingReport, String>>,
}

impl Round {
    pub(super) fn deadline(&self) -> Instant {
        self.begun + TIMEOUT
    }

    fn is_over(&self, now: Instant) -> bool {
        let PingReport { overlay, pods, .. } = &self.report;
        let answered = [overlay, pods].iter().all(|reach| reach.has_answered());
        answered && self.agent_done || now >= self.deadline()
    }
}

impl Agent {
    pub(super) fn begin_ping(
        &mut self,
        whom: &str,
        reply: oneshot::Sender<Result<PingReport, String>>,
    ) {
        if self.rounds.len() >= MAX_ROUNDS {
            let _ = reply.send(Err("too many pings at once".to_owned()));
            return;
        }
        let begun = Instant::now();
        let node = match self.node.ping(whom) {
            Ok(node) => node,
            Err(why) => return drop(reply.send(Err(why))),
        };
        let view = self.kernel.wanted.as_ref();
        let peer = view.and_then(|view| view.peers.get(&node));
        let subnet = peer.and_then(|peer| Some(peer.leases.first()?.1.first));
        let kernels = [subnet.map(|subnet| subnet.network()), subnet.map(gateway)];
        let sequences = kernels.map(|to| to.map(|to| self.ask_kernel(node, to)));
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
        self.rounds.push(Round { report, begun, sequences, agent_done: false, reply });
    }

    fn ask_kernel(&mut self, node: NodeId, to: IpAddr) -> u16 {
        let sequence = self.prober.next_sequence();
        // What cannot be sent is not answered.
        let _ = self.prober.send(to, self.probe_source(node), sequence, icmp::SMALL);
        sequence
    }

    pub(super) fn on_answered(&mut self, node: NodeId, answered: bool) {
        for round in self.rounds.iter_mut().filter(|round| round.report.node == node) {
            if answered && !round.agent_done {
                round.report.underlay.round_trip_ms = Some(milliseconds(round.begun.elapsed()));
            }
            round.agent_done = true;
        }
    }

    /// Says whether an answer to a request with this number was meant for a round.
    pub(super) fn on_ping_answer(&mut self, from: IpAddr, number: u16) -> bool {
        for Round { report, begun, sequences, .. } in &mut self.rounds {
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

    pub(super) fn end_rounds(&mut self) {
        let now = Instant::now();
        for mut round in self.rounds.extract_if(.., |round| round.is_over(now)).collect::<Vec<_>>()
        {
            let node = round.report.node;
            let path = self.path_statuses().into_iter().find(|path| path.node == node);
            round.report.path = path.as_ref().map(|path| path.state);
            round.report.problem = path.and_then(|path| path.problem);
            let _ = round.reply.send(Ok(round.report));
        }
    }
}

pub(super) fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1_000.0
}
