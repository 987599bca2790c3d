//! A UDP datagram that every host of the cluster answers as long as its kernel runs, and that firewalls let
//! through: it goes to the port of the agent.
//!
//! It is a QUIC packet of a version that does not exist. An agent answers it with the versions that it knows
//! (RFC 9000, section 6), without any state; where no agent runs, the kernel says that the port is closed
//! (ICMP). The number of the question stands in its connection ids, which come back in both.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsRawFd,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo},
};
use socket2::{SockFilter, SockRef};

use crate::icmp::{Asker, Family, IcmpEvent, What, never_fragment, take};

/// Servers ignore shorter ones (RFC 9000, 5.2.2).
pub const SIZE: usize = 1_200;
/// Of the form that asks for a list of versions (RFC 9000, 15).
const NO_VERSION: [u8; 4] = [0x6a; 4];
/// A long header, with the bit that all versions so far have set.
const LONG_HEADER: u8 = 0xc0;
/// Where the first connection id stands, behind its length: in the question that of the receiver, in the
/// answer that of whoever asked. Both are the same.
const ID: usize = 6;
const ID_LENGTH: u8 = 4;
const UDP_HEADER: u32 = 8;
/// What of an answer is read.
const PARSED: usize = 32;

/// Opens the socket from which they are sent. It takes only answers.
pub fn open(family: Family, identifier: u16) -> io::Result<UdpSocket> {
    let any = match family {
        Family::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    match family {
        Family::Inet => setsockopt(&socket, Ipv4PacketInfo, &true)?,
        Family::Inet6 => setsockopt(&socket, Ipv6RecvPacketInfo, &true)?,
    }
    never_fragment(&socket)?;
    SockRef::from(&socket).attach_filter(&filter(identifier))?;
    Ok(socket)
}

/// The question with this number, of `size` bytes, which is at least [`SIZE`].
pub fn question(identifier: u16, number: u16, size: usize) -> Vec<u8> {
    let [a, b, c, d] = (u32::from(identifier) << 16 | u32::from(number)).to_be_bytes();
    let mut packet = vec![LONG_HEADER];
    packet.extend(NO_VERSION);
    for _ in 0..2 {
        packet.extend([ID_LENGTH, a, b, c, d]);
    }
    packet.resize(size.max(SIZE), 0);
    packet
}

/// The number of a question of ours, in what is quoted of it.
pub fn number_of(identifier: u16, question: &[u8]) -> Option<u16> {
    number(identifier, NO_VERSION, question)
}

/// Takes the next answer from the socket.
pub fn receive(socket: &impl AsRawFd, asker: Asker) -> io::Result<Option<IcmpEvent>> {
    let mut buffer = [0; PARSED];
    let Some((from, interface, answer)) = take(socket, &mut buffer)? else { return Ok(None) };
    let number = number(asker.identifier, [0; 4], answer);
    Ok(number.map(|number| IcmpEvent { from, interface, what: What::Arrival(number) }))
}

fn number(identifier: u16, version: [u8; 4], packet: &[u8]) -> Option<u16> {
    let is_long = packet.first()? & 0x80 != 0;
    let is_right = packet.get(1..5)? == version && *packet.get(5)? == ID_LENGTH;
    let is_ours = packet.get(ID..ID + 2)? == identifier.to_be_bytes();
    let number = packet.get(ID + 2..ID + 4)?.try_into().ok()?;
    (is_long && is_right && is_ours).then_some(u16::from_be_bytes(number))
}

/// For the kernel's packet filter: a list of versions (version 0) for this identifier, so that non-members
/// wake no agent.
fn filter(identifier: u16) -> [SockFilter; 6] {
    use nix::libc::{BPF_ABS, BPF_H, BPF_JEQ, BPF_JMP, BPF_LD, BPF_RET, BPF_W};
    let load = |size, offset| SockFilter::new((BPF_LD | size | BPF_ABS) as u16, 0, 0, offset);
    let equals =
        |value, otherwise| SockFilter::new((BPF_JMP | BPF_JEQ) as u16, 0, otherwise, value);
    let give = |bytes| SockFilter::new(BPF_RET as u16, 0, 0, bytes);
    [
        load(BPF_W, UDP_HEADER + 1),
        equals(0, 3),
        load(BPF_H, UDP_HEADER + ID as u32),
        equals(identifier.into(), 1),
        give(u32::MAX),
        give(0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_recognised_in_what_is_quoted_of_it() {
        let packet = question(7, 0x1234, SIZE);
        assert_eq!(number_of(7, &packet[..20]), Some(0x1234));
        assert_eq!(number_of(8, &packet), None, "of another agent");
        (0..10).for_each(|len| assert_eq!(number_of(7, &packet[..len]), None));
    }

    #[test]
    fn only_answers_to_this_agent_come_through_the_filter() {
        let socket = open(Family::Inet, 7).expect("a socket");
        let to = (Ipv4Addr::LOCALHOST, socket.local_addr().expect("an address").port());
        let asker = Asker { identifier: 7, ports: [to.1; crate::dataplane::paths::FLOWS] };
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let answer = |identifier| {
            let mut packet = question(identifier, 9, SIZE);
            packet[1..5].fill(0);
            packet
        };
        for packet in [vec![], vec![0x80; 20], question(7, 9, SIZE), answer(8)] {
            sender.send_to(&packet, to).expect("sent");
            let nothing = receive(&socket, asker).expect_err("nothing to read");
            assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock, "{packet:?}");
        }
        sender.send_to(&answer(7), to).expect("sent");
        let heard = receive(&socket, asker).expect("a datagram").expect("an answer");
        assert_eq!((heard.from, heard.what), (Ipv4Addr::LOCALHOST.into(), What::Arrival(9)));
    }
}
