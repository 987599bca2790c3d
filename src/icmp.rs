//! ICMP (RFC 792, RFC 4443): echoes, which every kernel answers, and errors about datagrams to a closed port.

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

use crate::{
    checksum::checksum, dataplane::paths::FLOWS, netlink::attributes::address, probe_packet,
};

/// Payload of an ordinary echo request, in bytes.
pub const SMALL: usize = 56;
/// Bytes of a received packet that are read: enough for all headers.
const PARSED: usize = 128;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;
/// Size of the buffer for control messages about the receiving interface, in bytes.
const CONTROL: usize = 128;

/// The version of IP that an echo uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Inet,
    /// IPv6.
    Inet6,
}

/// What identifies the answers to one prober's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeIdentity {
    /// Identifier of its echo requests and datagrams.
    pub identifier: u16,
    /// UDP source ports of its datagrams.
    pub ports: [u16; FLOWS],
}

/// A received packet that concerns a prober.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcmpEvent {
    /// The sender.
    pub from: IpAddr,
    /// Index of the interface that received it.
    pub interface: u32,
    /// Its meaning.
    pub kind: IcmpKind,
}

/// The meaning of a received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpKind {
    /// An echo request of another prober.
    Request,
    /// The reply to this prober's echo request with this sequence number.
    Answer(u16),
    /// An agent's answer to this prober's datagram with this number.
    Arrival(u16),
    /// A "port unreachable" error about this prober's datagram with this number: it arrived, and no agent
    /// runs.
    Refusal(u16),
}

/// Makes a socket send packets unfragmented, up to the MTU of the interface, regardless of route and path
/// MTUs (`IP_PMTUDISC_PROBE`, ip(7)). Such packets test whether these MTUs are still right.
///
/// # Errors
/// If the kernel refuses a socket option.
pub fn disable_fragmentation(socket: &impl AsFd) -> io::Result<()> {
    // quinn-udp sets these options for QUIC's sockets. Using it avoids unsafe code in this crate.
    UdpSocketState::new(UdpSockRef::from(socket)).map(drop)
}

