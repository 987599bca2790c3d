//! Sees packets of a trial on the device by which they come and leave: before any rule has dropped them on
//! their way in, and after all rules have let them pass on their way out.

use std::io::{self, Read as _};

use nix::libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_JA, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET,
    BPF_W,
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::dataplane::forwarding::{MAGIC, UNUSED};

/// `ETH_P_ALL`, in network byte order.
const EVERYTHING: u16 = 3_u16.to_be();
/// `SKF_AD_OFF + SKF_AD_IFINDEX` of linux/filter.h
const INTERFACE: u32 = 0xffff_f000 + 8;
/// More than any packet of a trial has.
const LONGEST: usize = 128;

pub struct Capture(Socket);

impl Capture {
    /// On the interface with this index. Takes CAP_NET_RAW.
    pub fn open(interface: u32) -> io::Result<Self> {
        let protocol = Protocol::from(i32::from(EVERYTHING));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.attach_filter(&program(interface))?;
        socket.set_nonblocking(true)?;
        // What came before the filter is of no interest.
        let mut capture = Self(socket);
        while capture.next(&mut [0; LONGEST])?.is_some() {}
        Ok(capture)
    }

    pub const fn socket(&self) -> &Socket {
        &self.0
    }

    /// Gives each packet of any trial that has come since.
    pub fn take(&mut self, mut give: impl FnMut(&[u8])) {
        let mut buffer = [0; LONGEST];
        while let Ok(Some(length)) = self.next(&mut buffer) {
            give(&buffer[..length]);
        }
    }

    fn next(&mut self, buffer: &mut [u8; LONGEST]) -> io::Result<Option<usize>> {
        match self.0.read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// For the kernel's packet filter: packets of this interface, without options in their IP header, that are
/// datagrams with our payload, or segments to our two ports.
fn program(interface: u32) -> [SockFilter; 22] {
    const UDP: u32 = 17;
    const TCP: u32 = 6;
    const NO: usize = 20;
    const YES: usize = 21;
    let step = |code, operand| SockFilter::new(code as u16, 0, 0, operand);
    let word = |offset| step(BPF_LD | BPF_W | BPF_ABS, offset);
    let half = |offset| step(BPF_LD | BPF_H | BPF_ABS, offset);
    let byte = |offset| step(BPF_LD | BPF_B | BPF_ABS, offset);
    let and = |mask| step(BPF_ALU | BPF_AND | BPF_K, mask);
    // Jumps are counted from the next step.
    let when = |here: usize, value, then: usize, otherwise: usize| {
        let [then, otherwise] = [then, otherwise].map(|to| (to - here - 1) as u8);
        SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, then, otherwise, value)
    };
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
