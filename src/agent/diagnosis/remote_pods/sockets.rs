//! Sockets in the network namespace of the agent's own pod: they answer trials of other hosts and send
//! this host's trials.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
        setsockopt,
        sockopt::{RcvBufForce, UdpGroSegment},
    },
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::streams::{self, Event, IncomingStreams, OutgoingStreams};
use crate::{
    agent::diagnosis::{
        packet_filter::{Condition, FilterInput, Sources, receive_only, receive_only_where},
        raw_tcp,
    },
    dataplane::forwarding::{
        Field, NONCE_LEN, Probe, TrialProtocol,
        remote::message::{
            self, IS_MESSAGE, Kind, MessageType, REMOTE_DATA_PORT, REMOTE_PORT, Segment, Sort,
        },
    },
    pods::agent_pod::PodNamespace,
};

/// Buffer size in bytes, larger than any datagram.
const BUFFER_LEN: usize = 1 << 16;
/// Bytes read of a packet with a TCP segment: all of its headers.
const HEADERS_LEN: usize = 128;
/// Maximum number of packets or connections taken from a socket in one pass.
const MAX_PER_PASS: usize = 256;
/// Receive buffer of a socket in bytes.
const RECEIVE_BUFFER: usize = 2 << 20;
/// Upper limit of the kernel's accounting overhead per packet in bytes, added to twice the packet's
/// length.
const PACKET_OVERHEAD: usize = 1280;
/// Maximum number of half-open connections. A lost answer or reset keeps one of them for a minute.
const BACKLOG: i32 = 1024;

/// A received packet, or the state of a connection.
pub enum SocketEvent {
    /// A probe of another host's trial.
    Question { from: IpAddr, round: u32, sort: Sort },
    /// An answer to a probe of this host's trial.
    Answer { from: IpAddr, round: u32, kind: Kind },
    /// A connection to this address is established and carries data.
    Connected { to: IpAddr, round: u32 },
    /// The kernel had no room for some packets.
    Overflow,
}

/// Sockets of the pod, which has an address of each family.
pub struct NamespaceSockets {
    namespace: PodNamespace,
    families: Vec<FamilySockets>,
    /// Addresses from which probes are accepted.
    sources: Vec<Sources>,
    round: Option<u32>,
    buffer: Vec<u8>,
}

/// Sockets of one address family.
struct FamilySockets {
    address: IpAddr,
    /// Receives and answers probes.
    echoes: UdpSocket,
    echoes_taken: BufferUse,
    /// Sends the probes of the current round and receives their answers.
    asking: UdpSocket,
    segments: Socket,
    segments_taken: BufferUse,
    /// Makes the kernel accept connections as services in pods do: firewalls may drop resets only.
    listener: Socket,
    /// Connections with data made by this host.
    outgoing: OutgoingStreams,
    /// Connections with data made by other hosts.
    incoming: IncomingStreams,
}

/// Bytes taken from a socket since it was last empty. The kernel's drop counter is unsuitable, because
/// it includes packets that the socket filter rejected.
struct BufferUse {
    /// Bytes of buffer space that the taken packets used.
    bytes: usize,
    /// Size of the buffer: more taken bytes than this show that it was full.
    limit: usize,
}

impl NamespaceSockets {
    /// Opens the sockets. The kernel drops probes from addresses other than `sources`.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened or configured.
    pub fn open(namespace: PodNamespace, sources: &[Sources]) -> io::Result<Self> {
        let open = |address: IpAddr| {
            let (echoes, segments) = (datagrams(address, REMOTE_PORT)?, segments(address)?);
            Ok(FamilySockets {
                address,
                echoes_taken: BufferUse::of(&echoes)?,
                echoes: with_gro(echoes),
                asking: datagrams(address, 0)?,
                segments_taken: BufferUse::of(&segments)?,
                segments,
                listener: listener(address)?,
                outgoing: OutgoingStreams::default(),
                incoming: IncomingStreams::listen(address)?,
            })
        };
        let addresses = namespace.addresses;
        let families =
            namespace.inside(|| addresses.iter().map(open).collect::<io::Result<Vec<_>>>())?;
        let mut opened = Self {
            namespace,
            families,
            sources: Vec::new(),
            round: None,
            buffer: vec![0; BUFFER_LEN],
        };
        opened.admit(sources)?;
        Ok(opened)
    }

