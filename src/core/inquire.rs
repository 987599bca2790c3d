//! Questions of operators to other members than their own, and their orders about secrets.
//!
//! They are carried here and answered by the shell: nothing that is asked or said here decides anything.

use crate::{
    model::NodeId,
    wire::{Inquiry, Report, Request, Response},
};

use super::{Answer, CannotForget, Node, Output, Purpose, ReplyId};

impl Node {
    /// Asks a member; what it says comes as [`Output::Reported`]. False, if its address is not known.
    /// The number tells the answers apart.
    pub fn inquire(&mut self, node: NodeId, number: u64, inquiry: Inquiry) -> bool {
        self.call_member(node, Purpose::Inquire { node, number }, &Request::Inquire(inquiry))
    }

    pub const fn id(&self) -> NodeId {
        self.me.node
    }

    /// Answers [`Output::Inquired`].
    pub fn report(&mut self, reply: ReplyId, report: Report) {
        self.reply(reply, &Response::Report(Box::new(report)));
    }

    /// Members other than this one that neither left nor were forgotten.
    pub fn peers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.directory.peers(self.me.node).map(|record| record.node)
    }

    /// A member by its name or id.
    ///
    /// # Errors
    /// One sentence, where there is none, or there are several.
    pub fn find(&self, whom: &str) -> Result<NodeId, String> {
        match self.member_called(whom) {
            Err(CannotForget::Myself) => Ok(self.me.node),
            found => found.map_err(|error| error.to_string()),
        }
    }

    pub(super) fn on_inquiry_answer(&mut self, node: NodeId, number: u64, answer: Answer) {
        let report = match answer {
            Ok((from, Response::Report(report))) if from == node => Some(report),
            _ => None,
        };
        self.outputs.push_back(Output::Reported { node, number, report });
    }
}
