//! Forgetting by time alone, where most of a few fixed voters agree.
//!
//! Each voter counts how long it has itself missed a member, without interruption. Once that is long enough
//! it asks the other voters whether they have missed it as long, and vouches that it is gone if most have;
//! what follows is in `forget`. A vote is an observation and no promise, so nothing of it is kept: a voter
//! that restarts begins to count again, one that was frozen has missed nobody meanwhile, and one that does
//! not hold most voters as alive is itself the one that is cut off, and misses nobody. Two parts of a cluster
//! never forget each other's members: at most one of them has most voters.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    model::{NodeId, NodeName, Quorum, Time},
    wire::{Request, Response, Vote},
};

use super::{Answer, Node, Purpose};

/// How often a voter looks who is missing, and at most how much of a pause counts as having looked.
const LOOK: Duration = Duration::from_secs(5);
/// Each further voter waits so much longer before it asks: one of them is enough.
const STAGGER: Duration = Duration::from_secs(15);

/// What a voter has seen.
pub(super) struct Voting {
    look_at: Time,
    looked: Time,
    missing: BTreeMap<NodeId, Absence>,
    /// Voters whose rule is another one: their votes count for nothing.
    differing: BTreeSet<NodeId>,
}

/// A member that this voter has not seen alive for so long.
#[derive(Default)]
struct Absence {
    lasts: Duration,
    /// Voters that have missed it long enough as well.
    votes: BTreeSet<NodeId>,
}

impl Voting {
    pub(super) fn new(now: Time) -> Self {
        let missing = BTreeMap::new();
        Self { look_at: now + LOOK, looked: now, missing, differing: BTreeSet::new() }
    }
}

impl Node {
    pub(super) fn next_vote_step(&self) -> Option<Time> {
        self.ballot().map(|_| self.voting.look_at)
    }

    pub(super) fn step_vote(&mut self, now: Time) {
        let Some((quorum, place)) = self.ballot() else { return };
        if now < self.voting.look_at {
            return;
        }
        let due = quorum.forget_after + STAGGER * place;
        let quorum = quorum.clone();
        let watched = now.since(self.voting.looked).min(LOOK * 2);
        (self.voting.looked, self.voting.look_at) = (now, now + LOOK);

        let here = self.voters(&quorum).filter(|voter| self.is_here(*voter)).count();
        let peers = self.directory.peers(self.me.node).map(|record| record.node);
        let missing: BTreeSet<NodeId> = peers
            .filter(|node| here >= quorum.majority() && !self.membership.is_active(*node))
            .collect();
        self.voting.missing.retain(|node, _| missing.contains(node));
        for node in missing {
            let absence = self.voting.missing.entry(node).or_default();
            absence.lasts += watched;
            if absence.lasts >= due {
                absence.votes.insert(self.me.node);
                self.ask_voters(&quorum, node);
                self.count_votes(now, node);
            }
        }
    }

    fn ask_voters(&mut self, quorum: &Quorum, node: NodeId) {
        let voted = |voter: &NodeId| {
            self.voting.missing.get(&node).is_some_and(|absence| absence.votes.contains(voter))
        };
        for voter in self.voters(quorum).filter(|voter| !voted(voter)).collect::<Vec<_>>() {
            let request = Request::HaveYouMissed { node, quorum: quorum.clone() };
            self.call_member(voter, Purpose::Vote { voter, node }, &request);
        }
    }

    /// What this node says to a voter that asks.
    pub(super) fn vote(&self, asked_for: NodeId, theirs: &Quorum) -> Vote {
        match self.ballot() {
            Some((ours, _)) if ours == theirs => {
                let missed = self.voting.missing.get(&asked_for);
                let long = missed.is_some_and(|absence| absence.lasts >= ours.forget_after);
                if long { Vote::Missed } else { Vote::Seen }
            }
            _ => Vote::OtherRule,
        }
    }

    pub(super) fn on_vote(&mut self, now: Time, voter: NodeId, node: NodeId, answer: Answer) {
        let vote = match answer {
            Ok((from, Response::Vote(vote))) if from == voter => vote,
            Ok((from, other)) => return self.note_unexpected(from, &other, "no vote"),
            Err(error) => return tracing::debug!(%voter, %error, "no vote"),
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
        let Some((quorum, _)) = self.ballot() else { return };
        let votes = self.voting.missing.get(&node).map_or(0, |absence| absence.votes.len());
        if votes >= quorum.majority() && self.leaving.is_none() && !self.membership.is_active(node)
        {
            let name = self.name_of(node);
            tracing::warn!(%node, name, votes, ?quorum, "missed for too long by most voters");
            self.counters.voted_gone += 1;
            self.voting.missing.remove(&node);
            self.vouch(now, node, false);
        }
    }

    /// The rule, and this node's place among the voters if it is one.
    fn ballot(&self) -> Option<(&Quorum, u32)> {
        let quorum = self.config.quorum.as_ref().filter(|_| self.home.is_some())?;
        let place = quorum.voters().iter().position(|name| *name == self.me.name)?;
        Some((quorum, place as u32))
    }

    fn voters(&self, quorum: &Quorum) -> impl Iterator<Item = NodeId> {
        quorum.voters().iter().filter_map(|name| self.voter(name).ok())
    }

    fn is_here(&self, node: NodeId) -> bool {
        node == self.me.node || self.membership.is_active(node)
    }

    /// The one member of a voter's name that is not gone.
    fn voter(&self, name: &NodeName) -> Result<NodeId, &'static str> {
        if *name == self.me.name {
            return Ok(self.me.node);
        }
        let mut found = self.directory.peers(self.me.node).filter(|record| record.name == *name);
        match (found.next(), found.next()) {
            (Some(record), None) => Ok(record.node),
            (None, _) => Err("no member has that name"),
            (Some(_), Some(_)) => Err("several members have that name"),
        }
    }

    /// Why voting may come to nothing.
    pub(super) fn vote_problems(&self) -> Vec<String> {
        let Some((quorum, _)) = self.ballot() else { return Vec::new() };
        let unknown = quorum.voters().iter().filter_map(|name| {
            let why = self.voter(name).err()?;
            Some(format!("voter {}: {why}", name.as_str()))
        });
        let differing = self.voting.differing.iter().map(|voter| {
            format!(
                "voter {} has other voters or another forget_after than this node ({quorum:?}), so its \
                 vote does not count: write the same on all voters",
                self.name_of(*voter)
            )
        });
        unknown.chain(differing).collect()
    }
}
