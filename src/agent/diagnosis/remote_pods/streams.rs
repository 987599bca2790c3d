//! TCP connections of trials that carry data, in both directions.
//!
//! A connection carries a small segment followed by full-size ones, and the receiver returns the same
//! data. Neither end keeps a connection longer than a round.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use nix::libc::EINPROGRESS;
use socket2::{Domain, Protocol, Socket, Type};

use crate::dataplane::forwarding::remote::message::{self, MessageType, REMOTE_DATA_PORT, SMALL};

/// Maximum number of simultaneous incoming connections.
const MAX_INCOMING: usize = 64;
/// Lifetime of an incoming connection.
const LIFETIME: Duration = Duration::from_secs(10);
/// Maximum number of connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// Bytes per read.
const READ_LEN: usize = 1 << 14;

/// A change of an outgoing connection. The fields are the peer's address and the round.
pub enum Event {
    /// The connection is established and data was sent.
    Connected(IpAddr, u32),
    /// All data has been returned.
    Answered(IpAddr, u32),
}

/// An outgoing connection of this host's trial.
struct OutgoingStream {
    socket: Socket,
    to: IpAddr,
    round: u32,
    question: Vec<u8>,
    /// Bytes of the probe that were sent.
    sent: usize,
    /// Bytes received.
    carried: Vec<u8>,
}

/// The outgoing connections of one address of the pod.
#[derive(Default)]
pub struct OutgoingStreams(Vec<OutgoingStream>);

/// An incoming connection from another host's pod.
struct IncomingStream {
    socket: Socket,
    from: IpAddr,
    since: Instant,
    /// Bytes received; the answer after it has been prepared.
    carried: Vec<u8>,
    /// Number of answer bytes sent; `None` until the whole probe has arrived.
    answered: Option<usize>,
}

/// The listener and incoming connections of one address of the pod.
pub struct IncomingStreams {
    listener: Socket,
    incoming: Vec<IncomingStream>,
}

impl OutgoingStreams {
    /// Closes connections of earlier rounds.
    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// Starts a connection with a new socket of the pod, unless one to this peer exists in this round.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened or refuses to connect.
    pub fn begin(
        &mut self,
        to: IpAddr,
        round: u32,
        size: usize,
        open: impl FnOnce() -> io::Result<Socket>,
    ) -> io::Result<()> {
        if self.0.iter().any(|stream| stream.to == to && stream.round == round) {
            return Ok(());
        }
        let socket = open()?;
        match socket.connect(&SocketAddr::new(to, REMOTE_DATA_PORT).into()) {
            Err(error) if !is_under_way(&error) => return Err(error),
            _ => {}
        }
        let question = message::stream_question(round, size);
        self.0.push(OutgoingStream { socket, to, round, question, sent: 0, carried: Vec::new() });
        Ok(())
    }

    /// Advances each connection as far as possible without blocking.
    pub fn advance(&mut self, mut give: impl FnMut(Event)) {
        self.0.retain_mut(|stream| match stream.advance(&mut give) {
            Ok(is_open) => is_open,
            Err(error) => {
                tracing::trace!(%error, to = %stream.to, "connection failed");
                false
            }
        });
    }

    /// Returns the descriptors to poll for reading.
    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|stream| stream.socket.as_fd())
    }

    /// Returns the descriptors of connections with unsent bytes.
    pub fn writable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let unsent = self.0.iter().filter(|stream| stream.sent < stream.question.len());
        unsent.map(|stream| stream.socket.as_fd())
    }
}

impl OutgoingStream {
    /// Advances the connection, and returns whether it stays open.
    fn advance(&mut self, give: &mut impl FnMut(Event)) -> io::Result<bool> {
        while self.sent < self.question.len() {
            // The small segment is sent separately.
            let end = if self.sent < SMALL { SMALL } else { self.question.len() };
            let Some(sent) = nonblocking((&self.socket).write(&self.question[self.sent..end]))?
            else {
                break;
            };
            if self.sent == 0 {
                give(Event::Connected(self.to, self.round));
            }
            self.sent += sent;
        }
        if !read_available(&self.socket, &mut self.carried, self.question.len())? {
            return Ok(false);
        }
        let is_whole = self.carried.len() == self.question.len();
        let read = message::read_stream(&self.carried).map_err(|_| ErrorKind::InvalidData)?;
        if is_whole
            && read
                .is_some_and(|(said, round, _)| said == MessageType::Answer && round == self.round)
        {
            give(Event::Answered(self.to, self.round));
        }
        Ok(!is_whole)
    }
}

