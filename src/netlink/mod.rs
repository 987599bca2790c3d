//! A blocking rtnetlink socket for batches of changes and for dumps.
//!
//! Messages are built with `rtnetlink` and its packet crates. This module sends them itself, because many
//! entries must be sent in few system calls, each failure must be attributed to its message, and success must
//! not be reported for work that was not done. The asynchronous handle of `rtnetlink` does not meet these
//! requirements. [`link`] has interfaces and addresses; [`monitor`] receives change notifications. The
//! callers decide what to program.

pub mod attributes;
pub mod conntrack;
pub mod ethtool;
pub mod ipset;
pub mod link;
pub mod local;
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

use nix::{
    libc::ENOBUFS,
    sched::{CloneFlags, setns},
};

use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use unreadable::MAX_UNREADABLE;
pub use unreadable::{MessageSubject, Unreadable};

/// Maximum number of messages per system call. The receive buffer holds about 250 error messages; more would
/// be lost if they arrive at once.
const BATCH_MESSAGES: usize = 128;
/// Time to wait for the kernel's answer. The kernel answers at once, so after this time the answer is lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Number of attempts at a dump that concurrent changes interrupt.
const MAX_DUMP_ATTEMPTS: usize = 8;
/// Receive buffer in bytes. The kernel sends no larger datagram to a reader with a buffer of this size.
const RECEIVE_BUFFER_BYTES: usize = 1 << 16;
/// Maximum number of datagrams per call of [`drain`], so that a reader with other work returns after about 20
/// ms.
const MAX_DATAGRAMS_PER_READ: usize = 1_024;

/// A change to send.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// The message.
    pub message: RouteNetlinkMessage,
    /// `NLM_F_*` flags in addition to `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub flags: u16,
}

/// A change that the kernel refused.
#[derive(Debug)]
pub struct RefusedChange {
    /// Index of the change in its batch.
    pub index: usize,
    /// The kernel's error number.
    pub errno: i32,
}

impl RefusedChange {
    /// Returns the error.
    pub fn to_io(&self) -> io::Error {
        io::Error::from_raw_os_error(self.errno)
    }
}

/// Encoded changes that are sent with one system call.
pub struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the first change.
    first: u32,
    messages: usize,
}

/// A socket in the network namespace of the thread that opened it. It stays in that namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    unreadable: Vec<Unreadable>,
}

