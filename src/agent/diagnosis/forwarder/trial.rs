//! One trial: packets from the agent's own pod, packets to it from the tunnel, and what happens to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::{SockRef, Socket};

use super::{
    Peer, TrialInput,
    capture::Capture,
    carried::Carried,
    pod::{PodSockets, has_too_large_error, send_unfragmented},
    resolution::Resolution,
    setting::{MAX_MTU, MTU_EXCESS},
};
use crate::{
    dataplane::{
        forwarding::{
            Direction, NONCE_LEN, Probe, TrialProtocol, TrialResult, TrialWay, TunneledProbe,
            UNUSED, UNUSED_OUT, destination, echo, inner, number, parse,
        },
        paths::FLOWS,
    },
    icmp::{Family, IcmpKind, ProbeIdentity},
    model::Addresses,
    pods::agent_pod::{AgentPod, Shape},
    random::random,
};

/// Time limit; packets that have not arrived by then are lost.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of peers per trial.
const MAX_PEERS_PER_TRIAL: usize = 3;

/// Sockets of the pods and of this host.
pub struct Sockets(Vec<FamilySockets>);

/// Sockets of one address family.
struct FamilySockets {
    family: Family,
    pod: PodSockets,
    /// Sends this host's own echo requests.
    home: Socket,
    /// A second pod, to which the first one sends packets and address resolution frames.
    second: Option<(PodSockets, Resolution)>,
}

/// The input of one trial.
pub struct Trial<'a> {
    /// Hosts, peers and interfaces.
    pub setting: &'a TrialInput,
    /// The open sockets.
    pub sockets: &'a Sockets,
    /// Whether packets between pods of this host are tested, for IPv4 and IPv6.
    pub between: [bool; 2],
    /// The number of the trial, by which peers are chosen in turn.
    pub turn: usize,
    /// Underlay addresses to which several next hops lead.
    pub spread: BTreeSet<IpAddr>,
}

/// The result of a trial.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The verdict for each way.
    pub seen: Vec<(TrialWay, TrialResult)>,
    /// The source address that replaces the pod's in outgoing packets, by whether it is IPv4.
    pub translated: BTreeMap<bool, IpAddr>,
    /// The source address that replaces the sender's in incoming packets, by whether it is IPv4.
    pub arriving: BTreeMap<bool, IpAddr>,
    /// Index of an interface by which tunnel packets with the pod's packets leave, but no packets of
    /// this host's own programs to the same peer.
    pub stray: Option<u32>,
}

/// Packets of one family and their results.
struct Check<'a> {
    sockets: &'a FamilySockets,
    asker: ProbeIdentity,
    /// Number in this host's own echo requests.
    own: [u8; NONCE_LEN],
    /// Overlay addresses of the chosen peers.
    asked: Vec<IpAddr>,
    /// Packets to the pod with a peer's source address; empty if no peer has a tunnel.
    incoming: Vec<TunneledProbe>,
    /// Packets to all chosen peers.
    outgoing: Vec<Probe>,
    /// Packets to the second pod; empty if those are not tested.
    to_second: Vec<Probe>,
    /// Whether a peer has answered this host's own echo request.
    answered: bool,
    /// A packet that just fits into the tunnel to a peer, with its size in bytes.
    fitting: Option<(Probe, u32)>,
    /// Whether it was captured leaving.
    fitting_left: bool,
    /// Destination and size of a packet that does not fit.
    too_large: Option<(IpAddr, u32)>,
    /// Whether the ICMP error for it arrived.
    error_arrived: bool,
    /// Outgoing packets captured on the device.
    left: BTreeSet<TrialProtocol>,
    /// Incoming packets captured on the device.
    captured_in: BTreeSet<TrialProtocol>,
    /// Incoming packets that arrived at the pod.
    arrived: BTreeSet<TrialProtocol>,
    /// Packets that arrived at the second pod.
    arrived_at_second: BTreeSet<TrialProtocol>,
    /// Address resolution frames that arrived at the second pod.
    resolved_at_second: [bool; 2],
    /// Source address that replaced the pod's.
    translated: Option<IpAddr>,
    /// Source address that replaced the sender's.
    arriving: Option<IpAddr>,
    /// What was captured inside tunnel packets; `None` if no peer has a tunnel.
    carried: Option<Carried>,
}