impl IncomingStreams {
    /// Listens on the data port of this address. Must be called inside the pod's namespace.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened or bound.
    pub fn listen(address: IpAddr) -> io::Result<Self> {
        let at = SocketAddr::new(address, REMOTE_DATA_PORT);
        let listener = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
        listener.set_reuse_address(true)?;
        listener.bind(&at.into())?;
        listener.listen(BACKLOG)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, incoming: Vec::new() })
    }

    /// Returns the listening socket.
    pub const fn listener(&self) -> &Socket {
        &self.listener
    }

    /// Advances each connection as far as possible without blocking. A complete probe is answered if
    /// `give` returns `true` for its sender and round. Returns whether the limit of connections was
    /// reached.
    pub fn advance(&mut self, mut give: impl FnMut(IpAddr, u32) -> bool) -> bool {
        self.incoming.retain(|stream| stream.since.elapsed() < LIFETIME);
        while self.incoming.len() < MAX_INCOMING
            && let Ok((socket, from)) = self.listener.accept()
        {
            self.incoming.extend(IncomingStream::admit(socket, from.as_socket()));
        }
        self.incoming.retain_mut(|stream| stream.advance(&mut give).unwrap_or(false));
        let is_full = self.incoming.len() >= MAX_INCOMING;
        if is_full {
            // The oldest connection is closed to make room.
            self.incoming.remove(0);
        }
        is_full
    }

    /// Returns the descriptors to poll for reading.
    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let incoming = self.incoming.iter().map(|stream| stream.socket.as_fd());
        incoming.chain([self.listener.as_fd()])
    }

    /// Returns the descriptors of connections with unsent bytes.
    pub fn writable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let unsent = |stream: &&IncomingStream| {
            stream.answered.is_some_and(|sent| sent < stream.carried.len())
        };
        self.incoming.iter().filter(unsent).map(|stream| stream.socket.as_fd())
    }
}

impl IncomingStream {
    fn admit(socket: Socket, from: Option<SocketAddr>) -> Option<Self> {
        let prepared = reset_at_end(&socket).and_then(|()| socket.set_nonblocking(true));
        prepared.ok()?;
        let from = from?.ip();
        let since = Instant::now();
        Some(Self { socket, from, since, carried: Vec::new(), answered: None })
    }

    /// Advances the connection. Returns whether it stays open, which it does until the other end closes
    /// it.
    fn advance(&mut self, give: &mut impl FnMut(IpAddr, u32) -> bool) -> io::Result<bool> {
        let limit = match (self.answered, message::read_stream(&self.carried)) {
            (Some(_), _) => self.carried.len(),
            (None, Ok(Some((MessageType::Question, _, size)))) => size,
            (None, Ok(None)) => SMALL,
            (None, Ok(Some(_)) | Err(_)) => return Ok(false),
        };
        if !read_available(&self.socket, &mut self.carried, limit)? {
            return Ok(false);
        }
        let read = message::read_stream(&self.carried).map_err(|_| ErrorKind::InvalidData)?;
        if let (None, Some((_, round, size))) = (self.answered, read) {
            if self.carried.len() < size {
                // Bytes beyond the first part may be available already.
                return if limit == size { Ok(true) } else { self.advance(give) };
            }
            if !give(self.from, round) {
                return Ok(false);
            }
            message::answer(&mut self.carried);
            self.answered = Some(0);
        }
        while let Some(sent) = self.answered.filter(|sent| *sent < self.carried.len()) {
            let Some(more) = nonblocking((&self.socket).write(&self.carried[sent..]))? else {
                break;
            };
            self.answered = Some(sent + more);
        }
        Ok(true)
    }
}

/// Opens a nonblocking socket bound to this address. Must be called inside the pod's namespace.
///
/// # Errors
/// Fails if the socket cannot be opened or bound.
pub fn open_outgoing(address: IpAddr) -> io::Result<Socket> {
    let from = SocketAddr::new(address, 0);
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&from.into())?;
    socket.set_nonblocking(true)?;
    reset_at_end(&socket)?;
    Ok(socket)
}

/// Makes closing reset the connection, so that the kernel keeps no state of it, and sends each part
/// immediately.
fn reset_at_end(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)
}

/// Reads available bytes up to a total of `limit`. Returns whether the connection is still open.
fn read_available(socket: &Socket, carried: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    let mut buffer = [0; READ_LEN];
    loop {
        // At the limit nothing more is expected, but a read shows whether the other end is still
        // connected.
        let room = (limit - carried.len().min(limit)).clamp(1, READ_LEN);
        match nonblocking((&*socket).read(&mut buffer[..room]))? {
            None => return Ok(true),
            Some(0) => return Ok(false),
            Some(_) if carried.len() >= limit => return Err(ErrorKind::InvalidData.into()),
            Some(length) => carried.extend(&buffer[..length]),
        }
        if carried.len() == limit {
            return Ok(true);
        }
    }
}

/// Converts "would block" to `None`.
fn nonblocking(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(length) => Ok(Some(length)),
        Err(error) if is_under_way(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns whether the operation is incomplete rather than failed.
fn is_under_way(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
        || error.raw_os_error() == Some(EINPROGRESS)
}
