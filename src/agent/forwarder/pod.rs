//! Sockets inside the pod that is the agent's own.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{SockaddrStorage, recvfrom};
use socket2::Socket;

use crate::{
    agent::{
        packet_filter::{FilterInput, receive_only},
        raw_tcp,
    },
    dataplane::{
        forwarding::{Field, NONCE_LEN, Probe, Transport, UNUSED_OUT},
        silence::MAY_NOT_SEND,
    },
    icmp::{Family, disable_fragmentation},
    pods::standin::StandIn,
};

/// More than any packet of a trial has that is looked at.
const LONGEST: usize = 128;
const EPERM: i32 = 1;
const EMSGSIZE: i32 = 90;

/// Inside a pod.
pub struct PodSockets {
    pub address: IpAddr,
    pub datagrams: Socket,
    /// Of datagrams.
    pub port: u16,
    /// All segments of TCP that come to the pod, and those that are written as they are.
    pub segments: Socket,
    /// Sends what just fits into the tunnel.
    pub fitting: UdpSocket,
    /// Sends what is too large for the tunnel, and hears of it.
    pub large: UdpSocket,
}

impl PodSockets {
    pub fn open(pod: &StandIn, address: IpAddr) -> io::Result<Self> {
        pod.inside(|| {
            let segments = raw_tcp::open(address)?;
            let any: IpAddr = match address {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let whole = || {
                let socket = UdpSocket::bind((any, 0))?;
                socket.set_nonblocking(true)?;
                disable_fragmentation(&socket)?;
                receive_only(&socket, FilterInput::Segment, &[])?;
                io::Result::Ok(socket)
            };
            let (fitting, large) = (whole()?, whole()?);
            let datagrams = UdpSocket::bind((any, 0))?;
            let port = datagrams.local_addr()?.port();
            let datagrams = Socket::from(datagrams);
            datagrams.set_nonblocking(true)?;
            Ok(Self { address, datagrams, port, segments, fitting, large })
        })
    }

    /// Lets only what has this number come to these sockets from now on, and answers to first segments with
    /// one of the others, and forgets what has come before.
    pub fn await_only(&self, nonce: [u8; NONCE_LEN], asked: &[[u8; NONCE_LEN]]) -> io::Result<()> {
        let Self { address, datagrams, segments, .. } = self;
        only_with(datagrams, Transport::Udp, *address, nonce)?;
        let answers = asked.iter().map(|nonce| Probe::answer(*nonce));
        let fields: Vec<Field> =
            Probe::fields(Transport::Tcp, nonce).into_iter().chain(answers).collect();
        receive_only(segments, FilterInput::raw(*address), &fields)?;
        drain(segments, |_, _| {});
        Ok(())
    }

    /// What cannot be sent is not seen arriving.
    ///
    /// # Errors
    /// The kernel lets this process send nothing. No rule of the host sees packets inside a pod yet.
    pub fn send(&self, probe: &Probe) -> io::Result<()> {
        let sent = match probe.transport {
            Transport::Udp => {
                let to = SocketAddr::new(probe.to, probe.ports[1]);
                self.datagrams.send_to(&Probe::payload(probe.nonce), &to.into())
            }
            Transport::Tcp => {
                let to = SocketAddr::new(probe.to, 0);
                self.segments.send_to(&probe.segment(), &to.into())
            }
        };
        permitted(&sent)
    }

    /// Which of these have arrived, and from which address a segment has that was sent from another. Gives
    /// each segment with its source.
    pub fn hear<'a>(
        &self,
        probes: impl Iterator<Item = &'a Probe> + Clone,
        arrived: &mut BTreeSet<Transport>,
        mut give: impl FnMut(&[u8], Option<IpAddr>),
    ) -> Option<IpAddr> {
        drain(&self.datagrams, |payload, _| {
            let is_it = |probe: &&Probe| {
                probe.transport == Transport::Udp && *payload == Probe::payload(probe.nonce)
            };
            arrived.extend(probes.clone().find(is_it).map(|probe| probe.transport));
        });
        let mut other = None;
        drain(&self.segments, |packet, from| {
            let segment = raw_tcp::segment(self.address, packet).unwrap_or_default();
            give(segment, from);
            let is_it = |probe: &&Probe| probe.transport == Transport::Tcp && probe.is(segment);
            let found = probes.clone().find(is_it);
            other = other.or(from.filter(|from| found.is_some_and(|probe| probe.from != *from)));
            arrived.extend(found.map(|probe| probe.transport));
        });
        other
    }
}

/// # Errors
/// The kernel does not let this process send.
fn permitted(sent: &io::Result<usize>) -> io::Result<()> {
    let errno = sent.as_ref().err().and_then(io::Error::raw_os_error);
    if errno == Some(EPERM) { Err(io::Error::other(MAY_NOT_SEND)) } else { Ok(()) }
}

/// Lets only packets of a trial with this number come to a socket, so that those of others leave room for
/// them, and forgets what has come before. A raw one is for segments.
pub fn only_with(
    socket: &Socket,
    transport: Transport,
    address: IpAddr,
    nonce: [u8; NONCE_LEN],
) -> io::Result<()> {
    let shown = match transport {
        Transport::Udp => FilterInput::Segment,
        Transport::Tcp => FilterInput::raw(address),
    };
    receive_only(socket, shown, &Probe::fields(transport, nonce))?;
    drain(socket, |_, _| {});
    Ok(())
}

/// Whether this host has told that what was sent was too large.
pub fn hears_too_large(socket: &UdpSocket) -> bool {
    let error = socket.take_error().ok().flatten();
    error.is_some_and(|error| error.raw_os_error() == Some(EMSGSIZE))
}

/// Gives each packet that waits, and where it comes from.
pub fn drain(socket: &Socket, mut give: impl FnMut(&[u8], Option<IpAddr>)) {
    let mut buffer = [0; LONGEST];
    while let Ok((length, from)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
        let of_v4 = |from: &SockaddrStorage| Some(IpAddr::V4(from.as_sockaddr_in()?.ip()));
        let of_v6 = |from: &SockaddrStorage| Some(IpAddr::V6(from.as_sockaddr_in6()?.ip()));
        give(&buffer[..length], from.and_then(|from| of_v4(&from).or_else(|| of_v6(&from))));
    }
}

/// A packet of a size. What cannot be sent is neither seen nor told of.
pub fn send_whole(socket: &UdpSocket, to: IpAddr, size: u32, begin: &[u8]) {
    // What the last trial left is of no interest.
    let _ = socket.take_error();
    let length = size.saturating_sub(Family::of(to).headers()) as usize;
    let mut payload = begin.to_vec();
    payload.resize(length.max(begin.len()), 0);
    if socket.connect((to, UNUSED_OUT)).is_ok() {
        let _ = socket.send(&payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trial_whose_packets_the_kernel_refuses_says_so_and_one_that_finds_no_way_goes_on() {
        let refused = permitted(&Err(io::Error::from_raw_os_error(EPERM)));
        let said = refused.expect_err("no trial").to_string();
        assert!(said.contains("refuses packets that the agent sends (EPERM)"), "{said}");
        assert!(permitted(&Err(io::Error::from_raw_os_error(101))).is_ok());
        assert!(permitted(&Ok(7)).is_ok());
    }
}
