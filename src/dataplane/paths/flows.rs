//! Whether each of several flows gets through to a peer.
//!
//! Bundled links, and routers with several ways of equal cost, send each flow by one of them, chosen by its
//! addresses and ports. Where one is dead some flows are lost, and all others pass. The source port of a
//! tunnel packet follows from the flow inside it, so datagrams from several ports take several ways.

use super::path::VERDICT;
use crate::model::Time;

/// Ports from which datagrams are sent.
pub const FLOWS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// A datagram of it is under way.
    is_asked: bool,
    /// The last one was answered.
    answered: bool,
    /// When one was sent that was lost, and maybe not alone.
    doubt: Option<Time>,
    /// Lost since the last answer, while other requests were answered.
    lost: u32,
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    flows: [Flow; FLOWS],
    /// The one that was asked last.
    turn: usize,
    /// So many may be asked although nothing is wrong.
    credit: usize,
    /// The one that other datagrams take.
    current: usize,
}

impl Flows {
    /// The flow of datagrams that are not sent for the flow's sake: one that has not failed.
    pub(super) const fn current(&self) -> usize {
        self.current
    }

    /// While all is well one flow is asked at a time, and all of them while some are lost.
    pub(super) fn grant(&mut self) {
        self.credit = if self.tally().is_some() { FLOWS } else { 1 };
    }

    /// The flow that is to be asked now.
    pub(super) fn due(&self) -> Option<usize> {
        self.open().or_else(|| {
            let next = || (1..=FLOWS).map(|step| (self.turn + step) % FLOWS);
            next().find(|flow| self.is_free(*flow)).filter(|_| self.credit > 0)
        })
    }

    /// A flow of which too little is known since one was lost.
    fn open(&self) -> Option<usize> {
        let is_any_lost = self.flows.iter().any(|flow| flow.lost > 0);
        let is_open = |index: &usize| {
            let Flow { answered, lost, .. } = self.flows[*index];
            (1..VERDICT).contains(&lost) || is_any_lost && lost == 0 && !answered
        };
        (0..FLOWS).find(|index| self.is_free(*index) && is_open(index))
    }

    const fn is_free(&self, index: usize) -> bool {
        let Flow { is_asked, doubt, .. } = self.flows[index];
        !is_asked && doubt.is_none()
    }

    /// Whether it has to be found out if only flows were lost, or everything.
    pub(super) fn is_doubted(&self) -> bool {
        self.flows.iter().any(|flow| flow.doubt.is_some())
    }

    /// Whether something is still to be found out.
    pub(super) fn is_open(&self) -> bool {
        self.is_doubted() || self.open().is_some()
    }

    pub(super) const fn on_asked(&mut self, index: usize) {
        self.flows[index].is_asked = true;
        self.turn = index;
        self.credit = self.credit.saturating_sub(1);
    }

    /// What becomes of the last one will not be known.
    pub(super) const fn on_forgotten(&mut self, index: usize) {
        self.flows[index].is_asked = false;
    }

    pub(super) fn on_answer(&mut self, index: usize) {
        if self.flows.iter().all(|flow| flow.lost >= VERDICT) {
            // All were lost, so that it was no matter of flows: that is over.
            self.flows.iter_mut().for_each(|flow| flow.lost = 0);
        }
        self.flows[index] = Flow { answered: true, ..Flow::default() };
    }

    /// The same of a datagram that was not sent for the flow's sake.
    pub(super) fn on_arrival(&mut self, index: usize) {
        self.current = index;
        self.on_answer(index);
    }

    pub(super) fn on_loss(&mut self, index: usize, sent: Time) {
        let flow = &mut self.flows[index];
        (flow.is_asked, flow.doubt) = (false, Some(sent));
        if self.current == index {
            self.current = (index + 1) % FLOWS;
        }
    }

    /// A request that was sent then, for another reason, was answered: what was lost before was lost alone.
    pub(super) fn confirm(&mut self, sent: Time) {
        let is_first = self.flows.iter().all(|flow| flow.lost == 0);
        let is_lost = |flow: &Flow| flow.doubt.is_some_and(|at| at <= sent);
        if is_first && self.flows.iter().any(is_lost) {
            // What the others did before tells nothing about now.
            self.flows.iter_mut().for_each(|flow| flow.answered = false);
        }
        for flow in &mut self.flows {
            if flow.doubt.take_if(|at| *at <= sent).is_some() {
                (flow.answered, flow.lost) = (false, flow.lost.saturating_add(1));
            }
        }
    }

    /// Everything is lost: that says nothing about single flows.
    pub(super) fn forgive(&mut self) {
        self.flows.iter_mut().for_each(|flow| flow.doubt = None);
    }

    /// How many flows are lost, of how many; none where all are answered, or none is.
    pub(super) fn tally(&self) -> Option<(usize, usize)> {
        let count = |is: fn(&&Flow) -> bool| self.flows.iter().filter(is).count();
        let lost = count(|flow| flow.lost >= VERDICT);
        let answered = count(|flow| flow.answered);
        (lost > 0 && answered > 0).then_some((lost, lost + answered))
    }
}
