//! Sees packets of a trial on the device by which they come and leave: before any rule has dropped them on
//! their way in, and after all rules have let them pass on their way out. And sees them leave by any
//! interface inside tunnel packets.

use std::{io, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    libc::{
        BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_JA, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET,
        BPF_W,
    },
    sys::socket::{LinkAddr, recvfrom},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::dataplane::forwarding::{MAGIC, UNUSED};

/// `ETH_P_ALL`, in network byte order.
const EVERYTHING: u16 = 3_u16.to_be();
/// `SKF_AD_OFF + SKF_AD_IFINDEX` of linux/filter.h
const INTERFACE: u32 = 0xffff_f000 + 8;
/// `SKF_AD_OFF + SKF_AD_PKTTYPE` of linux/filter.h, and `PACKET_OUTGOING` of linux/if_packet.h
const KIND: u32 = 0xffff_f000 + 4;
const OUTGOING: u32 = 4;
const UDP: u32 = 17;
const TCP: u32 = 6;
/// More than any packet of a trial has, also inside a tunnel packet.
const LONGEST: usize = 192;

pub struct Capture(Socket);

impl Capture {
    /// On the interface with this index. Takes CAP_NET_RAW.
    pub fn open(interface: u32) -> io::Result<Self> {
        Self::with(&program(interface))
    }

    /// Of tunnel packets that leave by any interface, with datagrams or echoes of a trial inside.
    pub fn of_tunnels() -> io::Result<Self> {
        Self::with(&program_of_tunnels())
    }

    fn with(program: &[SockFilter]) -> io::Result<Self> {
        let protocol = Protocol::from(i32::from(EVERYTHING));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.attach_filter(program)?;
        socket.set_nonblocking(true)?;
        // What came before the filter is of no interest.
        let mut capture = Self(socket);
        while capture.next(&mut [0; LONGEST])?.is_some() {}
        Ok(capture)
    }

    pub const fn socket(&self) -> &Socket {
        &self.0
    }

    /// Gives each packet of any trial that has come since, with the index of the interface.
    pub fn take(&mut self, mut give: impl FnMut(&[u8], u32)) {
        let mut buffer = [0; LONGEST];
        while let Ok(Some((length, interface))) = self.next(&mut buffer) {
            give(&buffer[..length], interface);
        }
    }

    fn next(&mut self, buffer: &mut [u8; LONGEST]) -> io::Result<Option<(usize, u32)>> {
        match recvfrom::<LinkAddr>(self.0.as_raw_fd(), buffer) {
            Ok((length, from)) => {
                let interface = from.map_or(0, |from| from.ifindex());
                Ok(Some((length, u32::try_from(interface).unwrap_or(0))))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// For the kernel's packet filter: packets of this interface, without options in their IP header, that are
/// datagrams with our payload, or segments to our two ports.
fn program(interface: u32) -> [SockFilter; 22] {
    const NO: usize = 20;
    const YES: usize = 21;
    let magic = u32::from_be_bytes(MAGIC);
    [
        word(INTERFACE),
        when(1, interface, 2, NO),
        byte(0),
        and(0xf0),
        when(4, 0x40, 5, 12),
        // IPv4: protocol, payload of a datagram, destination port of a segment.
        byte(9),
        when(6, UDP, 7, 9),
        word(28),
        when(8, magic, YES, NO),
        when(9, TCP, 10, NO),
        half(22),
        step(BPF_JMP | BPF_JA, 18 - 11 - 1),
        // The same of IPv6.
        byte(6),
        when(13, UDP, 14, 16),
        word(48),
        when(15, magic, YES, NO),
        when(16, TCP, 17, NO),
        half(42),
        and(0xfffe),
        when(19, UNUSED.into(), YES, NO),
        step(BPF_RET, 0),
        step(BPF_RET, u32::MAX),
    ]
}

/// The same for tunnel packets that leave, by what a datagram or an echo inside carries. A packet that is
/// too short for a step does not pass.
fn program_of_tunnels() -> [SockFilter; 19] {
    const NO: usize = 17;
    const YES: usize = 18;
    /// Headers of UDP, VXLAN and Ethernet, and that of a datagram or an echo inside.
    const AROUND: u32 = 8 + 8 + 14 + 8;
    const IPV4: u32 = 20;
    const IPV6: u32 = 40;
    let magic = u32::from_be_bytes(MAGIC);
    [
        word(KIND),
        when(1, OUTGOING, 2, NO),
        byte(0),
        and(0xf0),
        when(4, 0x40, 5, 11),
        // Inside IPv4: IPv4, and IPv6.
        byte(9),
        when(6, UDP, 7, NO),
        word(IPV4 + AROUND + IPV4),
        when(8, magic, YES, 9),
        word(IPV4 + AROUND + IPV6),
        when(10, magic, YES, NO),
        // The same inside IPv6.
        byte(6),
        when(12, UDP, 13, NO),
        word(IPV6 + AROUND + IPV4),
        when(14, magic, YES, 15),
        word(IPV6 + AROUND + IPV6),
        when(16, magic, YES, NO),
        step(BPF_RET, 0),
        step(BPF_RET, u32::MAX),
    ]
}

fn step(code: u32, operand: u32) -> SockFilter {
    SockFilter::new(code as u16, 0, 0, operand)
}

fn word(offset: u32) -> SockFilter {
    step(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn half(offset: u32) -> SockFilter {
    step(BPF_LD | BPF_H | BPF_ABS, offset)
}

fn byte(offset: u32) -> SockFilter {
    step(BPF_LD | BPF_B | BPF_ABS, offset)
}

fn and(mask: u32) -> SockFilter {
    step(BPF_ALU | BPF_AND | BPF_K, mask)
}

/// Where a step leads to that stands at `here`: jumps are counted from the next one.
fn when(here: usize, value: u32, then: usize, otherwise: usize) -> SockFilter {
    let [then, otherwise] = [then, otherwise].map(|to| (to - here - 1) as u8);
    SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, then, otherwise, value)
}
