//! Bounds the memory of replies that peers have not read yet.
//!
//! A member that requests everything and reads nothing would otherwise keep a copy of the directory for each
//! of its requests.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use quinn::{SendStream, VarInt};

use super::connection::CALL_TIMEOUT;
use crate::model::NodeId;

/// Error code of a stream that is reset because its request gets no response.
const NO_ANSWER: VarInt = VarInt::from_u32(1);
/// Bytes of unread replies to one node. A single reply may be larger.
const MAX_BYTES_PER_NODE: usize = 4 << 20;
/// Bytes of unread replies to all nodes.
const MAX_BYTES: usize = 64 << 20;

/// The bytes of unread replies, by node.
#[derive(Clone, Debug, Default)]
pub(super) struct UnreadReplies(Arc<Mutex<BTreeMap<NodeId, usize>>>);

/// The room of one reply, until it is dropped.
#[derive(Debug)]
struct ReplyRoom {
    replies: UnreadReplies,
    node: NodeId,
    bytes: usize,
}

/// Ends a request without a response. Dropping the stream would end it like an empty response, which the peer
/// would report as malformed.
pub(super) fn give_up(mut stream: SendStream) {
    let _ = stream.reset(NO_ANSWER);
}

impl UnreadReplies {
    /// Starts a task that sends a reply, until the caller no longer waits for it. Drops the reply if the peer
    /// does not read earlier ones.
    pub(super) fn send(&self, peer: NodeId, mut stream: SendStream, bytes: Vec<u8>) {
        let Some(room) = self.room(peer, bytes.len()) else {
            tracing::debug!(%peer, "reply dropped: the peer does not read earlier ones");
            return give_up(stream);
        };
        tokio::spawn(async move {
            let sent = async {
                if stream.write_all(&bytes).await.is_ok() {
                    let _ = stream.finish();
                    let _ = stream.stopped().await;
                }
            };
            if tokio::time::timeout(CALL_TIMEOUT, sent).await.is_err() {
                give_up(stream);
            }
            drop(room);
        });
    }

    /// Returns the room for a reply; `None` if the node, or all nodes together, have too many unread ones.
    fn room(&self, node: NodeId, bytes: usize) -> Option<ReplyRoom> {
        let mut by_node = self.lock();
        let total: usize = by_node.values().sum();
        let own = by_node.get(&node).copied().unwrap_or_default();
        if total + bytes > MAX_BYTES || own > 0 && own + bytes > MAX_BYTES_PER_NODE {
            return None;
        }
        *by_node.entry(node).or_default() += bytes;
        Some(ReplyRoom { replies: self.clone(), node, bytes })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, usize>> {
        // A panic leaves no half-changed state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ReplyRoom {
    fn drop(&mut self) {
        let mut by_node = self.replies.lock();
        if let Some(bytes) = by_node.get_mut(&self.node) {
            *bytes = bytes.saturating_sub(self.bytes);
            if *bytes == 0 {
                by_node.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 8])
    }

    #[test]
    fn node_with_unread_replies_gets_no_more_and_takes_no_room_from_others() {
        let replies = UnreadReplies::default();
        let reply = 700_000;
        let held: Vec<_> = (0..32).map_while(|_| replies.room(node(1), reply)).collect();
        assert_eq!(held.len(), MAX_BYTES_PER_NODE / reply);
        assert!(replies.room(node(2), 8 << 20).is_some(), "one reply may be larger");
        drop(held);
        assert!(replies.room(node(1), reply).is_some());
    }

    #[test]
    fn unread_replies_of_all_nodes_are_bounded_and_leave_no_trace() {
        let replies = UnreadReplies::default();
        let held: Vec<_> = (0..200).filter_map(|n| replies.room(node(n), 1 << 20)).collect();
        assert_eq!(held.len(), MAX_BYTES >> 20);
        drop(held);
        assert!(replies.lock().is_empty());
    }
}
