//! Tries packets between the pod that is the agent's own and this host itself: input rules may drop what pods
//! send to their host, and output rules what the host sends to pods, a kubelet's probes among it.
//!
//! Many hosts let pods at some of their ports only, on purpose. So what comes to this host counts as lost
//! only where an echo, a datagram and the first segment of a connection are all without effect.

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
    agent::{
        packet_filter::{FilterInput, receive_only},
        raw_tcp,
        start::random,
    },
    dataplane::{
        forwarding::{Direction, NONCE_LEN, Probe, Transport, TrialResult, UNUSED, Way},
        paths::FLOWS,
    },
    icmp::{Family, IcmpKind, ProbeIdentity, SMALL},
    pods::{
        gateway,
        standin::{Shape, StandIn},
    },
};

/// What has not come by then is lost.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Sockets of both families, in the pod and on this host.
pub struct Home(Vec<Ends>);

struct Ends {
    family: Family,
    pod: IpAddr,
    gateway: IpAddr,
    /// Inside the pod.
    echo: Socket,
    inside: Socket,
    segments: Socket,
    /// On this host, under the gateway's address.
    outside: Socket,
    /// Only sends.
    sender: Socket,
}

/// What is sent, and what has been seen of it.
struct Check<'a> {
    ends: &'a Ends,
    asker: ProbeIdentity,
    nonce: [u8; NONCE_LEN],
    /// Source port of the segment to this host.
    fresh: u16,
    heard: bool,
    arrived: BTreeSet<Transport>,
}

impl Home {
    /// Leaves out a family whose gateway is not there.
    pub fn open(standin: &StandIn, shape: &Shape) -> Self {
        let pairs = shape.addresses.iter().zip(shape.subnets.iter());
        let opened = pairs.map(|(pod, subnet)| Ends::open(standin, pod, gateway(subnet)));
        let logged = opened.map(|ends| {
            ends.inspect_err(|error| tracing::debug!(%error, "pods and their host: not tried"))
        });
        Self(logged.filter_map(Result::ok).collect())
    }

    /// Waits by `wait`, which says whether to go on; gives nothing if not.
    pub fn run(
        &self,
        mut wait: impl FnMut(&[BorrowedFd<'_>], Duration) -> bool,
    ) -> io::Result<Vec<(Way, TrialResult)>> {
        let mut checks = self.0.iter().map(Check::begin).collect::<io::Result<Vec<_>>>()?;
        checks.iter().for_each(Check::send);
        let until = Instant::now() + TIMEOUT;
        loop {
            let pause = until.saturating_duration_since(Instant::now());
            let fds: Vec<_> = checks.iter().flat_map(|check| check.ends.fds()).collect();
            if !pause.is_zero() && !wait(&fds, pause) {
                return Ok(Vec::new());
            }
            checks.iter_mut().for_each(Check::hear);
            if pause.is_zero() || checks.iter().all(Check::is_done) {
                return Ok(checks.iter().flat_map(Check::seen).collect());
            }
        }
    }
}

impl Ends {
    fn open(standin: &StandIn, pod: IpAddr, gateway: IpAddr) -> io::Result<Self> {
        let family = Family::of(pod);
        let datagrams = |address: IpAddr| {
            let socket = UdpSocket::bind((address, 0))?;
            socket.set_nonblocking(true)?;
            io::Result::Ok(Socket::from(socket))
        };
        let sender = raw_tcp::open(gateway)?;
        // It would be given each segment that comes to this host.
        receive_only(&sender, FilterInput::raw(gateway), &[])?;
        let outside = datagrams(gateway)?;
        standin.inside(|| {
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
    fn begin(ends: &'a Ends) -> io::Result<Self> {
        let [a, b, c, d, ref nonce @ ..] =
            random::<{ NONCE_LEN + 4 }>().map_err(io::Error::other)?;
        let asker = ProbeIdentity { identifier: u16::from_ne_bytes([a, b]), ports: [0; FLOWS] };
        ends.family.filter(&ends.echo, asker, false)?;
        for (socket, transport) in [
            (&ends.inside, Transport::Udp),
            (&ends.outside, Transport::Udp),
            (&ends.segments, Transport::Tcp),
        ] {
            only_with(socket, transport, ends.pod, *nonce)?;
        }
        let fresh = u16::from_ne_bytes([c, d]) | 0x8000;
        let (heard, arrived) = (false, BTreeSet::new());
        Ok(Self { ends, asker, nonce: *nonce, fresh, heard, arrived })
    }

    /// The segment from this host to the pod, or the other way.
    fn segment(&self, from: IpAddr, to: IpAddr) -> Probe {
        let ports = [self.fresh, UNUSED];
        Probe { transport: Transport::Tcp, from, to, ports, nonce: self.nonce }
    }

    /// What cannot be sent is not seen.
    fn send(&self) {
        let Ends { family, pod, gateway, echo, inside, segments, outside, sender } = self.ends;
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

    fn hear(&mut self) {
        let Ends { family, pod, gateway, echo, inside, segments, outside, .. } = self.ends;
        while let Ok(heard) = family.receive(echo, self.asker) {
            self.heard |= heard.is_some_and(|heard| matches!(heard.kind, IcmpKind::Answer(_)));
        }
        let payload = Probe::payload(self.nonce);
        drain(outside, |datagram, _| self.heard |= datagram == payload);
        drain(inside, |datagram, _| {
            if datagram == payload {
                self.arrived.insert(Transport::Udp);
            }
        });
        let to_pod = self.segment(*gateway, *pod);
        // This host refuses the connection, for nothing listens there.
        let refused = [UNUSED, self.fresh].map(u16::to_be_bytes).concat();
        drain(segments, |packet, _| {
            let segment = raw_tcp::segment(*pod, packet).unwrap_or_default();
            self.heard |= segment.starts_with(&refused);
            if to_pod.is(segment) {
                self.arrived.insert(Transport::Tcp);
            }
        });
    }

    fn is_done(&self) -> bool {
        self.heard && self.arrived.len() == Transport::ALL.len()
    }

    fn seen(&self) -> Vec<(Way, TrialResult)> {
        let ipv4 = self.ends.pod.is_ipv4();
        let verdict = |is_there| if is_there { TrialResult::Passed } else { TrialResult::Lost };
        let from_host = Transport::ALL.map(|transport| {
            let arrived = verdict(self.arrived.contains(&transport));
            (Way { direction: Direction::FromHost(transport), ipv4 }, arrived)
        });
        let to_host = Way { direction: Direction::ToHost, ipv4 };
        from_host.into_iter().chain([(to_host, verdict(self.heard))]).collect()
    }
}
