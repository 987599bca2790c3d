//! Limits the memory of incoming messages, from their first byte until the loop takes them.
//!
//! A message needs a place in the budget of its node, and as much room in the budget of the process
//! as has arrived of it. Most messages are small. A large one waits for a place before it is read
//! further, while QUIC's flow control stops its sender. Small messages have a budget of their own,
//! so that they never wait for large ones.
//!
//! A node that sends only half a message must not block others: while messages wait for room, a
//! message without progress loses its room and is dropped.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quinn::{ReadError, RecvStream};
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

use crate::{model::NodeId, wire::STREAM_MAX};

/// Bytes per semaphore permit.
const PERMIT_BYTES: usize = 1024;
/// Bytes of a message that are read before it needs a place for large messages.
const SMALL_BYTES: usize = 64 * PERMIT_BYTES;
/// Upper limit of messages of one node that are read at once.
const MAX_MESSAGES_PER_NODE: usize = 16;
/// Bytes for messages of all peers: for the first [`SMALL_BYTES`] of each, and for the rest of
/// large ones.
const SMALL_TOTAL_BYTES: usize = 12 << 20;
const LARGE_TOTAL_BYTES: usize = 20 << 20;
/// Bytes that a message gets as soon as it begins.
const INITIAL_BYTES: usize = 4 * PERMIT_BYTES;
/// Bytes of a message that have to arrive per `PROGRESS_INTERVAL` while others wait for room.
const MIN_PROGRESS_BYTES: usize = 16 * PERMIT_BYTES;
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Time for which a message that has room waits for more, because others may wait for what it has.
const MORE_ROOM_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a message was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
    #[error("the stream ended early: {0}")]
    Stream(#[from] ReadError),
    #[error("the message is longer than {STREAM_MAX} bytes")]
    TooLong,
    #[error("the message made no progress while others waited for memory")]
    Stalled,
    #[error("other messages use all the memory")]
    NoRoom,
    #[error("the reader was closed")]
    Closed(#[from] AcquireError),
}

/// The budget of the process.
#[derive(Clone)]
pub(super) struct Intake {
    all: Arc<Budget>,
    nodes: Arc<Mutex<BTreeMap<NodeId, Weak<Budget>>>>,
}

/// The budget of one node, over all its connections, within that of the process.
#[derive(Clone)]
pub(super) struct NodeIntake {
    own: Arc<Budget>,
    all: Arc<Budget>,
}

#[derive(Debug)]
struct Budget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Number of messages that wait for room.
    waiting: AtomicUsize,
}

/// A message of a peer, with the room that it occupies until the loop drops it.
#[derive(Debug)]
pub struct Message {
    /// The message.
    pub bytes: Vec<u8>,
    _room: Option<Room>,
}

impl Message {
    /// Creates a message from a datagram, whose number QUIC limits.
    pub(super) fn datagram(bytes: Vec<u8>) -> Self {
        Self { bytes, _room: None }
    }
}

/// The shares of a message in the budgets: for its first bytes, and for those beyond.
#[derive(Debug)]
struct Room {
    small: Share,
    large: Share,
    /// Keeps the node's budget while its messages exist, even after its connections have ended.
    _node: Arc<Budget>,
}

/// Permits in the budget of the node and in that of the process.
#[derive(Debug, Default)]
struct Share {
    own: Option<OwnedSemaphorePermit>,
    all: Option<OwnedSemaphorePermit>,
}

impl Budget {
    fn new(small: usize, large: usize) -> Arc<Self> {
        let semaphore = |bytes| Arc::new(Semaphore::new(bytes / PERMIT_BYTES));
        let (small, large) = (semaphore(small), semaphore(large));
        Arc::new(Self { small, large, waiting: AtomicUsize::new(0) })
    }
}

/// Counts a message as waiting until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Share {
    /// Returns the bytes in the budget of the process.
    fn bytes(&self) -> usize {
        self.all.as_ref().map_or(0, |permit| permit.num_permits() * PERMIT_BYTES)
    }

    /// Returns what exceeds `bytes` to the budgets.
    fn shrink(&mut self, bytes: usize) {
        for permit in self.own.iter_mut().chain(&mut self.all) {
            drop(permit.split(permit.num_permits().saturating_sub(units(bytes))));
        }
    }
}

impl Room {
    fn bytes(&self) -> usize {
        self.small.bytes() + self.large.bytes()
    }

