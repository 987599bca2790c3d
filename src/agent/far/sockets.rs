//! Sockets inside the agent's own pod: for questions of others, and for our own.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt::RxqOvfl,
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    agent::{
        packet_filter::{Shown, only},
        raw_tcp,
    },
    dataplane::forwarding::{
        FAR_PORT, Field, Kind, NONCE_LEN, Probe, Said, Segment, Sort, Transport, answer,
        far_segment, question, read,
    },
    pods::standin::Room,
};

/// Larger than any datagram.
const LONGEST: usize = 1 << 16;
/// Enough of a packet with a segment in it.
const HEADERS: usize = 128;
/// Packets that are taken from a socket at once, and connections.
const AT_ONCE: usize = 64;
/// Connections that may be half open. An answer that is lost, or whose refusal is, keeps one for a minute.
const BACKLOG: i32 = 1024;

/// What has come.
pub enum Heard {
    Question {
        from: IpAddr,
        round: u32,
        sort: Sort,
    },
    Answer {
        from: IpAddr,
        round: u32,
        kind: Kind,
    },
    /// Packets that the kernel had no room for.
    Overflow,
}

/// Those of the pod, which has an address of each family.
pub struct RoomSockets {
    room: Room,
    families: Vec<FamilySockets>,
    buffer: Vec<u8>,
}

struct FamilySockets {
    address: IpAddr,
    /// Where questions come in.
    echoes: UdpSocket,
    /// Packets that it had no room for.
    echoes_lost: u32,
    /// Of this round.
    asking: UdpSocket,
    segments: Socket,
    /// Makes the kernel accept connections, as services of pods do: firewalls may drop refusals alone.
    listener: Socket,
    segments_lost: u32,
}

impl RoomSockets {
    pub fn open(room: Room) -> io::Result<Self> {
        let open = |address: IpAddr| {
            Ok(FamilySockets {
                address,
                echoes: counting(datagrams(address, FAR_PORT)?)?,
                echoes_lost: 0,
                asking: datagrams(address, 0)?,
                segments: counting(segments(address)?)?,
                segments_lost: 0,
                listener: listener(address)?,
            })
        };
        let addresses = room.addresses;
        let families =
            room.inside(|| addresses.iter().map(open).collect::<io::Result<Vec<_>>>())?;
        Ok(Self { room, families, buffer: vec![0; LONGEST] })
    }

    /// Asks from other ports from now on.
    pub fn renew(&mut self) -> io::Result<()> {
        let Self { room, families, .. } = self;
        room.inside(|| {
            for sockets in families {
                sockets.asking = datagrams(sockets.address, 0)?;
            }
            Ok(())
        })
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.families.iter().flat_map(|sockets| {
            let FamilySockets { echoes, asking, segments, listener, .. } = sockets;
            [echoes.as_fd(), asking.as_fd(), segments.as_fd(), listener.as_fd()]
        })
    }

    /// What cannot be sent does not arrive, and so is seen.
    pub fn send(&self, to: IpAddr, kind: Kind, round: u32, size: Option<usize>) {
        let of_family = |sockets: &&FamilySockets| sockets.address.is_ipv4() == to.is_ipv4();
        let Some(sockets) = self.families.iter().find(of_family) else { return };
        let sent = match size {
            Some(size) => sockets.asking.send_to(&question(kind, round, size), (to, FAR_PORT)),
            None => {
                let to = SocketAddr::new(to, 0);
                sockets.segments.send_to(&sockets.first_segment(to.ip(), round), &to.into())
            }
        };
        if let Err(error) = sent {
            tracing::trace!(%error, %to, ?kind, "not sent");
        }
    }

