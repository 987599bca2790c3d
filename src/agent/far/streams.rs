//! Connections of trials that carry data: those that this pod makes, and those that it answers.
//!
//! What is carried is a small segment and full-size ones after it, and the same comes back. Neither end keeps
//! a connection longer than a round takes.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::dataplane::forwarding::{
    FAR_DATA_PORT, MessageType, SMALL, answer, read_stream, stream_question,
};

/// Connections that are answered at once.
const AT_ONCE: usize = 64;
/// A connection that is not at its end by then does not get there.
const TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 64;
/// Bytes that are read at once.
const PART: usize = 1 << 14;

/// What has become of a connection.
pub enum Event {
    /// It is made, and data is on its way.
    Connected(IpAddr, u32),
    /// All has come back.
    Answered(IpAddr, u32),
}

/// A question that this pod sends.
struct Call {
    socket: Socket,
    to: IpAddr,
    round: u32,
    question: Vec<u8>,
    sent: usize,
    carried: Vec<u8>,
}

/// Those of one address of the pod.
#[derive(Default)]
pub struct Calls(Vec<Call>);

/// A connection that another pod has made.
struct Guest {
    socket: Socket,
    from: IpAddr,
    since: Instant,
    carried: Vec<u8>,
    /// How much of it has been sent back; none as long as it is not known that it is to be.
    answered: Option<usize>,
}

/// Those that come to one address of the pod.
pub struct Guests {
    listener: Socket,
    guests: Vec<Guest>,
}

impl Calls {
    /// Of former rounds nothing is of interest any more.
    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// Makes a connection with a socket of the pod, unless there is one.
    pub fn begin(
        &mut self,
        to: IpAddr,
        round: u32,
        size: usize,
        open: impl FnOnce() -> io::Result<Socket>,
    ) -> io::Result<()> {
        if self.0.iter().any(|call| call.to == to && call.round == round) {
            return Ok(());
        }
        let socket = open()?;
        match socket.connect(&SocketAddr::new(to, FAR_DATA_PORT).into()) {
            Err(error) if !is_under_way(&error) => return Err(error),
            _ => {}
        }
        let question = stream_question(round, size);
        self.0.push(Call { socket, to, round, question, sent: 0, carried: Vec::new() });
        Ok(())
    }

    /// Goes on with each as far as it goes.
    pub fn go_on(&mut self, mut give: impl FnMut(Event)) {
        self.0.retain_mut(|call| match call.go_on(&mut give) {
            Ok(is_open) => is_open,
            Err(error) => {
                tracing::trace!(%error, to = %call.to, "a connection has failed");
                false
            }
        });
    }

    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|call| call.socket.as_fd())
    }

    pub fn writable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let unsent = self.0.iter().filter(|call| call.sent < call.question.len());
        unsent.map(|call| call.socket.as_fd())
    }
}

impl Call {
    /// Says whether it goes on.
    fn go_on(&mut self, give: &mut impl FnMut(Event)) -> io::Result<bool> {
        while self.sent < self.question.len() {
            // The small segment is one of its own.
            let end = if self.sent < SMALL { SMALL } else { self.question.len() };
            let Some(sent) = done((&self.socket).write(&self.question[self.sent..end]))? else {
                break;
            };
            if self.sent == 0 {
                give(Event::Connected(self.to, self.round));
            }
            self.sent += sent;
        }
        if !take(&self.socket, &mut self.carried, self.question.len())? {
            return Ok(false);
        }
        let is_whole = self.carried.len() == self.question.len();
        let read = read_stream(&self.carried).map_err(|_| ErrorKind::InvalidData)?;
        if is_whole
            && read
                .is_some_and(|(said, round, _)| said == MessageType::Answer && round == self.round)
        {
            give(Event::Answered(self.to, self.round));
        }
        Ok(!is_whole)
    }
}

