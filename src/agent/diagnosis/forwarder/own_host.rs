//! Trials between the agent's own pod and this host: input rules may drop what pods send to their host,
//! and output rules what the host sends to pods, for example a kubelet's probes.
//!
//! Many hosts intentionally admit pods at some ports only. So packets to this host count as lost only if
//! an echo, a datagram and the first segment of a connection all have no effect.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::Socket;

use super::pod::{drain, only_with};
use crate::{
    agent::diagnosis::{
        packet_filter::{FilterInput, receive_only},
        raw_tcp,
    },
    dataplane::{
        forwarding::{Direction, NONCE_LEN, Probe, TrialProtocol, TrialResult, TrialWay, UNUSED},
        paths::FLOWS,
    },
    icmp::{Family, IcmpKind, ProbeIdentity, SMALL},
    pods::{
        agent_pod::{AgentPod, Shape},
        gateway,
    },
    random::random,
};

/// Time limit of a trial.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Sockets of both families, in the pod and on this host.
pub struct HostTrial(Vec<HostSockets>);

/// The sockets of one family.
struct HostSockets {
    family: Family,
    pod: IpAddr,
    gateway: IpAddr,
    /// Echo socket inside the pod.
    echo: Socket,
    /// UDP socket inside the pod.
    inside: Socket,
    /// Raw TCP socket inside the pod.
    segments: Socket,
    /// UDP socket on this host, bound to the gateway's address.
    outside: Socket,
    /// Raw TCP socket on this host; only sends.
    sender: Socket,
}

/// A trial of one family and its results.
struct Check<'a> {
    host_sockets: &'a HostSockets,
    asker: ProbeIdentity,
    nonce: [u8; NONCE_LEN],
    /// Source port of the segment to this host.
    source_port: u16,
    /// Whether anything has returned from this host to the pod.
    has_reply: bool,
    /// Packets from this host that have arrived in the pod.
    arrived: BTreeSet<TrialProtocol>,
}

impl HostTrial {
    /// Opens the sockets. A family whose gateway address is missing is skipped.
    pub fn open(agent_pod: &AgentPod, shape: &Shape) -> Self {
        let pairs = shape.addresses.iter().zip(shape.subnets.iter());
        let opened = pairs.map(|(pod, subnet)| HostSockets::open(agent_pod, pod, gateway(subnet)));
        let logged = opened.map(|host_sockets| {
            host_sockets.inspect_err(
                |error| tracing::debug!(%error, "packets between pods and this host not tested"),
            )
        });
        Self(logged.filter_map(Result::ok).collect())
    }

