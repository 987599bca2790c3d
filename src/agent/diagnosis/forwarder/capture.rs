//! Captures packets of a trial on an interface: incoming ones before any rule has dropped them, and
//! outgoing ones after all rules have accepted them. Also captures tunnel packets with packets of a
//! trial on all interfaces.

use std::{io, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_JA, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W},
    sys::socket::{LinkAddr, recvfrom},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::{
    agent::diagnosis::packet_filter::{step, when},
    dataplane::forwarding::{IN_ANSWER, IN_DATAGRAM, IN_SEGMENT},
    frames::packet_error,
};

/// `ETH_P_ALL`, in network byte order.
const ETH_P_ALL: u16 = 3_u16.to_be();
/// `SKF_AD_OFF + SKF_AD_IFINDEX` of linux/filter.h.
const INTERFACE: u32 = 0xffff_f000 + 8;
/// `SKF_AD_OFF + SKF_AD_PKTTYPE` of linux/filter.h.
const PACKET_TYPE: u32 = 0xffff_f000 + 4;
/// `PACKET_OUTGOING` of `linux/if_packet.h`.
const OUTGOING: u32 = 4;
/// Length of the IPv4 header without options.
const IPV4: u32 = 20;
/// Length of the IPv6 header.
const IPV6: u32 = 40;
/// Offset of the protocol number in the IPv4 header.
const IPV4_PROTOCOL: u32 = 9;
/// Offset of the next header number in the IPv6 header.
const IPV6_PROTOCOL: u32 = 6;
/// Protocol number.
const UDP: u32 = 17;
/// Protocol number.
const TCP: u32 = 6;
/// Bytes read of a packet: more than any packet of a trial has, even inside a tunnel packet.
const MAX_READ: usize = 192;

/// A packet socket with a filter for packets of one trial.
pub struct Capture(Socket);

impl Capture {
    /// Captures packets with one of these numbers on the interface with this index. Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened.
    pub fn open(interface: u32, numbers: &[u32]) -> io::Result<Self> {
        Self::with(&program(interface, numbers))
    }

    /// Captures outgoing tunnel packets on all interfaces whose inner datagram or echo has one of these
    /// numbers.
    ///
    /// # Errors
    /// Fails if the socket cannot be opened.
    pub fn of_tunnels(numbers: &[u32]) -> io::Result<Self> {
        Self::with(&program_of_tunnels(numbers))
    }

