//! Surveys: queries to many members at the same time about the peers they reach and the secrets they
//! accept.
//!
//! One survey for operators and one for tests of packets between pods run at a time. A few members are
//! queried simultaneously, each once and with a time limit. Members that gossip does not consider alive are
//! not queried.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use tokio::sync::oneshot::Sender;

use super::inquiries::Purpose;
use crate::{
    agent::Agent,
    api::{ApiError, ApiErrorCode, EncodedMatrix, Matrix, MatrixPath, MatrixRow},
    model::NodeId,
    wire::{Inquiry, PathReport, Report},
};

/// Members queried at the same time: each query may need a handshake, which takes a millisecond of CPU.
const MAX_PARALLEL_QUERIES: usize = 16;
/// Maximum number of members in the matrix of all paths.
const MAX_MATRIX_MEMBERS: usize = 256;
/// Time limit of a survey.
const SURVEY_TIMEOUT: Duration = Duration::from_secs(2);
/// A matrix younger than this is reused.
const MATRIX_MAX_AGE: Duration = Duration::from_secs(3);
/// Maximum length of a queue of surveys.
const MAX_QUEUED: usize = 16;

/// The report of each member; `None` if it did not answer.
pub(super) type Findings = BTreeMap<NodeId, Option<Report>>;
type Then = Box<dyn FnOnce(&mut Agent, Findings) + Send>;

/// The queues of surveys, and the last matrix of all paths.
#[derive(Default)]
pub(in crate::agent) struct Surveys {
    /// One queue for operators and one for the agent's own tests. The first survey of each is running.
    queues: [VecDeque<Survey>; 2],
    number: u64,
    /// Requests that wait for the matrix of all paths.
    matrix_replies: Vec<Sender<EncodedMatrix>>,
    /// The last matrix.
    matrix: Option<(Instant, EncodedMatrix)>,
}

struct Survey {
    number: u64,
    inquiry: Inquiry,
    /// Members not queried yet.
    left: VecDeque<NodeId>,
    asked: BTreeSet<NodeId>,
    findings: Findings,
    /// Set when the survey starts.
    deadline: Option<Instant>,
    then: Then,
}

impl Surveys {
    /// Returns when the next running survey times out.
    pub(in crate::agent) fn deadline(&self) -> Option<Instant> {
        self.queues.iter().filter_map(|queue| queue.front()?.deadline).min()
    }

    /// Appends a survey. Returns `false` if its queue is full.
    fn add(&mut self, survey: Survey) -> bool {
        let queue = &mut self.queues[usize::from(matches!(survey.inquiry, Inquiry::Arrivals(_)))];
        let has_room = queue.len() < MAX_QUEUED;
        if has_room {
            queue.push_back(survey);
        }
        has_room
    }

    /// Returns the survey with this number if it is running.
    fn running(&mut self, number: u64) -> Option<&mut Survey> {
        let mut first = self.queues.iter_mut().filter_map(VecDeque::front_mut);
        first.find(|survey| survey.number == number)
    }
}

