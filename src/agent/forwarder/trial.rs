//! One trial: packets out of the pod that is the agent's own, packets for it out of the tunnel, and what came
//! of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::{SockRef, Socket};

use super::{
    Peer, Setting,
    capture::Capture,
    carried::Carried,
    finding::Finding,
    pod::{PodSockets, hears_too_large, send_whole},
};
use crate::{
    agent::start::random,
    dataplane::{
        forwarding::{
            Direction, NONCE_LEN, Probe, Transport, TrialResult, TunneledProbe, UNUSED, UNUSED_OUT,
            Way, destination, echo, inner, number, parse,
        },
        paths::FLOWS,
    },
    icmp::{Family, IcmpKind, ProbeIdentity},
    model::Addresses,
    pods::standin::{Shape, StandIn},
};

/// What has not come by then is lost.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Peers that are asked at once.
const ASKED: usize = 3;
/// By so many bytes the pod's own MTU exceeds that of the tunnel.
pub const EXCESS: u32 = 64;
/// No interface carries more.
pub const LARGEST: u32 = 65_535;

/// Those of the pod, and those of this host.
pub struct Sockets(Vec<FamilySockets>);

struct FamilySockets {
    family: Family,
    pod: PodSockets,
    home: Socket,
    /// A second pod, to which the first speaks, and by which it is found.
    mate: Option<(PodSockets, Finding)>,
}

pub struct Trial<'a> {
    pub setting: &'a Setting,
    pub sockets: &'a Sockets,
    /// Whether packets between pods of this host are tried, with IPv4 and with IPv6.
    pub between: [bool; 2],
    /// Another number each time.
    pub turn: usize,
    /// Hosts to which several next hops lead.
    pub spread: BTreeSet<IpAddr>,
}

#[derive(Debug, Default)]
pub struct Outcome {
    pub seen: Vec<(Way, TrialResult)>,
    /// Which address packets leave under in place of the pod's, by whether it is IPv4.
    pub translated: BTreeMap<bool, IpAddr>,
    /// Which address packets arrive at the pod under in place of that of their sender; the same.
    pub arriving: BTreeMap<bool, IpAddr>,
    /// Index of an interface by which tunnel packets with the pod's packets leave, and those of this host's
    /// own programs to the same peer do not.
    pub stray: Option<u32>,
}