impl Family {
    /// Returns the family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Inet,
            IpAddr::V6(_) => Self::Inet6,
        }
    }

    /// Opens a raw ICMP socket in the present network namespace. Requires `CAP_NET_RAW`. The socket receives
    /// all ICMP packets to this host, including requests that the kernel answers.
    ///
    /// # Errors
    /// If the kernel refuses the socket or an option.
    pub fn open(self) -> io::Result<Socket> {
        match self {
            Self::Inet => {
                let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                setsockopt(&socket, Ipv4PacketInfo, &true)?;
                disable_fragmentation(&socket)?;
                Ok(socket)
            }
            Self::Inet6 => {
                let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
                setsockopt(&socket, Ipv6RecvPacketInfo, &true)?;
                disable_fragmentation(&socket)?;
                Ok(socket)
            }
        }
    }

    /// Attaches a filter to the socket, which then receives only packets that may concern `identity`, and
    /// echo requests if `requests` is true. The pings of other programs no longer wake the process.
    ///
    /// # Errors
    /// If the kernel refuses the filter.
    pub fn filter(
        self,
        socket: &impl AsFd,
        identity: ProbeIdentity,
        requests: bool,
    ) -> io::Result<()> {
        SockRef::from(socket).attach_filter(&self.program(identity, requests))
    }

    /// Returns the program for the kernel's packet filter (`linux/filter.h`). Register X holds the offset of
    /// the ICMP header: raw IPv4 sockets also receive the IP header.
    fn program(self, identity: ProbeIdentity, requests: bool) -> [SockFilter; 9] {
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
            when(identity.identifier.into(), 0, 1),
            step(BPF_RET, u32::MAX),
            step(BPF_RET, 0),
        ]
    }

    /// Receives the next packet. `None` if it does not concern `identity`.
    ///
    /// # Errors
    /// If the kernel reports an error; `WouldBlock` if no packet is queued.
    pub fn receive(
        self,
        socket: &impl AsRawFd,
        identity: ProbeIdentity,
    ) -> io::Result<Option<IcmpEvent>> {
        let mut buffer = [0; PARSED];
        let received = receive_packet(socket, &mut buffer)?;
        Ok(received
            .and_then(|(from, interface, packet)| self.parse(identity, from, interface, packet)))
    }

    /// Returns the length of the IP and ICMP headers, in bytes.
    pub const fn headers(self) -> u32 {
        match self {
            Self::Inet => 28,
            Self::Inet6 => 48,
        }
    }

    /// Builds an echo request with `payload` zero bytes. The kernel adds the IP header and, for IPv6, the
    /// checksum.
    pub fn request(self, identifier: u16, sequence: u16, payload: usize) -> Vec<u8> {
        self.request_with(identifier, sequence, &vec![0; payload])
    }

    /// Builds an echo request with this payload.
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

    /// Parses a packet from a raw socket, which for IPv4 begins with the IP header. `None` if it does not
    /// concern `identity`.
    fn parse(
        self,
        identity: ProbeIdentity,
        from: IpAddr,
        interface: u32,
        packet: &[u8],
    ) -> Option<IcmpEvent> {
        let header = match self {
            Self::Inet => usize::from(packet.first()? & 0x0f) * 4,
            Self::Inet6 => 0,
        };
        let icmp = packet.get(header..)?;
        let number = u16::from_be_bytes(icmp.get(6..8)?.try_into().ok()?);
        let (request, reply) = self.types();
        let kind = match *icmp.first()? {
            kind if kind == reply => {
                let is_own = *icmp.get(4..6)? == identity.identifier.to_be_bytes();
                is_own.then_some(IcmpKind::Answer(number))?
            }
            kind if kind == request => IcmpKind::Request,
            kind if kind == self.unreachable() => {
                let number = self.refused(icmp.get(8..)?, from, identity)?;
                IcmpKind::Refusal(number)
            }
            _ => return None,
        };
        Some(IcmpEvent { from, interface, kind })
    }

    /// Returns the number of this prober's datagram that an ICMP error quotes. `None` if the datagram is
    /// another prober's or was not sent to `to`.
    fn refused(self, quoted: &[u8], to: IpAddr, identity: ProbeIdentity) -> Option<u16> {
        let (protocol, destination, length) = match self {
            Self::Inet => (9, 16..20, usize::from(quoted.first()? & 0x0f) * 4),
            Self::Inet6 => (6, 24..40, 40),
        };
        let matches_sender = address(quoted.get(destination)?) == Some(to);
        let port = u16::from_be_bytes(*quoted.get(length..)?.first_chunk()?);
        let number = probe_packet::probe_number(identity.identifier, quoted.get(length + 8..)?)?;
        let is_own =
            matches_sender && *quoted.get(protocol)? == UDP && identity.ports.contains(&port);
        is_own.then_some(number)
    }

    /// Returns the type of "destination unreachable".
    const fn unreachable(self) -> u8 {
        match self {
            Self::Inet => 3,
            Self::Inet6 => 1,
        }
    }

    /// Returns the types of echo request and echo reply.
    const fn types(self) -> (u8, u8) {
        match self {
            Self::Inet => (8, 0),
            Self::Inet6 => (128, 129),
        }
    }
}

/// Sends a packet from an address of this host, regardless of the source address of the route.
///
/// # Errors
/// If the kernel refuses the packet; `WouldBlock` if the socket's buffer is full.
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

/// Receives the next packet from a socket with packet information. Returns the sender, the index of the
/// receiving interface, and the part of the packet that fits `buffer`.
///
/// # Errors
/// If the kernel reports an error; `WouldBlock` if no packet is queued.
pub fn receive_packet<'a>(
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

/// Returns two replies and an error that quotes an own datagram, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let ip = [&[0x45][..], &[0; 15], &[192, 0, 2, 1]].concat();
    let reply = [&ip[..], &[0, 0, 0, 0, 0, 7, 0, 9]].concat();
    let mut quoted = ip.clone();
    quoted[9] = UDP;
    let datagram = [0, 1, 0, 2, 0, 32, 0, 0];
    let probe = probe_packet::probe_packet(7, 9, 64);
    let error = [&ip[..], &[3, 3, 0, 0, 0, 0, 0, 0], &quoted, &datagram, &probe].concat();
    vec![reply, error, [&[129, 0, 0, 0, 0, 7, 0, 9][..], &[0; 8]].concat()]
}

