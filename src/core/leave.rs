//! Going for good: everything this node owns goes to a successor, and the node goes only once somebody has
//! it.
//!
//! First the successor is asked whether it will; only then are the records written, for a record cannot be
//! taken back. From then on this node's disk is the only place that knows, so it goes on offering the
//! records, to any member if the successor has died in that moment, and over restarts, until one has them.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Run, Time},
    wire::{Facts, Key, Request, Response},
};

use super::{
    Answer, InUse, Node, Output, Purpose, Stop,
    planted::{Bug, planted},
    rank::peer_score,
};

const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Leaving {
    /// Asked in vain.
    tried: BTreeSet<NodeId>,
    /// Who agreed to take everything. From then on this node uses its subnet no more: the successor may lease
    /// it to somebody in the moment in which it is told.
    successor: Option<NodeId>,
    /// The records are written, and somebody must accept them.
    handed: bool,
    /// All keepers were asked in vain: once more then.
    retry_at: Option<Time>,
}

impl Leaving {
    fn new() -> Self {
        Self { tried: BTreeSet::new(), successor: None, handed: false, retry_at: None }
    }

    /// Whether the subnet is in use no more.
    pub(super) const fn withdraws(&self) -> bool {
        self.successor.is_some()
    }

    /// The leave that a crash or a signal cut short after the records were written.
    pub(super) fn resumed(now: Time) -> Self {
        Self { handed: true, retry_at: Some(now), ..Self::new() }
    }
}

impl Node {
    pub(super) fn start_leaving(&mut self) {
        if self.leaving.is_some() {
            return;
        }
        if self.home.is_none() || self.is_alone() {
            self.outputs.push_back(Output::Stop(Stop::Left { successor: None }));
            return;
        }
        if self.duplicate.is_some() {
            return self.cannot_leave(
                "another process runs with this node's key, and its subnet is in use there too: run \
                 `gossamer reset-identity` on one of the two first",
            );
        }
        if !self.sync.synced() {
            return self.cannot_leave(
                "this node has not met anybody since its start who would know what it granted \
                 before: try again when it has",
            );
        }
        self.leaving = Some(Leaving::new());
        self.ask_next_successor();
    }

    pub(super) fn next_leave_step(&self) -> Option<Time> {
        self.leaving.as_ref()?.retry_at
    }

    pub(super) fn step_leave(&mut self, now: Time) {
        if self.next_leave_step().is_none_or(|at| now < at) {
            return;
        }
        if self.is_alone() {
            self.outputs.push_back(Output::Stop(Stop::Left { successor: None }));
        }
        if let Some(leaving) = &mut self.leaving {
            leaving.retry_at = None;
            leaving.tried.clear();
        }
        self.hand_to_next(now);
    }

    /// Peers that have not been asked in vain, the best suited first.
    fn candidates(&self) -> Vec<NodeId> {
        let me = self.me.node;
        let tried = self.leaving.as_ref().map(|leaving| &leaving.tried);
        let untried = |node: &NodeId| tried.is_none_or(|tried| !tried.contains(node));
        let mut candidates: Vec<_> =
            self.directory.peers(me).map(|record| record.node).filter(untried).collect();
        candidates.sort_by_key(|node| {
            std::cmp::Reverse((self.membership.is_active(*node), peer_score(me, *node)))
        });
        candidates
    }

    fn ask_next_successor(&mut self) {
        let successor = self.candidates().into_iter().find(|node| self.membership.is_active(*node));
        match successor {
            Some(successor) => {
                self.call_member(
                    successor,
                    Purpose::AskSuccessor { successor },
                    &Request::BeMySuccessor,
                );
            }
            None => {
                self.leaving = None;
                self.cannot_leave(
                    "no other member answers, and its subnets must go to somebody: \
                     try again when one does",
                );
            }
        }
    }

    fn cannot_leave(&mut self, why: &str) {
        self.outputs.push_back(Output::CannotLeave(why.to_owned()));
    }

    pub(super) fn on_successor_answer(&mut self, successor: NodeId, answer: Answer) {
        let Some(leaving) = &mut self.leaving else { return };
        leaving.tried.insert(successor);
        match answer {
            Ok((_, Response::Accepted)) => {
                leaving.tried.clear();
                leaving.successor = Some(successor);
                self.view_stale = true;
                if self.in_use == InUse::Nothing || planted(Bug::LeaveWithoutWithdrawal) {
                    self.on_withdrawn();
                }
            }
            _ => self.ask_next_successor(),
        }
    }

    /// The kernel uses no subnet of ours any more.
    pub(super) fn on_withdrawn(&mut self) {
        let unwritten = self.leaving.as_ref().filter(|leaving| !leaving.handed);
        if let Some(successor) = unwritten.and_then(|leaving| leaving.successor) {
            self.hand_over(successor);
            self.hand_to(successor);
        }
    }

    /// Writes everything this node owns over to the successor.
    fn hand_over(&mut self, successor: NodeId) {
        let (Some(leaving), Some(home)) = (&mut self.leaving, &mut self.home) else { return };
        let me = self.me.node;
        let changes = home.slots.hand_over(me, successor);
        leaving.handed = true;
        self.note_slots(&changes);
    }

    /// Tells a member everything, the record that names it as the one who knows included.
    fn hand_to(&mut self, keeper: NodeId) {
        if self.me.left_to != Some(keeper) {
            self.me.left_to = Some(keeper);
            self.me.version.change += 1;
            self.directory.merge(&self.me);
            self.dirty.mark(Key::Member(self.me.node), true);
        }
        let Some(home) = &self.home else { return };
        // Not only what it gives away: it may be the only one who knows of something else.
        let facts = self.everything(home);
        self.call_member(keeper, Purpose::Handover { keeper }, &Request::Handover(facts));
    }

    fn hand_to_next(&mut self, now: Time) {
        match (self.candidates().first(), &mut self.leaving) {
            (Some(keeper), _) => self.hand_to(*keeper),
            (None, Some(leaving)) => leaving.retry_at = Some(now + RETRY),
            (None, None) => {}
        }
    }

    pub(super) fn on_handover_answer(&mut self, now: Time, keeper: NodeId, answer: Answer) {
        let Some(leaving) = &mut self.leaving else { return };
        leaving.tried.insert(keeper);
        let successor = leaving.successor;
        let accepted = matches!(answer, Ok((_, Response::Accepted)));
        if !accepted && !planted(Bug::LeaveWithoutAcceptance) {
            tracing::warn!(%keeper, "did not accept the handover, asking another member");
            return self.hand_to_next(now);
        }
        let me = self.me.node;
        let still_owns =
            self.home.as_ref().is_some_and(|home| home.slots.runs_of(me).next().is_some());
        if still_owns && self.may_write() {
            // A grant to this node was on its way when it left. In doubt it writes nothing, and others
            // reclaim it.
            self.hand_over(successor.unwrap_or(keeper));
            return self.hand_to(keeper);
        }
        let mine = |run: &&Run| run.record.granter == me;
        let slots = self.home.iter().flat_map(|home| home.slots.runs()).filter(mine).copied();
        let facts =
            Facts { members: vec![self.me.clone()], slots: slots.collect(), ..Facts::default() };
        self.push.add(now, &facts, None);
        self.flush_push(now);
        self.membership.leave(now);
        self.drain_membership(now);
        self.outputs.push_back(Output::Stop(Stop::Left { successor }));
    }
}
