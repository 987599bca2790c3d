//! An operator's question whether a member's agent answers. Changes nothing anywhere.

use crate::{model::NodeId, wire::Request};

use super::{Answer, Node, Output, Purpose};

impl Node {
    /// Asks a member, by name or id, to compare states; that it answers comes as [`Output::Answered`].
    pub fn ping(&mut self, whom: &str) -> Result<NodeId, String> {
        let node = match self.member_called(whom) {
            Ok(node) => node,
            Err(super::CannotForget::Myself) => return Err("that is this node itself".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        let request = Request::Compare(self.roots());
        if self.call_member(node, Purpose::Ping { node }, &request) {
            Ok(node)
        } else {
            Err(format!("the address of {whom} is not known"))
        }
    }

    /// Any answer will do.
    pub(super) fn on_ping_answer(&mut self, node: NodeId, answer: &Answer) {
        let answered = answer.as_ref().is_ok_and(|(from, _)| *from == node);
        self.outputs.push_back(Output::Answered { node, answered });
    }
}