impl Netlink {
    /// Opens a socket in the network namespace of this thread.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(NETLINK_ROUTE)?;
        socket.set_cap_ack(true)?;
        // Without strict checking the kernel silently ignores the filters of a dump.
        socket.set_netlink_get_strict_chk(true)?;
        let buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
        Ok(Self { socket, sequence: 0, buffer, unreadable: Vec::new() })
    }

    /// Opens a socket in another network namespace. Switches this thread to that namespace and back to
    /// `home`, which is faster than a separate thread.
    ///
    /// # Errors
    /// If the kernel refuses; `EINVAL` if `netns` is not a network namespace.
    pub fn open_in(netns: &impl AsFd, home: &impl AsFd) -> io::Result<Self> {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        let opened = Self::open();
        setns(home, CloneFlags::CLONE_NEWNET)?;
        opened
    }

    /// Applies all changes in order. Returns those that the kernel refused.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn apply(&mut self, changes: Vec<Request>) -> io::Result<Vec<RefusedChange>> {
        let mut refused = Vec::new();
        let mut changes = changes.into_iter();
        let mut done = 0;
        loop {
            let chunk: Vec<Request> = changes.by_ref().take(BATCH_MESSAGES).collect();
            if chunk.is_empty() {
                return Ok(refused);
            }
            let batch = self.encode(chunk);
            for RefusedChange { index, errno } in self.send(&batch)? {
                refused.push(RefusedChange { index: done + index, errno });
            }
            done += batch.messages;
        }
    }

    /// Encodes changes for one system call: at most 128.
    pub fn encode(&mut self, changes: Vec<Request>) -> Batch {
        let first = self.sequence.wrapping_add(1);
        let messages = changes.len();
        let mut bytes = Vec::new();
        for (i, Request { message, flags }) in changes.into_iter().enumerate() {
            // The kernel always reports errors, so one acknowledgement, of the last change, is enough.
            let ack = if i + 1 == messages { NLM_F_ACK } else { 0 };
            self.append(message, NLM_F_REQUEST | ack | flags, &mut bytes);
        }
        Batch { bytes, first, messages }
    }

    /// Sends a batch and waits until the kernel has processed it. Returns the refused changes.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn send(&mut self, batch: &Batch) -> io::Result<Vec<RefusedChange>> {
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
                        refused.push(RefusedChange { index, errno: -code.get() });
                    }
                }
            }
            if acknowledged {
                return Ok(refused);
            }
        }
    }

    /// Applies one change.
    ///
    /// # Errors
    /// If the kernel refuses it (with the kernel's error number) or does not answer.
    pub fn apply_one(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        match self.apply(vec![Request { message, flags }])?.first() {
            Some(refused) => Err(refused.to_io()),
            None => Ok(()),
        }
    }

    /// Returns all objects that match the message, from one consistent dump.
    ///
    /// # Errors
    /// If the kernel refuses or does not answer; `Interrupted` if the tables change too fast.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.dump_some(message, Some)
    }

    /// Like [`Self::dump`], but stores only what `keep` returns for each object. For long tables of which
    /// little is needed.
    ///
    /// # Errors
    /// As for [`Self::dump`].
    pub fn dump_some<T>(
        &mut self,
        message: &RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..MAX_DUMP_ATTEMPTS {
            if let Some(found) = self.dump_once(message.clone(), &mut keep)? {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the kernel's tables change too fast"))
    }

    /// Returns the object that a message requests by name or index.
    ///
    /// # Errors
    /// If the kernel refuses, does not answer, or its answer cannot be parsed.
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

    /// Runs one dump. `None` if the tables changed during it, so that the result may lack entries.
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

    /// Appends a message with the next sequence number.
    fn append(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        // Each message starts at a multiple of four bytes (NLMSG_ALIGN).
        bytes.resize((start + message.buffer_len()).next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// Returns the messages that could not be parsed since the last call, at most the latest 64.
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

/// Runs `work` in another network namespace, in a separate thread. Sockets that it opens stay there.
///
/// # Errors
/// If the namespace cannot be entered, the thread cannot be started, or the error of `work`.
pub fn inside<T: Send>(
    netns: &(impl AsFd + Sync),
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    in_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        work()
    })
}

/// Runs `work` in a separate thread, so that a change of the network namespace ends with the thread.
///
/// # Errors
/// If the thread cannot be started, or the error of `work`.
pub fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let builder = thread::Builder::new().name("namespace".to_owned());
    thread::scope(|scope| builder.spawn_scoped(scope, work).map(thread::ScopedJoinHandle::join))
        .map_err(|error| io::Error::new(error.kind(), format!("cannot start a thread: {error}")))?
        .unwrap_or_else(|_| Err(io::Error::other("a namespace thread panicked")))
}

/// Parses the messages of one datagram. Skips messages that the packet crate cannot parse.
///
/// # Errors
/// If the datagram is truncated.
pub fn parse_messages(bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let (messages, unreadable) = parse(bytes)?;
    for message in unreadable {
        tracing::debug!(error = %message.to_io(), "unreadable netlink message skipped");
    }
    Ok(messages)
}

type Parsed = (Vec<NetlinkMessage<RouteNetlinkMessage>>, Vec<Unreadable>);

/// Parses the messages of one datagram.
fn parse(bytes: &[u8]) -> io::Result<Parsed> {
    let (mut messages, mut unreadable) = (Vec::new(), Vec::new());
    let mut rest = bytes;
    while let Some(length) = rest.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let message = rest.get(..length).filter(|_| length >= 16).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "truncated netlink message")
        })?;
        match NetlinkMessage::deserialize(message) {
            Ok(message) => messages.push(message),
            Err(error) => unreadable.push(Unreadable::new(message, &error)),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok((messages, unreadable))
}

/// Opens a socket to the kernel, with [`ANSWER_TIMEOUT`] for reading.
fn open_socket(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(socket)
}

/// Receives the next datagram of the kernel into the buffer.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.reserve(RECEIVE_BUFFER_BYTES);
    socket.recv(buffer, 0).map(drop).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer")
        }
        _ => error,
    })
}

/// Passes the datagrams that wait in a non-blocking socket to `each`, at most [`MAX_DATAGRAMS_PER_READ`] of
/// them. Returns whether datagrams were lost because the socket's buffer was full.
fn drain(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<bool> {
    let mut overrun = false;
    for _ in 0..MAX_DATAGRAMS_PER_READ {
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

    /// Returns a message of a type, with a body that starts with the protocol's header.
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
    fn unreadable_message_is_reported_with_its_subject() {
        // A neighbor of interface 5 and a route of protocol 73, each with a truncated attribute.
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
        assert_eq!(
            about,
            [(7, MessageSubject::Interface(5)), (7, MessageSubject::Route { protocol: 73 })]
        );
    }
}
