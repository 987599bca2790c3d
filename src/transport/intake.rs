//! The memory that messages of peers may take, from their first byte until the loop takes them.
//!
//! A message has its place in the budget of its node, and as much of that of the process as has come of it.
//! Most messages are small. A large one waits for its place before it is read further; QUIC's flow control
//! holds its sender back meanwhile. Small ones have a budget of their own, so that none waits for large ones.
//!
//! A node that sends half a message and no more must not keep the room of others: while some wait for room,
//! a message that does not go on gives its own back, and is lost.

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

/// Permits are counted in units of so many bytes.
const UNIT: usize = 1024;
/// A message is read so far before it must have the place of a large one.
const SMALL: usize = 64 * UNIT;
/// So many messages of one node are read at once.
const PLACES: usize = 16;
/// Room for messages of all peers, up to so much of each, and for what large ones are longer.
const SMALL_OF_ALL: usize = 12 << 20;
const LARGE_OF_ALL: usize = 20 << 20;
/// Room that a message has as soon as it begins.
const FIRST: usize = 4 * UNIT;
/// While others wait for room, so much of a message has to come in each `TIMEOUT`.
const PROGRESS: usize = 16 * UNIT;
const TIMEOUT: Duration = Duration::from_secs(1);
/// A message that has room waits so long for more: others may wait for what it has.
const PATIENCE_FOR_MORE: Duration = Duration::from_secs(2);

/// Why a message was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
    #[error("the stream ended early: {0}")]
    Stream(#[from] ReadError),
    #[error("it is longer than {STREAM_MAX} bytes")]
    TooLong,
    #[error("it does not go on, and other messages need its room")]
    Stalled,
    #[error("messages of others have all the room")]
    NoRoom,
    #[error("no more messages are read")]
    Closed(#[from] AcquireError),
}

/// The budget of the process.
#[derive(Clone)]
pub(super) struct Intake {
    all: Arc<Budget>,
    nodes: Arc<Mutex<BTreeMap<NodeId, Weak<Budget>>>>,
}

/// The budget of one node, on however many connections, within that of the process.
#[derive(Clone)]
pub(super) struct NodeIntake {
    own: Arc<Budget>,
    all: Arc<Budget>,
}

#[derive(Debug)]
struct Budget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Messages that wait for room.
    waiting: AtomicUsize,
}

/// What a peer has sent, with the room that it takes until the loop has it.
#[derive(Debug)]
pub struct Message {
    pub bytes: Vec<u8>,
    _room: Option<Room>,
}

impl Message {
    /// A datagram: QUIC bounds how many of them wait.
    pub(super) fn datagram(bytes: Vec<u8>) -> Self {
        Self { bytes, _room: None }
    }
}

/// What a message has of the budgets: for its first bytes, and for those that only large ones have.
#[derive(Debug)]
struct Room {
    small: Share,
    large: Share,
    /// A node whose connections have ended keeps its budget as long as its messages have a part of it.
    _node: Arc<Budget>,
}

/// Of the budget of the node, and of that of the process.
#[derive(Debug, Default)]
struct Share {
    own: Option<OwnedSemaphorePermit>,
    all: Option<OwnedSemaphorePermit>,
}

impl Budget {
    fn new(small: usize, large: usize) -> Arc<Self> {
        let semaphore = |bytes| Arc::new(Semaphore::new(bytes / UNIT));
        let (small, large) = (semaphore(small), semaphore(large));
        Arc::new(Self { small, large, waiting: AtomicUsize::new(0) })
    }
}

/// A message that waits, until it does no more.
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
    /// How many bytes it has of the budget of the process.
    fn bytes(&self) -> usize {
        self.all.as_ref().map_or(0, |permit| permit.num_permits() * UNIT)
    }

    /// Gives back what is more than so many bytes.
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

    fn shrink(&mut self, bytes: usize) {
        self.small.shrink(bytes.min(SMALL));
        self.large.shrink(bytes.saturating_sub(SMALL));
    }
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { all: Budget::new(SMALL_OF_ALL, LARGE_OF_ALL), nodes: Arc::default() }
    }

    /// The budget of a node.
    pub(super) fn of_node(&self, node: NodeId) -> NodeIntake {
        // Nothing in it is half changed where a panic could happen.
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let own = nodes.get(&node).and_then(Weak::upgrade).unwrap_or_else(|| {
            nodes.retain(|_, budget| budget.strong_count() > 0);
            let own = Budget::new(PLACES * SMALL, STREAM_MAX);
            nodes.insert(node, Arc::downgrade(&own));
            own
        });
        NodeIntake { own, all: self.all.clone() }
    }
}

impl NodeIntake {
    fn room(&self) -> Room {
        Room { small: Share::default(), large: Share::default(), _node: self.own.clone() }
    }

