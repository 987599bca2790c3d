//! Asking all members at once: whom they reach, and which secrets they know.
//!
//! One survey at a time for operators, and one for trials of packets between pods; a few members at
//! once, each asked once and not waited for longer than that. Members that gossip does not hold as alive are
//! not asked at all.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use axum::body::Bytes;
use tokio::sync::oneshot::Sender;

use super::Agent;
use crate::{
    api::{Matrix, MatrixPath, MatrixRow},
    model::NodeId,
    wire::{Inquiry, PathReport, Report},
};

/// Members asked at once: each may take a handshake, which is a millisecond of CPU.
const AT_ONCE: usize = 16;
/// Members asked in all.
const MAX_ASKED: usize = 256;
/// What has not answered by then does not answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A picture of all paths this young is given again.
const FRESH: Duration = Duration::from_secs(3);
/// Surveys that wait.
const MAX_WAITING: usize = 16;

/// What each member said; none, if it said nothing.
pub(super) type Findings = BTreeMap<NodeId, Option<Report>>;
type Then = Box<dyn FnOnce(&mut Agent, Findings) + Send>;

#[derive(Default)]
pub(super) struct Surveys {
    /// Those for operators, and those of the agent's own trials. The first one of each is under way.
    queues: [VecDeque<Survey>; 2],
    number: u64,
    /// Who waits for the picture of all paths.
    viewers: Vec<Sender<Bytes>>,
    /// The last one, as it is sent.
    matrix: Option<(Instant, Bytes)>,
}

struct Survey {
    number: u64,
    inquiry: Inquiry,
    /// Not asked yet.
    left: VecDeque<NodeId>,
    asked: BTreeSet<NodeId>,
    findings: Findings,
    /// From the moment it is the first one.
    deadline: Option<Instant>,
    then: Then,
}

impl Surveys {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.queues.iter().filter_map(|queue| queue.front()?.deadline).min()
    }

    fn add(&mut self, survey: Survey) -> bool {
        let queue = &mut self.queues[usize::from(matches!(survey.inquiry, Inquiry::Arrivals(_)))];
        let has_room = queue.len() < MAX_WAITING;
        if has_room {
            queue.push_back(survey);
        }
        has_room
    }

    /// The one with this number, if it is under way.
    fn under_way(&mut self, number: u64) -> Option<&mut Survey> {
        let mut first = self.queues.iter_mut().filter_map(VecDeque::front_mut);
        first.find(|survey| survey.number == number)
    }
}

