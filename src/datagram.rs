//! A UDP datagram to the agent's port that tests a path: firewalls let it pass, and every host answers it.
//!
//! An agent answers it statelessly with the list of its versions (RFC 9000, section 6). Without an agent, the
//! kernel answers with an ICMP "port unreachable" error. [`crate::probe_packet`] is its content.

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

use crate::{
    icmp::{Family, IcmpEvent, IcmpKind, ProbeIdentity, disable_fragmentation, receive_packet},
    probe_packet::{self, ID},
};

/// Length of the UDP header, in bytes.
const UDP_HEADER: u32 = 8;
/// Bytes of an answer that are read.
const PARSED: usize = 32;

/// Opens the socket that sends datagrams. Its filter passes only answers with this identifier.
///
/// # Errors
/// If the kernel refuses the socket, an option or the filter.
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
    disable_fragmentation(&socket)?;
    SockRef::from(&socket).attach_filter(&filter(identifier))?;
    Ok(socket)
}

/// Receives the next answer. `None` if it is malformed.
///
/// # Errors
/// If the kernel reports an error; `WouldBlock` if no answer is queued.
pub fn receive(socket: &impl AsRawFd, identity: ProbeIdentity) -> io::Result<Option<IcmpEvent>> {
    let mut buffer = [0; PARSED];
    let Some((from, interface, answer)) = receive_packet(socket, &mut buffer)? else {
        return Ok(None);
    };
    let number = probe_packet::answer_number(identity.identifier, answer);
    Ok(number.map(|number| IcmpEvent { from, interface, kind: IcmpKind::Arrival(number) }))
}

/// Returns the program for the kernel's packet filter: it passes version negotiation packets (version 0) with
/// this identifier, so that non-members cannot wake the agent.
fn filter(identifier: u16) -> [SockFilter; 6] {
    use nix::libc::{BPF_ABS, BPF_H, BPF_JEQ, BPF_JMP, BPF_LD, BPF_RET, BPF_W};
    let load = |size, offset| SockFilter::new((BPF_LD | size | BPF_ABS) as u16, 0, 0, offset);
    let equals =
        |value, otherwise| SockFilter::new((BPF_JMP | BPF_JEQ) as u16, 0, otherwise, value);
    let accept = |bytes| SockFilter::new(BPF_RET as u16, 0, 0, bytes);
    [
        load(BPF_W, UDP_HEADER + 1),
        equals(0, 3),
        load(BPF_H, UDP_HEADER + ID as u32),
        equals(identifier.into(), 1),
        accept(u32::MAX),
        accept(0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_packet::{SIZE, probe_packet};

    #[test]
    fn filter_passes_only_answers_with_the_probers_identifier() {
        let socket = open(Family::Inet, 7).expect("a socket");
        let to = (Ipv4Addr::LOCALHOST, socket.local_addr().expect("an address").port());
        let identity =
            ProbeIdentity { identifier: 7, ports: [to.1; crate::dataplane::paths::FLOWS] };
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let answer = |identifier| {
            let mut packet = probe_packet(identifier, 9, SIZE);
            packet[1..5].fill(0);
            packet
        };
        for packet in [vec![], vec![0x80; 20], probe_packet(7, 9, SIZE), answer(8)] {
            sender.send_to(&packet, to).expect("sent");
            let nothing = receive(&socket, identity).expect_err("nothing to read");
            assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock, "{packet:?}");
        }
        sender.send_to(&answer(7), to).expect("sent");
        let event = receive(&socket, identity).expect("a datagram").expect("an answer");
        assert_eq!((event.from, event.kind), (Ipv4Addr::LOCALHOST.into(), IcmpKind::Arrival(9)));
    }
}
