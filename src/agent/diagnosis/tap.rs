//! Captures tunnel packets and ARP or neighbor discovery at all interfaces: incoming packets before any
//! filter drops them, outgoing packets after all filters have accepted them.

use std::{
    cell::Cell,
    io::{self, IoSliceMut},
    net::Ipv6Addr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    libc::{
        BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, BPF_LD,
        BPF_LDX, BPF_LEN, BPF_MSH, BPF_RET, BPF_W,
    },
    sys::socket::{
        ControlMessageOwned, LinkAddr, MsgFlags, recvmsg, setsockopt,
        sockopt::{RcvBufForce, RxqOvfl},
    },
};
use socket2::{SockFilter, Socket, Type};

use crate::{
    agent::diagnosis::packet_filter::{step, when},
    dataplane::captured::{PACKET_OUTGOING, Packet},
    frames::{
        ADVERTISEMENT, ARP, ICMPV6, IPV6, SOLICITATION, arp, packet_socket, sender_at, solicitation,
    },
    model::Mac,
};

/// `ETH_P_ALL`
const ETH_P_ALL: u16 = 3;
/// Offset of the protocol number: `SKF_AD_OFF + SKF_AD_PROTOCOL` of linux/filter.h.
/// Offset of the packet type (`PACKET_OUTGOING` etc.): `SKF_AD_OFF + SKF_AD_PKTTYPE` of linux/filter.h.
const PROTOCOL: u32 = 0xffff_f000;
const PACKET_TYPE: u32 = 0xffff_f004;
/// `SKF_LL_OFF` of linux/filter.h: the start of the frame header, which begins with the destination MAC.
const FRAME_HEADER: u32 = 0xffe0_0000;
/// Bytes read of each packet: all headers up to the frame inside a tunnel packet.
const READ_LEN: u32 = 128;
/// Larger packets, in bytes, are not captured: they carry data of pods, may be very many, and show
/// nothing that small packets do not show.
const MAX_CAPTURED: u32 = 300;
/// Size of the receive buffer in bytes.
const RECEIVE_BUFFER: usize = 1 << 20;
/// No datagram is sent to this port (RFC 768 reserves it).
const UNUSED_PORT: u16 = 0;

/// A packet socket that captures such packets.
pub struct Tap {
    socket: Socket,
    /// Whether the receive buffer had no room for a packet.
    has_missed: Cell<bool>,
}

