//! Sockets inside the agent's own pod: for questions of others, and for our own.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::{
    dataplane::forwarding::{
        FAR_PORT, Kind, NONCE_LEN, Probe, Said, Segment, Sort, Transport, answer, far_segment,
        parse, question, read,
    },
    icmp::take,
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
    Question { from: IpAddr, round: u32, sort: Sort },
    Answer { from: IpAddr, round: u32, kind: Kind },
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
    /// Of this round.
    asking: UdpSocket,
    segments: Socket,
    /// Makes the kernel accept connections, as services of pods do: firewalls may drop refusals alone.
    listener: Socket,
}

impl RoomSockets {
    pub fn open(room: Room) -> io::Result<Self> {
        let open = |address: IpAddr| {
            Ok(FamilySockets {
                address,
                echoes: datagrams(address, FAR_PORT)?,
                asking: datagrams(address, 0)?,
                segments: segments(address)?,
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
        for sockets in &self.families {
            let FamilySockets { address, echoes, asking, segments, listener } = sockets;
            let ipv4 = address.is_ipv4();
            for _ in 0..AT_ONCE {
                let Ok((length, from)) = echoes.recv_from(&mut self.buffer) else { break };
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
                let Ok(taken) = take(segments, &mut packet) else { break };
                let Some((from, _, packet)) = taken else { continue };
                // With IPv4 it comes with the header before it.
                let bytes =
                    if ipv4 { parse(packet).map(|(.., bytes)| bytes) } else { Some(packet) };
                let kind = Kind::Segment;
                match bytes.and_then(far_segment) {
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
    let domain = Domain::for_address(SocketAddr::new(address, 0));
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    match address {
        IpAddr::V4(_) => setsockopt(&socket, Ipv4PacketInfo, &true)?,
        IpAddr::V6(_) => setsockopt(&socket, Ipv6RecvPacketInfo, &true)?,
    }
    socket.attach_filter(&program(address.is_ipv4()))?;
    socket.bind(&SocketAddr::new(address, 0).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// For the kernel's packet filter: segments from or to our port. X is where the header of TCP begins, behind
/// that of IPv4, which raw sockets get too.
fn program(ipv4: bool) -> [SockFilter; 7] {
    use nix::libc::{
        BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JEQ, BPF_JMP, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
    };
    let step = |code, operand| SockFilter::new(code as u16, 0, 0, operand);
    let when = |then, otherwise| {
        SockFilter::new((BPF_JMP | BPF_JEQ) as u16, then, otherwise, FAR_PORT.into())
    };
    let header = if ipv4 { step(BPF_LDX | BPF_B | BPF_MSH, 0) } else { step(BPF_LDX | BPF_IMM, 0) };
    [
        header,
        step(BPF_LD | BPF_H | BPF_IND, 0),
        when(2, 0),
        step(BPF_LD | BPF_H | BPF_IND, 2),
        when(0, 1),
        step(BPF_RET, u32::MAX),
        step(BPF_RET, 0),
    ]
}
