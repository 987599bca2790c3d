//! One trial: packets out of the pod that is the agent's own, packets for it out of the tunnel, and what came
//! of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Peer, Setting, capture::Capture};
use crate::{
    agent::start::random,
    dataplane::{
        forwarding::{
            Direction, NONCE_LEN, Probe, Seen, Transport, Tunnelled, UNUSED, UNUSED_OUT, Way, parse,
        },
        paths::FLOWS,
    },
    icmp::{Asker, Family, SMALL, What, never_fragment},
    model::Addresses,
    pods::standin::{Shape, StandIn},
};

/// What has not come by then is lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// Peers that are asked at once.
const ASKED: usize = 3;
/// More than any packet of a trial has.
const LONGEST: usize = 128;
/// By so many bytes the pod's own MTU exceeds that of the tunnel.
pub const EXCESS: u32 = 64;
/// No interface carries more.
pub const LARGEST: u32 = 65_535;
const EMSGSIZE: i32 = 90;

/// Those of the pod, and those of this host.
pub struct Sockets(Vec<FamilySockets>);

struct FamilySockets {
    family: Family,
    pod: PodSockets,
    home: Socket,
    /// A second pod, to which the first speaks.
    mate: Option<PodSockets>,
}

/// Inside a pod.
struct PodSockets {
    address: IpAddr,
    datagrams: Socket,
    /// Of datagrams.
    port: u16,
    /// All segments of TCP that come to the pod, and those that are written as they are.
    segments: Socket,
    /// Sends what is too large for the tunnel, and hears of it.
    large: UdpSocket,
}

pub struct Trial<'a> {
    pub setting: &'a Setting,
    pub sockets: &'a Sockets,
    /// Whether packets between pods of this host are tried, with IPv4 and with IPv6.
    pub between: [bool; 2],
    /// Another number each time.
    pub turn: usize,
}

#[derive(Debug, Default)]
pub struct Outcome {
    pub seen: Vec<(Way, Seen)>,
    /// Which address packets leave under in place of the pod's, by whether it is IPv4.
    pub translated: BTreeMap<bool, IpAddr>,
}

/// Packets of one family.
struct Check<'a> {
    sockets: &'a FamilySockets,
    asker: Asker,
    /// Peers' addresses.
    asked: Vec<IpAddr>,
    /// To the pod, as if they came from one of the peers; none where no peer has a tunnel.
    incoming: Vec<Tunnelled>,
    /// To all peers, and to the second pod; to nothing where that is not tried.
    outgoing: Vec<Probe>,
    beside: Vec<Probe>,
    /// A peer has answered this host itself.
    answered: bool,
    /// A peer with a tunnel, to which a packet is sent that does not fit into it; and whether that was told.
    too_large: Option<(IpAddr, u32)>,
    told: bool,
    /// What was seen on the device, and at the pods.
    left: BTreeSet<Transport>,
    come: BTreeSet<Transport>,
    arrived: BTreeSet<Transport>,
    arrived_beside: BTreeSet<Transport>,
    translated: Option<IpAddr>,
}

impl Sockets {
    /// With a mate for packets between pods where that is to be tried.
    pub fn open(standin: &StandIn, mate: Option<&StandIn>, shape: &Shape) -> io::Result<Self> {
        let open = |address: IpAddr| {
            let family = Family::of(address);
            let pod = PodSockets::open(standin, address)?;
            let home = family.open()?;
            home.set_nonblocking(true)?;
            let of_family = |ip: &IpAddr| ip.is_ipv4() == address.is_ipv4();
            let beside = shape.mate.into_iter().flat_map(Addresses::iter).find(of_family);
            let mate = mate.zip(beside).map(|(mate, address)| PodSockets::open(mate, address));
            Ok(FamilySockets { family, pod, home, mate: mate.transpose()? })
        };
        shape.addresses.iter().map(open).collect::<io::Result<_>>().map(Self)
    }
}

