//! Inquiries of operators to members, including the steps that change the secret.
//!
//! The core only carries them and the agent answers: no decision of the core depends on them.

use crate::{
    model::NodeId,
    wire::{Inquiry, Report, Request, Response},
};

use super::{Answer, CannotForget, Node, Output, Purpose, ReplyId};

impl Node {
    /// Sends an inquiry to a member; the result comes as [`Output::InquiryResult`] with the same number.
    /// Returns false if the member's address is not known.
    pub fn inquire(&mut self, node: NodeId, number: u64, inquiry: Inquiry) -> bool {
        self.call_member(node, Purpose::Inquire { node, number }, &Request::Inquire(inquiry))
    }

    /// Returns this node's id.
    pub const fn id(&self) -> NodeId {
        self.me.node
    }

    /// Answers [`Output::InquiryReceived`].
    pub fn report(&mut self, reply: ReplyId, report: Report) {
        self.reply(reply, &Response::Report(Box::new(report)));
    }

    /// Returns all members except this one, without those that left or were forgotten.
    pub fn peers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.directory.peers(self.me.node).map(|record| record.node)
    }

    /// Returns the member with this name or id; it may be this node.
    ///
    /// # Errors
    /// Fails if no member or several members match.
    pub fn find(&self, whom: &str) -> Result<NodeId, String> {
        match self.member_named(whom) {
            Err(CannotForget::Myself) => Ok(self.me.node),
            found => found.map_err(|error| error.to_string()),
        }
    }

    pub(super) fn handle_inquiry_answer(&mut self, node: NodeId, number: u64, answer: Answer) {
        let report = match answer {
            Ok((from, Response::Report(report))) if from == node => Some(report),
            _ => None,
        };
        self.outputs.push_back(Output::InquiryResult { node, number, report });
    }
}
