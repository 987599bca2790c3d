//! Sends inquiries to members and answers theirs (`rpc`).

use crate::{
    agent::Agent,
    model::{CallError, ClusterId, InquiryId, NodeId, ReplyId},
    rpc,
    transport::Call,
    wire::{Inquiry, InquiryAnswer, Refusal, Report},
};

/// Why this agent inquires.
#[derive(Clone, Copy, Debug)]
pub(in crate::agent) enum Purpose {
    /// A round of `gossamer ping`: any answer counts.
    Ping,
    /// The survey with this number.
    Survey(u64),
}

impl Agent {
    /// Sends an inquiry to a member. Returns false if its address is not known.
    pub(in crate::agent) fn inquire(
        &mut self,
        node: NodeId,
        purpose: Purpose,
        inquiry: &Inquiry,
    ) -> bool {
        let Some(address) = self.node.address_of(node) else { return false };
        let (id, frame) = self.requests.inquiries.begin(self.cluster_id(), node, purpose, inquiry);
        self.transport.call(Call::Inquiry(id), node, address, frame);
        true
    }

    /// Handles the end of an inquiry of this agent.
    pub(in crate::agent) fn on_inquiry_end(
        &mut self,
        id: InquiryId,
        result: Result<(NodeId, Vec<u8>), CallError>,
    ) {
        let Some((node, purpose)) = self.requests.inquiries.end(id) else { return };
        let answer = result.ok().and_then(|(from, frame)| match rpc::read_answer(&frame) {
            Ok(answer) if from == node && !self.node.is_forgotten(from) => Some(answer),
            Ok(_) => None,
            Err(error) => {
                self.node.report_malformed(self.clock.now(), from, &error);
                None
            }
        });
        match (purpose, answer) {
            (Purpose::Ping, answer) => self.on_answered(node, answer.is_some()),
            (Purpose::Survey(number), Some(InquiryAnswer::Report(report))) => {
                self.on_report(node, number, Some(report));
            }
            (Purpose::Survey(number), _) => self.on_report(node, number, None),
        }
    }

    /// Handles the inquiry of another agent.
    pub(in crate::agent) fn on_inquiry_frame(
        &mut self,
        from: NodeId,
        reply: ReplyId,
        frame: &[u8],
    ) {
        match rpc::read_inquiry(frame) {
            Ok((cluster, inquiry)) => match self.node.refusal(from, cluster) {
                Some(refusal) => self.answer_inquiry(reply, &InquiryAnswer::Refused(refusal)),
                None => self.on_inquiry(reply, from, inquiry),
            },
            Err(error) => {
                self.node.report_malformed(self.clock.now(), from, &error);
                let refusal = Refusal::Malformed(error.to_string().into());
                self.answer_inquiry(reply, &InquiryAnswer::Refused(refusal));
            }
        }
    }

    /// Answers an inquiry with a report.
    pub(in crate::agent) fn send_report(&mut self, reply: ReplyId, report: Report) {
        self.answer_inquiry(reply, &InquiryAnswer::Report(Box::new(report)));
    }

    /// Answers an inquiry.
    pub(in crate::agent) fn answer_inquiry(&mut self, reply: ReplyId, answer: &InquiryAnswer) {
        let frame = rpc::answer_frame(self.cluster_id(), answer);
        self.transport.reply(reply, frame);
    }

    fn cluster_id(&self) -> ClusterId {
        self.node.cluster().map_or(ClusterId::UNKNOWN, |cluster| cluster.id)
    }
}