impl PodSockets {
    fn open(pod: &StandIn, address: IpAddr) -> io::Result<Self> {
        pod.inside(|| {
            let domain = Domain::for_address(SocketAddr::new(address, 0));
            let segments = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
            segments.bind(&SocketAddr::new(address, 0).into())?;
            let any: IpAddr = match address {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let large = UdpSocket::bind((any, 0))?;
            large.set_nonblocking(true)?;
            never_fragment(&large)?;
            let datagrams = UdpSocket::bind((any, 0))?;
            let port = datagrams.local_addr()?.port();
            let datagrams = Socket::from(datagrams);
            for socket in [&datagrams, &segments] {
                socket.set_nonblocking(true)?;
            }
            Ok(Self { address, datagrams, port, segments, large })
        })
    }

    /// What cannot be sent is not seen arriving.
    fn send(&self, probe: &Probe) {
        let _ = match probe.transport {
            Transport::Udp => {
                let to = SocketAddr::new(probe.to, probe.ports[1]);
                self.datagrams.send_to(&Probe::payload(probe.nonce), &to.into())
            }
            Transport::Tcp => {
                let to = SocketAddr::new(probe.to, 0);
                self.segments.send_to(&probe.segment(), &to.into())
            }
        };
    }

    /// What cannot be sent is not told of.
    fn send_too_large(&self, to: IpAddr, size: u32) {
        // What the last trial left is of no interest.
        let _ = self.large.take_error();
        let payload = size.saturating_sub(Family::of(to).headers()) as usize;
        if self.large.connect((to, UNUSED_OUT)).is_ok() {
            let _ = self.large.send(&vec![0; payload]);
        }
    }

    /// Whether this host has told that it was too large.
    fn hears_too_large(&self) -> bool {
        let error = self.large.take_error().ok().flatten();
        error.is_some_and(|error| error.raw_os_error() == Some(EMSGSIZE))
    }

    /// Which of these have arrived.
    fn hear<'a>(
        &self,
        probes: impl Iterator<Item = &'a Probe> + Clone,
        arrived: &mut BTreeSet<Transport>,
    ) {
        drain(&self.datagrams, |payload| {
            let is_it = |probe: &&Probe| {
                probe.transport == Transport::Udp && *payload == Probe::payload(probe.nonce)
            };
            arrived.extend(probes.clone().find(is_it).map(|probe| probe.transport));
        });
        drain(&self.segments, |packet| {
            // With IPv4 it comes with the header before it.
            let segment = match self.address {
                IpAddr::V4(_) => parse(packet).map(|(.., segment)| segment).unwrap_or_default(),
                IpAddr::V6(_) => packet,
            };
            let is_it = |probe: &&Probe| probe.transport == Transport::Tcp && probe.is(segment);
            arrived.extend(probes.clone().find(is_it).map(|probe| probe.transport));
        });
    }
}

fn drain(socket: &Socket, mut give: impl FnMut(&[u8])) {
    let mut buffer = [0; LONGEST];
    let mut source = socket;
    while let Ok(length) = source.read(&mut buffer) {
        give(&buffer[..length]);
    }
}

