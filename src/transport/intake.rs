//! The memory that messages of peers may take, from their first byte until the loop takes them.
//!
//! A message has its place in the budget of its connection and in that of the process. Most messages are
//! small. A large one waits for its room before it is read further; QUIC's flow control holds its sender
//! back meanwhile.

use std::sync::Arc;

use quinn::RecvStream;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::wire::STREAM_MAX;

/// Permits are counted in units of so many bytes.
const UNIT: usize = 1024;
/// A message is read so far before it must wait for more room.
const SMALL: usize = 64 * UNIT;
/// Room for the small beginnings of as many streams as a peer may open, and for one large message.
const OF_ONE: usize = 64 * SMALL + STREAM_MAX;
/// Room for all messages of all peers.
const OF_ALL: usize = 32 << 20;

/// Why a message was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
    #[error("the stream ended early: {0}")]
    Stream(#[from] quinn::ReadError),
    #[error("it is longer than {STREAM_MAX} bytes")]
    TooLong,
    #[error("no more messages are read")]
    Closed(#[from] AcquireError),
}

/// The budget of the process.
#[derive(Clone)]
pub(super) struct Intake(Arc<Semaphore>);

impl Intake {
    pub(super) fn new() -> Self {
        Self(budget(OF_ALL))
    }

    /// The budget of one connection.
    pub(super) fn of_connection(&self) -> ConnectionIntake {
        ConnectionIntake { own: budget(OF_ONE), all: self.0.clone() }
    }
}

/// The budget of one connection, within that of the process.
#[derive(Clone)]
pub(super) struct ConnectionIntake {
    own: Arc<Semaphore>,
    all: Arc<Semaphore>,
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

#[derive(Debug)]
struct Room {
    own: OwnedSemaphorePermit,
    all: OwnedSemaphorePermit,
}

impl Room {
    fn shrink(&mut self, bytes: usize) {
        let surplus = self.own.num_permits().saturating_sub(units(bytes));
        drop((self.own.split(surplus), self.all.split(surplus)));
    }

    fn grow(&mut self, other: Self) {
        self.own.merge(other.own);
        self.all.merge(other.all);
    }
}

impl ConnectionIntake {
    /// Waits for room, of the connection first: who has none must not hold that of others.
    async fn take(&self, bytes: usize) -> Result<Room, AcquireError> {
        let count = u32::try_from(units(bytes)).unwrap_or(u32::MAX);
        let own = self.own.clone().acquire_many_owned(count).await?;
        let all = self.all.clone().acquire_many_owned(count).await?;
        Ok(Room { own, all })
    }

    /// Reads a stream to its end.
    ///
    /// # Errors
    /// Fails if the stream ends early, or if the message is longer than any may be.
    pub(super) async fn read(&self, stream: &mut RecvStream) -> Result<Message, IntakeError> {
        let mut room = self.take(SMALL).await?;
        let mut bytes = Vec::new();
        let mut is_large = false;
        while let Some(chunk) = stream.read_chunk(SMALL, true).await? {
            let length = bytes.len() + chunk.bytes.len();
            if length > STREAM_MAX {
                return Err(IntakeError::TooLong);
            }
            if length > SMALL && !is_large {
                room.grow(self.take(STREAM_MAX - SMALL).await?);
                is_large = true;
            }
            bytes.extend_from_slice(&chunk.bytes);
        }
        bytes.shrink_to_fit();
        room.shrink(bytes.len());
        Ok(Message { bytes, _room: Some(room) })
    }
}

fn budget(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(bytes / UNIT))
}

fn units(bytes: usize) -> usize {
    bytes.div_ceil(UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn room_of_one_connection_leaves_the_others_theirs() {
        let intake = Intake::new();
        let (one, other) = (intake.of_connection(), intake.of_connection());
        let mut rooms = Vec::new();
        for _ in 0..64 {
            rooms.push(one.take(SMALL).await.expect("open"));
        }
        rooms.push(one.take(STREAM_MAX).await.expect("open"));
        let more = tokio::time::timeout(std::time::Duration::from_millis(10), one.take(SMALL));
        assert!(more.await.is_err(), "one connection has more than its own room");
        other.take(STREAM_MAX).await.expect("open");
        let held: usize = rooms.iter().map(|room| room.all.num_permits() * UNIT).sum();
        assert_eq!(held, OF_ONE);
        drop(rooms);
        assert_eq!(intake.0.available_permits() * UNIT, OF_ALL);
    }

    #[tokio::test]
    async fn room_of_a_message_shrinks_to_its_length_and_grows_with_it() {
        let intake = Intake::new();
        let connection = intake.of_connection();
        let mut room = connection.take(SMALL).await.expect("open");
        room.shrink(1);
        assert_eq!(intake.0.available_permits(), OF_ALL / UNIT - 1);
        room.grow(connection.take(STREAM_MAX).await.expect("open"));
        assert_eq!(intake.0.available_permits(), (OF_ALL - STREAM_MAX) / UNIT - 1);
        drop(room);
        assert_eq!(connection.own.available_permits(), OF_ONE / UNIT);
    }
}
