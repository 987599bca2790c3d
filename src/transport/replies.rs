//! Bounds the memory of replies that peers have not read yet.
//!
//! A member that requests everything and reads nothing would otherwise keep a copy of the directory for each
//! of its requests. Small replies have no share in the limits, and of large ones the node with the most
//! unread bytes loses its oldest, so that no node prevents replies to another one.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use quinn::{SendStream, VarInt};
use tokio::sync::oneshot;

use super::connection::CALL_TIMEOUT;
use crate::model::NodeId;

/// Error code of a stream that is reset because its request gets no response.
const NO_ANSWER: VarInt = VarInt::from_u32(1);
/// Replies of up to this many bytes are always sent. Each belongs to a request, whose number is bounded.
const SMALL_BYTES: usize = 16 << 10;
/// Bytes of unread large replies to one node. A single reply may be larger.
const MAX_BYTES_PER_NODE: usize = 4 << 20;
/// Bytes of unread large replies to all nodes.
const MAX_BYTES: usize = 64 << 20;

/// The unread large replies.
#[derive(Clone, Debug, Default)]
pub(super) struct UnreadReplies(Arc<Mutex<Unread>>);

#[derive(Debug, Default)]
struct Unread {
    by_node: BTreeMap<NodeId, VecDeque<Reply>>,
    last_number: u64,
}

/// A reply that its peer has not read. Dropping it ends the task that sends it.
#[derive(Debug)]
struct Reply {
    number: u64,
    bytes: usize,
    _alive: oneshot::Sender<()>,
}

/// The room of one reply, until it is dropped.
#[derive(Debug)]
struct ReplyRoom {
    replies: UnreadReplies,
    node: NodeId,
    number: u64,
    /// Resolves when the reply has lost its room.
    lost: oneshot::Receiver<()>,
}

/// Ends a request without a response. Dropping the stream would end it like an empty response, which the peer
/// would report as malformed.
pub(super) fn give_up(mut stream: SendStream) {
    let _ = stream.reset(NO_ANSWER);
}

impl Unread {
    /// Returns the bytes of the replies to one node.
    fn bytes_of(replies: &VecDeque<Reply>) -> usize {
        replies.iter().map(|reply| reply.bytes).sum()
    }

    fn total(&self) -> usize {
        self.by_node.values().map(Self::bytes_of).sum()
    }

    /// Drops the oldest reply of the node that has the most unread bytes.
    fn drop_oldest_of_largest(&mut self) {
        let largest = self.by_node.iter_mut().max_by_key(|(_, replies)| Self::bytes_of(replies));
        let Some((node, replies)) = largest else { return };
        replies.pop_front();
        let (node, is_empty) = (*node, replies.is_empty());
        if is_empty {
            self.by_node.remove(&node);
        }
    }

    fn remove(&mut self, node: NodeId, number: u64) {
        let Some(replies) = self.by_node.get_mut(&node) else { return };
        replies.retain(|reply| reply.number != number);
        if replies.is_empty() {
            self.by_node.remove(&node);
        }
    }
}

impl UnreadReplies {
    /// Starts a task that sends a reply, until the caller no longer waits for it.
    pub(super) fn send(&self, peer: NodeId, mut stream: SendStream, bytes: Vec<u8>) {
        let room = match bytes.len() {
            ..=SMALL_BYTES => None,
            large => match self.room(peer, large) {
                Some(room) => Some(room),
                None => return give_up(stream),
            },
        };
        tokio::spawn(async move {
            let sent = async {
                if stream.write_all(&bytes).await.is_ok() {
                    let _ = stream.finish();
                    let _ = stream.stopped().await;
                }
            };
            let in_time = tokio::time::timeout(CALL_TIMEOUT, sent);
            let is_sent = match room {
                None => in_time.await.is_ok(),
                Some(mut room) => tokio::select! {
                    sent = in_time => sent.is_ok(),
                    _ = &mut room.lost => false,
                },
            };
            if !is_sent {
                give_up(stream);
            }
        });
    }

    /// Returns the room for a large reply; `None` if the node has too many unread ones.
    fn room(&self, node: NodeId, bytes: usize) -> Option<ReplyRoom> {
        let mut unread = self.lock();
        let own = unread.by_node.get(&node).map_or(0, Unread::bytes_of);
        if own > 0 && own + bytes > MAX_BYTES_PER_NODE {
            tracing::debug!(%node, "reply dropped: the peer does not read earlier ones");
            return None;
        }
        while unread.total() > 0 && unread.total() + bytes > MAX_BYTES {
            unread.drop_oldest_of_largest();
        }
        unread.last_number += 1;
        let number = unread.last_number;
        let (alive, lost) = oneshot::channel();
        unread.by_node.entry(node).or_default().push_back(Reply { number, bytes, _alive: alive });
        Some(ReplyRoom { replies: self.clone(), node, number, lost })
    }

    fn lock(&self) -> MutexGuard<'_, Unread> {
        // A panic leaves no half-changed state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ReplyRoom {
    fn drop(&mut self) {
        self.replies.lock().remove(self.node, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 8])
    }

    fn is_lost(room: &mut ReplyRoom) -> bool {
        room.lost.try_recv() == Err(oneshot::error::TryRecvError::Closed)
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

    /// Regression: members that read nothing prevented large replies to all others.
    #[test]
    fn node_without_unread_replies_gets_room_from_the_node_with_the_most() {
        let replies = UnreadReplies::default();
        let mut hoarded = Vec::new();
        for hoarder in 0..20 {
            hoarded.extend((0..4).filter_map(|_| replies.room(node(hoarder), 1 << 20)));
        }
        let mut honest = replies.room(node(99), 1 << 20).expect("room");
        assert!(replies.lock().total() <= MAX_BYTES);
        let more = replies.room(node(30), 4 << 20).expect("room");
        assert!(!is_lost(&mut honest), "others have more");
        assert!(hoarded.iter_mut().map(is_lost).filter(|lost| *lost).count() >= 17);
        drop((hoarded, honest, more));
        assert_eq!(replies.lock().total(), 0);
    }
}
