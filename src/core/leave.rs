//! Going for good: everything this node owns goes to an heir, and the node goes only once somebody has it.
//!
//! First the heir is asked whether it is there; only then are the records written, for a record cannot be
//! taken back. If the heir dies in that moment, any other member may keep the records for it.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    model::{NodeId, Time},
    wire::{Facts, Key, Request, Response},
};

use super::{CallError, Node, Output, Purpose, Stop, rank::peer_score};

const RETRY: Duration = Duration::from_secs(1);

type Answer = Result<(NodeId, Response), CallError>;

pub(super) struct Leaving {
    /// Asked in vain.
    tried: BTreeSet<NodeId>,
    /// Set once the records are written.
    handed: Option<(NodeId, Facts)>,
    /// All keepers were asked in vain: once more then.
    retry_at: Option<Time>,
}

impl Node {
    pub(super) fn start_leaving(&mut self) {
        if self.leaving.is_some() {
            return;
        }
        if self.home.is_none() || self.is_alone() {
            self.outputs.push_back(Output::Stop(Stop::Left { heir: None }));
            return;
        }
        self.leaving = Some(Leaving { tried: BTreeSet::new(), handed: None, retry_at: None });
        self.ask_next_heir();
    }

    pub(super) fn next_leave_step(&self) -> Option<Time> {
        self.leaving.as_ref()?.retry_at
    }

    pub(super) fn step_leave(&mut self, now: Time) {
        if self.next_leave_step().is_some_and(|at| at <= now) {
            if let Some(leaving) = &mut self.leaving {
                leaving.retry_at = None;
                leaving.tried.clear();
            }
            self.hand_to_next(now);
        }
    }

    fn next_candidate(&self) -> Option<NodeId> {
        let me = self.me.node;
        let leaving = self.leaving.as_ref()?;
        self.directory
            .peers(me)
            .map(|record| record.node)
            .filter(|node| !leaving.tried.contains(node) && self.membership.is_active(*node))
            .max_by_key(|node| peer_score(me, *node))
    }

    fn ask_next_heir(&mut self) {
        let Some(heir) = self.next_candidate() else {
            self.leaving = None;
            let why = "no other member answers, and its subnets must go to somebody: \
                       try again when one does"
                .to_owned();
            self.outputs.push_back(Output::CannotLeave(why));
            return;
        };
        let request = Request::Compare(self.buckets().roots());
        let after = self.after();
        self.call_member(heir, Purpose::AskHeir { heir }, &request, after);
    }

    pub(super) fn on_heir_answer(&mut self, heir: NodeId, answer: Answer) {
        let (Some(leaving), Some(home)) = (&mut self.leaving, &mut self.home) else { return };
        leaving.tried.insert(heir);
        match answer {
            Ok((_, Response::Same | Response::Differ(_))) => {
                let me = self.me.node;
                let changes = home.slots.hand_over(me, heir);
                let slots = changes.iter().map(|(run, _)| *run).collect();
                self.me.left = true;
                self.me.version.change += 1;
                self.directory.merge(&self.me);
                self.dirty.mark(Key::Member(me), true);
                let facts = Facts { members: vec![self.me.clone()], slots, active: Vec::new() };
                leaving.handed = Some((heir, facts));
                leaving.tried.clear();
                self.note_slots(&changes);
                self.hand_to(heir);
            }
            _ => self.ask_next_heir(),
        }
    }

    fn hand_to(&mut self, keeper: NodeId) {
        let Some((_, facts)) = self.leaving.as_ref().and_then(|l| l.handed.clone()) else { return };
        let after = self.after();
        self.call_member(keeper, Purpose::Handover { keeper }, &Request::Handover(facts), after);
    }

    fn hand_to_next(&mut self, now: Time) {
        match self.next_candidate() {
            Some(keeper) => self.hand_to(keeper),
            None => {
                if let Some(leaving) = &mut self.leaving {
                    leaving.retry_at = Some(now + RETRY);
                }
            }
        }
    }

    pub(super) fn on_handover_answer(&mut self, now: Time, keeper: NodeId, answer: Answer) {
        let Some(leaving) = &mut self.leaving else { return };
        leaving.tried.insert(keeper);
        let Some((heir, facts)) = leaving.handed.clone() else { return };
        if let Ok((_, Response::Accepted)) = answer {
            self.push.add(now, &facts, None);
            self.flush_push(now);
            self.membership.leave(now);
            self.drain_membership(now);
            self.outputs.push_back(Output::Stop(Stop::Left { heir: Some(heir) }));
        } else {
            tracing::warn!(%keeper, "did not accept the handover, asking another member");
            self.hand_to_next(now);
        }
    }
}
