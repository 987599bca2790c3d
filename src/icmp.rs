//! ICMP echo (RFC 792, RFC 4443): questions that every kernel answers, whatever runs on it.

use std::{
    io::{self, IoSliceMut},
    net::IpAddr,
    os::fd::AsRawFd,
};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
    sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo},
};
use socket2::{Domain, Protocol, Socket, Type};

/// Payload of an ordinary request.
pub const SMALL: usize = 56;
/// Enough of a packet to parse it.
const PARSED: usize = 128;
/// Enough for what the kernel says about where a packet came in.
const CONTROL: usize = 128;

/// Of which IP an echo is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Inet,
    Inet6,
}

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    pub from: IpAddr,
    /// The number of our request that this answers; none, if it is a request of somebody else.
    pub answers: Option<u16>,
    /// Index of the interface by which it came.
    pub interface: u32,
}

impl Family {
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Inet,
            IpAddr::V6(_) => Self::Inet6,
        }
    }

    /// A raw socket of the present network namespace; takes CAP_NET_RAW. It also sees requests of others to
    /// this host, which the kernel answers.
    pub fn open(self) -> io::Result<Socket> {
        match self {
            Self::Inet => {
                let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                setsockopt(&socket, Ipv4PacketInfo, &true)?;
                Ok(socket)
            }
            Self::Inet6 => {
                let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
                setsockopt(&socket, Ipv6RecvPacketInfo, &true)?;
                Ok(socket)
            }
        }
    }

    /// Takes the next packet from a socket; none, if it is no echo that concerns whoever has this identifier.
    pub fn receive(self, socket: &impl AsRawFd, identifier: u16) -> io::Result<Option<Echo>> {
        let mut buffer = [0; PARSED];
        let mut control = vec![0; CONTROL];
        let mut parts = [IoSliceMut::new(&mut buffer)];
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
        let packet = buffer.get(..length).unwrap_or_default();
        Ok(from.and_then(|from| self.parse(identifier, from, interface, packet)))
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
        let mut packet = vec![0_u8; 8 + payload];
        (packet[0], _) = self.types();
        packet[4..6].copy_from_slice(&identifier.to_be_bytes());
        packet[6..8].copy_from_slice(&sequence.to_be_bytes());
        if self == Self::Inet {
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    }

    /// Reads a packet as a raw socket gives it, with IPv4 after its header; none, if it is no echo that
    /// concerns whoever has this identifier.
    fn parse(self, identifier: u16, from: IpAddr, interface: u32, packet: &[u8]) -> Option<Echo> {
        let header = match self {
            Self::Inet => usize::from(packet.first()? & 0x0f) * 4,
            Self::Inet6 => 0,
        };
        let icmp = packet.get(header..)?;
        let number = u16::from_be_bytes(icmp.get(6..8)?.try_into().ok()?);
        let (request, reply) = self.types();
        match *icmp.first()? {
            kind if kind == reply && *icmp.get(4..6)? == identifier.to_be_bytes() => {
                Some(Echo { from, answers: Some(number), interface })
            }
            kind if kind == request => Some(Echo { from, answers: None, interface }),
            _ => None,
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

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
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
            let parse = |identifier, packet: &[u8]| family.parse(identifier, from, 3, packet);
            assert_eq!(parse(7, &packet), Some(Echo { from, answers: None, interface: 3 }));
            packet[header.len()] = reply;
            assert_eq!(parse(7, &packet), Some(Echo { from, answers: Some(9), interface: 3 }));
            assert_eq!(parse(8, &packet), None, "of somebody else");
            (0..header.len() + 8).for_each(|len| assert_eq!(parse(7, &packet[..len]), None));
        }
    }
}