    /// Gives all that has come, and answers a question if the answer is yes.
    pub fn hear(&mut self, mut give: impl FnMut(Heard) -> bool) {
        for sockets in &mut self.families {
            let FamilySockets { address, echoes, asking, segments, listener, .. } = sockets;
            let ipv4 = address.is_ipv4();
            for _ in 0..AT_ONCE {
                let Ok(Received { length, from, lost }) = receive(echoes, &mut self.buffer) else {
                    break;
                };
                if lost > std::mem::replace(&mut sockets.echoes_lost, lost) {
                    give(Heard::Overflow);
                }
                let Some(from) = from else { continue };
                let payload = &mut self.buffer[..length];
                let Some((Said::Question, kind, round)) = read(payload) else { continue };
                let sort = Sort { ipv4, kind };
                if give(Heard::Question { from: from.ip(), round, sort }) {
                    answer(payload);
                    if let Err(error) = echoes.send_to(payload, from) {
                        tracing::trace!(%error, %from, "not answered");
                    }
                }
            }
            for _ in 0..AT_ONCE {
                let Ok((length, from)) = asking.recv_from(&mut self.buffer) else { break };
                if let Some((Said::Answer, kind, round)) = read(&self.buffer[..length])
                    && from.port() == FAR_PORT
                {
                    give(Heard::Answer { from: from.ip(), round, kind });
                }
            }
            for _ in 0..AT_ONCE {
                let Ok((connection, _)) = listener.accept() else { break };
                // Reset, so that the kernel remembers nothing of it.
                let _ = connection.set_linger(Some(Duration::ZERO));
            }
            for _ in 0..AT_ONCE {
                let mut packet = [0; HEADERS];
                let Ok(Received { length, from, lost }) = receive(segments, &mut packet) else {
                    break;
                };
                if lost > std::mem::replace(&mut sockets.segments_lost, lost) {
                    give(Heard::Overflow);
                }
                let Some(from) = from.map(|from| from.ip()) else { continue };
                let packet = &packet[..length];
                let kind = Kind::Segment;
                match raw_tcp::segment(*address, packet).and_then(far_segment) {
                    // The kernel answers.
                    Some(Segment::Question(round)) => {
                        give(Heard::Question { from, round, sort: Sort { ipv4, kind } });
                    }
                    Some(Segment::Answer(round)) => _ = give(Heard::Answer { from, round, kind }),
                    None => {}
                }
            }
        }
    }
}

impl FamilySockets {
    fn first_segment(&self, to: IpAddr, round: u32) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&round.to_be_bytes());
        // Another one in each round, as connections have it.
        let port = round as u16 | 0x8000;
        let (from, ports) = (self.address, [port, FAR_PORT]);
        Probe { transport: Transport::Tcp, from, to, ports, nonce }.segment()
    }
}

fn datagrams(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, port))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn listener(address: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::new(address, FAR_PORT);
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn segments(address: IpAddr) -> io::Result<Socket> {
    let socket = raw_tcp::open(address)?;
    only(&socket, Shown::raw(address), &[Field::Half(0, FAR_PORT), Field::Half(2, FAR_PORT)])?;
    Ok(socket)
}

struct Received {
    length: usize,
    from: Option<SocketAddr>,
    /// Packets that the socket had no room for before this one came.
    lost: u32,
}

/// Has the kernel tell what a socket had no room for.
fn counting<S: AsFd>(socket: S) -> io::Result<S> {
    setsockopt(&socket, RxqOvfl, &1)?;
    Ok(socket)
}

fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = cmsg_space!(u32);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let from = message.address.as_ref().and_then(|address| {
        let ipv4 = address.as_sockaddr_in().map(|ip| SocketAddr::V4((*ip).into()));
        ipv4.or_else(|| address.as_sockaddr_in6().map(|ip| SocketAddr::V6((*ip).into())))
    });
    let count = |told| match told {
        ControlMessageOwned::RxqOvfl(count) => Some(count),
        _ => None,
    };
    Ok(Received {
        length: message.bytes,
        from,
        lost: message.cmsgs()?.find_map(count).unwrap_or_default(),
    })
}