impl Sockets {
    /// Opens the sockets, with those of a second pod if packets between pods are tested.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened.
    pub fn open(first: &AgentPod, second: Option<&AgentPod>, shape: &Shape) -> io::Result<Self> {
        let open = |address: IpAddr| {
            let family = Family::of(address);
            let pod = PodSockets::open(first, address)?;
            let home = family.open()?;
            home.set_nonblocking(true)?;
            let of_family = |ip: &IpAddr| ip.is_ipv4() == address.is_ipv4();
            let to_second = shape.second_pod.into_iter().flat_map(Addresses::iter).find(of_family);
            let second = second.zip(to_second).map(|(second, to)| {
                let resolution = Resolution::open(first, second, address, to)?;
                io::Result::Ok((PodSockets::open(second, to)?, resolution))
            });
            Ok(FamilySockets { family, pod, home, second: second.transpose()? })
        };
        shape.addresses.iter().map(open).collect::<io::Result<_>>().map(Self)
    }
}

impl Trial<'_> {
    /// Runs the trial. `wait` polls and returns whether to continue; otherwise the result is `None`.
    ///
    /// # Errors
    /// Fails if packets cannot be sent or captured.
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
            checks.iter_mut().for_each(Check::receive);
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

    /// Returns the peers whose turn it is, with their overlay addresses of this family.
    fn chosen_peers(&self, is_ipv4: bool, is_tunnelled: bool) -> Vec<(&Peer, IpAddr)> {
        let is_of_family = |vtep: &&IpAddr| vtep.is_ipv4() == is_ipv4;
        // Packets of a family leave by one device.
        let peers = self.setting.peers.iter().filter(|peer| peer.tunnelled == is_tunnelled);
        let peers = peers.filter_map(|peer| Some((peer, *peer.vteps.iter().find(is_of_family)?)));
        let peers: Vec<(&Peer, IpAddr)> = peers.collect();
        let start = self.turn.wrapping_mul(MAX_PEERS_PER_TRIAL) % peers.len().max(1);
        let count = MAX_PEERS_PER_TRIAL.min(peers.len());
        peers.iter().cycle().skip(start).take(count).copied().collect()
    }

    #[expect(clippy::too_many_lines, reason = "one field for each packet and its result")]
    fn checks(&self, is_tunnelled: bool) -> io::Result<Vec<Check<'_>>> {
        let random = || random::<NONCE_LEN>().map_err(io::Error::other);
        let mut checks = Vec::new();
        for sockets in &self.sockets.0 {
            let FamilySockets { family, pod, home, second } = sockets;
            let is_ipv4 = pod.address.is_ipv4();
            let tries_between = self.between[usize::from(!is_ipv4)];
            let second = second.as_ref().filter(|_| tries_between);
            let chosen = self.chosen_peers(is_ipv4, is_tunnelled);
            if chosen.is_empty() && second.is_none() {
                continue;
            }
            let [a, b, ..] = random()?;
            let asker = ProbeIdentity { identifier: u16::from_ne_bytes([a, b]), ports: [0; FLOWS] };
            family.filter(home, asker, false)?;
            let (inwards, outwards, sideways) = (random()?, random()?, random()?);
            let (whole, own) = (random()?, random()?);
            pod.await_only(inwards, &[outwards, sideways])?;
            second.map_or(Ok(()), |(second, _)| second.await_only(sideways, &[]))?;
            // A different source port each time, as new connections have.
            let fresh = u16::from_ne_bytes([a, b]) | 0x8000;
            let probe =
                |transport, from, to, ports, nonce| Probe { transport, from, to, ports, nonce };
            let of_each = |from, to, ports: [[u16; 2]; 2], nonce| {
                let transports = TrialProtocol::ALL.into_iter().zip(ports);
                transports.map(move |(transport, ports)| probe(transport, from, to, ports, nonce))
            };
            // Size of a packet from the pod that does not fit.
            let carried = self.setting.carried + MTU_EXCESS / 2;
            let through = chosen.iter().find(|(peer, _)| peer.tunnelled);
            let incoming = through.into_iter().flat_map(|(peer, vtep)| {
                let ports = [[UNUSED, pod.port], [fresh, UNUSED]];
                let (vni, macs) = (self.setting.vni, [peer.mac, self.setting.mac]);
                of_each(*vtep, pod.address, ports, inwards).map(move |probe| TunneledProbe {
                    vni,
                    macs,
                    probe,
                })
            });
            let outgoing = chosen.iter().flat_map(|(_, vtep)| {
                let ports = [[pod.port, UNUSED_OUT], [fresh, UNUSED_OUT]];
                of_each(pod.address, *vtep, ports, outwards)
            });
            let to_second = second.into_iter().flat_map(|(second, _)| {
                let ports = [[pod.port, second.port], [fresh, UNUSED]];
                of_each(pod.address, second.address, ports, sideways)
            });
            checks.push(Check {
                sockets,
                asker,
                own,
                asked: chosen.iter().map(|(_, vtep)| *vtep).collect(),
                incoming: incoming.collect(),
                outgoing: outgoing.collect(),
                to_second: to_second.collect(),
                answered: false,
                fitting: through.map(|(peer, vtep)| {
                    let ports = [pod.port, UNUSED_OUT];
                    (probe(TrialProtocol::Udp, pod.address, *vtep, ports, whole), peer.carried)
                }),
                fitting_left: false,
                too_large: through.filter(|_| carried < MAX_MTU).map(|(_, vtep)| (*vtep, carried)),
                error_arrived: false,
                left: BTreeSet::new(),
                captured_in: BTreeSet::new(),
                arrived: BTreeSet::new(),
                arrived_at_second: BTreeSet::new(),
                resolved_at_second: [false; 2],
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

    /// Opens the socket that injects tunnel packets.
    fn tunnel(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((self.setting.local, 0))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.setting.mark {
            SockRef::from(&socket).set_mark(mark)?;
        }
        Ok(socket)
    }

    /// Sends tunnel packets over loopback as if they came from the peer's host.
    fn inject(&self, check: &Check<'_>, tunnel: &UdpSocket) {
        let to = SocketAddr::new(self.setting.local, self.setting.port);
        for packet in &check.incoming {
            // A packet that cannot be sent does not arrive, and is detected that way.
            let _ = tunnel.send_to(&packet.bytes(), to);
        }
    }
}

impl Check<'_> {
    /// Sends all packets of the trial except the injected ones.
    fn send(&self) -> io::Result<()> {
        let FamilySockets { family, pod, home, second } = self.sockets;
        if let (Some((_, resolution)), [_, ..]) = (second, &self.to_second[..]) {
            resolution.send();
        }
        for (number, to) in self.asked.iter().enumerate() {
            // The number in the payload identifies the echo request inside a tunnel packet.
            let payload = Probe::payload(self.own);
            let packet = family.request_with(self.asker.identifier, number as u16, &payload);
            let _ = home.send_to(&packet, &SocketAddr::new(*to, 0).into());
        }
        self.outgoing.iter().chain(&self.to_second).try_for_each(|probe| pod.send(probe))?;
        if let Some((probe, size)) = &self.fitting {
            send_unfragmented(&pod.fitting, probe.to, *size, &Probe::payload(probe.nonce));
        }
        if let Some((to, size)) = self.too_large {
            send_unfragmented(&pod.large, to, size, &[]);
        }
        Ok(())
    }

    /// Returns the numbers of packets to capture on this host.
    fn numbers(&self) -> impl Iterator<Item = u32> {
        let incoming = self.incoming.iter().map(|packet| packet.probe.nonce);
        let fitting = self.fitting.iter().map(|(probe, _)| probe.nonce);
        let outgoing = self.outgoing.iter().map(|probe| probe.nonce);
        let all: BTreeSet<_> = outgoing.chain(incoming).chain(fitting).chain([self.own]).collect();
        all.into_iter().map(number)
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let FamilySockets { pod, home, second, .. } = self.sockets;
        let pods = [pod].into_iter().chain(second.as_ref().map(|(second, _)| second));
        let inside = pods.flat_map(|pod| [pod.datagrams.as_fd(), pod.segments.as_fd()]);
        let resolution = second.iter().map(|(_, resolution)| resolution.socket().as_fd());
        inside.chain(resolution).chain([pod.large.as_fd(), home.as_fd()])
    }

    /// Records what has arrived at the pods and what has answered this host.
    fn receive(&mut self) {
        let FamilySockets { family, pod, home, second } = self.sockets;
        while let Ok(heard) = family.receive(home, self.asker) {
            self.answered |= heard.is_some_and(|heard| matches!(heard.kind, IcmpKind::Answer(_)));
        }
        self.error_arrived |= has_too_large_error(&pod.large);
        // A route with a smaller MTU exists, so the packet is too large and proves nothing.
        self.fitting.take_if(|_| has_too_large_error(&pod.fitting));
        let incoming = self.incoming.iter().map(|packet| &packet.probe);
        let accepts = |probes: &[Probe], segment: &[u8], from: Option<IpAddr>| {
            let mut asked = probes.iter().filter(|probe| from == Some(probe.to));
            asked.any(|probe| probe.is_accepted_by(segment))
        };
        let arriving = pod.receive(incoming, &mut self.arrived, |segment, from| {
            if accepts(&self.outgoing, segment, from) {
                self.left.insert(TrialProtocol::Tcp);
            }
            if accepts(&self.to_second, segment, from) {
                self.arrived_at_second.insert(TrialProtocol::Tcp);
            }
        });
        self.arriving = self.arriving.or(arriving);
        if let Some((second, resolution)) = second {
            second.receive(self.to_second.iter(), &mut self.arrived_at_second, |_, _| {});
            resolution.receive(&mut self.resolved_at_second);
        }
    }

    /// Records a packet captured on the device.
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
            if let (Some(carried), TrialProtocol::Udp) = (&mut self.carried, transport) {
                carried.entered.extend(destination(packet));
            }
            // All datagrams share one port, so the kernel would reuse the translation of earlier ones.
            let is_new = transport == TrialProtocol::Tcp;
            self.translated = self.translated.or((is_new && from != address).then_some(from));
        }
        if self.incoming.iter().any(|packet| is_it(&packet.probe)) {
            self.captured_in.insert(transport);
        }
        let is_accepted = |packet: &TunneledProbe| {
            from == packet.probe.to && packet.probe.is_accepted_by(segment)
        };
        if self.incoming.iter().any(is_accepted) {
            self.arrived.insert(transport);
        }
    }

    /// Records a tunnel packet that leaves by the interface with this index.
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
        let all = |seen: &BTreeSet<TrialProtocol>| seen.len() == TrialProtocol::ALL.len();
        if self.carried.as_ref().is_some_and(|carried| carried.seen() == TrialResult::Lost) {
            return false;
        }
        (self.too_large.is_none() || self.error_arrived)
            && (self.fitting.is_none() || self.fitting_left)
            && (self.outgoing.is_empty() || all(&self.left))
            && (self.incoming.is_empty() || all(&self.arrived))
            && (self.to_second.is_empty()
                || all(&self.arrived_at_second) && self.resolved_at_second == [true; 2])
    }

    /// Returns the verdicts.
    fn seen(&self) -> Vec<(TrialWay, TrialResult)> {
        let ipv4 = self.sockets.pod.address.is_ipv4();
        let mut seen = Vec::new();
        let mut note = |direction, verdict| seen.push((TrialWay { direction, ipv4 }, verdict));
        if self.carried.is_some() {
            let is_known =
                self.fitting.is_some() && self.answered && self.left.contains(&TrialProtocol::Udp);
            let fits = match (self.fitting_left, is_known) {
                (true, _) => TrialResult::Passed,
                (false, true) => TrialResult::Lost,
                (false, false) => TrialResult::Unclear,
            };
            note(Direction::LargeOut, fits);
        }
        if self.too_large.is_some() {
            let error_arrived = match (self.error_arrived, self.fitting_left) {
                (true, _) => TrialResult::Passed,
                (false, true) => TrialResult::Lost,
                (false, false) => TrialResult::Unclear,
            };
            note(Direction::TooLarge, error_arrived);
        }
        if let Some(carried) = &self.carried {
            note(Direction::Carried, carried.seen());
        }
        if !self.to_second.is_empty() {
            let is_found = self.resolved_at_second == [true; 2];
            note(
                Direction::NeighborDiscovery,
                if is_found { TrialResult::Passed } else { TrialResult::Lost },
            );
        }
        for transport in TrialProtocol::ALL {
            if !self.outgoing.is_empty() {
                // A peer that does not answer this host either may be down, or may drop echo requests.
                let out = match (self.left.contains(&transport), self.answered) {
                    (true, _) => TrialResult::Passed,
                    (false, true) => TrialResult::Lost,
                    (false, false) => TrialResult::Unclear,
                };
                note(Direction::Out(transport), out);
            }
            if !self.incoming.is_empty() {
                let comes = match (
                    self.arrived.contains(&transport),
                    self.captured_in.contains(&transport),
                ) {
                    (true, _) => TrialResult::Passed,
                    (false, true) => TrialResult::Lost,
                    (false, false) => TrialResult::Unclear,
                };
                note(Direction::In(transport), comes);
            }
            if !self.to_second.is_empty() {
                let has_arrived = self.arrived_at_second.contains(&transport);
                let between = if has_arrived { TrialResult::Passed } else { TrialResult::Lost };
                note(Direction::Between(transport), between);
            }
        }
        seen
    }
}