impl Guests {
    /// At a port of this address, inside the pod.
    pub fn listen(address: IpAddr) -> io::Result<Self> {
        let at = SocketAddr::new(address, FAR_DATA_PORT);
        let listener = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
        listener.set_reuse_address(true)?;
        listener.bind(&at.into())?;
        listener.listen(BACKLOG)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, guests: Vec::new() })
    }

    pub const fn listener(&self) -> &Socket {
        &self.listener
    }

    /// Goes on with each as far as it goes. A question of which all has come is answered if the answer of
    /// `give` to its sender and its round is yes. Says whether one was turned away.
    pub fn go_on(&mut self, mut give: impl FnMut(IpAddr, u32) -> bool) -> bool {
        self.guests.retain(|guest| guest.since.elapsed() < TIMEOUT);
        while self.guests.len() < AT_ONCE
            && let Ok((socket, from)) = self.listener.accept()
        {
            self.guests.extend(Guest::admit(socket, from.as_socket()));
        }
        self.guests.retain_mut(|guest| guest.go_on(&mut give).unwrap_or(false));
        let is_full = self.guests.len() >= AT_ONCE;
        if is_full {
            // The oldest one makes room.
            self.guests.remove(0);
        }
        is_full
    }

    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let guests = self.guests.iter().map(|guest| guest.socket.as_fd());
        guests.chain([self.listener.as_fd()])
    }

    pub fn writable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let unsent = |guest: &&Guest| guest.answered.is_some_and(|sent| sent < guest.carried.len());
        self.guests.iter().filter(unsent).map(|guest| guest.socket.as_fd())
    }
}

impl Guest {
    fn admit(socket: Socket, from: Option<SocketAddr>) -> Option<Self> {
        let prepared = reset_at_end(&socket).and_then(|()| socket.set_nonblocking(true));
        prepared.ok()?;
        let from = from?.ip();
        let since = Instant::now();
        Some(Self { socket, from, since, carried: Vec::new(), answered: None })
    }

    /// Says whether it goes on: until the other end has ended it.
    fn go_on(&mut self, give: &mut impl FnMut(IpAddr, u32) -> bool) -> io::Result<bool> {
        let limit = match (self.answered, read_stream(&self.carried)) {
            (Some(_), _) => self.carried.len(),
            (None, Ok(Some((MessageType::Question, _, size)))) => size,
            (None, Ok(None)) => SMALL,
            (None, Ok(Some(_)) | Err(_)) => return Ok(false),
        };
        if !take(&self.socket, &mut self.carried, limit)? {
            return Ok(false);
        }
        let read = read_stream(&self.carried).map_err(|_| ErrorKind::InvalidData)?;
        if let (None, Some((_, round, size))) = (self.answered, read) {
            if self.carried.len() < size {
                // More may wait than the first part.
                return if limit == size { Ok(true) } else { self.go_on(give) };
            }
            if !give(self.from, round) {
                return Ok(false);
            }
            answer(&mut self.carried);
            self.answered = Some(0);
        }
        while let Some(sent) = self.answered.filter(|sent| *sent < self.carried.len()) {
            let Some(more) = done((&self.socket).write(&self.carried[sent..]))? else { break };
            self.answered = Some(sent + more);
        }
        Ok(true)
    }
}

/// A socket of this address that does not wait. It is to be made inside the pod.
pub fn caller(address: IpAddr) -> io::Result<Socket> {
    let from = SocketAddr::new(address, 0);
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&from.into())?;
    socket.set_nonblocking(true)?;
    reset_at_end(&socket)?;
    Ok(socket)
}

/// So that the kernel remembers nothing of it, and sends each part at once.
fn reset_at_end(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)
}

/// Takes what has come, up to so many bytes in all. Says whether more may come.
fn take(socket: &Socket, carried: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    let mut buffer = [0; PART];
    loop {
        // At the limit nothing more is expected: that shows whether the other end is still there.
        let room = (limit - carried.len().min(limit)).clamp(1, PART);
        match done((&*socket).read(&mut buffer[..room]))? {
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

/// None where it has to wait.
fn done(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(length) => Ok(Some(length)),
        Err(error) if is_under_way(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Not yet done, and no failure.
fn is_under_way(error: &io::Error) -> bool {
    const EINPROGRESS: i32 = 115;
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
        || error.raw_os_error() == Some(EINPROGRESS)
}
