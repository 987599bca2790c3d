//! Inquiries between agents: what operators want to know of members, and the steps that change the secret.
//!
//! They travel beside the consensus core, in frames of their own, and no decision of a node depends on them.
//! This module encodes and decodes the frames and remembers which inquiries are open. The agent sends and
//! receives them, and asks the node which inquiries to refuse.

use std::collections::BTreeMap;

use crate::{
    model::{ClusterId, InquiryId, NodeId},
    wire::{Frame, Inquiry, InquiryAnswer, WireError},
};

/// The open inquiries of this agent, each with the caller's purpose.
#[derive(Debug)]
pub struct Inquiries<P> {
    last: u64,
    open: BTreeMap<InquiryId, (NodeId, P)>,
}

impl<P> Default for Inquiries<P> {
    fn default() -> Self {
        Self { last: 0, open: BTreeMap::new() }
    }
}

impl<P> Inquiries<P> {
    /// Opens an inquiry to a member. Returns its id and the frame to send.
    pub fn begin(
        &mut self,
        cluster: ClusterId,
        node: NodeId,
        purpose: P,
        inquiry: &Inquiry,
    ) -> (InquiryId, Vec<u8>) {
        self.last += 1;
        let id = InquiryId(self.last);
        self.open.insert(id, (node, purpose));
        (id, Frame::Inquiry(&inquiry.encode()).encode(cluster))
    }

    /// Closes an inquiry, whose call has ended. Returns the member and the purpose.
    pub fn end(&mut self, id: InquiryId) -> Option<(NodeId, P)> {
        self.open.remove(&id)
    }
}

/// Returns whether a frame is an inquiry. All other requests are for the node.
pub fn is_inquiry(frame: &[u8]) -> bool {
    matches!(Frame::decode(frame), Ok((_, Frame::Inquiry(_))))
}

/// Decodes the frame of an inquiry. Returns the sender's cluster and the inquiry.
///
/// # Errors
/// Fails if the frame is none of an inquiry, or the inquiry is malformed.
pub fn read_inquiry(frame: &[u8]) -> Result<(ClusterId, Inquiry), WireError> {
    match Frame::decode(frame)? {
        (cluster, Frame::Inquiry(payload)) => Ok((cluster, Inquiry::decode(payload)?)),
        _ => Err(unexpected("inquiry")),
    }
}

/// Encodes the frame of an answer.
pub fn answer_frame(cluster: ClusterId, answer: &InquiryAnswer) -> Vec<u8> {
    Frame::Answer(&answer.encode()).encode(cluster)
}

/// Decodes the frame of an answer.
///
/// # Errors
/// Fails if the frame is none of an answer, or the answer is malformed.
pub fn read_answer(frame: &[u8]) -> Result<InquiryAnswer, WireError> {
    match Frame::decode(frame)? {
        (_, Frame::Answer(payload)) => InquiryAnswer::decode(payload),
        _ => Err(unexpected("answer")),
    }
}

fn unexpected(what: &'static str) -> WireError {
    WireError::Malformed { what, why: "the frame is of another kind".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request;

    const CLUSTER: ClusterId = ClusterId::from_bytes([7; 8]);

    #[test]
    fn inquiry_and_answer_round_trip_and_end_once() {
        let member = NodeId::from_bytes([1; 8]);
        let mut inquiries = Inquiries::default();
        let (id, frame) = inquiries.begin(CLUSTER, member, "why", &Inquiry::Arrivals(3));
        assert!(is_inquiry(&frame));
        assert_eq!(read_inquiry(&frame), Ok((CLUSTER, Inquiry::Arrivals(3))));
        let (other, _) = inquiries.begin(CLUSTER, member, "other", &Inquiry::Ping);
        assert_ne!(id, other);
        assert_eq!(inquiries.end(id), Some((member, "why")));
        assert_eq!(inquiries.end(id), None);
        assert_eq!(
            read_answer(&answer_frame(CLUSTER, &InquiryAnswer::Pong)),
            Ok(InquiryAnswer::Pong)
        );
    }

    #[test]
    fn frames_of_other_kinds_are_refused() {
        let request = Frame::Request(&Request::BeMySuccessor.encode()).encode(CLUSTER);
        assert!(!is_inquiry(&request) && !is_inquiry(b"") && !is_inquiry(&[9; 100]));
        assert!(read_inquiry(&request).is_err() && read_answer(&request).is_err());
        let garbage = Frame::Inquiry(&[200, 1]).encode(CLUSTER);
        assert!(is_inquiry(&garbage) && read_inquiry(&garbage).is_err());
    }
}
