//! A blocking netlink route socket: batches of changes and dumps, nothing else.
//!
//! Messages are built with `rtnetlink` and its packet crates. The sending is ours because a bulk of
//! entries must travel in few system calls with every failure tied to its message, and because nothing
//! may report success for work that was not done (both measured against the asynchronous handle).
//! Interfaces are made and found in [`link`]; [`monitor`] hears of changes. What to program is not decided
//! here.

pub mod attributes;
pub mod ethtool;
pub mod ipset;
pub mod link;
pub mod monitor;
pub mod neighbour;
pub mod netconf;
pub mod nftables;
mod raw;
pub mod route;
pub mod tc;
mod unreadable;
pub mod xfrm;

use std::{fmt, io, os::fd::AsFd, thread, time::Duration};

use nix::sched::{CloneFlags, setns};

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use unreadable::MAX_UNREADABLE;
pub use unreadable::{About, Unreadable};

/// Messages per system call. Without this bound more failures than the receive buffer holds could come
/// back at once (it takes about 250).
const BATCH_MESSAGES: usize = 128;
/// The kernel answers at once; silence this long means that the answer was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump that other changes interrupt is asked for again, this many times.
const DUMP_TRIES: usize = 8;
const ENOBUFS: i32 = 105;
/// The kernel never sends more in one message to a reader with a buffer of this size.
const RECEIVE_BUFFER: usize = 1 << 16;
/// Datagrams that are read in one turn of a reader that has other work, too: some 20 ms.
const TURN: usize = 1_024;

/// One change: the message and its `NLM_F_*` flags beside request and acknowledgement.
#[derive(Debug, PartialEq)]
pub struct Request {
    pub message: RouteNetlinkMessage,
    pub flags: u16,
}

/// A change that the kernel refused; `index` is its place in the batch.
#[derive(Debug)]
pub struct Refused {
    pub index: usize,
    pub errno: i32,
}

impl Refused {
    pub fn to_io(&self) -> io::Error {
        io::Error::from_raw_os_error(self.errno)
    }
}

/// Changes that travel together.
pub struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the first.
    first: u32,
    messages: usize,
}

