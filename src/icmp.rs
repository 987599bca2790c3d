//! ICMP (RFC 792, RFC 4443): questions that every kernel answers, whatever runs on it.
//!
//! Echoes, and what a kernel says about a datagram that no process waits for.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
        setsockopt,
        sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo},
    },
};
use quinn_udp::{UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};

use crate::{checksum::checksum, datagram, dataplane::paths::FLOWS, netlink::attributes::address};

/// Payload of an ordinary request.
pub const SMALL: usize = 56;
/// Enough of a packet to parse it.
const PARSED: usize = 128;
/// `IPPROTO_UDP`
const UDP: u8 = 17;
/// Enough for what the kernel says about where a packet came in.
const CONTROL: usize = 128;

/// Of which IP an echo is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Inet,
    Inet6,
}

/// By what answers are recognised as ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Of echo requests.
    pub identifier: u16,
    /// UDP ports from which datagrams are sent.
    pub ports: [u16; FLOWS],
}

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpEvent {
    pub from: IpAddr,
    /// Index of the interface by which it came.
    pub interface: u32,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Somebody else's request.
    Request,
    /// The answer to our request with this number.
    Answer(u16),
    /// Our datagram with this number has arrived whole, and an agent has answered it.
    Arrival(u16),
    /// The same, and the kernel has refused it: no process waits for it there.
    Refusal(u16),
}

/// Makes a socket send packets whole, as large as the interface takes them, whatever MTU a route has or a
/// router has told: such a packet is to find out whether that is still so (ip(7), `IP_PMTUDISC_PROBE`).
///
/// # Errors
/// What the kernel says to the socket options.
pub fn never_fragment(socket: &impl AsFd) -> io::Result<()> {
    // What QUIC's sockets need, too, and where the options are set without unsafe code of our own.
    UdpSocketState::new(UdpSockRef::from(socket)).map(drop)
}

impl Family {
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Inet,
            IpAddr::V6(_) => Self::Inet6,
        }
    }

    /// A raw socket of the present network namespace; takes CAP_NET_RAW. It sees everything that comes to
    /// this host, requests too, which the kernel answers.
    pub fn open(self) -> io::Result<Socket> {
        match self {
            Self::Inet => {
                let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                setsockopt(&socket, Ipv4PacketInfo, &true)?;
                never_fragment(&socket)?;
                Ok(socket)
            }
            Self::Inet6 => {
                let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
                setsockopt(&socket, Ipv6RecvPacketInfo, &true)?;
                never_fragment(&socket)?;
                Ok(socket)
            }
        }
    }

    /// Lets the kernel pass on only what concerns whoever asks, with or without requests of others, so that
    /// nobody else's pings wake it.
    pub fn filter(self, socket: &impl AsFd, asker: Asker, requests: bool) -> io::Result<()> {
        SockRef::from(socket).attach_filter(&self.program(asker, requests))
    }

    /// For the kernel's packet filter (`linux/filter.h`): X is where the ICMP header begins, behind that of
    /// IPv4, which raw sockets get too.
    fn program(self, asker: Asker, requests: bool) -> [SockFilter; 9] {
        use nix::libc::{
            BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JEQ, BPF_JMP, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
        };
        const HEADER_LENGTH: u32 = BPF_LDX | BPF_B | BPF_MSH;
        const X: u32 = BPF_LDX | BPF_IMM;
        const BYTE: u32 = BPF_LD | BPF_B | BPF_IND;
        const HALF: u32 = BPF_LD | BPF_H | BPF_IND;
        let step = |code, operand| SockFilter::new(code as u16, 0, 0, operand);
        let when = |value, then, otherwise| {
            SockFilter::new((BPF_JMP | BPF_JEQ) as u16, then, otherwise, value)
        };
        let (request, reply) = self.types();
        [
            match self {
                Self::Inet => step(HEADER_LENGTH, 0),
                Self::Inet6 => step(X, 0),
            },
            step(BYTE, 0),
            when(reply.into(), 2, 0),
            when(self.unreachable().into(), 3, 0),
            when(request.into(), if requests { 2 } else { 3 }, 3),
            step(HALF, 4),
            when(asker.identifier.into(), 0, 1),
            step(BPF_RET, u32::MAX),
            step(BPF_RET, 0),
        ]
    }

    /// Takes the next packet from a socket; none, if it does not concern whoever asks.
    pub fn receive(self, socket: &impl AsRawFd, asker: Asker) -> io::Result<Option<IcmpEvent>> {
        let mut buffer = [0; PARSED];
        let taken = take(socket, &mut buffer)?;
        Ok(taken.and_then(|(from, interface, packet)| self.parse(asker, from, interface, packet)))
    }

    /// Headers of IP and ICMP: what a packet is larger than its payload.
    pub const fn headers(self) -> u32 {
        match self {
            Self::Inet => 28,
            Self::Inet6 => 48,
        }
    }

    /// A request with `payload` zero bytes; the kernel puts the IP header before it, and with IPv6 the
    /// checksum into it.
    pub fn request(self, identifier: u16, sequence: u16, payload: usize) -> Vec<u8> {
        self.request_with(identifier, sequence, &vec![0; payload])
    }

    /// The same with another payload.
    pub fn request_with(self, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = [&[0; 8], payload].concat();
        (packet[0], _) = self.types();
        packet[4..6].copy_from_slice(&identifier.to_be_bytes());
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        if self == Self::Inet {
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    }

    /// Reads a packet as a raw socket gives it, with IPv4 after its header; none, if it does not
    /// concern whoever asks.
    fn parse(self, asker: Asker, from: IpAddr, interface: u32, packet: &[u8]) -> Option<IcmpEvent> {
        let header = match self {
            Self::Inet => usize::from(packet.first()? & 0x0f) * 4,
            Self::Inet6 => 0,
        };
        let icmp = packet.get(header..)?;
        let number = u16::from_be_bytes(icmp.get(6..8)?.try_into().ok()?);
        let (request, reply) = self.types();
        let what = match *icmp.first()? {
            kind if kind == reply => {
                let ours = *icmp.get(4..6)? == asker.identifier.to_be_bytes();
                ours.then_some(What::Answer(number))?
            }
            kind if kind == request => What::Request,
            kind if kind == self.unreachable() => {
                let number = self.refused(icmp.get(8..)?, from, asker)?;
                What::Refusal(number)
            }
            _ => return None,
        };
        Some(IcmpEvent { from, interface, what })
    }

    /// The number of the datagram of ours that is quoted after an ICMP header, if it was sent to `to`.
    fn refused(self, quoted: &[u8], to: IpAddr, asker: Asker) -> Option<u16> {
        let (protocol, destination, length) = match self {
            Self::Inet => (9, 16..20, usize::from(quoted.first()? & 0x0f) * 4),
            Self::Inet6 => (6, 24..40, 40),
        };
        let sent_there = address(quoted.get(destination)?) == Some(to);
        let port = u16::from_be_bytes(*quoted.get(length..)?.first_chunk()?);
        let number = datagram::number_of(asker.identifier, quoted.get(length + 8..)?)?;
        let is_ours = sent_there && *quoted.get(protocol)? == UDP && asker.ports.contains(&port);
        is_ours.then_some(number)
    }

    /// The type of "destination unreachable".
    const fn unreachable(self) -> u8 {
        match self {
            Self::Inet => 3,
            Self::Inet6 => 1,
        }
    }

    /// The types of request and reply.
    const fn types(self) -> (u8, u8) {
        match self {
            Self::Inet => (8, 0),
            Self::Inet6 => (128, 129),
        }
    }
}

