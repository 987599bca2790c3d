//! Requests of operators that wait for an answer.

use std::time::Instant;

use tokio::sync::oneshot;

use super::{ping::PingRound, status::Waiter};
use crate::api::ApiError;

/// Requests that are answered later than in the turn in which they arrive.
#[derive(Default)]
pub(in crate::agent) struct PendingRequests {
    /// Requests that wait for convergence with a number of members.
    pub(in crate::agent) waiters: Vec<Waiter>,
    /// Pings that wait for answers.
    pub(in crate::agent) ping_rounds: Vec<PingRound>,
    /// The operator's request to leave, until it is answered.
    pub(in crate::agent) leave_reply: Option<oneshot::Sender<Result<Option<String>, ApiError>>>,
}

impl PendingRequests {
    /// Returns when requests must be answered.
    pub(in crate::agent) fn deadlines(&self) -> impl Iterator<Item = Instant> {
        let waiters = self.waiters.iter().map(|waiter| waiter.deadline);
        waiters.chain(self.ping_rounds.iter().map(PingRound::deadline))
    }
}
