//! Forgets members by timeout, if a majority of configured voters agrees.
//!
//! Each voter measures how long a member has been missing without interruption. After `forget_after` it
//! queries the other voters. If a majority has missed the member for as long, it declares the member gone;
//! `forget` does the rest. A vote is an observation, so it is not saved:
//!
//! - A restarted voter starts to measure from zero.
//! - A voter that was frozen does not count that time.
//! - A member whose kernel answers this voter is not missing, even if its agent is silent.
//! - A voter that does not hold a majority of voters as alive is cut off itself and counts nothing.
//!
//! Two parts of a partitioned cluster never forget each other's members, because only one of them can have a
//! majority of voters.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Duration,
};

use crate::{
    model::{NodeId, NodeName, Problem, ProblemCode, Quorum, Time},
    wire::{Request, Response, Vote},
};

use super::{Answer, Node, Purpose, forget::MAX_PER_STEP};

/// How often a voter checks which members are missing. At most twice this much counts between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Delay of each voter after the one before it in the list; a vote by one of them is enough.
const VOTER_STAGGER: Duration = Duration::from_secs(15);

/// The observations of this node as a voter.
pub(super) struct Voting {
    next_check: Time,
    last_check: Time,
    missing: BTreeMap<NodeId, Absence>,
    /// The member about which the voters were queried last. A check continues after it.
    last_queried: Option<NodeId>,
    /// Voters with another list of voters or another timeout: their votes do not count.
    differing: BTreeSet<NodeId>,
}

/// A member that this voter has not seen alive for a time.
#[derive(Default)]
struct Absence {
    duration: Duration,
    /// Voters that have missed it for `forget_after`.
    votes: BTreeSet<NodeId>,
}

impl Voting {
    pub(super) fn new(now: Time) -> Self {
        let missing = BTreeMap::new();
        Self {
            next_check: now + CHECK_INTERVAL,
            last_check: now,
            missing,
            last_queried: None,
            differing: BTreeSet::new(),
        }
    }
}

impl Voting {
    /// Returns the members about which the voters are queried in this check: a part of those overdue, since a
    /// member that lies can invent thousands. Each has its turn.
    fn next_queried(&mut self, overdue: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let after = |last: NodeId| overdue.range((Bound::Excluded(last), Bound::Unbounded));
        let rest = self.last_queried.map(after).into_iter().flatten();
        let next: Vec<NodeId> =
            rest.chain(overdue).take(MAX_PER_STEP.min(overdue.len())).copied().collect();
        self.last_queried = next.last().copied();
        next
    }
}

impl Node {
    pub(super) fn next_vote_step(&self) -> Option<Time> {
        self.voting_rule().map(|_| self.voting.next_check)
    }

    pub(super) fn step_vote(&mut self, now: Time) {
        let Some((quorum, index)) = self.voting_rule() else { return };
        if now < self.voting.next_check {
            return;
        }
        let due = quorum.forget_after + VOTER_STAGGER * index;
        let quorum = quorum.clone();
        let elapsed = now.since(self.voting.last_check).min(CHECK_INTERVAL * 2);
        (self.voting.last_check, self.voting.next_check) = (now, now + CHECK_INTERVAL);

        let voters: Vec<NodeId> = self.voters(&quorum).collect();
        let alive = voters.iter().filter(|voter| self.is_alive(**voter)).count();
        let peers = self.replica.directory.peers(self.replica.me.node).map(|record| record.node);
        let missing: BTreeSet<NodeId> =
            peers.filter(|node| alive >= quorum.majority() && self.misses(*node)).collect();
        self.voting.missing.retain(|node, _| missing.contains(node));
        let mut overdue = BTreeSet::new();
        for node in missing {
            let absence = self.voting.missing.entry(node).or_default();
            absence.duration += elapsed;
            if absence.duration >= due {
                absence.votes.insert(self.replica.me.node);
                overdue.insert(node);
            }
        }
        for node in self.voting.next_queried(&overdue) {
            self.query_voters(&quorum, &voters, node);
            self.count_votes(now, node);
        }
    }

    fn query_voters(&mut self, quorum: &Quorum, voters: &[NodeId], node: NodeId) {
        let voted = |voter: &NodeId| {
            self.voting.missing.get(&node).is_some_and(|absence| absence.votes.contains(voter))
        };
        for voter in voters.iter().filter(|voter| !voted(voter)).copied().collect::<Vec<_>>() {
            let request = Request::HaveYouMissed { node, quorum: quorum.clone() };
            self.call_member(voter, Purpose::Vote { voter, node }, &request);
        }
    }

