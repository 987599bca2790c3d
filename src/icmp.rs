//! ICMP echo (RFC 792): questions that every kernel answers, whatever runs on it.

use std::{io, net::Ipv4Addr};

use socket2::{Domain, Protocol, Socket, Type};

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Headers of IPv4 and ICMP: what a packet is larger than its payload.
pub const HEADERS: u32 = 28;
/// Payload of an ordinary request.
pub const SMALL: usize = 56;
/// Enough of a packet to parse it.
pub const PARSED: usize = 128;

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    pub from: Ipv4Addr,
    /// The number of our request that this answers; none, if it is a request of somebody else.
    pub answers: Option<u16>,
}

/// A raw socket of the present network namespace; takes CAP_NET_RAW. It also sees requests of others to this
/// host, which the kernel answers.
pub fn open() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
}

/// A request with `payload` zero bytes; the kernel puts the IP header before it.
pub fn request(identifier: u16, sequence: u16, payload: usize) -> Vec<u8> {
    let mut packet = vec![0_u8; 8 + payload];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Reads an IPv4 packet as a raw socket gives it; none, if it is no echo that concerns whoever has this
/// identifier.
pub fn parse(identifier: u16, packet: &[u8]) -> Option<Echo> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let from = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
    let icmp = packet.get(header..)?;
    let number = u16::from_be_bytes(icmp.get(6..8)?.try_into().ok()?);
    match *icmp.first()? {
        ECHO_REPLY if *icmp.get(4..6)? == identifier.to_be_bytes() => {
            Some(Echo { from, answers: Some(number) })
        }
        ECHO_REQUEST => Some(Echo { from, answers: None }),
        _ => None,
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
        assert_eq!(checksum(&request(7, 9, 5)), 0);
    }

    #[test]
    fn only_whole_echoes_of_ours_are_answers() {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 42, 7, 0, 10, 42, 9, 0];
        packet.extend(request(7, 9, 4));
        let from = Ipv4Addr::new(10, 42, 7, 0);
        assert_eq!(parse(7, &packet), Some(Echo { from, answers: None }));
        packet[20] = ECHO_REPLY;
        assert_eq!(parse(7, &packet), Some(Echo { from, answers: Some(9) }));
        assert_eq!(parse(8, &packet), None, "of somebody else");
        (0..28).for_each(|length| assert_eq!(parse(7, &packet[..length]), None));
    }
}
