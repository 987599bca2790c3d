//! Dials addresses. A member can choose some of them: it asks this node to probe others on its behalf. The
//! number of dials is limited, so that they neither fill the memory nor flood these addresses.

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, net::SocketAddr, time::Instant};

use quinn::{ClientConfig, Connection, Endpoint, VarInt};

use super::{
    CALL_QUEUE, Call, DIAL_TIMEOUT, Event, Events, FRAME_QUEUE, Intake, Transport,
    admission::SharedAdmissions, bucket::Bucket, read, send_on,
};
use crate::{
    model::{CallError, NodeId},
    transport::{
        connection::call_error,
        credentials::{SERVER_NAME, peer_of},
    },
};

/// Dials at once. An unanswered one takes 12 kB of sent packets and 20 kB of memory.
const MAX_DIALS: usize = 64;
/// Dials at once beyond which frames begin no further one, so that calls find a place.
const MAX_DIALS_OF_FRAMES: usize = 32;
/// Peers whose calls wait for a place; calls to further ones fail.
const MAX_WAITING: usize = 256;
/// Dials per second that frames to others than neighbors begin. This node and the members that probe through
/// it need a few, when many members fall silent at once.
const FRAME_DIALS_PER_SECOND: f64 = 16.0;
/// The number of these dials in a row.
const FRAME_DIALS_BURST: f64 = 64.0;

/// The dials that run and those that wait for a place.
pub(super) struct Dials {
    running: usize,
    of_frames: Bucket,
    /// Peers with calls, in the order in which they are dialed.
    waiting: VecDeque<(NodeId, SocketAddr)>,
}

impl Dials {
    pub(super) const fn new(now: Instant) -> Self {
        let of_frames = Bucket::new(now, FRAME_DIALS_PER_SECOND, FRAME_DIALS_BURST);
        Self { running: 0, of_frames, waiting: VecDeque::new() }
    }

    /// Returns whether a frame may begin a dial. Frames to neighbors need no token: they are few, and without
    /// them this node would not know which of its neighbors live.
    fn admits_frame(&mut self, is_to_neighbor: bool) -> bool {
        match is_to_neighbor {
            true => self.running < MAX_DIALS,
            false => self.running < MAX_DIALS_OF_FRAMES && self.of_frames.take(Instant::now()),
        }
    }
}

/// What a dialing task needs.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) endpoint: Endpoint,
    pub(super) client: ClientConfig,
    pub(super) admissions: SharedAdmissions,
    pub(super) intake: Intake,
    pub(super) events: Events,
    pub(super) me: NodeId,
}

impl Dialer {
    /// Connects to the node that answers at an address.
    ///
    /// # Errors
    /// When no node answers in time, or the handshake fails.
    pub(super) async fn connect(
        &self,
        address: SocketAddr,
    ) -> Result<(NodeId, Connection), CallError> {
        self.admissions.lock().learn_non_member(Instant::now(), address.ip());
        let connecting = self
            .endpoint
            .connect_with(self.client.clone(), address, SERVER_NAME)
            .map_err(|error| CallError::Unreachable(format!("{address}: {error}")))?;
        let connection = tokio::time::timeout(DIAL_TIMEOUT, connecting)
            .await
            .map_err(|_| CallError::Unreachable(format!("{address} does not answer")))?
            .map_err(|error| call_error(&error, address))?;
        let peer = peer_of(&connection)
            .ok_or_else(|| CallError::Unreachable(format!("{address}: unreadable certificate")))?;
        Ok((peer, connection))
    }

    /// Starts a task that reads a connection.
    pub(super) fn read(&self, peer: NodeId, connection: Connection) {
        tokio::spawn(read(peer, connection, self.intake.clone(), self.events.clone()));
    }
}

impl Transport {
    /// Sends a frame, at once or when a connection is open. Without a place for a dial, it is dropped like a
    /// lost packet.
    pub(super) fn send_frame(
        &mut self,
        to: NodeId,
        address: SocketAddr,
        bytes: Vec<u8>,
        reliably: bool,
    ) {
        let link = self.peers.entry(to).or_default();
        if let Some(connection) = link.live_at(address) {
            return send_on(connection, bytes, reliably);
        }
        // The frame travels with calls that wait for a place.
        let is_expected = link.is_dialing || !link.calls.is_empty();
        if !is_expected && !self.dials.admits_frame(self.neighbors.contains(&to)) {
            tracing::trace!(%to, "frame dropped: too many dials");
            if link.is_unused() {
                self.peers.remove(&to);
            }
            return;
        }
        if link.frames.len() >= FRAME_QUEUE {
            link.frames.pop_front();
        }
        link.frames.push_back((bytes, reliably));
        if !is_expected {
            self.dial(to, address);
        }
    }

    /// Sends a request to a member. The response or the error arrives as an event.
    pub fn call(&mut self, call: Call, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        let link = self.peers.entry(to).or_default();
        if let Some(connection) = link.live_at(address).cloned() {
            return self.request_on(call, to, connection, bytes);
        }
        let is_expected = link.is_dialing || !link.calls.is_empty();
        let has_place = self.dials.running < MAX_DIALS;
        let is_refused = !is_expected && !has_place && self.dials.waiting.len() >= MAX_WAITING;
        if is_refused || link.calls.len() >= CALL_QUEUE {
            if link.is_unused() {
                self.peers.remove(&to);
            }
            let why = "too many calls are waiting for a connection".to_owned();
            return self.answer(call, CallError::Unreachable(why));
        }
        link.calls.push_back((call, bytes));
        match has_place {
            _ if is_expected => {}
            true => self.dial(to, address),
            false => self.dials.waiting.push_back((to, address)),
        }
    }

    /// Starts a task that connects to a peer, unless one is running.
    fn dial(&mut self, peer: NodeId, address: SocketAddr) {
        let Some(link) = self.peers.get_mut(&peer) else { return };
        if std::mem::replace(&mut link.is_dialing, true) {
            return;
        }
        self.dials.running += 1;
        self.dialer.admissions.lock().learn_member(Instant::now(), address.ip());
        let dialer = self.dialer.clone();
        tokio::spawn(async move {
            let event = match dialer.connect(address).await {
                Ok((found, connection)) if found == peer => {
                    dialer.read(peer, connection.clone());
                    Event::Connected { peer, connection, inbound: false }
                }
                Ok((found, connection)) => {
                    connection.close(VarInt::from_u32(1), b"another node was expected");
                    let why = format!("{address} is node {found} now, not {peer}");
                    Event::DialFailed { peer, error: CallError::Unreachable(why) }
                }
                Err(error) => Event::DialFailed { peer, error },
            };
            let _ = dialer.events.send(event).await;
        });
    }

    /// Frees the place of a dial that has ended, and dials peers whose calls wait for one.
    pub(super) fn dial_ended(&mut self) {
        self.dials.running = self.dials.running.saturating_sub(1);
        while self.dials.running < MAX_DIALS
            && let Some((peer, address)) = self.dials.waiting.pop_front()
        {
            // The peer may have connected in the meantime.
            if self.peers.get(&peer).is_some_and(|link| !link.calls.is_empty()) {
                self.dial(peer, address);
            }
        }
    }
}
