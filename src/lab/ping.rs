//! `ping` from inside a namespace, without an external program.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::Socket;

use super::NetNs;
use crate::{
    dataplane::paths::FLOWS,
    icmp::{self, Family, IcmpEvent, IcmpKind, ProbeIdentity},
};

/// Sends ICMP echo requests from one namespace.
pub struct Pinger {
    socket: Socket,
    asker: ProbeIdentity,
    sequence: u16,
}

impl Pinger {
    /// Opens a socket in a namespace.
    ///
    /// # Errors
    /// Fails if the kernel refuses the socket.
    pub fn new(netns: &NetNs) -> io::Result<Self> {
        // Only the identifier matters: a pinger sends no datagrams.
        let asker =
            ProbeIdentity { identifier: (std::process::id() & 0xffff) as u16, ports: [0; FLOWS] };
        Ok(Self { socket: netns.run(|| Family::Inet.open())?, asker, sequence: 0 })
    }

    /// Sends one request and waits for its reply. Returns the round trip, or `None` on timeout.
    ///
    /// # Errors
    /// Fails if the request cannot be sent.
    pub fn ping(&mut self, to: Ipv4Addr, timeout: Duration) -> io::Result<Option<Duration>> {
        // On one machine the reply may arrive before `send` returns.
        let sent = Instant::now();
        self.send(to)?;
        while let Some(left) = timeout.checked_sub(sent.elapsed()).filter(|left| !left.is_zero()) {
            if self.receive(left)? == Some((to.into(), self.sequence)) {
                return Ok(Some(sent.elapsed()));
            }
        }
        Ok(None)
    }

    /// Sends `count` requests, one per `interval`, and returns the number of replies.
    ///
    /// # Errors
    /// Fails if the socket fails. A request that cannot be sent counts as unanswered.
    pub fn stream(&mut self, to: Ipv4Addr, count: u16, interval: Duration) -> io::Result<u16> {
        let start = Instant::now();
        let mut answered = 0;
        for number in 0..count {
            // An unreachable network counts as a lost packet.
            let _ = self.send(to);
            let next = start + interval * (u32::from(number) + 1);
            while let Some(left) =
                next.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            {
                answered +=
                    u16::from(self.receive(left)?.is_some_and(|(from, _)| from == IpAddr::V4(to)));
            }
        }
        let grace = Instant::now() + Duration::from_millis(500);
        while answered < count
            && let Some(left) = grace.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            answered +=
                u16::from(self.receive(left)?.is_some_and(|(from, _)| from == IpAddr::V4(to)));
        }
        Ok(answered)
    }

    fn send(&mut self, to: Ipv4Addr) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let packet = Family::Inet.request(self.asker.identifier, self.sequence, icmp::SMALL);
        self.socket.send_to(&packet, &SocketAddr::new(IpAddr::V4(to), 0).into())?;
        Ok(())
    }

    /// Receives the next reply and returns its sender and sequence number. Returns `None` on timeout or
    /// for another packet.
    fn receive(&self, timeout: Duration) -> io::Result<Option<(IpAddr, u16)>> {
        self.socket.set_read_timeout(Some(timeout.max(Duration::from_micros(1))))?;
        match Family::Inet.receive(&self.socket, self.asker) {
            Ok(Some(IcmpEvent { from, kind: IcmpKind::Answer(number), .. })) => {
                Ok(Some((from, number)))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}