/// Parses a packet as either family, for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(packet: &[u8]) -> bool {
    let identity = ProbeIdentity { identifier: 7, ports: [1; FLOWS] };
    let from = [192, 0, 2, 1].into();
    let read = |family: Family| family.parse(identity, from, 1, packet);
    read(Family::Inet).or_else(|| read(Family::Inet6)).is_some()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn checksum_over_a_packet_with_its_checksum_is_zero() {
        assert_eq!(checksum(&Family::Inet.request(7, 9, 5)), 0);
    }

    #[test]
    fn only_complete_replies_with_the_probers_identifier_are_answers() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        for (family, header, reply) in
            [(Family::Inet, &ip_header[..], 0), (Family::Inet6, &[][..], 129)]
        {
            let from = IpAddr::from([10, 42, 7, 0]);
            let mut packet = header.to_vec();
            packet.extend(family.request(7, 9, 4));
            let parse = |identifier, packet: &[u8]| {
                family
                    .parse(ProbeIdentity { identifier, ports: [1; FLOWS] }, from, 3, packet)
                    .map(|event| event.kind)
            };
            assert_eq!(parse(7, &packet), Some(IcmpKind::Request));
            packet[header.len()] = reply;
            assert_eq!(parse(7, &packet), Some(IcmpKind::Answer(9)));
            assert_eq!(parse(8, &packet), None, "of another prober");
            (0..header.len() + 8).for_each(|len| assert_eq!(parse(7, &packet[..len]), None));
        }
    }

    /// The filter works on sockets of any kind, so a Unix socket avoids the need for `CAP_NET_RAW`.
    #[test]
    fn filter_passes_own_replies_and_errors_and_requests_if_enabled() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        for (family, header) in [(Family::Inet, &ip_header[..]), (Family::Inet6, &[][..])] {
            let passes = |requests, kind, identifier: u16| {
                let (to, from) = UnixDatagram::pair().expect("sockets");
                from.set_nonblocking(true).expect("a socket");
                family
                    .filter(&from, ProbeIdentity { identifier: 7, ports: [1; FLOWS] }, requests)
                    .expect("a filter");
                let mut packet = [header, &family.request(identifier, 9, 4)].concat();
                packet[header.len()] = kind;
                to.send(&packet).is_ok() && from.recv(&mut [0; 64]).is_ok()
            };
            let (request, reply) = family.types();
            for (kind, identifier, passes_without, passes_with) in [
                (reply, 7, true, true),
                (reply, 8, false, false),
                (request, 8, false, true),
                (family.unreachable(), 0, true, true),
                (5, 7, false, false),
            ] {
                assert_eq!(passes(false, kind, identifier), passes_without, "{family:?} {kind}");
                assert_eq!(passes(true, kind, identifier), passes_with, "{family:?} {kind}");
            }
        }
    }

    #[test]
    fn only_an_error_from_the_destination_about_an_own_datagram_is_a_refusal() {
        let ip_header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        let mut quoted =
            [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 42, 9, 0, 10, 42, 7, 0].to_vec();
        quoted.extend([0x12, 0x34, 0x82, 0x9a, 0, 8, 0, 0]);
        quoted.extend(&probe_packet::probe_packet(7, 9, probe_packet::SIZE)[..10]);
        let packet = [&ip_header[..], &[3, 3, 0, 0, 0, 0, 0, 0], &quoted].concat();
        let parse = |port, from: [u8; 4], packet: &[u8]| {
            let identity = ProbeIdentity { identifier: 7, ports: [port; FLOWS] };
            Family::Inet.parse(identity, from.into(), 3, packet).map(|event| event.kind)
        };
        let peer = [10, 42, 7, 0];
        assert_eq!(parse(0x1234, peer, &packet), Some(IcmpKind::Refusal(9)));
        assert_eq!(parse(0x1235, peer, &packet), None, "of another prober");
        assert_eq!(parse(0x1234, [10, 42, 7, 1], &packet), None, "from a router on the path");
        (0..packet.len()).for_each(|len| assert_eq!(parse(0x1234, peer, &packet[..len]), None));
        let from: IpAddr = "fd42:0:0:7::".parse().expect("an address");
        let mut quoted = [0; 48];
        (quoted[6], quoted[40], quoted[41]) = (17, 0x12, 0x34);
        quoted[24..40].copy_from_slice(&crate::netlink::attributes::octets(from));
        let probe = &probe_packet::probe_packet(7, 9, probe_packet::SIZE)[..10];
        let packet = [&[1, 4, 0, 0, 0, 0, 0, 0], &quoted[..], probe].concat();
        let event = Family::Inet6.parse(
            ProbeIdentity { identifier: 7, ports: [0x1234; FLOWS] },
            from,
            3,
            &packet,
        );
        assert_eq!(event.map(|event| event.kind), Some(IcmpKind::Refusal(9)));
    }
}
