//! The endpoint: dialling, accepting, and one connection per pair of nodes.
//!
//! Owned by one loop, which hands every [`Event`] back to [`Transport::handle`]; the tasks it starts
//! share nothing with it but the channel of events, and the state of admission.

mod accept;
mod admission;
mod dial;
mod names;
mod settings;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
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

use self::{
    accept::accept,
    admission::SharedAdmissions,
    dial::Dialler,
    settings::{endpoint_settings, roles},
    socket::LimitedSocket,
};
pub use self::{
    admission::{Flood, Handshakes},
    socket::ReceiveBuffer,
};
use super::{
    connection::{Event, Events, ask, read, send_stream},
    credentials::Credentials,
    intake::Intake,
};
use crate::{
    core::{CallError, CallId, Input, ReplyId},
    model::NodeId,
};

/// Events that wait for the loop; readers of streams wait, datagrams are shed.
const EVENT_QUEUE: usize = 4096;
/// Frames that wait for a connection; the oldest is dropped.
const FRAME_QUEUE: usize = 32;
const CALL_QUEUE: usize = 8;
/// Questions that wait for our answer; they pile up only while a disk does not write.
const MAX_REPLIES: usize = 1024;
/// Code of a stream that is reset because its question gets no answer.
const NO_ANSWER: VarInt = VarInt::from_u32(1);
/// Connections kept open: about 10 MB. The one that was not used for longest makes way.
const MAX_CONNECTIONS: usize = 256;
const DIAL_TIMEOUT: Duration = Duration::from_secs(4);
/// A second connection to one peer is closed after this.
const SPARE: Duration = Duration::from_secs(10);
/// A call by name, with all of its addresses, ends after this time.
const NAME_TIMEOUT: Duration = Duration::from_secs(8);

/// The UDP socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "listen {address}: the UDP port is in use: is another gossamer running here? \
         stop it or choose another --listen"
    )]
    InUse { address: SocketAddr },
    #[error("listen {address}: {error}")]
    Io { address: SocketAddr, error: io::Error },
}

pub struct Transport {
    dialler: Dialler,
    credentials: Credentials,
    peers: BTreeMap<NodeId, PeerLink>,
    /// The ways back to peers that asked.
    replies: BTreeMap<ReplyId, SendStream>,
    next_reply: u64,
    /// Calls by name so far: each begins with another address of the name.
    calls_by_name: AtomicUsize,
    buffer: ReceiveBuffer,
}

/// The connection to a peer, or what waits for one.
#[derive(Default)]
struct PeerLink {
    connection: Option<Connection>,
    since: Option<Instant>,
    /// When something last went this way, or came.
    used: Option<Instant>,
    dialling: bool,
    frames: VecDeque<Vec<u8>>,
    calls: VecDeque<(CallId, Vec<u8>)>,
}

