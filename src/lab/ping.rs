//! ICMP echo (RFC 792) from inside a namespace, so that no `ping` program is needed.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::NetNs;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// A raw ICMP socket in one namespace.
pub struct Pinger {
    socket: Socket,
    identifier: u16,
    sequence: u16,
}

impl Pinger {
    pub fn new(netns: &NetNs) -> io::Result<Self> {
        let socket = netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
        let identifier = (std::process::id() & 0xffff) as u16;
        Ok(Self { socket, identifier, sequence: 0 })
    }

    /// Sends one request and waits for its reply: the round trip, or None if none came in time.
    pub fn ping(&mut self, to: Ipv4Addr, timeout: Duration) -> io::Result<Option<Duration>> {
        // On one machine the reply may be here before the call that sends returns.
        let sent = Instant::now();
        let sequence = self.send(to)?;
        while let Some(left) = timeout.checked_sub(sent.elapsed()).filter(|left| !left.is_zero()) {
            match self.receive(left)? {
                Some((from, number)) if (from, number) == (to, sequence) => {
                    return Ok(Some(sent.elapsed()));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Sends `count` requests, one each `interval`, and says how many were answered.
    pub fn stream(&mut self, to: Ipv4Addr, count: u16, interval: Duration) -> io::Result<u16> {
        let start = Instant::now();
        let mut answered = 0;
        for number in 0..count {
            // An unreachable network is a lost packet, like any other.
            let _ = self.send(to);
            let next = start + interval * (u32::from(number) + 1);
            while let Some(left) =
                next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            {
                answered += u16::from(self.receive(left)?.is_some_and(|(from, _)| from == to));
            }
        }
        let grace = Instant::now() + Duration::from_millis(500);
        while answered < count
            && let Some(left) = grace.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            answered += u16::from(self.receive(left)?.is_some_and(|(from, _)| from == to));
        }
        Ok(answered)
    }

    fn send(&mut self, to: Ipv4Addr) -> io::Result<u16> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = [0_u8; 64];
        packet[0] = ECHO_REQUEST;
        packet[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        packet[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.socket.send_to(&packet, &SocketAddr::new(IpAddr::V4(to), 0).into())?;
        Ok(self.sequence)
    }

    /// The next echo reply to us: from whom, and its number. None if the time is over.
    fn receive(&mut self, timeout: Duration) -> io::Result<Option<(Ipv4Addr, u16)>> {
        self.socket.set_read_timeout(Some(timeout.max(Duration::from_micros(1))))?;
        let mut buffer = [0; 2048];
        let length = match (&self.socket).read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(self.parse(&buffer[..length]))
    }

    fn parse(&self, packet: &[u8]) -> Option<(Ipv4Addr, u16)> {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        let from = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
        let icmp = packet.get(header..)?;
        let ours = icmp.first() == Some(&ECHO_REPLY)
            && icmp.get(4..6) == Some(&self.identifier.to_be_bytes()[..]);
        let number = u16::from_be_bytes(icmp.get(6..8)?.try_into().ok()?);
        ours.then_some((from, number))
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
        let mut packet = [8, 0, 0, 0, 1, 2, 3, 4, 5];
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&packet), 0);
    }
}