    /// Returns what exceeds `bytes` to the budgets.
    fn shrink(&mut self, bytes: usize) {
        self.small.shrink(bytes.min(SMALL_BYTES));
        self.large.shrink(bytes.saturating_sub(SMALL_BYTES));
    }
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { all: Budget::new(SMALL_TOTAL_BYTES, LARGE_TOTAL_BYTES), nodes: Arc::default() }
    }

    /// Returns the budget of a node.
    pub(super) fn of_node(&self, node: NodeId) -> NodeIntake {
        // A panic leaves no half-changed state.
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let own = nodes.get(&node).and_then(Weak::upgrade).unwrap_or_else(|| {
            nodes.retain(|_, budget| budget.strong_count() > 0);
            let own = Budget::new(MAX_MESSAGES_PER_NODE * SMALL_BYTES, STREAM_MAX);
            nodes.insert(node, Arc::downgrade(&own));
            own
        });
        NodeIntake { own, all: self.all.clone() }
    }
}

impl NodeIntake {
    /// Returns an empty room of this node.
    fn room(&self) -> Room {
        Room { small: Share::default(), large: Share::default(), _node: self.own.clone() }
    }

    /// Waits for a place of a small or large message in the node's budget. The place covers the
    /// maximum size, so messages of one node never wait for each other in a cycle.
    async fn place(&self, share: &mut Share, is_large: bool) -> Result<(), AcquireError> {
        if share.own.is_none() {
            let (budget, bytes) = if is_large {
                (&self.own.large, STREAM_MAX)
            } else {
                (&self.own.small, SMALL_BYTES)
            };
            share.own = Some(budget.clone().acquire_many_owned(permits(bytes)).await?);
        }
        Ok(())
    }

    /// Waits for more room in the budget of the process.
    async fn more(
        &self,
        share: &mut Share,
        bytes: usize,
        is_large: bool,
    ) -> Result<(), IntakeError> {
        let is_first = share.all.is_none() && !is_large;
        let budget = if is_large { &self.all.large } else { &self.all.small };
        let count = permits(bytes);
        let more = match budget.clone().try_acquire_many_owned(count) {
            Ok(more) => more,
            Err(_) => {
                let _waiting = Waiting::new(&self.all.waiting);
                let more = budget.clone().acquire_many_owned(count);
                match is_first {
                    true => more.await?,
                    false => timeout(MORE_ROOM_TIMEOUT, more)
                        .await
                        .map_err(|_| IntakeError::NoRoom)??,
                }
            }
        };
        match &mut share.all {
            Some(all) => all.merge(more),
            None => share.all = Some(more),
        }
        Ok(())
    }

    /// Makes room for `bytes`, and for some of the bytes that follow.
    async fn grow(&self, room: &mut Room, bytes: usize) -> Result<(), IntakeError> {
        let has = room.bytes();
        let wanted = bytes
            .max(has + has / 2)
            .max(INITIAL_BYTES)
            .next_multiple_of(PERMIT_BYTES)
            .min(STREAM_MAX);
        if has < SMALL_BYTES {
            self.place(&mut room.small, false).await?;
            self.more(&mut room.small, wanted.min(SMALL_BYTES) - has, false).await?;
        }
        if wanted > SMALL_BYTES && bytes > SMALL_BYTES {
            self.place(&mut room.large, true).await?;
            self.more(&mut room.large, wanted - has.max(SMALL_BYTES), true).await?;
        }
        Ok(())
    }

    /// Reads a stream to its end.
    ///
    /// # Errors
    /// When the stream ends early, the message is too long, or it makes no progress while others
    /// wait for room.
    pub(super) async fn read(&self, stream: &mut RecvStream) -> Result<Message, IntakeError> {
        let mut room = self.room();
        let mut bytes = Vec::new();
        let (mut counted, mut until) = (0, Instant::now() + PROGRESS_INTERVAL);
        loop {
            let Ok(chunk) = timeout_at(until, stream.read_chunk(SMALL_BYTES, true)).await else {
                let is_short = self.all.waiting.load(Ordering::Relaxed) > 0;
                if is_short && room.bytes() > 0 && bytes.len() - counted < MIN_PROGRESS_BYTES {
                    return Err(IntakeError::Stalled);
                }
                (counted, until) = (bytes.len(), Instant::now() + PROGRESS_INTERVAL);
                continue;
            };
            let Some(chunk) = chunk? else { break };
            let length = bytes.len() + chunk.bytes.len();
            if length > STREAM_MAX {
                return Err(IntakeError::TooLong);
            }
            // Until it is copied, the chunk occupies memory of QUIC, at most one packet.
            if length > room.bytes() {
                self.grow(&mut room, length).await?;
                bytes.reserve_exact(room.bytes() - bytes.len());
            }
            bytes.extend_from_slice(&chunk.bytes);
        }
        bytes.shrink_to_fit();
        room.shrink(bytes.len());
        Ok(Message { bytes, _room: Some(room) })
    }
}

