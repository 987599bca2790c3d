//! `gossamer ping` without the overlay: checks whether a member's agent answers. Changes no state.

use crate::{model::NodeId, wire::Request};

use super::{Answer, Node, Output, Purpose};

impl Node {
    /// Sends a comparison request to a member, by name or id; its result comes as [`Output::PingResult`].
    ///
    /// # Errors
    /// Fails if no or several members match, or if it is this node or one without a known address.
    pub fn ping(&mut self, whom: &str) -> Result<NodeId, String> {
        let node = match self.member_named(whom) {
            Ok(node) => node,
            Err(super::CannotForget::Myself) => {
                return Err("the member is this node itself".to_owned());
            }
            Err(error) => return Err(error.to_string()),
        };
        let request = Request::Compare(self.roots());
        if self.call_member(node, Purpose::Ping { node }, &request) {
            Ok(node)
        } else {
            Err(format!("the address of {whom} is not known"))
        }
    }

    /// Reports whether the member answered; any response counts.
    pub(super) fn handle_ping_answer(&mut self, node: NodeId, answer: &Answer) {
        let answered = answer.as_ref().is_ok_and(|(from, _)| *from == node);
        self.outputs.push_back(Output::PingResult { node, answered });
    }
}