    /// Returns this node's vote on a member, for a voter with the rule `theirs`.
    pub(super) fn vote(&self, node: NodeId, theirs: &Quorum) -> Vote {
        match self.voting_rule() {
            Some((ours, _)) if ours == theirs => {
                let missed = self.voting.missing.get(&node);
                let long = missed.is_some_and(|absence| absence.duration >= ours.forget_after);
                if long { Vote::Missed } else { Vote::Seen }
            }
            _ => Vote::OtherRule,
        }
    }

    pub(super) fn handle_vote(&mut self, now: Time, voter: NodeId, node: NodeId, answer: Answer) {
        let vote = match answer {
            Ok((from, Response::Vote(vote))) if from == voter => vote,
            Ok((from, other)) => {
                return self.note_unexpected(from, &other, "unexpected response to a vote request");
            }
            Err(error) => return tracing::debug!(%voter, %error, "voter did not answer"),
        };
        if vote == Vote::OtherRule {
            self.voting.differing.insert(voter);
        } else {
            self.voting.differing.remove(&voter);
        }
        if let (Vote::Missed, Some(absence)) = (vote, self.voting.missing.get_mut(&node)) {
            absence.votes.insert(voter);
            self.count_votes(now, node);
        }
    }

    fn count_votes(&mut self, now: Time, node: NodeId) {
        let Some((quorum, _)) = self.voting_rule() else { return };
        let votes = self.voting.missing.get(&node).map_or(0, |absence| absence.votes.len());
        if votes >= quorum.majority() && !self.lifecycle.is_leaving() && self.misses(node) {
            let (name, quorum) = (self.name_of(node).to_owned(), quorum.clone());
            if self.log_budget.take(now) {
                tracing::warn!(
                    %node, name, votes, ?quorum, "majority of voters missed a member for too long"
                );
            }
            self.counters.voted_gone += 1;
            self.voting.missing.remove(&node);
            self.declare_gone(now, node, false);
        }
    }

    /// Returns the rule and this node's index among the voters, or `None` if it is no voter.
    fn voting_rule(&self) -> Option<(&Quorum, u32)> {
        let quorum =
            self.config.quorum.as_ref().filter(|_| self.replica.cluster_state.is_some())?;
        let index = quorum.voters().iter().position(|name| *name == self.replica.me.name)?;
        Some((quorum, index as u32))
    }

    fn voters(&self, quorum: &Quorum) -> impl Iterator<Item = NodeId> {
        quorum.voters().iter().filter_map(|name| self.voter(name).ok())
    }

    fn is_alive(&self, node: NodeId) -> bool {
        node == self.replica.me.node || self.membership.is_active(node)
    }

    /// Returns whether neither the agent nor the kernel of a member answers. A kernel that forwards without
    /// an agent still serves the member's pods, so their subnet is in use.
    fn misses(&self, node: NodeId) -> bool {
        !self.membership.is_active(node) && !self.running_hosts.contains_key(&node)
    }

    /// Returns the one current member with a voter's name.
    fn voter(&self, name: &NodeName) -> Result<NodeId, &'static str> {
        if *name == self.replica.me.name {
            return Ok(self.replica.me.node);
        }
        let mut found = self
            .replica
            .directory
            .peers(self.replica.me.node)
            .filter(|record| record.name == *name);
        match (found.next(), found.next()) {
            (Some(record), None) => Ok(record.node),
            (None, _) => Err("no member has that name"),
            (Some(_), Some(_)) => Err("several members have that name"),
        }
    }

    /// Returns the reasons for which votes may fail.
    pub(super) fn vote_problems(&self) -> Vec<Problem> {
        let Some((quorum, _)) = self.voting_rule() else { return Vec::new() };
        let unknown = quorum.voters().iter().filter_map(|name| {
            let why = self.voter(name).err()?;
            let what = format!("voter {}: {why}", name.as_str());
            Some(Problem::new(ProblemCode::Voting, name, what, ""))
        });
        let differing = self.voting.differing.iter().map(|voter| {
            let name = self.name_of(*voter);
            Problem::new(
                ProblemCode::Voting,
                name,
                format!(
                    "voter {name} has other voters or another forget_after than this node ({quorum:?}), so \
                     its vote does not count"
                ),
                "configure the same on all voters",
            )
        });
        unknown.chain(differing).collect()
    }
}