    /// Replaces the addresses from which probes are accepted.
    ///
    /// # Errors
    /// Fails if a filter cannot be attached.
    pub fn admit(&mut self, sources: &[Sources]) -> io::Result<()> {
        self.sources = sources.to_vec();
        self.families.iter().try_for_each(|family| family.admit(sources, self.round))
    }

    /// Starts a round: sends from new ports, and accepts answers of this round only.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened or configured.
    pub fn start_round(&mut self, round: u32) -> io::Result<()> {
        let Self { namespace, families, .. } = self;
        self.round = Some(round);
        namespace.inside(|| {
            for sockets in families {
                sockets.outgoing.forget();
                sockets.asking = datagrams(sockets.address, 0)?;
                receive_only(
                    &sockets.asking,
                    FilterInput::Segment,
                    &[message::is_of_round(round)],
                )?;
                sockets.admit(&self.sources, self.round)?;
            }
            Ok(())
        })
    }

    /// Returns the descriptors to poll for reading.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.families.iter().flat_map(|sockets| {
            let FamilySockets { echoes, asking, segments, listener, outgoing, incoming, .. } =
                sockets;
            let single = [echoes.as_fd(), asking.as_fd(), segments.as_fd(), listener.as_fd()];
            single.into_iter().chain(outgoing.readable()).chain(incoming.readable())
        })
    }

    /// Returns the descriptors of connections that wait to send.
    pub fn writable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.families.iter().flat_map(|sockets| {
            let FamilySockets { outgoing, incoming, .. } = sockets;
            outgoing.writable().chain(incoming.writable())
        })
    }

    /// Sends a probe. `size` is the size of a datagram or stream in bytes; `None` sends a TCP segment. A
    /// probe that cannot be sent does not arrive, and is detected that way.
    ///
    /// # Errors
    /// Fails if the probe cannot be sent.
    pub fn send(
        &mut self,
        to: IpAddr,
        kind: Kind,
        round: u32,
        size: Option<usize>,
    ) -> io::Result<()> {
        let Self { namespace, families, .. } = self;
        let of_family = |sockets: &&mut FamilySockets| sockets.address.is_ipv4() == to.is_ipv4();
        let Some(sockets) = families.iter_mut().find(of_family) else { return Ok(()) };
        let from = sockets.address;
        let sent = match size {
            Some(size) if kind == Kind::Data => {
                let open = || namespace.inside(|| streams::open_outgoing(from));
                sockets.outgoing.begin(to, round, size, open)
            }
            Some(size) => {
                let payload = message::question(kind, round, size * kind.segments());
                send_segmented(&sockets.asking, &payload, SocketAddr::new(to, REMOTE_PORT), size)
            }
            None => {
                let to = SocketAddr::new(to, 0);
                let segment = sockets.first_segment(to.ip(), round);
                sockets.segments.send_to(&segment, &to.into()).map(drop)
            }
        };
        sent.inspect_err(|error| tracing::trace!(%error, %to, ?kind, "not sent"))
    }

    /// Passes everything received to `give`, and answers a probe if `give` returns `true`.
    pub fn receive_all(&mut self, mut give: impl FnMut(SocketEvent) -> bool) {
        for sockets in &mut self.families {
            sockets.receive_questions(&mut self.buffer, &mut give);
            sockets.receive_answers(&mut self.buffer, &mut give);
            sockets.refuse_connections();
            sockets.receive_segments(&mut give);
            sockets.advance_streams(&mut give);
        }
    }
}

impl FamilySockets {
    /// Receives probes in datagrams, and answers those that `give` accepts.
    fn receive_questions(&mut self, buffer: &mut [u8], give: &mut impl FnMut(SocketEvent) -> bool) {
        let ipv4 = self.address.is_ipv4();
        for _ in 0..MAX_PER_PASS {
            let received = receive(&self.echoes, buffer);
            if self.echoes_taken.note(&received) {
                give(SocketEvent::Overflow);
            }
            let Ok(Received { length, from, segment }) = received else { break };
            let Some(from) = from else { continue };
            let Some(mut rest) = buffer.get_mut(..length) else { continue };
            loop {
                let datagram = rest.len().min(segment.unwrap_or(length));
                let Some((MessageType::Question, kind, round)) = message::read(&rest[..datagram])
                else {
                    break;
                };
                let size = if kind.segments() > 1 { rest.len() } else { datagram };
                let (payload, others) = std::mem::take(&mut rest).split_at_mut(size);
                rest = others;
                let sort = Sort { ipv4, kind };
                if give(SocketEvent::Question { from: from.ip(), round, sort }) {
                    message::answer(payload);
                    let sent =
                        send_segmented(&self.echoes, payload, from, datagram).or_else(|_| {
                            send_segmented(&self.echoes, &payload[..datagram], from, datagram)
                        });
                    if let Err(error) = sent {
                        tracing::trace!(%error, %from, "not answered");
                    }
                }
            }
        }
    }

