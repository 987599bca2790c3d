//! The QUIC endpoint: dialing, accepting, and one connection per pair of nodes.
//!
//! One loop owns the endpoint and passes each [`Event`] to [`Transport::handle`]. The tasks that it
//! starts share only the event queue and the state of admission with it.

mod accept;
mod admission;
mod bucket;
mod dial;
mod links;
mod names;
mod settings;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::IpNet;
use quinn::{Connection, Endpoint, SendStream, VarInt};
use tokio::sync::mpsc;

pub use self::names::check_name;
use self::{
    accept::accept,
    admission::SharedAdmissions,
    dial::{Dialer, Dials},
    links::PeerLink,
    settings::{endpoint_settings, roles},
    socket::LimitedSocket,
};
pub use self::{
    admission::{Flood, Handshakes},
    socket::ReceiveBuffer,
};
use super::{
    connection::{Call, Event, Events, Received, read, request, send_on},
    credentials::Credentials,
    intake::Intake,
    replies::{UnreadReplies, give_up},
};
use crate::model::{CallError, NodeId, ReplyId};

/// Length of the event queue. When it is full, readers of streams wait, and datagrams are dropped.
const EVENT_QUEUE: usize = 4096;
/// Frames that wait for a connection to one peer; a further one replaces the oldest.
const FRAME_QUEUE: usize = 32;
/// Calls that wait for a connection to one peer; further ones fail.
const CALL_QUEUE: usize = 8;
/// Unanswered requests of peers, which accumulate only while the disk accepts no writes.
const MAX_REPLIES: usize = 1024;
/// Time limit of a handshake.
const DIAL_TIMEOUT: Duration = Duration::from_secs(4);
/// Time after which a second connection to one peer is closed.
const DUPLICATE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of a call by name, including all its addresses.
const NAME_TIMEOUT: Duration = Duration::from_secs(8);

/// Why the UDP socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process has the port.
    #[error(
        "listen {address}: the UDP port is in use: is another gossamer running here? \
         stop it or choose another --listen"
    )]
    InUse {
        /// The address of the socket.
        address: SocketAddr,
    },
    /// Another error.
    #[error("listen {address}: {error}")]
    Io {
        /// The address of the socket.
        address: SocketAddr,
        /// The error.
        error: io::Error,
    },
}

/// The QUIC endpoint with its connections.
pub struct Transport {
    dialer: Dialer,
    dials: Dials,
    /// Members whose connections are kept, although they are not used for a while.
    neighbors: BTreeSet<NodeId>,
    credentials: Credentials,
    peers: BTreeMap<NodeId, PeerLink>,
    /// Peers whose secret differs from this node's, until one connects.
    other_secret: BTreeSet<NodeId>,
    /// Response streams of unanswered requests.
    replies: BTreeMap<ReplyId, (NodeId, SendStream)>,
    unread: UnreadReplies,
    next_reply: u64,
    /// Number of calls by name; each starts with the next address of the name.
    calls_by_name: AtomicUsize,
    buffer: ReceiveBuffer,
}