    /// Waits for the place of a small message, or of a large one, among those of its node. It is for all that
    /// such a message may be: messages of one node never wait for each other in a circle.
    async fn place(&self, share: &mut Share, is_large: bool) -> Result<(), AcquireError> {
        if share.own.is_none() {
            let (budget, bytes) =
                if is_large { (&self.own.large, STREAM_MAX) } else { (&self.own.small, SMALL) };
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
                    false => timeout(PATIENCE_FOR_MORE, more)
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

    /// Makes room for so many bytes, and for some of those that will follow.
    async fn grow(&self, room: &mut Room, bytes: usize) -> Result<(), IntakeError> {
        let has = room.bytes();
        let wanted = bytes.max(has + has / 2).max(FIRST).next_multiple_of(UNIT).min(STREAM_MAX);
        if has < SMALL {
            self.place(&mut room.small, false).await?;
            self.more(&mut room.small, wanted.min(SMALL) - has, false).await?;
        }
        if wanted > SMALL && bytes > SMALL {
            self.place(&mut room.large, true).await?;
            self.more(&mut room.large, wanted - has.max(SMALL), true).await?;
        }
        Ok(())
    }

    /// Reads a stream to its end.
    ///
    /// # Errors
    /// Fails if the stream ends early, if the message is longer than any may be, or if it does not go on
    /// while others need its room.
    pub(super) async fn read(&self, stream: &mut RecvStream) -> Result<Message, IntakeError> {
        let mut room = self.room();
        let mut bytes = Vec::new();
        let (mut counted, mut until) = (0, Instant::now() + TIMEOUT);
        loop {
            let Ok(chunk) = timeout_at(until, stream.read_chunk(SMALL, true)).await else {
                let is_short = self.all.waiting.load(Ordering::Relaxed) > 0;
                if is_short && room.bytes() > 0 && bytes.len() - counted < PROGRESS {
                    return Err(IntakeError::Stalled);
                }
                (counted, until) = (bytes.len(), Instant::now() + TIMEOUT);
                continue;
            };
            let Some(chunk) = chunk? else { break };
            let length = bytes.len() + chunk.bytes.len();
            if length > STREAM_MAX {
                return Err(IntakeError::TooLong);
            }
            // Until it is copied the chunk is memory of QUIC's, a packet's at most.
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

fn permits(bytes: usize) -> u32 {
    u32::try_from(units(bytes)).unwrap_or(u32::MAX)
}

fn units(bytes: usize) -> usize {
    bytes.div_ceil(UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 8])
    }

    /// A message of which so many bytes have come.
    async fn begun(intake: &NodeIntake, bytes: usize) -> Room {
        let mut room = intake.room();
        for bytes in (1_200..=bytes).step_by(1_200).chain([bytes]) {
            if bytes > room.bytes() {
                intake.grow(&mut room, bytes).await.expect("room");
            }
        }
        room
    }

    fn free(intake: &Intake) -> usize {
        (intake.all.small.available_permits() + intake.all.large.available_permits()) * UNIT
    }

    const ALL: usize = SMALL_OF_ALL + LARGE_OF_ALL;

    #[tokio::test]
    async fn message_has_room_for_little_more_than_has_come_of_it() {
        let intake = Intake::new();
        let one = intake.of_node(node(1));
        for bytes in [1, 300, 66_000, 1 << 20, STREAM_MAX] {
            let mut room = begun(&one, bytes).await;
            let has = ALL - free(&intake);
            assert_eq!(has, room.bytes());
            assert!(
                has >= bytes && has <= (bytes + bytes / 2 + UNIT).max(FIRST),
                "{has} for {bytes}"
            );
            room.shrink(bytes);
            assert!(ALL - free(&intake) < bytes + 2 * UNIT, "{bytes}");
            drop(room);
            assert_eq!(free(&intake), ALL);
        }
    }

    #[tokio::test]
    async fn messages_of_one_node_on_any_connections_share_its_places() {
        let intake = Intake::new();
        let waits = async |intake: &NodeIntake, bytes| {
            timeout(Duration::from_millis(10), begun(intake, bytes)).await.is_err()
        };
        let large = begun(&intake.of_node(node(1)), STREAM_MAX).await;
        assert!(waits(&intake.of_node(node(1)), SMALL + 1).await, "a second large one");
        let mut small = Vec::new();
        for _ in 1..PLACES {
            small.push(begun(&intake.of_node(node(1)), 1).await);
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
    async fn large_message_without_room_ends_and_keeps_no_small_one_waiting() {
        let intake = Intake::new();
        let mut room = begun(&intake.of_node(node(1)), SMALL).await;
        let others = intake.all.large.clone().acquire_many_owned(permits(LARGE_OF_ALL)).await;
        let refused = intake.of_node(node(1)).grow(&mut room, 2 * SMALL).await;
        assert!(matches!(refused, Err(IntakeError::NoRoom)), "{refused:?}");
        assert_eq!(intake.all.waiting.load(Ordering::Relaxed), 0);
        begun(&intake.of_node(node(1)), SMALL).await;
        drop(others);
        intake.of_node(node(1)).grow(&mut room, 2 * SMALL).await.expect("room again");
    }
}