    /// Runs a trial. `wait` polls and returns whether to continue; otherwise the result is empty.
    ///
    /// # Errors
    /// Fails if the trial cannot be prepared.
    pub fn run(
        &self,
        mut wait: impl FnMut(&[BorrowedFd<'_>], Duration) -> bool,
    ) -> io::Result<Vec<(TrialWay, TrialResult)>> {
        let mut checks = self.0.iter().map(Check::begin).collect::<io::Result<Vec<_>>>()?;
        checks.iter().for_each(Check::send);
        let until = Instant::now() + TIMEOUT;
        loop {
            let pause = until.saturating_duration_since(Instant::now());
            let fds: Vec<_> = checks.iter().flat_map(|check| check.host_sockets.fds()).collect();
            if !pause.is_zero() && !wait(&fds, pause) {
                return Ok(Vec::new());
            }
            checks.iter_mut().for_each(Check::receive);
            if pause.is_zero() || checks.iter().all(Check::is_done) {
                return Ok(checks.iter().flat_map(Check::seen).collect());
            }
        }
    }
}

impl HostSockets {
    fn open(agent_pod: &AgentPod, pod: IpAddr, gateway: IpAddr) -> io::Result<Self> {
        let family = Family::of(pod);
        let datagrams = |address: IpAddr| {
            let socket = UdpSocket::bind((address, 0))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(Socket::from(socket))
        };
        let sender = raw_tcp::open(gateway)?;
        // Without this filter the socket would receive every segment sent to this host.
        receive_only(&sender, FilterInput::raw(gateway), &[])?;
        let outside = datagrams(gateway)?;
        agent_pod.inside(|| {
            let echo = family.open()?;
            echo.set_nonblocking(true)?;
            let any = match pod {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => pod,
            };
            let (inside, segments) = (datagrams(any)?, raw_tcp::open(pod)?);
            Ok(Self { family, pod, gateway, echo, inside, segments, outside, sender })
        })
    }

    fn fds(&self) -> [BorrowedFd<'_>; 4] {
        [self.echo.as_fd(), self.inside.as_fd(), self.segments.as_fd(), self.outside.as_fd()]
    }
}

impl<'a> Check<'a> {
    fn begin(host_sockets: &'a HostSockets) -> io::Result<Self> {
        let [a, b, c, d, ref nonce @ ..] =
            random::<{ NONCE_LEN + 4 }>().map_err(io::Error::other)?;
        let asker = ProbeIdentity { identifier: u16::from_ne_bytes([a, b]), ports: [0; FLOWS] };
        host_sockets.family.filter(&host_sockets.echo, asker, false)?;
        for (socket, transport) in [
            (&host_sockets.inside, TrialProtocol::Udp),
            (&host_sockets.outside, TrialProtocol::Udp),
            (&host_sockets.segments, TrialProtocol::Tcp),
        ] {
            only_with(socket, transport, host_sockets.pod, *nonce)?;
        }
        let source_port = u16::from_ne_bytes([c, d]) | 0x8000;
        let (has_reply, arrived) = (false, BTreeSet::new());
        Ok(Self { host_sockets, asker, nonce: *nonce, source_port, has_reply, arrived })
    }

    /// Returns the segment from this host to the pod, or the reverse.
    fn segment(&self, from: IpAddr, to: IpAddr) -> Probe {
        let ports = [self.source_port, UNUSED];
        Probe { transport: TrialProtocol::Tcp, from, to, ports, nonce: self.nonce }
    }

    /// Sends all packets. A packet that cannot be sent does not arrive, and is detected that way.
    fn send(&self) {
        let HostSockets { family, pod, gateway, echo, inside, segments, outside, sender } =
            self.host_sockets;
        let payload = Probe::payload(self.nonce);
        let at = |ip: IpAddr| SocketAddr::new(ip, 0).into();
        let request = family.request_with(self.asker.identifier, 0, &[0; SMALL]);
        let _ = echo.send_to(&request, &at(*gateway));
        let port = |socket: &Socket| Some(socket.local_addr().ok()?.as_socket()?.port());
        if let (Some(inside_at), Some(outside_at)) = (port(inside), port(outside)) {
            let _ = inside.send_to(&payload, &SocketAddr::new(*gateway, outside_at).into());
            let _ = outside.send_to(&payload, &SocketAddr::new(*pod, inside_at).into());
        }
        let _ = segments.send_to(&self.segment(*pod, *gateway).segment(), &at(*gateway));
        let _ = sender.send_to(&self.segment(*gateway, *pod).segment(), &at(*pod));
    }

    /// Records what has arrived.
    fn receive(&mut self) {
        let HostSockets { family, pod, gateway, echo, inside, segments, outside, .. } =
            self.host_sockets;
        while let Ok(heard) = family.receive(echo, self.asker) {
            self.has_reply |= heard.is_some_and(|heard| matches!(heard.kind, IcmpKind::Answer(_)));
        }
        let payload = Probe::payload(self.nonce);
        drain(outside, |datagram, _| self.has_reply |= datagram == payload);
        drain(inside, |datagram, _| {
            if datagram == payload {
                self.arrived.insert(TrialProtocol::Udp);
            }
        });
        let to_pod = self.segment(*gateway, *pod);
        // This host resets the connection, because nothing listens on the port.
        let refused = [UNUSED, self.source_port].map(u16::to_be_bytes).concat();
        drain(segments, |packet, _| {
            let segment = raw_tcp::segment(*pod, packet).unwrap_or_default();
            self.has_reply |= segment.starts_with(&refused);
            if to_pod.is(segment) {
                self.arrived.insert(TrialProtocol::Tcp);
            }
        });
    }

    fn is_done(&self) -> bool {
        self.has_reply && self.arrived.len() == TrialProtocol::ALL.len()
    }

    fn seen(&self) -> Vec<(TrialWay, TrialResult)> {
        let ipv4 = self.host_sockets.pod.is_ipv4();
        let verdict = |is_there| if is_there { TrialResult::Passed } else { TrialResult::Lost };
        let from_host = TrialProtocol::ALL.map(|transport| {
            let arrived = verdict(self.arrived.contains(&transport));
            (TrialWay { direction: Direction::FromHost(transport), ipv4 }, arrived)
        });
        let to_host = TrialWay { direction: Direction::ToHost, ipv4 };
        from_host.into_iter().chain([(to_host, verdict(self.has_reply))]).collect()
    }
}
