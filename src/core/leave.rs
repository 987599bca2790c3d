//! Leaving: hands all slots of this node to a successor and ends membership once a member has the records.
//!
//! The successor has to agree first, because records cannot be revoked once written. From then on this node's
//! disk may be the only place that holds them. So the node offers the records to one member after the other,
//! also after a restart, until one accepts.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Run, Time},
    wire::{Facts, Key, Request, Response},
};

use super::{Answer, KernelSubnet, Node, Purpose, Stop, rank::peer_score};

/// Pause after no member has accepted the handover.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Leaving {
    /// Members that refused or did not answer.
    tried: BTreeSet<NodeId>,
    /// The member that agreed to take over. This node stops using its subnet, because the successor may lease
    /// it to another node as soon as it has the records.
    successor: Option<NodeId>,
    /// Whether the handover records are written, so that a member has to accept them.
    handed: bool,
    /// When to offer the records again after all members failed.
    pub(super) retry_at: Option<Time>,
}

impl Leaving {
    fn new() -> Self {
        Self { tried: BTreeSet::new(), successor: None, handed: false, retry_at: None }
    }

    /// Whether this node stops using its subnet.
    pub(super) const fn withdraws(&self) -> bool {
        self.successor.is_some()
    }

    /// Resumes a leave that a crash or a signal interrupted after the records were written.
    pub(super) fn resumed(now: Time) -> Self {
        Self { handed: true, retry_at: Some(now), ..Self::new() }
    }
}

impl Node {
    pub(super) fn start_leaving(&mut self) {
        if self.lifecycle.is_leaving() {
            return;
        }
        if self.replica.cluster_state.is_none() || self.is_alone() {
            self.outbox.stop(Stop::Left { successor: None });
            return;
        }
        if !self.key_use.is_unique() {
            return self.cannot_leave(
                "another process runs with this node's key and may use its subnet: run \
                 `gossamer reset-identity` on one of the two hosts first",
            );
        }
        if !self.replica.sync.synced() {
            return self.cannot_leave(
                "since its start this node has not compared its state with a member that knows its \
                 earlier grants: try again when it has",
            );
        }
        self.lifecycle.leaving = Some(Leaving::new());
        self.query_next_successor();
    }

    pub(super) fn step_leave(&mut self, now: Time) {
        if self.lifecycle.next_leave_step().is_none_or(|at| now < at) {
            return;
        }
        if self.is_alone() {
            self.outbox.stop(Stop::Left { successor: None });
        }
        if let Some(leaving) = &mut self.lifecycle.leaving {
            leaving.retry_at = None;
            leaving.tried.clear();
        }
        self.hand_to_next(now);
    }

    /// Returns the peers that have not failed yet, active ones first, then by rendezvous score.
    fn candidates(&self) -> Vec<NodeId> {
        let me = self.replica.me.node;
        let tried = self.lifecycle.leaving.as_ref().map(|leaving| &leaving.tried);
        let untried = |node: &NodeId| tried.is_none_or(|tried| !tried.contains(node));
        let mut candidates: Vec<_> =
            self.replica.directory.peers(me).map(|record| record.node).filter(untried).collect();
        candidates.sort_by_key(|node| {
            std::cmp::Reverse((self.membership.is_active(*node), peer_score(me, *node)))
        });
        candidates
    }

    fn query_next_successor(&mut self) {
        let successor = self.candidates().into_iter().find(|node| self.membership.is_active(*node));
        match successor {
            Some(successor) => {
                self.call_member(
                    successor,
                    Purpose::QuerySuccessor { successor },
                    &Request::BeMySuccessor,
                );
            }
            None => {
                self.lifecycle.leaving = None;
                self.cannot_leave(
                    "no other member answers, and one has to take over the subnets of this node: \
                     try again when one does. If the others are gone for good, run `gossamer forget NAME` \
                     for each, then leave",
                );
            }
        }
    }

