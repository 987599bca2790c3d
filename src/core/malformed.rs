//! Unusable input from peers: counted, logged at a bounded rate, and otherwise ignored.
//!
//! A faulty peer can send many such messages for a long time. The log gets at most one line a minute for each
//! peer and kind, with the count since the previous line.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use crate::{
    model::{ClusterId, NodeId, Problem, ProblemCode, Time, visible},
    wire::{Frame, Response},
};

use super::Node;

/// Interval between two log lines about one peer and kind.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long a refused entry remains among the problems.
const PROBLEM_DURATION: Duration = Duration::from_secs(600);
/// Limit of remembered notes; beyond it the oldest is dropped.
const MAX_NOTES: usize = 1024;
/// Limit of peers named among the problems.
const MAX_NAMED: usize = 20;

/// What is wrong with a peer's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A message that cannot be decoded, or a response of the wrong kind.
    Unreadable,
    /// A message of another cluster.
    OtherCluster,
    /// Facts that cannot be true.
    Refused,
    /// Two records of one slot and epoch.
    TwoOwners,
    /// The peer refuses to compare states with this node.
    RefusesComparison,
    /// A `Hello` was served; noted only to bound the log.
    SendsHello,
}

#[derive(Clone, Debug)]
struct Note {
    logged: Time,
    since: u64,
    last: Time,
    why: String,
}

/// The notes, by peer and kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes(BTreeMap<(NodeId, Kind), Note>);

impl Notes {
    /// Adds to a note. Returns the count since the last log line if another line is due.
    pub(super) fn add(
        &mut self,
        now: Time,
        peer: NodeId,
        kind: Kind,
        count: u64,
        why: &str,
    ) -> Option<u64> {
        if self.0.len() >= MAX_NOTES && !self.0.contains_key(&(peer, kind)) {
            let oldest = self.0.iter().min_by_key(|(_, note)| note.last).map(|(key, _)| *key);
            oldest.map(|oldest| self.0.remove(&oldest));
        }
        let fresh = Note { logged: now, since: 0, last: now, why: String::new() };
        let is_first = !self.0.contains_key(&(peer, kind));
        let note = self.0.entry((peer, kind)).or_insert(fresh);
        note.last = now;
        note.since += count;
        if note.why != why {
            why.clone_into(&mut note.why);
        }
        let is_due = is_first || now.since(note.logged) >= LOG_INTERVAL;
        is_due.then(|| {
            note.logged = now;
            std::mem::take(&mut note.since)
        })
    }

    /// Returns the peers whose entries were refused lately, with the last reason.
    fn refused(&self, now: Time) -> impl Iterator<Item = (NodeId, &str)> {
        let lately = move |note: &&Note| now.since(note.last) < PROBLEM_DURATION;
        self.0.iter().filter(|((_, kind), _)| *kind == Kind::Refused).filter_map(
            move |((peer, _), note)| Some((*peer, Some(note).filter(lately)?.why.as_str())),
        )
    }

    /// Removes the note about refused entries of a peer that now sends valid ones.
    pub(super) fn clear_refused(&mut self, peer: NodeId) {
        self.0.remove(&(peer, Kind::Refused));
    }
}

impl Node {
    /// Notes a response of the wrong kind. Every peer may answer with a refusal; anything else is malformed.
    pub(super) fn note_unexpected(&mut self, from: NodeId, response: &Response, what: &str) {
        match response {
            Response::Refused(refusal) => {
                tracing::debug!(peer = %from, %refusal, "{what}");
                self.stop_if_expelled(refusal);
            }
            _ => self.note_malformed(from, &what),
        }
    }

    /// Notes a frame for the agent that cannot be decoded.
    pub fn report_malformed(&mut self, now: Time, from: NodeId, error: &dyn Display) {
        self.clock = now;
        self.note_malformed(from, error);
    }

    pub(super) fn note_malformed(&mut self, from: NodeId, error: &dyn Display) {
        self.counters.malformed += 1;
        let error = visible(&error.to_string());
        if let Some(count) = self.note(from, Kind::Unreadable, 1, &error) {
            let name = self.name_of(from);
            tracing::warn!(peer = %from, name, count, %error, "unreadable message ignored");
        }
    }

    pub(super) fn note_foreign(&mut self, from: NodeId, theirs: ClusterId) {
        self.counters.malformed += 1;
        if let Some(count) = self.note(from, Kind::OtherCluster, 1, "") {
            let ours = self.replica.cluster_id();
            tracing::warn!(peer = %from, count, ?ours, %theirs, "message of another cluster ignored");
        }
    }

    /// Notes facts that cannot be true. Members refuse them and pass none on, so the sender is faulty or runs
    /// an old release.
    pub(super) fn note_refused(&mut self, peer: NodeId, count: u64, why: &str) {
        self.counters.refused += count;
        let why = visible(why);
        if let Some(count) = self.note(peer, Kind::Refused, count, &why) {
            tracing::warn!(%peer, name = self.name_of(peer), count, %why, "entries refused");
        }
    }

    pub(super) fn note(&mut self, peer: NodeId, kind: Kind, count: u64, why: &str) -> Option<u64> {
        let count = self.notes.add(self.clock, peer, kind, count, why)?;
        // A peer that changes its key is a new one each time.
        self.refusal_log_budget.take(self.clock).then_some(count)
    }

    /// Returns one problem for each peer whose entries are refused.
    pub(super) fn refused_problems(&self) -> Vec<Problem> {
        let all: Vec<_> = self.notes.refused(self.clock).collect();
        let named = all.iter().take(MAX_NAMED).map(|(node, why)| {
            let name = self.name_of(*node);
            let what = format!(
                "{name} ({node}) sends facts that cannot be true, and they are ignored: {why}"
            );
            Problem::new(ProblemCode::InvalidFacts, name, what, "")
        });
        let more = all.len().saturating_sub(MAX_NAMED);
        let more = (more > 0).then(|| {
            let what = format!("{more} more members send facts that cannot be true");
            Problem::new(ProblemCode::InvalidFacts, "other members", what, "")
        });
        named.chain(more).collect()
    }
}

pub(super) fn read_response(bytes: &[u8]) -> Result<Response, String> {
    match Frame::decode(bytes) {
        Ok((_, Frame::Response(payload))) => {
            Response::decode(payload).map_err(|error| visible(&error.to_string()))
        }
        Ok(_) => Err("the answer is not a response".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_about_one_peer_and_kind_are_logged_once_a_minute_with_their_count() {
        let peer = |seed: u8| NodeId::from_bytes([seed; 8]);
        let mut notes = Notes::default();
        let mut at = |seconds, seed, kind| {
            let now = Time::ZERO + Duration::from_secs(seconds);
            notes.add(now, peer(seed), kind, 1, "why")
        };
        assert_eq!(at(0, 1, Kind::Unreadable), Some(1));
        for second in 1..60 {
            assert_eq!(at(second, 1, Kind::Unreadable), None);
        }
        assert_eq!(at(30, 2, Kind::Unreadable), Some(1), "another peer");
        assert_eq!(at(30, 1, Kind::OtherCluster), Some(1), "another kind");
        assert_eq!(at(61, 1, Kind::Unreadable), Some(60));
    }

    #[test]
    fn notes_are_bounded_however_many_peers_there_are() {
        let mut notes = Notes::default();
        for number in 0..3_000_u64 {
            let now = Time::from_nanos(number);
            notes.add(now, NodeId::from_bytes(number.to_le_bytes()), Kind::Refused, 1, "why");
        }
        assert_eq!(notes.0.len(), MAX_NOTES);
    }
}