impl Trial<'_> {
    /// Waits by `wait`, which says whether to go on; gives nothing if not.
    ///
    /// # Errors
    /// What kept packets from being sent, or from being looked at.
    pub fn run(
        &self,
        mut wait: impl FnMut(&[BorrowedFd<'_>], Duration) -> bool,
    ) -> io::Result<Option<Outcome>> {
        let is_tunnelled = self.setting.peers.iter().any(|peer| peer.tunnelled);
        let exit = if is_tunnelled { self.setting.device } else { self.setting.underlay };
        let mut checks = self.checks(is_tunnelled)?;
        let tunnel = self.tunnel()?;
        let mut capture = Capture::open(exit)?;
        checks.iter().for_each(|check| {
            check.send();
            self.inject(check, &tunnel);
        });
        let until = Instant::now() + PATIENCE;
        loop {
            let pause = until.saturating_duration_since(Instant::now());
            let mut fds: Vec<_> = checks.iter().flat_map(Check::fds).collect();
            fds.push(capture.socket().as_fd());
            if !pause.is_zero() && !wait(&fds, pause) {
                return Ok(None);
            }
            checks.iter_mut().for_each(Check::hear);
            capture.take(|packet| checks.iter_mut().for_each(|check| check.on_device(packet)));
            if pause.is_zero() || checks.iter().all(Check::is_done) {
                let seen = checks.iter().flat_map(Check::seen).collect();
                let translated = checks.iter().filter_map(|check| {
                    let address = check.translated?;
                    Some((address.is_ipv4(), address))
                });
                return Ok(Some(Outcome { seen, translated: translated.collect() }));
            }
        }
    }

    fn checks(&self, is_tunnelled: bool) -> io::Result<Vec<Check<'_>>> {
        let random = || random::<NONCE_LEN>().map_err(io::Error::other);
        let mut checks = Vec::new();
        for sockets in &self.sockets.0 {
            let FamilySockets { family, pod, home, mate } = sockets;
            let is_ipv4 = pod.address.is_ipv4();
            let of_family =
                |peer: &Peer| peer.vteps.iter().find(|vtep| vtep.is_ipv4() == is_ipv4).copied();
            // By one device.
            let peers = self.setting.peers.iter().filter(|peer| peer.tunnelled == is_tunnelled);
            let peers: Vec<(&Peer, IpAddr)> =
                peers.filter_map(|peer| Some((peer, of_family(peer)?))).collect();
            let [between4, between6] = self.between;
            let tries_between = if is_ipv4 { between4 } else { between6 };
            let mate = mate.as_ref().filter(|_| tries_between);
            if peers.is_empty() && mate.is_none() {
                continue;
            }
            let start = self.turn.wrapping_mul(ASKED) % peers.len().max(1);
            let chosen: Vec<_> =
                peers.iter().cycle().skip(start).take(ASKED.min(peers.len())).collect();
            let [a, b, ..] = random()?;
            let asker = Asker { identifier: u16::from_ne_bytes([a, b]), ports: [0; FLOWS] };
            family.filter(home, asker, false)?;
            let (inwards, outwards, sideways) = (random()?, random()?, random()?);
            // Another port each time, as connections have it.
            let fresh = u16::from_ne_bytes([a, b]) | 0x8000;
            let probe =
                |transport, from, to, ports, nonce| Probe { transport, from, to, ports, nonce };
            // Of a pod's packet that does not fit.
            let carried = self.setting.carried + EXCESS / 2;
            let through = chosen.iter().find(|(peer, _)| peer.tunnelled);
            let incoming = through.into_iter().flat_map(|(peer, vtep)| {
                let ports = [[UNUSED, pod.port], [fresh, UNUSED]];
                Transport::ALL.into_iter().zip(ports).map(|(transport, ports)| Tunnelled {
                    vni: self.setting.vni,
                    macs: [peer.mac, self.setting.mac],
                    probe: probe(transport, *vtep, pod.address, ports, inwards),
                })
            });
            let outgoing = chosen.iter().flat_map(|(_, vtep)| {
                let ports = [[pod.port, UNUSED_OUT], [fresh, UNUSED_OUT]];
                Transport::ALL
                    .into_iter()
                    .zip(ports)
                    .map(|(transport, ports)| probe(transport, pod.address, *vtep, ports, outwards))
            });
            let beside = mate.into_iter().flat_map(|mate| {
                let ports = [[pod.port, mate.port], [fresh, UNUSED]];
                Transport::ALL.into_iter().zip(ports).map(|(transport, ports)| {
                    probe(transport, pod.address, mate.address, ports, sideways)
                })
            });
            checks.push(Check {
                sockets,
                asker,
                asked: chosen.iter().map(|(_, vtep)| *vtep).collect(),
                incoming: incoming.collect(),
                outgoing: outgoing.collect(),
                beside: beside.collect(),
                answered: false,
                too_large: through.filter(|_| carried < LARGEST).map(|(_, vtep)| (*vtep, carried)),
                told: false,
                left: BTreeSet::new(),
                come: BTreeSet::new(),
                arrived: BTreeSet::new(),
                arrived_beside: BTreeSet::new(),
                translated: None,
            });
        }
        Ok(checks)
    }

    fn tunnel(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((self.setting.local, 0))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.setting.mark {
            SockRef::from(&socket).set_mark(mark)?;
        }
        Ok(socket)
    }

    /// By loopback, as if it came from the peer's host.
    fn inject(&self, check: &Check<'_>, tunnel: &UdpSocket) {
        let to = SocketAddr::new(self.setting.local, self.setting.port);
        for packet in &check.incoming {
            // What cannot be sent is not seen coming.
            let _ = tunnel.send_to(&packet.bytes(), to);
        }
    }
}