    fn with(program: &[SockFilter]) -> io::Result<Self> {
        let protocol = Protocol::from(i32::from(ETH_P_ALL));
        let socket =
            Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)).map_err(packet_error)?;
        socket.attach_filter(program)?;
        socket.set_nonblocking(true)?;
        // Discards what arrived before the filter was attached.
        let mut capture = Self(socket);
        while capture.next(&mut [0; MAX_READ])?.is_some() {}
        Ok(capture)
    }

    /// Returns the socket, to poll it.
    pub const fn socket(&self) -> &Socket {
        &self.0
    }

    /// Passes each captured packet to `give`, with the index of the interface.
    pub fn take(&mut self, mut give: impl FnMut(&[u8], u32)) {
        let mut buffer = [0; MAX_READ];
        while let Ok(Some((length, interface))) = self.next(&mut buffer) {
            give(&buffer[..length], interface);
        }
    }

    fn next(&mut self, buffer: &mut [u8; MAX_READ]) -> io::Result<Option<(usize, u32)>> {
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

/// Returns a socket filter that accepts packets of this interface, without IP options, that are
/// datagrams or segments with one of these numbers, or answers to such a segment.
fn program(interface: u32, numbers: &[u32]) -> Vec<SockFilter> {
    let answers: Vec<u32> = numbers.iter().map(|number| number.wrapping_add(1)).collect();
    let of_family = |protocol, header| {
        let datagrams = [word(header + IN_DATAGRAM)].into_iter().chain(has_one_of(numbers));
        let datagrams: Vec<SockFilter> = datagrams.chain([refuse()]).collect();
        let mut steps = vec![byte(protocol), when(UDP, 0, 1), jump(1), jump(datagrams.len())];
        steps.extend(datagrams);
        steps.extend([when(TCP, 1, 0), refuse(), word(header + IN_SEGMENT)]);
        steps.extend(has_one_of(numbers));
        steps.push(word(header + IN_ANSWER));
        steps.extend(has_one_of(&answers));
        steps.push(refuse());
        steps
    };
    let mut program = vec![word(INTERFACE), when(interface, 1, 0), refuse(), byte(0), and(0xf0)];
    let ipv4 = of_family(IPV4_PROTOCOL, IPV4);
    program.extend([when(0x40, 1, 0), jump(ipv4.len())]);
    program.extend(ipv4);
    program.extend(of_family(IPV6_PROTOCOL, IPV6));
    program
}

/// Returns the same filter for outgoing tunnel packets, by the number in the inner datagram or echo. A
/// packet that is too short for a load instruction is rejected.
fn program_of_tunnels(numbers: &[u32]) -> Vec<SockFilter> {
    /// Length of the UDP, VXLAN and Ethernet headers.
    const AROUND: u32 = 8 + 8 + 14;
    let mut program = vec![word(PACKET_TYPE), when(OUTGOING, 1, 0), refuse(), byte(0), and(0xf0)];
    let of_family = |protocol, header| {
        let mut steps = vec![byte(protocol), when(UDP, 1, 0), refuse()];
        for inner in [IPV4, IPV6] {
            steps.push(word(header + AROUND + inner + IN_DATAGRAM));
            steps.extend(has_one_of(numbers));
        }
        steps.push(refuse());
        steps
    };
    let ipv4 = of_family(IPV4_PROTOCOL, IPV4);
    program.push(when(0x40, 1, 0));
    program.push(jump(ipv4.len()));
    program.extend(ipv4);
    program.extend(of_family(IPV6_PROTOCOL, IPV6));
    program
}

/// Accepts the packet if the loaded word is one of these numbers; otherwise continues with the next
/// instruction.
fn has_one_of(numbers: &[u32]) -> Vec<SockFilter> {
    numbers.iter().flat_map(|number| [when(*number, 0, 1), step(BPF_RET, u32::MAX)]).collect()
}

fn refuse() -> SockFilter {
    step(BPF_RET, 0)
}

fn word(offset: u32) -> SockFilter {
    step(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn byte(offset: u32) -> SockFilter {
    step(BPF_LD | BPF_B | BPF_ABS, offset)
}

fn and(mask: u32) -> SockFilter {
    step(BPF_ALU | BPF_AND | BPF_K, mask)
}

/// Jumps over this many instructions.
fn jump(over: usize) -> SockFilter {
    step(BPF_JMP | BPF_JA, over as u32)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use socket2::SockRef;

    use super::*;

    const NUMBERS: [u32; 3] = [0x0102_0304, 0x8506_0708, 0x090a_0b0c];

    fn passes(program: &[SockFilter], packet: &[u8]) -> bool {
        let (to, from) = UnixDatagram::pair().expect("sockets");
        from.set_nonblocking(true).expect("a socket");
        SockRef::from(&from).attach_filter(program).expect("a filter");
        to.send(packet).is_ok() && from.recv(&mut [0; MAX_READ]).is_ok()
    }

    /// Returns a packet with headers of this family and protocol, followed by a number.
    fn packet(version: u8, protocol: u32, number: u32) -> Vec<u8> {
        let (header, at) = if version == 4 { (IPV4, IPV4_PROTOCOL) } else { (IPV6, IPV6_PROTOCOL) };
        let before = if protocol == TCP { IN_SEGMENT } else { IN_DATAGRAM };
        let mut packet = vec![0; (header + before) as usize];
        (packet[0], packet[at as usize]) = (version << 4, protocol as u8);
        [packet, number.to_be_bytes().to_vec()].concat()
    }

    #[test]
    fn filter_rejects_packets_without_trial_number() {
        // A packet sent to this socket has no interface, so the test of the interface is cut off.
        let filter = &program(7, &NUMBERS)[3..];
        for (version, protocol) in [(4, UDP), (4, TCP), (6, UDP), (6, TCP)] {
            for number in NUMBERS {
                let named = format!("{version} {protocol} {number:#x}");
                assert!(passes(filter, &packet(version, protocol, number)), "{named}");
                assert!(!passes(filter, &packet(version, protocol, number + 1)), "{named}");
                assert!(!passes(filter, &packet(version, 1, number)), "{named}");
                let answer = packet(version, protocol, 0);
                let number = if protocol == TCP { number + 1 } else { number };
                let answer = [answer, number.to_be_bytes().to_vec()].concat();
                assert_eq!(passes(filter, &answer), protocol == TCP, "{named}");
            }
        }
    }

    #[test]
    fn filter_rejects_tunnel_packets_without_trial_number() {
        // A packet sent to this socket is never outgoing, so the test of the direction is cut off.
        let filter = &program_of_tunnels(&NUMBERS)[3..];
        for (outer, inner) in [(4, 4), (4, 6), (6, 4), (6, 6)] {
            let tunnel = |number| {
                let mut tunnel = packet(outer, UDP, 0);
                tunnel.truncate(if outer == 4 { 20 } else { 40 });
                tunnel.extend([0; 8 + 8 + 14]);
                tunnel.extend(packet(inner, UDP, number));
                // Padding for the load instructions, as in a packet of a trial.
                tunnel.extend([0; 64]);
                tunnel
            };
            for number in NUMBERS {
                assert!(passes(filter, &tunnel(number)), "{outer} {inner} {number:#x}");
                assert!(!passes(filter, &tunnel(number + 1)), "{outer} {inner} {number:#x}");
            }
        }
    }
}
