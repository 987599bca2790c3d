//! Messages that are of no use: counted, said once each, and otherwise ignored.

use std::fmt::Display;

use crate::{
    model::{ClusterId, NodeId, visible},
    wire::{Frame, Response},
};

use super::Node;

impl Node {
    /// A peer may refuse; any other response that was not asked for is a fault of its program.
    pub(super) fn note_unexpected(&mut self, from: NodeId, response: &Response, what: &str) {
        match response {
            Response::Refused(refusal) => {
                tracing::debug!(peer = %from, %refusal, "{what}");
                self.on_expulsion(refusal);
            }
            _ => self.note_malformed(from, &what),
        }
    }

    pub(super) fn note_malformed(&mut self, from: NodeId, error: &dyn Display) {
        self.counters.malformed += 1;
        let error = visible(&error.to_string());
        tracing::warn!(peer = %from, name = self.name_of(from), %error, "unreadable message ignored");
    }

    pub(super) fn note_foreign(&mut self, from: NodeId, theirs: ClusterId) {
        self.counters.malformed += 1;
        let ours = self.cluster_id();
        tracing::warn!(peer = %from, ?ours, %theirs, "message of another cluster ignored");
    }
}

pub(super) fn read_response(bytes: &[u8]) -> Result<Response, String> {
    match Frame::decode(bytes) {
        Ok((_, Frame::Response(payload))) => {
            Response::decode(payload).map_err(|error| error.to_string())
        }
        Ok(_) => Err("the answer is not a response".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