/// Returns the number of permits for `bytes`.
fn permits(bytes: usize) -> u32 {
    u32::try_from(units(bytes)).unwrap_or(u32::MAX)
}

fn units(bytes: usize) -> usize {
    bytes.div_ceil(PERMIT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 8])
    }

    /// Makes room for a message of which `bytes` have arrived.
    async fn partly_received(intake: &NodeIntake, bytes: usize) -> Room {
        let mut room = intake.room();
        for bytes in (1_200..=bytes).step_by(1_200).chain([bytes]) {
            if bytes > room.bytes() {
                intake.grow(&mut room, bytes).await.expect("room");
            }
        }
        room
    }

    fn free(intake: &Intake) -> usize {
        (intake.all.small.available_permits() + intake.all.large.available_permits()) * PERMIT_BYTES
    }

    const ALL: usize = SMALL_TOTAL_BYTES + LARGE_TOTAL_BYTES;

    #[tokio::test]
    async fn message_occupies_little_more_than_has_arrived() {
        let intake = Intake::new();
        let one = intake.of_node(node(1));
        for bytes in [1, 300, 66_000, 1 << 20, STREAM_MAX] {
            let mut room = partly_received(&one, bytes).await;
            let has = ALL - free(&intake);
            assert_eq!(has, room.bytes());
            assert!(
                has >= bytes && has <= (bytes + bytes / 2 + PERMIT_BYTES).max(INITIAL_BYTES),
                "{has} for {bytes}"
            );
            room.shrink(bytes);
            assert!(ALL - free(&intake) < bytes + 2 * PERMIT_BYTES, "{bytes}");
            drop(room);
            assert_eq!(free(&intake), ALL);
        }
    }

    #[tokio::test]
    async fn messages_of_one_node_share_its_places_over_all_connections() {
        let intake = Intake::new();
        let waits = async |intake: &NodeIntake, bytes| {
            timeout(Duration::from_millis(10), partly_received(intake, bytes)).await.is_err()
        };
        let large = partly_received(&intake.of_node(node(1)), STREAM_MAX).await;
        assert!(waits(&intake.of_node(node(1)), SMALL_BYTES + 1).await, "a second large one");
        let mut small = Vec::new();
        for _ in 1..MAX_MESSAGES_PER_NODE {
            small.push(partly_received(&intake.of_node(node(1)), 1).await);
        }
        assert!(waits(&intake.of_node(node(1)), 1).await, "one more than it may have");
        assert!(!waits(&intake.of_node(node(2)), STREAM_MAX).await, "another node waits");
        drop((large, small));
        assert!(!waits(&intake.of_node(node(1)), STREAM_MAX).await);
        assert_eq!(free(&intake), ALL);
        intake.of_node(node(3));
        assert_eq!(intake.nodes.lock().expect("whole").len(), 1, "nodes without messages");
    }

    #[tokio::test]
    async fn large_message_without_room_fails_and_blocks_no_small_one() {
        let intake = Intake::new();
        let mut room = partly_received(&intake.of_node(node(1)), SMALL_BYTES).await;
        let others = intake.all.large.clone().acquire_many_owned(permits(LARGE_TOTAL_BYTES)).await;
        let refused = intake.of_node(node(1)).grow(&mut room, 2 * SMALL_BYTES).await;
        assert!(matches!(refused, Err(IntakeError::NoRoom)), "{refused:?}");
        assert_eq!(intake.all.waiting.load(Ordering::Relaxed), 0);
        partly_received(&intake.of_node(node(1)), SMALL_BYTES).await;
        drop(others);
        intake.of_node(node(1)).grow(&mut room, 2 * SMALL_BYTES).await.expect("room again");
    }
}