impl Tap {
    /// Opens a socket for ARP, neighbor discovery and tunnel packets to this UDP port. Needs
    /// `CAP_NET_RAW`.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened or its filter cannot be attached.
    pub fn open(port: u16) -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, ETH_P_ALL)?;
        socket.attach_filter(&program(port))?;
        let tap = Self::of(socket);
        // Discards what arrived before the filter was attached.
        while tap.next(|_| ())?.is_some() {}
        Ok(tap)
    }

    /// Opens a socket for incoming ARP packets only.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened.
    pub fn of_arp() -> io::Result<Self> {
        packet_socket(Type::DGRAM, ARP).map(Self::of)
    }

    /// Opens a socket for incoming neighbor discovery packets only.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened or its filter cannot be attached.
    pub fn of_discovery() -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, IPV6)?;
        socket.attach_filter(&program(UNUSED_PORT))?;
        Ok(Self::of(socket))
    }

    /// Opens a socket for ARP and neighbor discovery at all interfaces, including ports of bridges: all
    /// outgoing packets, and incoming ones in frames to this MAC. A bridge passes other frames to other
    /// hosts, not to this host alone.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened or its filter cannot be attached.
    pub fn of_neighbors(to: Mac) -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, ETH_P_ALL)?;
        socket.attach_filter(
            &to_mac(to).into_iter().chain(program(UNUSED_PORT)).collect::<Vec<_>>(),
        )?;
        let tap = Self::of(socket);
        // Discards what arrived before the filter was attached.
        while tap.next(|_| ())?.is_some() {}
        Ok(tap)
    }

    fn of(socket: Socket) -> Self {
        // A packet missed in a storm of ARP would be taken for lost. Without the privilege to force the
        // size, the kernel grants as much as `net.core.rmem_max` allows.
        let forced = setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER);
        let given = forced
            .map_err(io::Error::from)
            .or_else(|_| socket.set_recv_buffer_size(RECEIVE_BUFFER));
        let told = setsockopt(&socket, RxqOvfl, &1);
        if let Err(error) = given.and(told.map_err(io::Error::from)) {
            tracing::debug!(%error, "a packet socket may miss packets");
        }
        Self { socket, has_missed: Cell::new(false) }
    }

    /// Returns whether the buffer had no room for packets, as far as later packets have reported it.
    pub fn has_missed(&self) -> bool {
        self.has_missed.get()
    }

    /// Passes the next packet to `see`. Returns `None` if no packet is queued.
    ///
    /// # Errors
    /// Fails if the socket cannot be read.
    pub fn next<T>(&self, see: impl FnOnce(&Packet<'_>) -> T) -> io::Result<Option<T>> {
        let mut buffer = [0; READ_LEN as usize];
        let mut control = cmsg_space!(u32);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let descriptor = self.socket.as_raw_fd();
        let flags = MsgFlags::empty();
        let received = recvmsg::<LinkAddr>(descriptor, &mut slices, Some(&mut control), flags).map(
            |message| {
                let is_loss = |told| matches!(told, ControlMessageOwned::RxqOvfl(1..));
                if message.cmsgs().is_ok_and(|mut told| told.any(is_loss)) {
                    self.has_missed.set(true);
                }
                (message.bytes, message.address)
            },
        );
        let (length, from) = match received {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(None),
            // An interface was shut down.
            Err(Errno::ENETDOWN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let from = from.ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some(see(&Packet {
            link: u32::try_from(from.ifindex()).unwrap_or(0),
            kind: from.pkttype(),
            protocol: u16::from_be(from.protocol()),
            bytes: &buffer[..length],
        })))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends ARP requests or neighbor solicitations at one Ethernet interface.
pub struct Asker {
    socket: Socket,
    mac: Mac,
}

impl Asker {
    /// Opens the socket.
    ///
    /// # Errors
    /// Fails with `Unsupported` if the interface is not Ethernet.
    pub fn open(interface: &str) -> io::Result<Self> {
        let (socket, mac) = sender_at(interface)?;
        Ok(Self { socket, mac })
    }

    /// Returns the source MAC of the requests.
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends an ARP request to one machine, or to all. A request for the sender's own address carries no
    /// sender address, so that it changes no ARP table (RFC 5227).
    ///
    /// # Errors
    /// Fails if the frame cannot be sent.
    pub fn ask(&self, to: Option<Mac>, sender: [u8; 4], target: [u8; 4]) -> io::Result<()> {
        let sender = if sender == target { [0; 4] } else { sender };
        self.socket.send(&arp(self.mac, to, sender.into(), target.into())).map(drop)
    }

    /// Sends a neighbor solicitation (RFC 4861, 4.3), whatever the kernel's neighbor table contains for
    /// the target.
    ///
    /// # Errors
    /// Fails if the frame cannot be sent.
    pub fn solicit(&self, to: Option<Mac>, sender: Ipv6Addr, target: Ipv6Addr) -> io::Result<()> {
        self.socket.send(&solicitation(self.mac, to, sender, target)).map(drop)
    }
}

/// Returns a socket filter that accepts outgoing packets and packets to this MAC, and continues with the
/// filter appended to it.
fn to_mac(mac: Mac) -> [SockFilter; 7] {
    let [a, b, c, d, e, f] = *mac.as_bytes();
    [
        step(BPF_LD | BPF_B | BPF_ABS, PACKET_TYPE),
        when(PACKET_OUTGOING.into(), 5, 0),
        step(BPF_LD | BPF_W | BPF_ABS, FRAME_HEADER),
        when(u32::from_be_bytes([a, b, c, d]), 0, 2),
        step(BPF_LD | BPF_H | BPF_ABS, FRAME_HEADER + 4),
        when(u32::from_be_bytes([0, 0, e, f]), 1, 0),
        step(BPF_RET, 0),
    ]
}

/// Returns a socket filter that accepts ARP, neighbor discovery, and small unfragmented datagrams to the
/// port.
fn program(port: u16) -> [SockFilter; 23] {
    let when = |test: u32, value, then, otherwise| {
        SockFilter::new((BPF_JMP | test | BPF_K) as u16, then, otherwise, value)
    };
    let port = u32::from(port);
    [
        step(BPF_LD | BPF_W | BPF_ABS, PROTOCOL),
        when(BPF_JEQ, u32::from(ARP), 19, 0),
        when(BPF_JEQ, IPV6.into(), 8, 0),
        when(BPF_JEQ, 0x0800, 0, 18),
        step(BPF_LD | BPF_B | BPF_ABS, 9),
        when(BPF_JEQ, 17, 0, 16),
        step(BPF_LD | BPF_H | BPF_ABS, 6),
        when(BPF_JSET, 0x1fff, 14, 0),
        step(BPF_LDX | BPF_B | BPF_MSH, 0),
        step(BPF_LD | BPF_H | BPF_IND, 2),
        when(BPF_JEQ, port, 8, 11),
        step(BPF_LD | BPF_B | BPF_ABS, 6),
        when(BPF_JEQ, 17, 4, 0),
        when(BPF_JEQ, ICMPV6.into(), 0, 8),
        step(BPF_LD | BPF_B | BPF_ABS, 40),
        when(BPF_JEQ, ADVERTISEMENT.into(), 5, 0),
        when(BPF_JEQ, SOLICITATION.into(), 4, 5),
        step(BPF_LD | BPF_H | BPF_ABS, 42),
        when(BPF_JEQ, port, 0, 3),
        step(BPF_LD | BPF_W | BPF_LEN, 0),
        when(BPF_JGT, MAX_CAPTURED, 1, 0),
        step(BPF_RET, READ_LEN),
        step(BPF_RET, 0),
    ]
}
