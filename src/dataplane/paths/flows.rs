//! Whether each of several flows reaches a peer.
//!
//! Bonded links and routers with equal-cost paths choose the link of each flow by its addresses and ports. If
//! one link is dead, some flows are lost and all others pass. The source port of a tunnel packet depends on
//! the flow inside it, so datagrams from several source ports take several links.

use super::replies::LOSSES_UNTIL_LOST;
use crate::model::Time;

/// Number of flows: source ports from which datagrams are sent.
pub const FLOWS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// A probe of this flow is pending.
    is_pending: bool,
    /// The last probe was answered.
    answered: bool,
    /// When a lost probe was sent that is not yet known to be lost alone.
    unconfirmed_loss: Option<Time>,
    /// Losses since the last answer, while other probes were answered.
    lost: u32,
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    flows: [Flow; FLOWS],
    /// The flow probed last.
    last_probed: usize,
    /// Number of flow probes allowed while nothing is wrong.
    allowance: usize,
    /// The flow of datagrams that are not flow probes.
    current: usize,
}

impl Flows {
    /// Returns the flow for datagrams that are not flow probes: one that has not failed.
    pub(super) const fn current(&self) -> usize {
        self.current
    }

    /// Renews the allowance: one flow while all pass, all flows while some are lost.
    pub(super) fn renew_allowance(&mut self) {
        self.allowance = if self.tally().is_some() { FLOWS } else { 1 };
    }

    /// Returns the flow to probe now.
    pub(super) fn next_flow(&self) -> Option<usize> {
        self.undecided_flow().or_else(|| {
            let next = || (1..=FLOWS).map(|step| (self.last_probed + step) % FLOWS);
            next().find(|flow| self.is_idle(*flow)).filter(|_| self.allowance > 0)
        })
    }

    /// Returns a flow whose state is not certain since one was lost.
    fn undecided_flow(&self) -> Option<usize> {
        let is_any_lost = self.flows.iter().any(|flow| flow.lost > 0);
        let is_undecided = |index: &usize| {
            let Flow { answered, lost, .. } = self.flows[*index];
            (1..LOSSES_UNTIL_LOST).contains(&lost) || is_any_lost && lost == 0 && !answered
        };
        (0..FLOWS).find(|index| self.is_idle(*index) && is_undecided(index))
    }

    const fn is_idle(&self, index: usize) -> bool {
        let Flow { is_pending, unconfirmed_loss, .. } = self.flows[index];
        !is_pending && unconfirmed_loss.is_none()
    }

    /// Returns whether a loss is not yet known to concern only its flow.
    pub(super) fn has_unconfirmed_loss(&self) -> bool {
        self.flows.iter().any(|flow| flow.unconfirmed_loss.is_some())
    }

    /// Returns whether the state of any flow is not certain.
    pub(super) fn is_undecided(&self) -> bool {
        self.has_unconfirmed_loss() || self.undecided_flow().is_some()
    }

    pub(super) const fn on_sent(&mut self, index: usize) {
        self.flows[index].is_pending = true;
        self.last_probed = index;
        self.allowance = self.allowance.saturating_sub(1);
    }

    /// Records that the result of the flow's pending probe will stay unknown.
    pub(super) const fn on_abandoned(&mut self, index: usize) {
        self.flows[index].is_pending = false;
    }

    pub(super) fn on_answer(&mut self, index: usize) {
        if self.flows.iter().all(|flow| flow.lost >= LOSSES_UNTIL_LOST) {
            // All flows were lost, so the cause was not a single link. It is gone.
            self.flows.iter_mut().for_each(|flow| flow.lost = 0);
        }
        self.flows[index] = Flow { answered: true, ..Flow::default() };
    }

    /// Records the answer to a datagram that was not a flow probe.
    pub(super) fn on_arrival(&mut self, index: usize) {
        self.current = index;
        self.on_answer(index);
    }

    pub(super) fn on_loss(&mut self, index: usize, sent: Time) {
        let flow = &mut self.flows[index];
        (flow.is_pending, flow.unconfirmed_loss) = (false, Some(sent));
        if self.current == index {
            self.current = (index + 1) % FLOWS;
        }
    }

    /// Records that a probe of another kind, sent at `sent`, was answered: earlier losses concern only their
    /// flows.
    pub(super) fn confirm_losses(&mut self, sent: Time) {
        let is_first = self.flows.iter().all(|flow| flow.lost == 0);
        let is_lost = |flow: &Flow| flow.unconfirmed_loss.is_some_and(|at| at <= sent);
        if is_first && self.flows.iter().any(is_lost) {
            // Earlier answers say nothing about the other flows' present state.
            self.flows.iter_mut().for_each(|flow| flow.answered = false);
        }
        for flow in &mut self.flows {
            if flow.unconfirmed_loss.take_if(|at| *at <= sent).is_some() {
                (flow.answered, flow.lost) = (false, flow.lost.saturating_add(1));
            }
        }
    }

    /// Discards unconfirmed losses: everything is lost, which says nothing about single flows.
    pub(super) fn discard_unconfirmed(&mut self) {
        self.flows.iter_mut().for_each(|flow| flow.unconfirmed_loss = None);
    }

    /// Returns the numbers of lost flows and of flows with a known result; `None` if all pass or all are
    /// lost.
    pub(super) fn tally(&self) -> Option<(usize, usize)> {
        let count = |is: fn(&&Flow) -> bool| self.flows.iter().filter(is).count();
        let lost = count(|flow| flow.lost >= LOSSES_UNTIL_LOST);
        let answered = count(|flow| flow.answered);
        (lost > 0 && answered > 0).then_some((lost, lost + answered))
    }
}