impl Check<'_> {
    fn send(&self) {
        let FamilySockets { family, pod, home, .. } = self.sockets;
        for (number, to) in self.asked.iter().enumerate() {
            let packet = family.request(self.asker.identifier, number as u16, SMALL);
            let _ = home.send_to(&packet, &SocketAddr::new(*to, 0).into());
        }
        self.outgoing.iter().chain(&self.beside).for_each(|probe| pod.send(probe));
        if let Some((to, size)) = self.too_large {
            pod.send_too_large(to, size);
        }
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let FamilySockets { pod, home, mate, .. } = self.sockets;
        let pods = [pod].into_iter().chain(mate);
        let inside = pods.flat_map(|pod| [pod.datagrams.as_fd(), pod.segments.as_fd()]);
        inside.chain([pod.large.as_fd(), home.as_fd()])
    }

    fn hear(&mut self) {
        let FamilySockets { family, pod, home, mate } = self.sockets;
        while let Ok(heard) = family.receive(home, self.asker) {
            self.answered |= heard.is_some_and(|heard| matches!(heard.what, What::Answer(_)));
        }
        self.told |= pod.hears_too_large();
        pod.hear(self.incoming.iter().map(|packet| &packet.probe), &mut self.arrived);
        if let Some(mate) = mate {
            mate.hear(self.beside.iter(), &mut self.arrived_beside);
        }
    }

    fn on_device(&mut self, packet: &[u8]) {
        let address = self.sockets.pod.address;
        let Some((from, transport, segment)) = parse(packet) else { return };
        if from.is_ipv4() != address.is_ipv4() {
            return;
        }
        let is_it = |probe: &Probe| probe.transport == transport && probe.is(segment);
        if self.outgoing.iter().any(is_it) {
            self.left.insert(transport);
            // Datagrams have one port: the kernel remembers how it has translated the ones before.
            let is_new = transport == Transport::Tcp;
            self.translated = self.translated.or((is_new && from != address).then_some(from));
        }
        if self.incoming.iter().any(|packet| is_it(&packet.probe)) {
            self.come.insert(transport);
        }
    }

    fn is_done(&self) -> bool {
        let all = |seen: &BTreeSet<Transport>| seen.len() == Transport::ALL.len();
        (self.too_large.is_none() || self.told)
            && (self.outgoing.is_empty() || all(&self.left))
            && (self.incoming.is_empty() || all(&self.arrived))
            && (self.beside.is_empty() || all(&self.arrived_beside))
    }

    fn seen(&self) -> Vec<(Way, Seen)> {
        let ipv4 = self.sockets.pod.address.is_ipv4();
        let mut seen = Vec::new();
        let mut note = |direction, verdict| seen.push((Way { direction, ipv4 }, verdict));
        if self.too_large.is_some() {
            let told = match (self.told, self.left.contains(&Transport::Udp)) {
                (true, _) => Seen::Passed,
                (false, true) => Seen::Lost,
                (false, false) => Seen::Unclear,
            };
            note(Direction::TooLarge, told);
        }
        for transport in Transport::ALL {
            if !self.outgoing.is_empty() {
                // A peer that does not answer this host either may be gone, or answer no echoes.
                let out = match (self.left.contains(&transport), self.answered) {
                    (true, _) => Seen::Passed,
                    (false, true) => Seen::Lost,
                    (false, false) => Seen::Unclear,
                };
                note(Direction::Out(transport), out);
            }
            if !self.incoming.is_empty() {
                let comes =
                    match (self.arrived.contains(&transport), self.come.contains(&transport)) {
                        (true, _) => Seen::Passed,
                        (false, true) => Seen::Lost,
                        (false, false) => Seen::Unclear,
                    };
                note(Direction::In(transport), comes);
            }
            if !self.beside.is_empty() {
                let has_arrived = self.arrived_beside.contains(&transport);
                let between = if has_arrived { Seen::Passed } else { Seen::Lost };
                note(Direction::Between(transport), between);
            }
        }
        seen
    }
}
