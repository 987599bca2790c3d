//! Sockets inside the network namespace of the agent's own pod.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::{
    libc::{EMSGSIZE, EPERM},
    sys::socket::{SockaddrStorage, recvfrom},
};
use socket2::Socket;

use crate::{
    agent::diagnosis::{
        packet_filter::{FilterInput, receive_only},
        raw_tcp,
    },
    dataplane::{
        forwarding::{Field, NONCE_LEN, Probe, TrialProtocol, UNUSED_OUT},
        silence::MAY_NOT_SEND,
    },
    icmp::{Family, disable_fragmentation},
    model::unspecified,
    pods::agent_pod::AgentPod,
};

/// Bytes read of a packet of a trial.
const MAX_READ: usize = 128;

/// The sockets of one pod and address family.
pub struct PodSockets {
    /// The pod's address.
    pub address: IpAddr,
    /// A UDP socket.
    pub datagrams: Socket,
    /// Port of `datagrams`.
    pub port: u16,
    /// A raw socket that sends TCP segments and receives all segments to the pod.
    pub segments: Socket,
    /// Sends packets that just fit into the tunnel.
    pub fitting: UdpSocket,
    /// Sends packets that are too large for the tunnel, and receives the ICMP error.
    pub large: UdpSocket,
}

impl PodSockets {
    /// Opens the sockets.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened inside the pod's namespace.
    pub fn open(pod: &AgentPod, address: IpAddr) -> io::Result<Self> {
        pod.inside(|| {
            let segments = raw_tcp::open(address)?;
            let any = unspecified(address.is_ipv4());
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

    /// Attaches filters for packets with this number and for answers to segments with one of the `asked`
    /// numbers, and discards packets received earlier.
    ///
    /// # Errors
    /// Fails if a filter cannot be attached.
    pub fn await_only(&self, nonce: [u8; NONCE_LEN], asked: &[[u8; NONCE_LEN]]) -> io::Result<()> {
        let Self { address, datagrams, segments, .. } = self;
        only_with(datagrams, TrialProtocol::Udp, *address, nonce)?;
        let answers = asked.iter().map(|nonce| Probe::answer(*nonce));
        let fields: Vec<Field> =
            Probe::fields(TrialProtocol::Tcp, nonce).into_iter().chain(answers).collect();
        receive_only(segments, FilterInput::raw(*address), &fields)?;
        drain(segments, |_, _| {});
        Ok(())
    }

    /// Sends a packet of a trial. A packet that cannot be sent does not arrive, and is detected that
    /// way.
    ///
    /// # Errors
    /// Fails if the kernel forbids this process to send (EPERM): rules of the host do not apply inside a
    /// pod's namespace, so it is no result of the trial.
    pub fn send(&self, probe: &Probe) -> io::Result<()> {
        let sent = match probe.transport {
            TrialProtocol::Udp => {
                let to = SocketAddr::new(probe.to, probe.ports[1]);
                self.datagrams.send_to(&Probe::payload(probe.nonce), &to.into())
            }
            TrialProtocol::Tcp => {
                let to = SocketAddr::new(probe.to, 0);
                self.segments.send_to(&probe.segment(), &to.into())
            }
        };
        check_permission(&sent)
    }

    /// Adds the transports of the probes that have arrived to `arrived`. Returns the source address of a
    /// segment if it differs from the probe's. Passes each segment with its source to `give`.
    pub fn receive<'a>(
        &self,
        probes: impl Iterator<Item = &'a Probe> + Clone,
        arrived: &mut BTreeSet<TrialProtocol>,
        mut give: impl FnMut(&[u8], Option<IpAddr>),
    ) -> Option<IpAddr> {
        drain(&self.datagrams, |payload, _| {
            let is_it = |probe: &&Probe| {
                probe.transport == TrialProtocol::Udp && *payload == Probe::payload(probe.nonce)
            };
            arrived.extend(probes.clone().find(is_it).map(|probe| probe.transport));
        });
        let mut other = None;
        drain(&self.segments, |packet, from| {
            let segment = raw_tcp::segment(self.address, packet).unwrap_or_default();
            give(segment, from);
            let is_it = |probe: &&Probe| probe.transport == TrialProtocol::Tcp && probe.is(segment);
            let found = probes.clone().find(is_it);
            other = other.or(from.filter(|from| found.is_some_and(|probe| probe.from != *from)));
            arrived.extend(found.map(|probe| probe.transport));
        });
        other
    }
}

/// The kernel forbids this process to send.
#[derive(Debug, thiserror::Error)]
#[error("{MAY_NOT_SEND}")]
pub struct Forbidden;

/// Converts EPERM to an error.
///
/// # Errors
/// Fails with [`Forbidden`] if the kernel forbids this process to send.
fn check_permission(sent: &io::Result<usize>) -> io::Result<()> {
    let errno = sent.as_ref().err().and_then(io::Error::raw_os_error);
    if errno == Some(EPERM) { Err(io::Error::other(Forbidden)) } else { Ok(()) }
}

/// Attaches a filter for packets of a trial with this number, so that other packets do not fill the
/// buffer, and discards packets received earlier. TCP requires a raw socket.
///
/// # Errors
/// Fails if the filter cannot be attached.
pub fn only_with(
    socket: &Socket,
    transport: TrialProtocol,
    address: IpAddr,
    nonce: [u8; NONCE_LEN],
) -> io::Result<()> {
    let shown = match transport {
        TrialProtocol::Udp => FilterInput::Segment,
        TrialProtocol::Tcp => FilterInput::raw(address),
    };
    receive_only(socket, shown, &Probe::fields(transport, nonce))?;
    drain(socket, |_, _| {});
    Ok(())
}

/// Returns whether the kernel reported that a packet sent was too large.
pub fn has_too_large_error(socket: &UdpSocket) -> bool {
    let error = socket.take_error().ok().flatten();
    error.is_some_and(|error| error.raw_os_error() == Some(EMSGSIZE))
}

/// Passes each queued packet to `give`, with its source.
pub fn drain(socket: &Socket, mut give: impl FnMut(&[u8], Option<IpAddr>)) {
    let mut buffer = [0; MAX_READ];
    while let Ok((length, from)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
        let of_v4 = |from: &SockaddrStorage| Some(IpAddr::V4(from.as_sockaddr_in()?.ip()));
        let of_v6 = |from: &SockaddrStorage| Some(IpAddr::V6(from.as_sockaddr_in6()?.ip()));
        give(&buffer[..length], from.and_then(|from| of_v4(&from).or_else(|| of_v6(&from))));
    }
}

/// Sends a packet of `size` bytes without fragmentation. Failures are ignored.
pub fn send_unfragmented(socket: &UdpSocket, to: IpAddr, size: u32, begin: &[u8]) {
    // Discards the error of the previous trial.
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
    fn eperm_fails_trial_and_unreachable_network_does_not() {
        let refused = check_permission(&Err(io::Error::from_raw_os_error(EPERM)));
        let said = refused.expect_err("no trial").to_string();
        assert!(said.contains("refuses packets that the agent sends (EPERM)"), "{said}");
        assert!(check_permission(&Err(io::Error::from_raw_os_error(101))).is_ok());
        assert!(check_permission(&Ok(7)).is_ok());
    }
}