/// Sends a packet from this address of the host, whatever the route to its destination says.
///
/// # Errors
/// What the kernel says, `WouldBlock` among it.
pub fn send_from(
    socket: &impl AsRawFd,
    packet: &[u8],
    to: SocketAddr,
    from: IpAddr,
) -> io::Result<usize> {
    let (info4, info6);
    let control = match from {
        IpAddr::V4(from) => {
            let local = in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
            let any = in_addr { s_addr: 0 };
            info4 = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: local, ipi_addr: any };
            ControlMessage::Ipv4PacketInfo(&info4)
        }
        IpAddr::V6(from) => {
            let local = in6_addr { s6_addr: from.octets() };
            info6 = in6_pktinfo { ipi6_addr: local, ipi6_ifindex: 0 };
            ControlMessage::Ipv6PacketInfo(&info6)
        }
    };
    let (parts, to) = ([IoSlice::new(packet)], SockaddrStorage::from(to));
    let sent = sendmsg(socket.as_raw_fd(), &parts, &[control], MsgFlags::MSG_DONTWAIT, Some(&to));
    sent.map_err(io::Error::from)
}

/// Takes the next packet from a socket that says where it came in: the sender, the index of that interface,
/// and as much of the packet as there is room for.
pub fn take<'a>(
    socket: &impl AsRawFd,
    buffer: &'a mut [u8],
) -> io::Result<Option<(IpAddr, u32, &'a [u8])>> {
    let mut control = vec![0; CONTROL];
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let from = message.address.as_ref().and_then(|address| {
        let ipv4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        ipv4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    let mut interface = 0;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                interface = info.ipi_ifindex.cast_unsigned();
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => interface = info.ipi6_ifindex,
            _ => {}
        }
    }
    let length = message.bytes;
    Ok(from.map(|from| (from, interface, buffer.get(..length).unwrap_or_default())))
}

/// A reply and an error that quotes a datagram of ours, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let ip = [&[0x45][..], &[0; 15], &[192, 0, 2, 1]].concat();
    let reply = [&ip[..], &[0, 0, 0, 0, 0, 7, 0, 9]].concat();
    let mut quoted = ip.clone();
    quoted[9] = UDP;
    let datagram = [0, 1, 0, 2, 0, 32, 0, 0];
    let question = datagram::question(7, 9, 64);
    let error = [&ip[..], &[3, 3, 0, 0, 0, 0, 0, 0], &quoted, &datagram, &question].concat();
    vec![reply, error, [&[129, 0, 0, 0, 0, 7, 0, 9][..], &[0; 8]].concat()]
}

