//! Sees packets of a trial on the VXLAN device: before any rule has dropped them on their way in, and after
//! all rules have let them pass on their way out.

use std::io::{self, Read as _};

use nix::libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::dataplane::forwarding::MAGIC;

/// `ETH_P_ALL`, in network byte order.
const EVERYTHING: u16 = 3_u16.to_be();
/// `SKF_AD_OFF + SKF_AD_IFINDEX` of linux/filter.h
const INTERFACE: u32 = 0xffff_f000 + 8;
/// Where the payload of a UDP datagram begins, behind a header of either family without options.
const PAYLOAD4: usize = 28;
const PAYLOAD6: usize = 48;

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
        while capture.next()?.is_some() {}
        Ok(capture)
    }

    pub const fn socket(&self) -> &Socket {
        &self.0
    }

    /// The payload of the next packet of any trial; none if there is no more.
    pub fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 128];
        match self.0.read(&mut buffer) {
            Ok(length) => {
                let packet = &buffer[..length];
                let start = if packet.first().is_some_and(|byte| byte >> 4 == 4) {
                    PAYLOAD4
                } else {
                    PAYLOAD6
                };
                Ok(Some(packet.get(start..).unwrap_or_default().to_vec()))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// For the kernel's packet filter: packets of this interface with our payload.
fn program(interface: u32) -> [SockFilter; 8] {
    let step = |code, operand| SockFilter::new(code as u16, 0, 0, operand);
    let when = |value, then, otherwise| {
        SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, then, otherwise, value)
    };
    let word = |at: u32| step(BPF_LD | BPF_W | BPF_ABS, at);
    let magic = u32::from_be_bytes(MAGIC);
    [
        word(INTERFACE),
        when(interface, 0, 4),
        word(PAYLOAD4 as u32),
        when(magic, 3, 0),
        word(PAYLOAD6 as u32),
        when(magic, 1, 0),
        step(BPF_RET, 0),
        step(BPF_RET, u32::MAX),
    ]
}