impl Agent {
    /// Queries these members and calls `then` with their reports. Returns `false` if too many surveys
    /// are queued.
    pub(in crate::agent) fn survey(
        &mut self,
        members: Vec<NodeId>,
        inquiry: Inquiry,
        then: impl FnOnce(&mut Self, Findings) + Send + 'static,
    ) -> bool {
        self.requests.surveys.number += 1;
        let (left, silent): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|node| self.node.is_active(*node));
        let is_added = self.requests.surveys.add(Survey {
            number: self.requests.surveys.number,
            inquiry,
            left: left.into(),
            asked: BTreeSet::new(),
            findings: silent.into_iter().map(|node| (node, None)).collect(),
            deadline: None,
            then: Box::new(then),
        });
        if is_added {
            self.advance_surveys();
        }
        is_added
    }

    /// Sends the matrix of all paths: from each member to each other member.
    pub(in crate::agent) fn show_matrix(&mut self, reply: Sender<EncodedMatrix>) {
        if let Some((at, matrix)) = &self.requests.surveys.matrix
            && at.elapsed() < MATRIX_MAX_AGE
        {
            return drop(reply.send(matrix.clone()));
        }
        self.requests.surveys.matrix_replies.push(reply);
        if self.requests.surveys.matrix_replies.len() > 1 {
            return;
        }
        let mut members: Vec<NodeId> = self.node.peers().collect();
        let omitted = members.len().saturating_sub(MAX_MATRIX_MEMBERS);
        members.truncate(MAX_MATRIX_MEMBERS);
        if !self
            .survey(members, Inquiry::Report, move |agent, found| agent.send_matrix(found, omitted))
        {
            // Dropping the replies tells the clients that there is no answer.
            self.requests.surveys.matrix_replies.clear();
        }
    }

    /// Returns this node's report for other members.
    pub(super) fn own_report(&self) -> Report {
        let path = |(node, state, round_trip): (NodeId, _, Option<Duration>)| PathReport {
            node,
            state,
            round_trip_us: round_trip
                .map(|span| u32::try_from(span.as_micros()).unwrap_or(u32::MAX)),
        };
        Report {
            version: env!("CARGO_PKG_VERSION").into(),
            problems: u32::try_from(self.problems(&self.path_findings()).len()).unwrap_or(u32::MAX),
            paths: self.path_states().map(path).collect(),
            secrets: self.secrets.keyring.ids(),
            refused: None,
            arrivals: None,
        }
    }

    /// Ends surveys whose time limit has passed.
    pub(in crate::agent) fn end_overdue_surveys(&mut self, now: Instant) {
        if self.requests.surveys.deadline().is_some_and(|at| at <= now) {
            self.advance_surveys();
            self.carry_out();
        }
    }

    /// Stores the report of a member. `None` means that it did not answer.
    pub(in crate::agent) fn on_report(
        &mut self,
        node: NodeId,
        number: u64,
        report: Option<Box<Report>>,
    ) {
        let known = self.node.peers().count() + 1;
        let Some(survey) = self.requests.surveys.running(number) else { return };
        if survey.asked.remove(&node) {
            let report = report.map(|mut report| {
                report.paths.truncate(known);
                *report
            });
            survey.findings.insert(node, report);
        }
        self.advance_surveys();
    }

    /// Queries the next members, and ends surveys that are complete.
    pub(super) fn advance_surveys(&mut self) {
        (0..self.requests.surveys.queues.len()).for_each(|queue| self.advance_queue(queue));
    }

    fn advance_queue(&mut self, queue: usize) {
        let now = Instant::now();
        while let Some(survey) = self.requests.surveys.queues[queue].front_mut() {
            let is_late = *survey.deadline.get_or_insert(now + SURVEY_TIMEOUT) <= now;
            let room = MAX_PARALLEL_QUERIES.saturating_sub(survey.asked.len());
            let count = if is_late { 0 } else { room.min(survey.left.len()) };
            let next: Vec<NodeId> = survey.left.drain(..count).collect();
            let (purpose, inquiry) = (Purpose::Survey(survey.number), survey.inquiry.clone());
            let (asked, silent): (BTreeSet<NodeId>, BTreeSet<NodeId>) =
                next.into_iter().partition(|node| self.inquire(*node, purpose, &inquiry));
            let Some(survey) = self.requests.surveys.queues[queue].front_mut() else { return };
            survey.asked.extend(asked);
            survey.findings.extend(silent.into_iter().map(|node| (node, None)));
            match (survey.asked.is_empty(), survey.left.is_empty()) {
                (false, _) if !is_late => return,
                // None of these members has a known address.
                (true, false) if !is_late => continue,
                _ => {}
            }
            let Some(survey) = self.requests.surveys.queues[queue].pop_front() else { return };
            let mut findings = survey.findings;
            findings.extend(survey.asked.into_iter().chain(survey.left).map(|node| (node, None)));
            (survey.then)(self, findings);
        }
    }

    /// Sends the report of one member, or `None` if it does not answer.
    pub(in crate::agent) fn show_peer(
        &mut self,
        whom: &str,
        reply: Sender<Result<Option<MatrixRow>, ApiError>>,
    ) {
        let node = match self.node.find(whom) {
            Ok(node) if node == self.node.id() => {
                let row = self.row(node, Some(self.own_report()));
                return drop(reply.send(Ok(Some(row))));
            }
            Ok(node) => node,
            Err(why) => {
                return drop(reply.send(Err(ApiError::new(ApiErrorCode::NotFound, why))));
            }
        };
        self.survey(vec![node], Inquiry::Report, move |agent, mut found| {
            let report = found.remove(&node).flatten();
            let _ = reply.send(Ok(report.map(|report| agent.row(node, Some(report)))));
        });
    }

    fn row(&self, node: NodeId, report: Option<Report>) -> MatrixRow {
        MatrixRow {
            node,
            name: self.node.name_of(node).to_owned(),
            version: report.as_ref().map(|report| report.version.to_string()),
            problems: report.as_ref().map(|report| report.problems),
            paths: report.map(|report| report.paths.iter().map(MatrixPath::from).collect()),
        }
    }

    /// Serializes the matrix and sends it to all waiting requests.
    fn send_matrix(&mut self, mut findings: Findings, omitted: usize) {
        findings.insert(self.node.id(), Some(self.own_report()));
        let mut rows: Vec<MatrixRow> =
            findings.into_iter().map(|(node, report)| self.row(node, report)).collect();
        rows.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
        let matrix = Matrix { rows, omitted }.encode();
        self.requests.surveys.matrix = Some((Instant::now(), matrix.clone()));
        for viewer in self.requests.surveys.matrix_replies.drain(..) {
            let _ = viewer.send(matrix.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_operator_queue_leaves_room_for_trial_survey() {
        let survey = |number, inquiry| Survey {
            number,
            inquiry,
            left: VecDeque::new(),
            asked: BTreeSet::new(),
            findings: Findings::new(),
            deadline: None,
            then: Box::new(|_, _| ()),
        };
        let mut surveys = Surveys::default();
        let added = (0..100).filter(|number| surveys.add(survey(*number, Inquiry::Report)));
        assert_eq!(added.count(), MAX_QUEUED);
        assert!(surveys.add(survey(100, Inquiry::Arrivals(7))));
        assert!(surveys.running(0).is_some() && surveys.running(100).is_some());
        assert!(surveys.running(1).is_none());
    }
}