/// Reads a packet of either family, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(packet: &[u8]) -> bool {
    let asker = Asker { identifier: 7, ports: [1; FLOWS] };
    let from = [192, 0, 2, 1].into();
    let read = |family: Family| family.parse(asker, from, 1, packet);
    read(Family::Inet).or_else(|| read(Family::Inet6)).is_some()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn the_checksum_of_a_packet_with_its_checksum_is_zero() {
        assert_eq!(checksum(&Family::Inet.request(7, 9, 5)), 0);
    }

    #[test]
    fn only_whole_echoes_of_ours_are_answers() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        for (family, header, reply) in
            [(Family::Inet, &ip_header[..], 0), (Family::Inet6, &[][..], 129)]
        {
            let from = IpAddr::from([10, 42, 7, 0]);
            let mut packet = header.to_vec();
            packet.extend(family.request(7, 9, 4));
            let parse = |identifier, packet: &[u8]| {
                family
                    .parse(Asker { identifier, ports: [1; FLOWS] }, from, 3, packet)
                    .map(|heard| heard.what)
            };
            assert_eq!(parse(7, &packet), Some(What::Request));
            packet[header.len()] = reply;
            assert_eq!(parse(7, &packet), Some(What::Answer(9)));
            assert_eq!(parse(8, &packet), None, "of somebody else");
            (0..header.len() + 8).for_each(|len| assert_eq!(parse(7, &packet[..len]), None));
        }
    }

    /// The kernel filters what comes to a socket of any kind.
    #[test]
    fn the_kernel_passes_on_what_concerns_us_and_requests_only_when_asked_to() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        for (family, header) in [(Family::Inet, &ip_header[..]), (Family::Inet6, &[][..])] {
            let passes = |requests, kind, identifier: u16| {
                let (to, from) = UnixDatagram::pair().expect("sockets");
                from.set_nonblocking(true).expect("a socket");
                family
                    .filter(&from, Asker { identifier: 7, ports: [1; FLOWS] }, requests)
                    .expect("a filter");
                let mut packet = [header, &family.request(identifier, 9, 4)].concat();
                packet[header.len()] = kind;
                to.send(&packet).is_ok() && from.recv(&mut [0; 64]).is_ok()
            };
            let (request, reply) = family.types();
            for (kind, identifier, quiet, curious) in [
                (reply, 7, true, true),
                (reply, 8, false, false),
                (request, 8, false, true),
                (family.unreachable(), 0, true, true),
                (5, 7, false, false),
            ] {
                assert_eq!(passes(false, kind, identifier), quiet, "{family:?} {kind}");
                assert_eq!(passes(true, kind, identifier), curious, "{family:?} {kind}");
            }
        }
    }

    #[test]
    fn only_what_is_said_of_our_datagram_by_whom_it_was_sent_to_is_a_refusal() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        let mut quoted =
            [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 42, 9, 0, 10, 42, 7, 0].to_vec();
        quoted.extend([0x12, 0x34, 0x82, 0x9a, 0, 8, 0, 0]);
        quoted.extend(&datagram::question(7, 9, datagram::SIZE)[..10]);
        let packet = [&ip_header[..], &[3, 3, 0, 0, 0, 0, 0, 0], &quoted].concat();
        let parse = |port, from: [u8; 4], packet: &[u8]| {
            let asker = Asker { identifier: 7, ports: [port; FLOWS] };
            Family::Inet.parse(asker, from.into(), 3, packet).map(|heard| heard.what)
        };
        let peer = [10, 42, 7, 0];
        assert_eq!(parse(0x1234, peer, &packet), Some(What::Refusal(9)));
        assert_eq!(parse(0x1235, peer, &packet), None, "of somebody else");
        assert_eq!(parse(0x1234, [10, 42, 7, 1], &packet), None, "from somewhere on the way");
        (0..packet.len()).for_each(|len| assert_eq!(parse(0x1234, peer, &packet[..len]), None));
        let from: IpAddr = "fd42:0:0:7::".parse().expect("an address");
        let mut quoted = [0; 48];
        (quoted[6], quoted[40], quoted[41]) = (17, 0x12, 0x34);
        quoted[24..40].copy_from_slice(&crate::netlink::attributes::octets(from));
        let question = &datagram::question(7, 9, datagram::SIZE)[..10];
        let packet = [&[1, 4, 0, 0, 0, 0, 0, 0], &quoted[..], question].concat();
        let heard =
            Family::Inet6.parse(Asker { identifier: 7, ports: [0x1234; FLOWS] }, from, 3, &packet);
        assert_eq!(heard.map(|heard| heard.what), Some(What::Refusal(9)));
    }
}
