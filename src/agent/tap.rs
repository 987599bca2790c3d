//! Sees packets of tunnels, and ARP, at all interfaces: as they come in before anything drops them, and as
//! they go out after everything has let them pass.

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

use super::packet_filter::{step, when};
use crate::{
    dataplane::{
        answers::PACKET_OUTGOING,
        silence::{self, Packet},
    },
    frames::{ICMPV6, IPV6, arp, packet_socket, sender_at, solicitation},
    model::Mac,
};

/// `ETH_P_ALL`
const EVERYTHING: u16 = 3;
/// `SKF_AD_OFF + SKF_AD_PROTOCOL` of linux/filter.h, and the same with `SKF_AD_PKTTYPE`.
const PROTOCOL: u32 = 0xffff_f000;
const KIND: u32 = 0xffff_f004;
/// `SKF_LL_OFF`: the frame's header, which begins with the MAC it goes to.
const FRAME: u32 = 0xffe0_0000;
/// Bytes of a packet that are read: all headers up to the frame inside a tunnel packet.
const READ: u32 = 128;
/// Larger packets carry data of pods. Of those there may be very many, and small ones tell the same.
const SMALL: u32 = 300;
/// Bytes of packets that wait to be read.
const BUFFER: usize = 1 << 20;
/// No datagram goes there (RFC 768 reserves it).
const NO_PORT: u16 = 0;

/// A socket that sees such packets.
pub struct Tap {
    socket: Socket,
    /// It had no room for a packet.
    has_missed: Cell<bool>,
}

impl Tap {
    /// Tunnel packets are those to this UDP port. Takes CAP_NET_RAW.
    pub fn open(port: u16) -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, EVERYTHING)?;
        socket.attach_filter(&program(port))?;
        let tap = Self::of(socket);
        // What came before the filter is of no interest.
        while tap.next(|_| ())?.is_some() {}
        Ok(tap)
    }

    /// Sees ARP alone, and nothing of this host's own.
    pub fn of_arp() -> io::Result<Self> {
        packet_socket(Type::DGRAM, silence::ARP).map(Self::of)
    }

    /// The same of neighbor discovery.
    pub fn of_discovery() -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, IPV6)?;
        socket.attach_filter(&program(NO_PORT))?;
        Ok(Self::of(socket))
    }

    /// Sees ARP and neighbor discovery at all interfaces, ports of bridges among them: as they leave, and of
    /// what comes in the frames to this MAC alone. A bridge passes no others on to this host, or not only.
    pub fn of_neighbors(to: Mac) -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, EVERYTHING)?;
        socket
            .attach_filter(&to_mac(to).into_iter().chain(program(NO_PORT)).collect::<Vec<_>>())?;
        let tap = Self::of(socket);
        // What came before the filter is of no interest.
        while tap.next(|_| ())?.is_some() {}
        Ok(tap)
    }

    fn of(socket: Socket) -> Self {
        // What it misses in a storm of ARP would pass for lost. Without the right to more the kernel gives as
        // much as it may.
        let forced = setsockopt(&socket, RcvBufForce, &BUFFER);
        let given =
            forced.map_err(io::Error::from).or_else(|_| socket.set_recv_buffer_size(BUFFER));
        let told = setsockopt(&socket, RxqOvfl, &1);
        if let Err(error) = given.and(told.map_err(io::Error::from)) {
            tracing::debug!(%error, "a packet socket may miss packets");
        }
        Self { socket, has_missed: Cell::new(false) }
    }

    /// Whether packets came that it had no room for, as far as those that came later tell.
    pub fn has_missed(&self) -> bool {
        self.has_missed.get()
    }

    /// Shows the next packet; none if there is no more.
    pub fn next<T>(&self, see: impl FnOnce(&Packet<'_>) -> T) -> io::Result<Option<T>> {
        let mut buffer = [0; READ as usize];
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
            // An interface has gone down.
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

/// Asks for addresses by ARP or neighbor discovery at one Ethernet interface.
pub struct Asker {
    socket: Socket,
    mac: Mac,
}

impl Asker {
    /// # Errors
    /// `Unsupported` where the interface is no Ethernet.
    pub fn open(interface: &str) -> io::Result<Self> {
        let (socket, mac) = sender_at(interface)?;
        Ok(Self { socket, mac })
    }

    /// Hardware address under which it asks.
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends one question to one machine, or to all. Of its own address it is asked without a sender, so that
    /// no table changes by it (RFC 5227).
    pub fn ask(&self, to: Option<Mac>, sender: [u8; 4], target: [u8; 4]) -> io::Result<()> {
        let sender = if sender == target { [0; 4] } else { sender };
        self.socket.send(&arp(self.mac, to, sender.into(), target.into())).map(drop)
    }

    /// The same by neighbor discovery (RFC 4861, 4.3), whatever the kernel knows of the target.
    pub fn solicit(&self, to: Option<Mac>, sender: Ipv6Addr, target: Ipv6Addr) -> io::Result<()> {
        self.socket.send(&solicitation(self.mac, to, sender, target)).map(drop)
    }
}

/// For the kernel's packet filter: lets pass what leaves and what comes to this MAC, for a filter behind it.
fn to_mac(mac: Mac) -> [SockFilter; 7] {
    let [a, b, c, d, e, f] = *mac.as_bytes();
    [
        step(BPF_LD | BPF_B | BPF_ABS, KIND),
        when(PACKET_OUTGOING.into(), 5, 0),
        step(BPF_LD | BPF_W | BPF_ABS, FRAME),
        when(u32::from_be_bytes([a, b, c, d]), 0, 2),
        step(BPF_LD | BPF_H | BPF_ABS, FRAME + 4),
        when(u32::from_be_bytes([0, 0, e, f]), 1, 0),
        step(BPF_RET, 0),
    ]
}

/// For the kernel's packet filter: ARP, neighbor discovery, and small datagrams to the port that are no
/// fragments.
fn program(port: u16) -> [SockFilter; 23] {
    let when = |test: u32, value, then, otherwise| {
        SockFilter::new((BPF_JMP | test | BPF_K) as u16, then, otherwise, value)
    };
    let port = u32::from(port);
    [
        step(BPF_LD | BPF_W | BPF_ABS, PROTOCOL),
        when(BPF_JEQ, u32::from(silence::ARP), 19, 0),
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
        when(BPF_JEQ, silence::ADVERTISEMENT.into(), 5, 0),
        when(BPF_JEQ, silence::SOLICITATION.into(), 4, 5),
        step(BPF_LD | BPF_H | BPF_ABS, 42),
        when(BPF_JEQ, port, 0, 3),
        step(BPF_LD | BPF_W | BPF_LEN, 0),
        when(BPF_JGT, SMALL, 1, 0),
        step(BPF_RET, READ),
        step(BPF_RET, 0),
    ]
}