/// Packets of one family.
struct Check<'a> {
    sockets: &'a FamilySockets,
    asker: ProbeIdentity,
    /// The number of what this host itself asks.
    own: [u8; NONCE_LEN],
    /// Peers' addresses.
    asked: Vec<IpAddr>,
    /// To the pod, as if they came from one of the peers; none where no peer has a tunnel.
    incoming: Vec<TunneledProbe>,
    /// To all peers, and to the second pod; to nothing where that is not tried.
    outgoing: Vec<Probe>,
    beside: Vec<Probe>,
    /// A peer has answered this host itself.
    answered: bool,
    /// A peer with a tunnel, to which a packet is sent that just fits into it, and has been seen leaving,
    /// and one of this size that does not fit; and whether that was told.
    fitting: Option<(Probe, u32)>,
    fitting_left: bool,
    too_large: Option<(IpAddr, u32)>,
    told: bool,
    /// What was seen on the device, and at the pods.
    left: BTreeSet<Transport>,
    come: BTreeSet<Transport>,
    arrived: BTreeSet<Transport>,
    arrived_beside: BTreeSet<Transport>,
    found_beside: [bool; 2],
    translated: Option<IpAddr>,
    /// The same of what comes in.
    arriving: Option<IpAddr>,
    /// What was seen inside tunnel packets; none where no peer has a tunnel.
    carried: Option<Carried>,
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
            let mate = mate.zip(beside).map(|(mate, to)| {
                let finding = Finding::open(standin, mate, address, to)?;
                io::Result::Ok((PodSockets::open(mate, to)?, finding))
            });
            Ok(FamilySockets { family, pod, home, mate: mate.transpose()? })
        };
        shape.addresses.iter().map(open).collect::<io::Result<_>>().map(Self)
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
        let numbers: Vec<u32> = checks.iter().flat_map(Check::numbers).collect();
        let mut capture = Capture::open(exit, &numbers)?;
        let mut tunnels = Capture::of_tunnels(&numbers)?;
        for check in &checks {
            check.send()?;
            self.inject(check, &tunnel);
        }
        let until = Instant::now() + TIMEOUT;
        loop {
            let pause = until.saturating_duration_since(Instant::now());
            let mut fds: Vec<_> = checks.iter().flat_map(Check::fds).collect();
            fds.extend([&capture, &tunnels].map(|capture| capture.socket().as_fd()));
            if !pause.is_zero() && !wait(&fds, pause) {
                return Ok(None);
            }
            checks.iter_mut().for_each(Check::hear);
            capture.take(|packet, _| checks.iter_mut().for_each(|check| check.on_device(packet)));
            tunnels.take(|packet, link| {
                checks.iter_mut().for_each(|check| _ = check.on_wire(packet, link));
            });
            if pause.is_zero() || checks.iter().all(Check::is_done) {
                let seen = checks.iter().flat_map(Check::seen).collect();
                let by_family = |address: IpAddr| (address.is_ipv4(), address);
                let translated = checks.iter().filter_map(|check| check.translated.map(by_family));
                let arriving = checks.iter().filter_map(|check| check.arriving.map(by_family));
                let (translated, arriving) = (translated.collect(), arriving.collect());
                let stray = checks.iter().find_map(|check| check.carried.as_ref()?.stray());
                return Ok(Some(Outcome { seen, translated, arriving, stray }));
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
            let asker = ProbeIdentity { identifier: u16::from_ne_bytes([a, b]), ports: [0; FLOWS] };
            family.filter(home, asker, false)?;
            let (inwards, outwards, sideways) = (random()?, random()?, random()?);
            let (whole, own) = (random()?, random()?);
            pod.await_only(inwards, &[outwards, sideways])?;
            mate.map_or(Ok(()), |(mate, _)| mate.await_only(sideways, &[]))?;
            // Another port each time, as connections have it.
            let fresh = u16::from_ne_bytes([a, b]) | 0x8000;
            let probe =
                |transport, from, to, ports, nonce| Probe { transport, from, to, ports, nonce };
            // Of a pod's packet that does not fit.
            let carried = self.setting.carried + EXCESS / 2;
            let through = chosen.iter().find(|(peer, _)| peer.tunnelled);
            let incoming = through.into_iter().flat_map(|(peer, vtep)| {
                let ports = [[UNUSED, pod.port], [fresh, UNUSED]];
                Transport::ALL.into_iter().zip(ports).map(|(transport, ports)| TunneledProbe {
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
            let beside = mate.into_iter().flat_map(|(mate, _)| {
                let ports = [[pod.port, mate.port], [fresh, UNUSED]];
                Transport::ALL.into_iter().zip(ports).map(|(transport, ports)| {
                    probe(transport, pod.address, mate.address, ports, sideways)
                })
            });
            checks.push(Check {
                sockets,
                asker,
                own,
                asked: chosen.iter().map(|(_, vtep)| *vtep).collect(),
                incoming: incoming.collect(),
                outgoing: outgoing.collect(),
                beside: beside.collect(),
                answered: false,
                fitting: through.map(|(peer, vtep)| {
                    let ports = [pod.port, UNUSED_OUT];
                    (probe(Transport::Udp, pod.address, *vtep, ports, whole), peer.carried)
                }),
                fitting_left: false,
                too_large: through.filter(|_| carried < LARGEST).map(|(_, vtep)| (*vtep, carried)),
                told: false,
                left: BTreeSet::new(),
                come: BTreeSet::new(),
                arrived: BTreeSet::new(),
                arrived_beside: BTreeSet::new(),
                found_beside: [false; 2],
                translated: None,
                arriving: None,
                carried: through.map(|_| Carried {
                    spread: chosen
                        .iter()
                        .filter(|(peer, _)| self.spread.contains(&peer.underlay))
                        .map(|(_, vtep)| *vtep)
                        .collect(),
                    ..Carried::default()
                }),
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
    fn send(&self) -> io::Result<()> {
        let FamilySockets { family, pod, home, mate } = self.sockets;
        if let (Some((_, finding)), [_, ..]) = (mate, &self.beside[..]) {
            finding.send();
        }
        for (number, to) in self.asked.iter().enumerate() {
            // By its number it is found inside a tunnel packet.
            let payload = Probe::payload(self.own);
            let packet = family.request_with(self.asker.identifier, number as u16, &payload);
            let _ = home.send_to(&packet, &SocketAddr::new(*to, 0).into());
        }
        self.outgoing.iter().chain(&self.beside).try_for_each(|probe| pod.send(probe))?;
        if let Some((probe, size)) = &self.fitting {
            send_whole(&pod.fitting, probe.to, *size, &Probe::payload(probe.nonce));
        }
        if let Some((to, size)) = self.too_large {
            send_whole(&pod.large, to, size, &[]);
        }
        Ok(())
    }

    /// Of packets that are to be seen on this host.
    fn numbers(&self) -> impl Iterator<Item = u32> {
        let incoming = self.incoming.iter().map(|packet| packet.probe.nonce);
        let fitting = self.fitting.iter().map(|(probe, _)| probe.nonce);
        let outgoing = self.outgoing.iter().map(|probe| probe.nonce);
        let all: BTreeSet<_> = outgoing.chain(incoming).chain(fitting).chain([self.own]).collect();
        all.into_iter().map(number)
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let FamilySockets { pod, home, mate, .. } = self.sockets;
        let pods = [pod].into_iter().chain(mate.as_ref().map(|(mate, _)| mate));
        let inside = pods.flat_map(|pod| [pod.datagrams.as_fd(), pod.segments.as_fd()]);
        let finding = mate.iter().map(|(_, finding)| finding.socket().as_fd());
        inside.chain(finding).chain([pod.large.as_fd(), home.as_fd()])
    }

    fn hear(&mut self) {
        let FamilySockets { family, pod, home, mate } = self.sockets;
        while let Ok(heard) = family.receive(home, self.asker) {
            self.answered |= heard.is_some_and(|heard| matches!(heard.kind, IcmpKind::Answer(_)));
        }
        self.told |= hears_too_large(&pod.large);
        // It does not fit, then: a route has a smaller MTU.
        self.fitting.take_if(|_| hears_too_large(&pod.fitting));
        let incoming = self.incoming.iter().map(|packet| &packet.probe);
        let accepts = |probes: &[Probe], segment: &[u8], from: Option<IpAddr>| {
            let mut asked = probes.iter().filter(|probe| from == Some(probe.to));
            asked.any(|probe| probe.is_accepted_by(segment))
        };
        let arriving = pod.hear(incoming, &mut self.arrived, |segment, from| {
            if accepts(&self.outgoing, segment, from) {
                self.left.insert(Transport::Tcp);
            }
            if accepts(&self.beside, segment, from) {
                self.arrived_beside.insert(Transport::Tcp);
            }
        });
        self.arriving = self.arriving.or(arriving);
        if let Some((mate, finding)) = mate {
            mate.hear(self.beside.iter(), &mut self.arrived_beside, |_, _| {});
            finding.hear(&mut self.found_beside);
        }
    }

    fn on_device(&mut self, packet: &[u8]) {
        let address = self.sockets.pod.address;
        let Some((from, transport, segment)) = parse(packet) else { return };
        if from.is_ipv4() != address.is_ipv4() {
            return;
        }
        let is_it = |probe: &Probe| probe.transport == transport && probe.is(segment);
        self.fitting_left |= self.fitting.as_ref().is_some_and(|(probe, _)| is_it(probe));
        if self.outgoing.iter().any(is_it) {
            self.left.insert(transport);
            if let (Some(carried), Transport::Udp) = (&mut self.carried, transport) {
                carried.entered.extend(destination(packet));
            }
            // Datagrams have one port: the kernel remembers how it has translated the ones before.
            let is_new = transport == Transport::Tcp;
            self.translated = self.translated.or((is_new && from != address).then_some(from));
        }
        if self.incoming.iter().any(|packet| is_it(&packet.probe)) {
            self.come.insert(transport);
        }
        let is_accepted = |packet: &TunneledProbe| {
            from == packet.probe.to && packet.probe.is_accepted_by(segment)
        };
        if self.incoming.iter().any(is_accepted) {
            self.arrived.insert(transport);
        }
    }

    /// Of a tunnel packet that leaves by the interface with this index.
    fn on_wire(&mut self, packet: &[u8], link: u32) -> Option<()> {
        let packet = inner(packet)?;
        let (to, carried) = (destination(packet)?, self.carried.as_mut()?);
        let is_of_pod = parse(packet).is_some_and(|(_, transport, segment)| {
            let is_it = |probe: &Probe| probe.transport == transport && probe.is(segment);
            self.outgoing.iter().any(is_it)
        });
        if is_of_pod {
            carried.left.entry(to).or_default().insert(link);
        } else if echo(packet) == Some(self.asker.identifier) {
            carried.own.entry(to).or_default().insert(link);
        }
        Some(())
    }

    fn is_done(&self) -> bool {
        let all = |seen: &BTreeSet<Transport>| seen.len() == Transport::ALL.len();
        if self.carried.as_ref().is_some_and(|carried| carried.seen() == TrialResult::Lost) {
            return false;
        }
        (self.too_large.is_none() || self.told)
            && (self.fitting.is_none() || self.fitting_left)
            && (self.outgoing.is_empty() || all(&self.left))
            && (self.incoming.is_empty() || all(&self.arrived))
            && (self.beside.is_empty()
                || all(&self.arrived_beside) && self.found_beside == [true; 2])
    }

    fn seen(&self) -> Vec<(Way, TrialResult)> {
        let ipv4 = self.sockets.pod.address.is_ipv4();
        let mut seen = Vec::new();
        let mut note = |direction, verdict| seen.push((Way { direction, ipv4 }, verdict));
        if self.carried.is_some() {
            let is_known =
                self.fitting.is_some() && self.answered && self.left.contains(&Transport::Udp);
            let fits = match (self.fitting_left, is_known) {
                (true, _) => TrialResult::Passed,
                (false, true) => TrialResult::Lost,
                (false, false) => TrialResult::Unclear,
            };
            note(Direction::LargeOut, fits);
        }
        if self.too_large.is_some() {
            let told = match (self.told, self.fitting_left) {
                (true, _) => TrialResult::Passed,
                (false, true) => TrialResult::Lost,
                (false, false) => TrialResult::Unclear,
            };
            note(Direction::TooLarge, told);
        }
        if let Some(carried) = &self.carried {
            note(Direction::Carried, carried.seen());
        }
        if !self.beside.is_empty() {
            let is_found = self.found_beside == [true; 2];
            note(
                Direction::NeighborDiscovery,
                if is_found { TrialResult::Passed } else { TrialResult::Lost },
            );
        }
        for transport in Transport::ALL {
            if !self.outgoing.is_empty() {
                // A peer that does not answer this host either may be gone, or answer no echoes.
                let out = match (self.left.contains(&transport), self.answered) {
                    (true, _) => TrialResult::Passed,
                    (false, true) => TrialResult::Lost,
                    (false, false) => TrialResult::Unclear,
                };
                note(Direction::Out(transport), out);
            }
            if !self.incoming.is_empty() {
                let comes =
                    match (self.arrived.contains(&transport), self.come.contains(&transport)) {
                        (true, _) => TrialResult::Passed,
                        (false, true) => TrialResult::Lost,
                        (false, false) => TrialResult::Unclear,
                    };
                note(Direction::In(transport), comes);
            }
            if !self.beside.is_empty() {
                let has_arrived = self.arrived_beside.contains(&transport);
                let between = if has_arrived { TrialResult::Passed } else { TrialResult::Lost };
                note(Direction::Between(transport), between);
            }
        }
        seen
    }
}