    /// Receives answers to this host's datagrams.
    fn receive_answers(&mut self, buffer: &mut [u8], give: &mut impl FnMut(SocketEvent) -> bool) {
        for _ in 0..MAX_PER_PASS {
            let Ok((length, from)) = self.asking.recv_from(buffer) else { break };
            if let Some((MessageType::Answer, kind, round)) = message::read(&buffer[..length])
                && from.port() == REMOTE_PORT
            {
                give(SocketEvent::Answer { from: from.ip(), round, kind });
            }
        }
    }

    /// Closes connections with a reset, so that the kernel keeps no state of them.
    fn refuse_connections(&self) {
        for _ in 0..MAX_PER_PASS {
            let Ok((connection, _)) = self.listener.accept() else { break };
            let _ = connection.set_linger(Some(Duration::ZERO));
        }
    }

    /// Receives probes and answers in TCP segments.
    fn receive_segments(&mut self, give: &mut impl FnMut(SocketEvent) -> bool) {
        let ipv4 = self.address.is_ipv4();
        for _ in 0..MAX_PER_PASS {
            let mut packet = [0; HEADERS_LEN];
            let received = receive(&self.segments, &mut packet);
            if self.segments_taken.note(&received) {
                give(SocketEvent::Overflow);
            }
            let Ok(Received { length, from, .. }) = received else { break };
            let Some(from) = from.map(|from| from.ip()) else { continue };
            let packet = &packet[..length.min(HEADERS_LEN)];
            let kind = Kind::Segment;
            match raw_tcp::segment(self.address, packet).and_then(message::segment) {
                // The kernel itself answers the segment.
                Some(Segment::Question(round)) => {
                    give(SocketEvent::Question { from, round, sort: Sort { ipv4, kind } });
                }
                Some(Segment::Answer(round)) => _ = give(SocketEvent::Answer { from, round, kind }),
                None => {}
            }
        }
    }

    /// Advances the connections that carry data.
    fn advance_streams(&mut self, give: &mut impl FnMut(SocketEvent) -> bool) {
        let (ipv4, kind) = (self.address.is_ipv4(), Kind::Data);
        let sort = Sort { ipv4, kind };
        let is_full =
            self.incoming.advance(|from, round| give(SocketEvent::Question { from, round, sort }));
        if is_full {
            give(SocketEvent::Overflow);
        }
        self.outgoing.advance(|event| {
            give(match event {
                Event::Connected(to, round) => SocketEvent::Connected { to, round },
                Event::Answered(from, round) => SocketEvent::Answer { from, round, kind },
            });
        });
    }

    /// Attaches filters so that unrelated packets fill neither the buffers nor the connection queue.
    fn admit(&self, sources: &[Sources], round: Option<u32>) -> io::Result<()> {
        let is_of_family = |sources: &&Sources| sources.is_ipv4() == self.address.is_ipv4();
        let from = sources.iter().find(is_of_family).map(Condition::From);
        let question =
            |field| from.into_iter().chain([Condition::Field(field)]).collect::<Vec<_>>();
        let [to_port, from_port] = [2, 0].map(|at| Field::Half(at, REMOTE_PORT));
        receive_only_where(&self.echoes, FilterInput::Segment, &[&question(IS_MESSAGE)])?;
        receive_only_where(&self.listener, FilterInput::Segment, &[&question(to_port)])?;
        let to_data = question(Field::Half(2, REMOTE_DATA_PORT));
        receive_only_where(self.incoming.listener(), FilterInput::Segment, &[&to_data])?;
        let question = question(to_port);
        let answer =
            round.map(|round| [from_port, message::answers_segment(round)].map(Condition::Field));
        let answer = answer.as_ref().map(<[_; 2]>::as_slice);
        let any: Vec<_> = answer.into_iter().chain([question.as_slice()]).collect();
        receive_only_where(&self.segments, FilterInput::raw(self.address), &any)
    }

