//! Sees packets of tunnels, and ARP, at all interfaces: as they come in before anything drops them, and as
//! they go out after everything has let them pass.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    libc::{
        BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JGT, BPF_JMP, BPF_JSET, BPF_K, BPF_LD,
        BPF_LDX, BPF_LEN, BPF_MSH, BPF_RET, BPF_W,
    },
    sys::socket::{LinkAddr, bind, recvfrom},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::{
    dataplane::silence::{self, Packet},
    model::Mac,
};

/// `ETH_P_ALL`
const EVERYTHING: u16 = 3;
/// `SKF_AD_OFF + SKF_AD_PROTOCOL` of linux/filter.h
const PROTOCOL: u32 = 0xffff_f000;
/// Bytes of a packet that are read: all headers up to the frame inside a tunnel packet.
const READ: u32 = 128;
/// Larger packets carry data of pods. Of those there may be very many, and small ones tell the same.
const SMALL: u32 = 300;
/// `ARPHRD_ETHER`
const ETHERNET: u16 = 1;

/// A socket that sees such packets.
pub struct Tap(Socket);

impl Tap {
    /// Tunnel packets are those to this UDP port. Takes CAP_NET_RAW.
    pub fn open(port: u16) -> io::Result<Self> {
        let socket = packet_socket(Type::DGRAM, EVERYTHING)?;
        socket.attach_filter(&program(port))?;
        let tap = Self(socket);
        // What came before the filter is of no interest.
        while tap.next(|_| ())?.is_some() {}
        Ok(tap)
    }

    /// Sees ARP alone, and nothing of this host's own.
    pub fn of_arp() -> io::Result<Self> {
        packet_socket(Type::DGRAM, silence::ARP).map(Self)
    }

    /// Shows the next packet; none if there is no more.
    pub fn next<T>(&self, see: impl FnOnce(&Packet<'_>) -> T) -> io::Result<Option<T>> {
        let mut buffer = [0; READ as usize];
        let (length, from) = match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
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
        self.0.as_fd()
    }
}

/// Asks for addresses by ARP at one Ethernet interface.
pub struct Asker {
    socket: Socket,
    mac: Mac,
}

impl Asker {
    /// # Errors
    /// `Unsupported` where the interface is no Ethernet.
    pub fn open(interface: &str) -> io::Result<Self> {
        let of_link = getifaddrs()?.filter(|address| address.interface_name == interface);
        let address = of_link
            .filter_map(|address| address.address?.as_link_addr().copied())
            .find(|address| address.hatype() == ETHERNET)
            .ok_or(io::ErrorKind::Unsupported)?;
        let mac = Mac::from_bytes(address.addr().ok_or(io::ErrorKind::Unsupported)?);
        let socket = packet_socket(Type::RAW, silence::ARP)?;
        bind(socket.as_raw_fd(), &address)?;
        Ok(Self { socket, mac })
    }

    /// Sends one question. Of its own address it is asked without a sender, so that no table changes by it
    /// (RFC 5227).
    pub fn ask(&self, sender: [u8; 4], target: [u8; 4]) -> io::Result<()> {
        let sender = if sender == target { [0; 4] } else { sender };
        let mut frame = vec![0xff; 6];
        frame.extend(self.mac.as_bytes());
        frame.extend(silence::ARP.to_be_bytes());
        frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(self.mac.as_bytes());
        frame.extend(sender);
        frame.extend([0; 6]);
        frame.extend(target);
        self.socket.send(&frame).map(drop)
    }
}

fn packet_socket(kind: Type, protocol: u16) -> io::Result<Socket> {
    let protocol = Protocol::from(i32::from(protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// For the kernel's packet filter: ARP, advertisements of neighbors, and small datagrams to the port that are
/// no fragments.
fn program(port: u16) -> [SockFilter; 22] {
    let step = |code: u32, operand| SockFilter::new(code as u16, 0, 0, operand);
    let when = |test: u32, value, then, otherwise| {
        SockFilter::new((BPF_JMP | test | BPF_K) as u16, then, otherwise, value)
    };
    let port = u32::from(port);
    [
        step(BPF_LD | BPF_W | BPF_ABS, PROTOCOL),
        when(BPF_JEQ, u32::from(silence::ARP), 18, 0),
        when(BPF_JEQ, 0x86dd, 8, 0),
        when(BPF_JEQ, 0x0800, 0, 17),
        step(BPF_LD | BPF_B | BPF_ABS, 9),
        when(BPF_JEQ, 17, 0, 15),
        step(BPF_LD | BPF_H | BPF_ABS, 6),
        when(BPF_JSET, 0x1fff, 13, 0),
        step(BPF_LDX | BPF_B | BPF_MSH, 0),
        step(BPF_LD | BPF_H | BPF_IND, 2),
        when(BPF_JEQ, port, 7, 10),
        step(BPF_LD | BPF_B | BPF_ABS, 6),
        when(BPF_JEQ, 17, 3, 0),
        when(BPF_JEQ, 58, 0, 7),
        step(BPF_LD | BPF_B | BPF_ABS, 40),
        when(BPF_JEQ, silence::ADVERTISEMENT.into(), 4, 5),
        step(BPF_LD | BPF_H | BPF_ABS, 42),
        when(BPF_JEQ, port, 0, 3),
        step(BPF_LD | BPF_W | BPF_LEN, 0),
        when(BPF_JGT, SMALL, 1, 0),
        step(BPF_RET, READ),
        step(BPF_RET, 0),
    ]
}