impl Transport {
    /// Opens the socket, and accepts connections from then on. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn bind(
        address: SocketAddr,
        credentials: &Credentials,
    ) -> Result<(Self, mpsc::Receiver<Event>), BindError> {
        let fail = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { address },
            _ => BindError::Io { address, error },
        };
        let admissions = SharedAdmissions::new(credentials.first_ids.clone());
        let intake = Intake::new();
        let (socket, buffer) = LimitedSocket::bind(address, admissions.clone()).map_err(fail)?;
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let (server, client) = roles(credentials);
        let runtime = Arc::new(quinn::TokioRuntime);
        let settings = endpoint_settings(credentials);
        let endpoint =
            Endpoint::new_with_abstract_socket(settings, Some(server), Arc::new(socket), runtime)
                .map_err(fail)?;
        let accepting =
            accept(endpoint.clone(), admissions.clone(), intake.clone(), events.clone());
        tokio::spawn(accepting);
        let dialer = Dialer { endpoint, client, admissions, intake, events, me: credentials.me };
        let transport = Self {
            dialer,
            dials: Dials::new(Instant::now()),
            neighbors: BTreeSet::new(),
            credentials: credentials.clone(),
            peers: BTreeMap::new(),
            replies: BTreeMap::new(),
            unread: UnreadReplies::default(),
            next_reply: 0,
            other_secret: BTreeSet::new(),
            calls_by_name: AtomicUsize::new(0),
            buffer,
        };
        Ok((transport, receiver))
    }

    /// Returns the socket's address.
    ///
    /// # Errors
    /// When the socket does not report it.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.dialer.endpoint.local_addr()
    }

    /// Returns the number of peers with a connection.
    pub fn connections(&self) -> usize {
        self.peers.values().filter(|link| link.live().is_some()).count()
    }

    /// Returns whether the last handshake with a peer failed because its secret differs from this node's.
    pub fn has_other_secret(&self, peer: NodeId) -> bool {
        self.other_secret.contains(&peer)
    }

    /// Returns QUIC's estimate of the round-trip time to a peer; `None` without a connection.
    pub fn round_trip(&self, peer: NodeId) -> Option<Duration> {
        Some(self.peers.get(&peer)?.live()?.rtt())
    }

    /// Returns the source address of a peer's packets; `None` without a connection.
    pub fn remote(&self, peer: NodeId) -> Option<SocketAddr> {
        Some(self.peers.get(&peer)?.live()?.remote_address())
    }

    /// Returns the number of packets received on a peer's connection; `None` without one.
    pub fn received(&self, peer: NodeId) -> Option<u64> {
        Some(self.peers.get(&peer)?.live()?.stats().udp_rx.datagrams)
    }

    /// Returns the socket's receive buffer.
    pub const fn receive_buffer(&self) -> ReceiveBuffer {
        self.buffer
    }

    /// Returns the counters of handshakes.
    pub fn handshakes(&self) -> Handshakes {
        self.dialer.admissions.lock().counts()
    }

    /// Returns the current flood of first packets from unproven addresses, if there is one.
    pub fn flood(&self) -> Option<Flood> {
        self.dialer.admissions.lock().flood(Instant::now())
    }

    /// Returns the current excess of handshakes from proven addresses, if there is one: they get no
    /// place, or lose it.
    pub fn crowd(&self) -> Option<Flood> {
        self.dialer.admissions.lock().crowd(Instant::now())
    }

    /// Sets the pods' networks. All their addresses count as one source of handshakes.
    pub fn learn_overlay(&self, networks: Vec<IpNet>) {
        self.dialer.admissions.lock().learn_overlay(networks);
    }

    /// Processes an event; returns what has arrived, if anything has.
    pub fn handle(&mut self, event: Event) -> Option<Received> {
        match event {
            Event::Connected { peer, connection, inbound } => {
                self.connected(peer, connection, inbound);
                if !inbound {
                    self.dial_ended();
                }
                None
            }
            Event::Closed { peer, stable_id } => {
                self.closed(peer, stable_id);
                None
            }
            Event::DialFailed { peer, error } => {
                self.dial_failed(peer, &error);
                self.dial_ended();
                None
            }
            Event::Message { from, message } => {
                self.mark_used(from);
                Some(Received::Message { from, bytes: message.bytes })
            }
            Event::Request { from, message, stream } => {
                self.mark_used(from);
                self.next_reply += 1;
                let reply = ReplyId(self.next_reply);
                self.replies.insert(reply, (from, stream));
                if self.replies.len() > MAX_REPLIES
                    && let Some((oldest, _)) = self.replies.first_key_value()
                {
                    self.give_up(*oldest);
                }
                Some(Received::Request { from, reply, bytes: message.bytes })
            }
            Event::Answer { call, result } => {
                let result = result.map(|(from, message)| (from, message.bytes));
                Some(Received::Answer { call, result })
            }
        }
    }

    /// Sends a frame in a datagram, which may be lost. A frame that is too large takes a stream.
    pub fn send(&mut self, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        self.send_frame(to, address, bytes, false);
    }

    /// Sends a frame on a stream: lost packets are sent again. It is lost with the connection only.
    pub fn send_reliably(&mut self, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        self.send_frame(to, address, bytes, true);
    }

    /// Sends a request to the node that answers at a name, `HOST:PORT`.
    pub fn call_name(&self, call: Call, name: String, bytes: Vec<u8>) {
        let dialer = self.dialer.clone();
        let turn = self.calls_by_name.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let requested = async {
                let (peer, connection) = dialer.connect_name(&name, turn).await?;
                request(peer, &connection, &dialer.intake, &bytes).await
            };
            let result = tokio::time::timeout(NAME_TIMEOUT, requested)
                .await
                .unwrap_or_else(|_| Err(CallError::Unreachable(format!("{name} does not answer"))));
            let _ = dialer.events.send(Event::Answer { call, result }).await;
        });
    }

    /// Sends the response to a request. It is lost if the peer is gone, does not read it in time, or does not
    /// read earlier ones.
    pub fn reply(&mut self, reply: ReplyId, bytes: Vec<u8>) {
        if let Some((peer, stream)) = self.replies.remove(&reply) {
            self.unread.send(peer, stream, bytes);
        }
    }

    /// Ends a request without a response.
    pub fn give_up(&mut self, reply: ReplyId) {
        if let Some((_, stream)) = self.replies.remove(&reply) {
            give_up(stream);
        }
    }

    /// Uses these credentials for further handshakes, and closes connections to peers that they do
    /// not accept. Closed connections are re-created on demand.
    pub fn use_credentials(&mut self, credentials: &Credentials) {
        let (server, client) = roles(credentials);
        self.dialer.endpoint.set_server_config(Some(server));
        self.dialer.client = client;
        self.dialer.admissions.lock().accept_ids(credentials.first_ids.clone());
        self.credentials = credentials.clone();
        for link in self.peers.values_mut() {
            if let Some(connection) = link.connection.take_if(|held| !credentials.accepts(held)) {
                connection.close(VarInt::from_u32(0), b"its secret is no longer accepted");
            }
        }
    }

    /// Closes all connections after a change of this host's address, because peers' connections
    /// lead to the old one. They are re-created on demand.
    pub fn moved(&mut self) {
        for link in self.peers.values_mut() {
            if let Some(connection) = link.connection.take() {
                connection.close(VarInt::from_u32(0), b"moved");
            }
        }
    }

    /// Waits briefly for the delivery of sent frames, then closes all connections.
    pub async fn close(self) {
        const LINGER: Duration = Duration::from_millis(200);
        // A graceful close discards unacknowledged datagrams.
        tokio::time::sleep(LINGER).await;
        self.dialer.endpoint.close(VarInt::from_u32(0), b"leaving");
        let _ = tokio::time::timeout(LINGER, self.dialer.endpoint.wait_idle()).await;
    }

    /// Stores a new connection, and sends what waits for it.
    fn connected(&mut self, peer: NodeId, connection: Connection, inbound: bool) {
        // The handshake may have begun before a secret was removed.
        if !self.credentials.accepts(&connection) {
            connection.close(VarInt::from_u32(0), b"its secret is no longer accepted");
            let error = CallError::OtherSecret(connection.remote_address());
            return self.dial_failed(peer, &error);
        }
        let address = connection.remote_address().ip();
        self.other_secret.remove(&peer);
        self.dialer.admissions.lock().learn_member(Instant::now(), address);
        let link = self.peers.entry(peer).or_default();
        link.is_dialing &= inbound;
        // If two nodes dial each other at once, both keep the connection that the node with the
        // smaller id opened, and read the other one for a while. A later connection means that the
        // peer has lost the old one.
        let at_once = link.since.is_some_and(|since| since.elapsed() < DIAL_TIMEOUT);
        let superfluous = if link.live().is_none() || !at_once || inbound == (peer < self.dialer.me)
        {
            link.replace(connection.clone(), inbound)
        } else {
            Some(connection.clone())
        };
        if let Some(superfluous) = superfluous {
            tokio::spawn(close_later(superfluous));
        }
        link.last_used = Some(Instant::now());
        for (bytes, reliably) in link.frames.drain(..) {
            send_on(&connection, bytes, reliably);
        }
        for (call, bytes) in std::mem::take(&mut link.calls) {
            self.request_on(call, peer, connection.clone(), bytes);
        }
        self.close_least_recently_used();
    }

    /// Marks the peer's connection as used.
    fn mark_used(&mut self, peer: NodeId) {
        if let Some(link) = self.peers.get_mut(&peer) {
            link.last_used = Some(Instant::now());
        }
    }

    /// Removes a connection that has ended.
    fn closed(&mut self, peer: NodeId, stable_id: usize) {
        if let Some(link) = self.peers.get_mut(&peer)
            && link.connection.as_ref().is_some_and(|c| c.stable_id() == stable_id)
        {
            link.connection = None;
            if link.is_unused() {
                self.peers.remove(&peer);
            }
        }
    }

    /// Drops the frames and fails the calls that wait for a connection.
    fn dial_failed(&mut self, peer: NodeId, error: &CallError) {
        tracing::debug!(%peer, %error, "dial failed");
        if matches!(error, CallError::OtherSecret(_)) {
            self.other_secret.insert(peer);
        }
        let Some(link) = self.peers.get_mut(&peer) else { return };
        link.is_dialing = false;
        link.frames.clear();
        let calls = std::mem::take(&mut link.calls);
        if link.is_unused() {
            self.peers.remove(&peer);
        }
        calls.into_iter().for_each(|(call, _)| self.answer(call, error.clone()));
    }

    /// Starts a task that sends a request on a connection.
    fn request_on(&self, call: Call, peer: NodeId, on: Connection, bytes: Vec<u8>) {
        let (events, intake) = (self.dialer.events.clone(), self.dialer.intake.clone());
        tokio::spawn(async move {
            let result = request(peer, &on, &intake, &bytes).await;
            let _ = events.send(Event::Answer { call, result }).await;
        });
    }

    /// Ends a call with an error, through the event queue like a response. A task waits if the
    /// queue is full.
    fn answer(&self, call: Call, error: CallError) {
        let (events, result) = (self.dialer.events.clone(), Err(error));
        tokio::spawn(async move { events.send(Event::Answer { call, result }).await });
    }
}

/// Closes a superfluous connection after a delay, so that transfers on it can end.
async fn close_later(connection: Connection) {
    tokio::time::sleep(DUPLICATE_TIMEOUT).await;
    connection.close(VarInt::from_u32(0), b"duplicate connection");
}