    fn first_segment(&self, to: IpAddr, round: u32) -> Vec<u8> {
        let round_bytes = round.to_be_bytes();
        let nonce: [u8; NONCE_LEN] = std::array::from_fn(|at| round_bytes[at % round_bytes.len()]);
        // A different source port in each round, as new connections have.
        let port = round as u16 | 0x8000;
        let (from, ports) = (self.address, [port, REMOTE_PORT]);
        Probe { transport: TrialProtocol::Tcp, from, to, ports, nonce }.segment()
    }
}

fn datagrams(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, port))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn listener(address: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::new(address, REMOTE_PORT);
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn segments(address: IpAddr) -> io::Result<Socket> {
    let socket = raw_tcp::open(address)?;
    receive_only(&socket, FilterInput::raw(address), &[])?;
    Ok(socket)
}

/// A packet read from a socket.
struct Received {
    /// Length of the packet in bytes, even if it exceeds the buffer.
    length: usize,
    from: Option<SocketAddr>,
    /// Size in bytes of each datagram if the packet contains several (UDP GRO).
    segment: Option<usize>,
}

/// Enables UDP GRO if possible: the kernel then delivers several datagrams of one packet together.
fn with_gro(socket: UdpSocket) -> UdpSocket {
    if let Err(error) = setsockopt(&socket, UdpGroSegment, &true) {
        tracing::debug!(%error, "UDP GRO unavailable");
    }
    socket
}

/// Sends datagrams of `size` bytes as one packet (UDP GSO). The last one may be smaller.
fn send_segmented(
    socket: &UdpSocket,
    payload: &[u8],
    to: SocketAddr,
    size: usize,
) -> io::Result<()> {
    if payload.len() <= size {
        return socket.send_to(payload, to).map(drop);
    }
    let size = u16::try_from(size).map_err(io::Error::other)?;
    let parts = [IoSlice::new(payload)];
    let control = [ControlMessage::UdpGsoSegments(&size)];
    let to = SockaddrStorage::from(to);
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))?;
    Ok(())
}

impl BufferUse {
    /// Enlarges a socket's receive buffer. Without the privilege to force the size, the kernel grants as
    /// much as `net.core.rmem_max` allows.
    fn of(socket: &impl AsFd) -> io::Result<Self> {
        let given = SockRef::from(socket);
        if setsockopt(socket, RcvBufForce, &RECEIVE_BUFFER).is_err() {
            given.set_recv_buffer_size(RECEIVE_BUFFER)?;
        }
        Ok(Self { bytes: 0, limit: given.recv_buffer_size()? / 2 })
    }

    /// Records the result of a read, and returns whether packets may have been lost for lack of room.
    fn note(&mut self, received: &io::Result<Received>) -> bool {
        match received {
            Ok(Received { length, .. }) => self.bytes += PACKET_OVERHEAD + 2 * length,
            Err(_) => self.bytes = 0,
        }
        self.bytes > self.limit
    }
}

fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = cmsg_space!(i32);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_TRUNC;
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let from = message.address.as_ref().and_then(|address| {
        let ipv4 = address.as_sockaddr_in().map(|ip| SocketAddr::V4((*ip).into()));
        ipv4.or_else(|| address.as_sockaddr_in6().map(|ip| SocketAddr::V6((*ip).into())))
    });
    let mut segment = None;
    for told in message.cmsgs()? {
        if let ControlMessageOwned::UdpGroSegments(size) = told {
            segment = usize::try_from(size).ok();
        }
    }
    let segment = segment.filter(|size| *size > 0);
    Ok(Received { length: message.bytes, from, segment })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_buffer_is_detected_and_filtered_packets_are_not() {
        let [to, from] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a socket"));
        to.set_nonblocking(true).expect("a socket");
        receive_only(&to, FilterInput::Segment, &[IS_MESSAGE]).expect("a filter");
        let mut taken = BufferUse::of(&to).expect("a buffer");
        let room = SockRef::from(&to).recv_buffer_size().expect("its size");
        let mut send_and_take = |payload: &[u8]| {
            for _ in 0..room / 500 {
                from.send_to(payload, to.local_addr().expect("an address")).expect("sent");
            }
            let mut buffer = [0; HEADERS_LEN];
            let mut is_noticed = false;
            loop {
                let received = receive(&to, &mut buffer);
                is_noticed |= taken.note(&received);
                if received.is_err() {
                    return is_noticed;
                }
            }
        };
        let said = message::question(Kind::Small, 7, 32);
        assert!(!send_and_take(b"of another") && send_and_take(&said));
        assert!(!send_and_take(b"of another"), "it was empty since");
    }
}