    fn cannot_leave(&mut self, why: &str) {
        self.outbox.report_cannot_leave(why);
    }

    pub(super) fn handle_successor_answer(&mut self, successor: NodeId, answer: Answer) {
        let Some(leaving) = &mut self.lifecycle.leaving else { return };
        leaving.tried.insert(successor);
        match answer {
            Ok((_, Response::Accepted)) => {
                leaving.tried.clear();
                leaving.successor = Some(successor);
                self.outbox.invalidate_view();
                if self.lifecycle.kernel_subnet == KernelSubnet::Nothing {
                    self.continue_leave_after_withdrawal();
                }
            }
            _ => self.query_next_successor(),
        }
    }

    /// Continues the leave after the kernel has stopped using this node's subnet.
    pub(super) fn continue_leave_after_withdrawal(&mut self) {
        let unwritten = self.lifecycle.leaving.as_ref().filter(|leaving| !leaving.handed);
        if let Some(successor) = unwritten.and_then(|leaving| leaving.successor) {
            self.hand_over(successor);
            self.hand_to(successor);
        }
    }

    /// Writes records that make the successor owner of all slots of this node.
    fn hand_over(&mut self, successor: NodeId) {
        let (Some(leaving), Some(cluster_state)) =
            (&mut self.lifecycle.leaving, &mut self.replica.cluster_state)
        else {
            return;
        };
        let me = self.replica.me.node;
        let changes = cluster_state.slots.hand_over(me, successor);
        leaving.handed = true;
        self.replica.note_slots(&mut self.outbox, &changes);
    }

    /// Sends all facts to a member, including this node's record with `left_to` set to it.
    fn hand_to(&mut self, keeper: NodeId) {
        if self.replica.me.left_to != Some(keeper) {
            self.replica.me.left_to = Some(keeper);
            self.replica.me.version.change += 1;
            self.replica.directory.merge(&self.replica.me);
            self.outbox.mark_urgent(Key::Member(self.replica.me.node));
        }
        // All facts, not only the handover: this node may be the only one that knows some of them.
        let facts = self.replica.everything(self.active());
        self.call_member(keeper, Purpose::Handover { keeper }, &Request::Handover(facts));
    }

    fn hand_to_next(&mut self, now: Time) {
        match (self.candidates().first(), &mut self.lifecycle.leaving) {
            (Some(keeper), _) => self.hand_to(*keeper),
            (None, Some(leaving)) => leaving.retry_at = Some(now + RETRY_INTERVAL),
            (None, None) => {}
        }
    }

    pub(super) fn handle_handover_answer(&mut self, now: Time, keeper: NodeId, answer: Answer) {
        let Some(leaving) = &mut self.lifecycle.leaving else { return };
        leaving.tried.insert(keeper);
        let successor = leaving.successor;
        let accepted = matches!(answer, Ok((_, Response::Accepted)));
        if !accepted {
            tracing::warn!(%keeper, "handover not accepted, trying another member");
            return self.hand_to_next(now);
        }
        let me = self.replica.me.node;
        if self.replica.owns_slots(me) && self.may_write() {
            // A grant to this node arrived during the leave. With unverified memory the node writes nothing,
            // and the cluster reclaims the slot.
            self.hand_over(successor.unwrap_or(keeper));
            return self.hand_to(keeper);
        }
        let mine = |run: &&Run| run.record.granter == me;
        let slots = self
            .replica
            .cluster_state
            .iter()
            .flat_map(|cluster_state| cluster_state.slots.runs())
            .filter(mine)
            .copied();
        let facts = Facts {
            members: vec![self.replica.me.clone()],
            slots: slots.collect(),
            ..Facts::default()
        };
        self.replica.push.add(now, &facts, None);
        self.flush_push(now);
        self.membership.leave(now);
        self.drain_membership(now);
        self.outbox.stop(Stop::Left { successor });
    }
}