impl Transport {
    /// Binds the socket and accepts connections from then on. Must be called within a tokio runtime.
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
        let dialler = Dialler { endpoint, client, admissions, intake, events, me: credentials.me };
        let transport = Self {
            dialler,
            credentials: credentials.clone(),
            peers: BTreeMap::new(),
            replies: BTreeMap::new(),
            next_reply: 0,
            calls_by_name: AtomicUsize::new(0),
            buffer,
        };
        Ok((transport, receiver))
    }

    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.dialler.endpoint.local_addr()
    }

    /// How many peers there is a connection to.
    pub fn connections(&self) -> usize {
        self.peers.values().filter(|link| link.live().is_some()).count()
    }

    /// How long a packet to a peer and back takes, by QUIC's estimate; none without a connection.
    pub fn round_trip(&self, peer: NodeId) -> Option<Duration> {
        Some(self.peers.get(&peer)?.live()?.rtt())
    }

    /// From where the packets of a peer come; none without a connection.
    pub fn remote(&self, peer: NodeId) -> Option<SocketAddr> {
        Some(self.peers.get(&peer)?.live()?.remote_address())
    }

    /// How many packets of a peer have come on its connection; none without one.
    pub fn received(&self, peer: NodeId) -> Option<u64> {
        Some(self.peers.get(&peer)?.live()?.stats().udp_rx.datagrams)
    }

    /// The room for packets that wait to be read.
    pub const fn receive_buffer(&self) -> ReceiveBuffer {
        self.buffer
    }

    /// What became of the first packets of handshakes.
    pub fn handshakes(&self) -> Handshakes {
        self.dialler.admissions.lock().counts()
    }

    /// Whether strangers flood this node now with first packets that prove no address.
    pub fn flood(&self) -> Option<Flood> {
        self.dialler.admissions.lock().flood(Instant::now())
    }

    /// Whether handshakes find no place now, or lose it. Their addresses are proven.
    pub fn crowd(&self) -> Option<Flood> {
        self.dialler.admissions.lock().crowd(Instant::now())
    }

    /// Takes note of the networks of pods: all of their addresses are one source of handshakes.
    pub fn learn_overlay(&self, networks: Vec<IpNet>) {
        self.dialler.admissions.lock().learn_overlay(networks);
    }

    /// Takes note of an event; what concerns the node comes back as an input.
    pub fn handle(&mut self, event: Event) -> Option<Input> {
        match event {
            Event::Connected { peer, connection, inbound } => {
                self.connected(peer, connection, inbound);
                None
            }
            Event::Closed { peer, stable_id } => {
                self.closed(peer, stable_id);
                None
            }
            Event::DialFailed { peer, error } => {
                self.dial_failed(peer, &error);
                None
            }
            Event::Message { from, message } => {
                self.touch(from);
                Some(Input::Message { from, bytes: message.bytes })
            }
            Event::Request { from, message, stream } => {
                self.touch(from);
                self.next_reply += 1;
                let reply = ReplyId(self.next_reply);
                self.replies.insert(reply, stream);
                if self.replies.len() > MAX_REPLIES
                    && let Some((oldest, _)) = self.replies.first_key_value()
                {
                    self.give_up(*oldest);
                }
                Some(Input::Request { from, reply, bytes: message.bytes })
            }
            Event::Answer { call, result } => {
                let result = result.map(|(from, message)| (from, message.bytes));
                Some(Input::Answer { call, result })
            }
        }
    }

    /// Sends a frame, or loses it.
    pub fn send(&mut self, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        let link = self.peers.entry(to).or_default();
        link.used = Some(Instant::now());
        if let Some(connection) = link.live() {
            return send_on(connection, bytes);
        }
        if link.frames.len() >= FRAME_QUEUE {
            link.frames.pop_front();
        }
        link.frames.push_back(bytes);
        self.dial(to, address);
    }

    /// Asks a member. The answer, or the reason for none, comes as an event.
    pub fn call(&mut self, call: CallId, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        let link = self.peers.entry(to).or_default();
        link.used = Some(Instant::now());
        if let Some(connection) = link.live().cloned() {
            return self.ask_on(call, to, connection, bytes);
        }
        if link.calls.len() >= CALL_QUEUE {
            return self
                .answer(call, CallError::Unreachable("too many calls wait for it".to_owned()));
        }
        link.calls.push_back((call, bytes));
        self.dial(to, address);
    }

    /// Asks whoever answers at a name, `HOST:PORT`.
    pub fn call_name(&self, call: CallId, name: String, bytes: Vec<u8>) {
        let dialler = self.dialler.clone();
        let turn = self.calls_by_name.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let asked = async {
                let (peer, connection) = dialler.connect_name(&name, turn).await?;
                ask(peer, &connection, &dialler.intake, &bytes).await
            };
            let result = tokio::time::timeout(NAME_TIMEOUT, asked)
                .await
                .unwrap_or_else(|_| Err(CallError::Unreachable(format!("{name} does not answer"))));
            let _ = dialler.events.send(Event::Answer { call, result }).await;
        });
    }

    /// Answers a question; the peer may be gone by now.
    pub fn reply(&mut self, reply: ReplyId, bytes: Vec<u8>) {
        if let Some(mut stream) = self.replies.remove(&reply) {
            tokio::spawn(async move {
                if stream.write_all(&bytes).await.is_ok() {
                    let _ = stream.finish();
                    let _ = stream.stopped().await;
                }
            });
        }
    }

    /// Ends a question without an answer. A stream that is only dropped would end as if it had been answered
    /// with nothing, which the peer would take for a broken message.
    pub fn give_up(&mut self, reply: ReplyId) {
        if let Some(mut stream) = self.replies.remove(&reply) {
            let _ = stream.reset(NO_ANSWER);
        }
    }

    /// From now on handshakes are made with these. Connections with peers that would not be let in any more
    /// are closed; they are made anew when they are next needed.
    pub fn use_credentials(&mut self, credentials: &Credentials) {
        let (server, client) = roles(credentials);
        self.dialler.endpoint.set_server_config(Some(server));
        self.dialler.client = client;
        self.dialler.admissions.lock().accept_ids(credentials.first_ids.clone());
        self.credentials = credentials.clone();
        for link in self.peers.values_mut() {
            if let Some(connection) = link.connection.take_if(|held| !credentials.accept(held)) {
                connection.close(VarInt::from_u32(0), b"its secret was dropped");
            }
        }
    }

    /// This host has another address: connections that peers have opened lead to the old one, so all are made
    /// anew when they are next needed.
    pub fn moved(&mut self) {
        for link in self.peers.values_mut() {
            if let Some(connection) = link.connection.take() {
                connection.close(VarInt::from_u32(0), b"moved");
            }
        }
    }

    /// Lets what was sent arrive, then closes everything.
    pub async fn close(self) {
        const LINGER: Duration = Duration::from_millis(200);
        // A graceful close discards unacknowledged datagrams, so give them a moment first.
        tokio::time::sleep(LINGER).await;
        self.dialler.endpoint.close(VarInt::from_u32(0), b"leaving");
        let _ = tokio::time::timeout(LINGER, self.dialler.endpoint.wait_idle()).await;
    }

    fn dial(&mut self, peer: NodeId, address: SocketAddr) {
        let Some(link) = self.peers.get_mut(&peer) else { return };
        if std::mem::replace(&mut link.dialling, true) {
            return;
        }
        self.dialler.admissions.lock().learn_member(Instant::now(), address.ip());
        let dialler = self.dialler.clone();
        tokio::spawn(async move {
            let event = match dialler.connect(address).await {
                Ok((found, connection)) if found == peer => {
                    dialler.read(peer, connection.clone());
                    Event::Connected { peer, connection, inbound: false }
                }
                Ok((found, connection)) => {
                    connection.close(VarInt::from_u32(1), b"another node was expected");
                    let why = format!("{address} is node {found} now, not {peer}");
                    Event::DialFailed { peer, error: CallError::Unreachable(why) }
                }
                Err(error) => Event::DialFailed { peer, error },
            };
            let _ = dialler.events.send(event).await;
        });
    }

    fn connected(&mut self, peer: NodeId, connection: Connection, inbound: bool) {
        // It may have been begun before a secret was dropped.
        if !self.credentials.accept(&connection) {
            connection.close(VarInt::from_u32(0), b"its secret was dropped");
            let error = CallError::Rejected("its secret was dropped".to_owned());
            return self.dial_failed(peer, &error);
        }
        let address = connection.remote_address().ip();
        self.dialler.admissions.lock().learn_member(Instant::now(), address);
        let link = self.peers.entry(peer).or_default();
        link.dialling &= inbound;
        // Two nodes that dial each other at once keep the connection of the smaller id; the other one
        // is still read for a while. Later on a new connection means that the peer has lost the old one.
        let at_once = link.since.is_some_and(|since| since.elapsed() < DIAL_TIMEOUT);
        let spare = if link.live().is_none() || !at_once || inbound == (peer < self.dialler.me) {
            link.since = Some(Instant::now());
            link.connection.replace(connection.clone())
        } else {
            Some(connection.clone())
        };
        if let Some(spare) = spare {
            tokio::spawn(close_later(spare));
        }
        link.used = Some(Instant::now());
        for bytes in link.frames.drain(..) {
            send_on(&connection, bytes);
        }
        for (call, bytes) in std::mem::take(&mut link.calls) {
            self.ask_on(call, peer, connection.clone(), bytes);
        }
        self.make_room();
    }

    fn touch(&mut self, peer: NodeId) {
        if let Some(link) = self.peers.get_mut(&peer) {
            link.used = Some(Instant::now());
        }
    }

    fn make_room(&mut self) {
        if self.connections() > MAX_CONNECTIONS {
            let live = self.peers.values().filter_map(|link| Some((link.used, link.live()?)));
            if let Some((_, connection)) = live.min_by_key(|(used, _)| *used) {
                connection.close(VarInt::from_u32(0), b"others are needed more");
            }
        }
    }

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

    fn dial_failed(&mut self, peer: NodeId, error: &CallError) {
        tracing::debug!(%peer, %error, "not connected");
        let Some(link) = self.peers.get_mut(&peer) else { return };
        link.dialling = false;
        link.frames.clear();
        let calls = std::mem::take(&mut link.calls);
        if link.is_unused() {
            self.peers.remove(&peer);
        }
        calls.into_iter().for_each(|(call, _)| self.answer(call, error.clone()));
    }

    fn ask_on(&self, call: CallId, peer: NodeId, on: Connection, bytes: Vec<u8>) {
        let (events, intake) = (self.dialler.events.clone(), self.dialler.intake.clone());
        tokio::spawn(async move {
            let result = ask(peer, &on, &intake, &bytes).await;
            let _ = events.send(Event::Answer { call, result }).await;
        });
    }

    /// Ends a call that got no further. Through the queue like any other answer, however full it is.
    fn answer(&self, call: CallId, error: CallError) {
        let (events, result) = (self.dialler.events.clone(), Err(error));
        tokio::spawn(async move { events.send(Event::Answer { call, result }).await });
    }
}

impl PeerLink {
    fn live(&self) -> Option<&Connection> {
        self.connection.as_ref().filter(|connection| connection.close_reason().is_none())
    }

    fn is_unused(&self) -> bool {
        self.connection.is_none()
            && !self.dialling
            && self.frames.is_empty()
            && self.calls.is_empty()
    }
}

/// What is under way on it may end.
async fn close_later(connection: Connection) {
    tokio::time::sleep(SPARE).await;
    connection.close(VarInt::from_u32(0), b"there is another one");
}

fn send_on(connection: &Connection, bytes: Vec<u8>) {
    if connection.max_datagram_size().is_some_and(|max| bytes.len() <= max) {
        if let Err(error) = connection.send_datagram(bytes.into()) {
            tracing::debug!(%error, "frame lost");
        }
    } else {
        tokio::spawn(send_stream(connection.clone(), bytes));
    }
}