impl Agent {
    /// Asks these members, and goes on with what they say. False, if too many surveys wait already.
    pub(super) fn survey(
        &mut self,
        members: Vec<NodeId>,
        inquiry: Inquiry,
        then: impl FnOnce(&mut Self, Findings) + Send + 'static,
    ) -> bool {
        self.surveys.number += 1;
        let (left, silent): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|node| self.node.is_active(*node));
        let is_added = self.surveys.add(Survey {
            number: self.surveys.number,
            inquiry,
            left: left.into(),
            asked: BTreeSet::new(),
            findings: silent.into_iter().map(|node| (node, None)).collect(),
            deadline: None,
            then: Box::new(then),
        });
        if is_added {
            self.go_on_with_surveys();
        }
        is_added
    }

    /// The way from each member to each other one.
    pub(super) fn show_matrix(&mut self, reply: Sender<Bytes>) {
        if let Some((at, matrix)) = &self.surveys.matrix
            && at.elapsed() < FRESH
        {
            return drop(reply.send(matrix.clone()));
        }
        self.surveys.viewers.push(reply);
        if self.surveys.viewers.len() > 1 {
            return;
        }
        let mut members: Vec<NodeId> = self.node.peers().collect();
        let omitted = members.len().saturating_sub(MAX_ASKED);
        members.truncate(MAX_ASKED);
        if !self.survey(members, Inquiry::Report, move |agent, found| agent.draw(found, omitted)) {
            // They hear that they get no answer.
            self.surveys.viewers.clear();
        }
    }

    /// How this node is, for others.
    pub(super) fn own_report(&self) -> Report {
        let path = |(node, state, round_trip): (NodeId, _, Option<Duration>)| PathReport {
            node,
            state,
            round_trip_us: round_trip
                .map(|span| u32::try_from(span.as_micros()).unwrap_or(u32::MAX)),
        };
        Report {
            version: env!("CARGO_PKG_VERSION").into(),
            problems: u32::try_from(self.problems().len()).unwrap_or(u32::MAX),
            paths: self.path_states().map(path).collect(),
            secrets: self.keyring.ids(),
            refused: None,
            arrivals: None,
        }
    }

    /// Ends what has taken too long.
    pub(super) fn end_surveys(&mut self, now: Instant) {
        if self.surveys.deadline().is_some_and(|at| at <= now) {
            self.go_on_with_surveys();
            self.carry_out();
        }
    }

    pub(super) fn on_reported(&mut self, node: NodeId, number: u64, report: Option<Box<Report>>) {
        let known = self.node.peers().count() + 1;
        let Some(survey) = self.surveys.under_way(number) else { return };
        if survey.asked.remove(&node) {
            let report = report.map(|mut report| {
                report.paths.truncate(known);
                *report
            });
            survey.findings.insert(node, report);
        }
        self.go_on_with_surveys();
    }

    /// Asks the next ones, and ends surveys that are over.
    pub(super) fn go_on_with_surveys(&mut self) {
        (0..self.surveys.queues.len()).for_each(|queue| self.go_on_with(queue));
    }

    fn go_on_with(&mut self, queue: usize) {
        let now = Instant::now();
        while let Some(survey) = self.surveys.queues[queue].front_mut() {
            let is_late = *survey.deadline.get_or_insert(now + TIMEOUT) <= now;
            while survey.asked.len() < AT_ONCE
                && !is_late
                && let Some(node) = survey.left.pop_front()
            {
                if self.node.inquire(node, survey.number, survey.inquiry.clone()) {
                    survey.asked.insert(node);
                } else {
                    survey.findings.insert(node, None);
                }
            }
            if !survey.asked.is_empty() && !is_late {
                return;
            }
            let Some(survey) = self.surveys.queues[queue].pop_front() else { return };
            let mut findings = survey.findings;
            findings.extend(survey.asked.into_iter().chain(survey.left).map(|node| (node, None)));
            (survey.then)(self, findings);
        }
    }

    /// What one member says of itself; nothing, if it does not answer.
    pub(super) fn show_peer(
        &mut self,
        whom: &str,
        reply: Sender<Result<Option<MatrixRow>, String>>,
    ) {
        let node = match self.node.find(whom) {
            Ok(node) if node == self.node.id() => {
                let row = self.row(node, Some(self.own_report()));
                return drop(reply.send(Ok(Some(row))));
            }
            Ok(node) => node,
            Err(why) => return drop(reply.send(Err(why))),
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

    fn draw(&mut self, mut findings: Findings, omitted: usize) {
        findings.insert(self.node.id(), Some(self.own_report()));
        let mut rows: Vec<MatrixRow> =
            findings.into_iter().map(|(node, report)| self.row(node, report)).collect();
        rows.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
        let matrix = serde_json::to_vec(&Matrix { rows, omitted }).unwrap_or_default();
        let matrix = Bytes::from(matrix);
        self.surveys.matrix = Some((Instant::now(), matrix.clone()));
        for viewer in self.surveys.viewers.drain(..) {
            let _ = viewer.send(matrix.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_surveys_of_operators_leave_room_for_one_of_a_trial() {
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
        assert_eq!(added.count(), MAX_WAITING);
        assert!(surveys.add(survey(100, Inquiry::Arrivals(7))));
        assert!(surveys.under_way(0).is_some() && surveys.under_way(100).is_some());
        assert!(surveys.under_way(1).is_none());
    }
}
