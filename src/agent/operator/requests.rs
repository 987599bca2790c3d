//! Requests of operators that wait for an answer, and what is kept for further ones.

use std::time::Instant;

use tokio::sync::oneshot;

use super::{
    inquiries::Purpose,
    ping::PingRound,
    status::{RecentStatus, Waiter},
    survey::Surveys,
};
use crate::{agent::listeners::ListenerProblems, api::ApiError, rpc::Inquiries};

/// Requests of operators that are answered later than in the turn in which they arrive.
pub(in crate::agent) struct Requests {
    /// Control sockets that could not be opened.
    pub(in crate::agent) listener_problems: ListenerProblems,
    /// Requests that wait for convergence with a number of members.
    pub(in crate::agent) waiters: Vec<Waiter>,
    /// The status that further requests get as well.
    pub(in crate::agent) recent_status: Option<RecentStatus>,
    /// Inquiries to members that serve requests.
    pub(in crate::agent) inquiries: Inquiries<Purpose>,
    /// Pings that wait for answers.
    pub(in crate::agent) ping_rounds: Vec<PingRound>,
    /// Surveys of all members.
    pub(in crate::agent) surveys: Surveys,
    /// The operator's request to leave, until it is answered.
    pub(in crate::agent) leave_reply: Option<oneshot::Sender<Result<Option<String>, ApiError>>>,
}

impl Requests {
    /// Returns the requests with which the agent starts: those that have waited since before.
    pub(in crate::agent) fn new(listener_problems: ListenerProblems, waiters: Vec<Waiter>) -> Self {
        Self {
            listener_problems,
            waiters,
            recent_status: None,
            inquiries: Inquiries::default(),
            ping_rounds: Vec::new(),
            surveys: Surveys::default(),
            leave_reply: None,
        }
    }

    /// Returns when requests must be answered.
    pub(in crate::agent) fn deadlines(&self) -> impl Iterator<Item = Instant> {
        let waiters = self.waiters.iter().map(|waiter| waiter.deadline);
        let pings = self.ping_rounds.iter().map(PingRound::deadline);
        waiters.chain(pings).chain(self.surveys.deadline())
    }
}