/// A socket in the network namespace of the thread that opened it, for good.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    unreadable: Vec<Unreadable>,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_ROUTE)?;
        socket.set_cap_ack(true)?;
        // Without strict checking the kernel ignores the filters of a dump silently.
        socket.set_netlink_get_strict_chk(true)?;
        let buffer = Vec::with_capacity(RECEIVE_BUFFER);
        Ok(Self { socket, sequence: 0, buffer, unreadable: Vec::new() })
    }

    /// A socket in another network namespace, for good. This thread goes there and comes back to its
    /// `home`: a thread of its own would take longer than the rest.
    ///
    /// # Errors
    /// `EINVAL` if that is none.
    pub fn open_in(netns: &impl AsFd, home: &impl AsFd) -> io::Result<Self> {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        let opened = Self::open();
        setns(home, CloneFlags::CLONE_NEWNET)?;
        opened
    }

    /// Carries out all changes, in order, and names those that the kernel refused.
    pub fn apply(&mut self, changes: Vec<Request>) -> io::Result<Vec<Refused>> {
        let mut refused = Vec::new();
        let mut changes = changes.into_iter();
        let mut done = 0;
        loop {
            let some: Vec<Request> = changes.by_ref().take(BATCH_MESSAGES).collect();
            if some.is_empty() {
                return Ok(refused);
            }
            let batch = self.encode(some);
            for Refused { index, errno } in self.send(&batch)? {
                refused.push(Refused { index: done + index, errno });
            }
            done += batch.messages;
        }
    }

    /// Changes as bytes, for one system call: at most 128 of them.
    pub fn encode(&mut self, changes: Vec<Request>) -> Batch {
        let first = self.sequence.wrapping_add(1);
        let messages = changes.len();
        let mut bytes = Vec::new();
        for (i, Request { message, flags }) in changes.into_iter().enumerate() {
            // Refusals come back in any case; one acknowledgement tells that all is done.
            let ack = if i + 1 == messages { NLM_F_ACK } else { 0 };
            self.append(message, NLM_F_REQUEST | ack | flags, &mut bytes);
        }
        Batch { bytes, first, messages }
    }

    /// Sends a batch and waits until it is done.
    pub fn send(&mut self, batch: &Batch) -> io::Result<Vec<Refused>> {
        send_all(&self.socket, &batch.bytes)?;
        let mut refused = Vec::new();
        loop {
            let mut acknowledged = false;
            for message in self.receive()? {
                let index = message.header.sequence_number.wrapping_sub(batch.first) as usize;
                if index >= batch.messages {
                    continue;
                }
                if let NetlinkPayload::Error(error) = message.payload {
                    acknowledged |= index + 1 == batch.messages;
                    if let Some(code) = error.code {
                        refused.push(Refused { index, errno: -code.get() });
                    }
                }
            }
            if acknowledged {
                return Ok(refused);
            }
        }
    }

    /// Carries out one change; a refusal is an error with the kernel's number.
    pub fn apply_one(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        match self.apply(vec![Request { message, flags }])?.first() {
            Some(refused) => Err(refused.to_io()),
            None => Ok(()),
        }
    }

    /// All objects that match the message, from one undisturbed pass.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.dump_some(message, Some)
    }

    /// The same, where a table may be very long and little of it is wanted: only what `keep` gives for an
    /// object is held in memory.
    pub fn dump_some<T>(
        &mut self,
        message: &RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(message.clone(), &mut keep)? {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the kernel's tables change too fast"))
    }

    /// The object that a message asks for by name or number.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let mut bytes = Vec::new();
        self.append(message, NLM_F_REQUEST, &mut bytes);
        let sequence = self.sequence;
        send_all(&self.socket, &bytes)?;
        loop {
            let ours = |message: &NetlinkMessage<_>| message.header.sequence_number == sequence;
            match self.receive()?.into_iter().find(ours).map(|message| message.payload) {
                Some(NetlinkPayload::InnerMessage(found)) => return Ok(found),
                Some(NetlinkPayload::Error(error)) => return Err(error.to_io()),
                _ => {}
            }
            if let Some(answer) = self.unreadable.iter().find(|found| found.sequence == sequence) {
                return Err(answer.to_io());
            }
        }
    }

    /// None if the tables changed meanwhile, so that the result may lack entries.
    fn dump_once<T>(
        &mut self,
        message: RouteNetlinkMessage,
        keep: &mut impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Option<Vec<T>>> {
        let mut bytes = Vec::new();
        self.append(message, NLM_F_REQUEST | NLM_F_DUMP, &mut bytes);
        let sequence = self.sequence;
        send_all(&self.socket, &bytes)?;
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found.extend(keep(inner)),
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(found)),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        // Each message begins on a multiple of four bytes (NLMSG_ALIGN).
        bytes.resize((start + message.buffer_len()).next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// Messages that could not be read since this was last asked, the latest ones.
    pub fn take_unreadable(&mut self) -> Vec<Unreadable> {
        std::mem::take(&mut self.unreadable)
    }

    fn receive(&mut self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        receive(&self.socket, &mut self.buffer)?;
        let (messages, unreadable) = parse(&self.buffer)?;
        self.unreadable.extend(unreadable);
        let surplus = self.unreadable.len().saturating_sub(MAX_UNREADABLE);
        self.unreadable.drain(..surplus);
        Ok(messages)
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Does something in another network namespace. Sockets that are opened stay there for good.
pub fn inside<T: Send>(
    netns: &(impl AsFd + Sync),
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    in_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// In a thread of its own: a namespace once entered is never left.
///
/// # Errors
/// That of the work, or the system gives no thread.
pub fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let builder = thread::Builder::new().name("namespace".to_owned());
    thread::scope(|scope| builder.spawn_scoped(scope, work).map(thread::ScopedJoinHandle::join))
        .map_err(|error| {
            io::Error::new(error.kind(), format!("the system gives no thread: {error}"))
        })?
        .unwrap_or_else(|_| Err(io::Error::other("a namespace thread panicked")))
}

/// Every message of one datagram. One that the packet crate cannot read is left out.
///
/// # Errors
/// Fails if the datagram is cut off.
pub fn parse_messages(bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let (messages, unreadable) = parse(bytes)?;
    for message in unreadable {
        tracing::debug!(error = %message.to_io(), "netlink message not understood");
    }
    Ok(messages)
}

type Parsed = (Vec<NetlinkMessage<RouteNetlinkMessage>>, Vec<Unreadable>);

fn parse(bytes: &[u8]) -> io::Result<Parsed> {
    let (mut messages, mut unreadable) = (Vec::new(), Vec::new());
    let mut rest = bytes;
    while let Some(length) = rest.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let message = rest
            .get(..length)
            .filter(|_| length >= 16)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "cut off netlink message"))?;
        match NetlinkMessage::deserialize(message) {
            Ok(message) => messages.push(message),
            Err(error) => unreadable.push(Unreadable::new(message, &error)),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok((messages, unreadable))
}

/// A socket that talks to the kernel, and waits only so long for its answers.
fn open_socket(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(socket)
}

/// The kernel's next answer, in the place of what is in the buffer.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.reserve(RECEIVE_BUFFER);
    socket.recv(buffer, 0).map(drop).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer")
        }
        _ => error,
    })
}

/// What waits in a socket that does not block, datagram by datagram: all of it, unless it is more than one
/// turn takes. Says whether some was lost because there was more than the socket holds.
fn drain(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<bool> {
    let mut overrun = false;
    for _ in 0..TURN {
        match receive(socket, buffer) {
            Ok(()) => each(buffer)?,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(overrun),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => overrun = true,
            Err(error) => return Err(error),
        }
    }
    Ok(overrun)
}

fn send_all(socket: &Socket, bytes: &[u8]) -> io::Result<()> {
    let sent = socket.send(bytes, 0)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of a type with a body that begins with this header.
    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(16 + body.len()).expect("short").to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn message_that_cannot_be_read_says_what_it_is_about() {
        // A neighbor of interface 5 and a route of protocol 73, each with an attribute that is cut off.
        let mut neighbor = vec![0; 12];
        neighbor[4] = 5;
        let mut route = vec![2, 24, 0, 0, 254, 73, 0, 1, 0, 0, 0, 0];
        for body in [&mut neighbor, &mut route] {
            body.extend([200, 0, 1, 0]);
        }
        let bytes = [message(28, &neighbor), message(24, &route)].concat();
        let (read, unreadable) = parse(&bytes).expect("whole");
        assert!(read.is_empty(), "{read:?}");
        let about: Vec<_> = unreadable.iter().map(|one| (one.sequence, one.about)).collect();
        assert_eq!(about, [(7, About::Interface(5)), (7, About::Route { protocol: 73 })]);
    }
}
