//! The loop's side of the data path probe: requests out, answers in, and what follows for the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::Interest, net::UdpSocket, sync::mpsc};

use super::Agent;
use crate::{
    api::{EventKind, EventLevel},
    core::Liveness,
    datagram,
    dataplane::{
        desired::Way,
        offload::{Ask, Offload},
        path_mtu_reports::Reports,
        paths::{By, FLOWS, Kind, LOOK, Paths, Subject},
    },
    icmp::{self, Family, IcmpEvent, IcmpKind, ProbeIdentity},
    model::NodeId,
};

/// What was heard and waits for the loop; more is shed.
const QUEUE: usize = 256;
/// Packets counted longer ago than this tell nothing about now.
const COUNTED: Duration = Duration::from_secs(3);
/// Bytes in the largest datagram (RFC 768), less an IPv6 header.
const DATAGRAM_MAX: u32 = 65_487;

/// The sockets, if there are any, and what is known by them.
pub(super) struct Prober {
    inet: Option<Sockets>,
    inet6: Option<Sockets>,
    pub(super) paths: Paths,
    pub(super) reports: Reports,
    offload: Offload,
    look_at: Instant,
    /// The goal of the kernel, and the hash of gossip's opinions, that `paths` was told of.
    told: Option<(u64, u64)>,
    /// Whether requests of others are heard, too.
    hears_requests: bool,
    /// Packets that have come from the agents of peers in doubt, when last looked.
    received: BTreeMap<NodeId, u64>,
    /// Tunnel packets that have come from members, and when they were counted.
    counted: Option<(Instant, BTreeMap<IpAddr, u64>)>,
}

/// Of one family.
struct Sockets {
    family: Family,
    echoes: Arc<UdpSocket>,
    /// One for each flow.
    datagrams: [Arc<UdpSocket>; FLOWS],
    asker: ProbeIdentity,
}

impl Prober {
    /// Opens the sockets, each read by a task; without the privilege nobody is probed, and nobody withdrawn.
    pub(super) fn start(
        identifier: u16,
        withdraw_after: Option<Duration>,
    ) -> (Self, mpsc::Receiver<IcmpEvent>) {
        let (heard, receiver) = mpsc::channel(QUEUE);
        let start = |family: Family| {
            let opened = Sockets::open(family, identifier)
                .inspect_err(|error| tracing::debug!(?family, %error, "no socket to probe with"));
            let sockets = opened.ok()?;
            tokio::spawn(read_echoes(family, sockets.echoes.clone(), sockets.asker, heard.clone()));
            for datagrams in &sockets.datagrams {
                tokio::spawn(read_datagrams(datagrams.clone(), sockets.asker, heard.clone()));
            }
            Some(sockets)
        };
        let (inet, inet6) = (start(Family::Inet), start(Family::Inet6));
        let blind = inet.is_none() && inet6.is_none();
        if blind {
            tracing::warn!("the overlay is not probed: that takes CAP_NET_RAW");
        }
        let paths = Paths::new(withdraw_after.filter(|_| !blind));
        let prober = Self {
            inet,
            inet6,
            paths,
            reports: Reports::default(),
            offload: Offload::default(),
            look_at: Instant::now(),
            told: None,
            hears_requests: true,
            received: BTreeMap::new(),
            counted: None,
        };
        (prober, receiver)
    }

    /// How the checksum offload should be on the device; none, if that is not our business.
    pub(super) const fn wanted_offload(&self) -> Option<bool> {
        self.offload.wanted()
    }

    /// Packets whose checksums were left to the network card do not arrive.
    pub(super) const fn is_offload_guilty(&self) -> bool {
        self.offload.is_guilty()
    }

    pub(super) fn next_sequence(&mut self) -> u16 {
        self.paths.next_sequence()
    }

    /// Asks for an echo, from this address of the host if one is given.
    pub(super) fn send(
        &self,
        to: IpAddr,
        from: Option<IpAddr>,
        sequence: u16,
        payload: usize,
    ) -> io::Result<usize> {
        let Sockets { family, echoes, asker, .. } = self.sockets(to)?;
        let packet = family.request(asker.identifier, sequence, payload);
        send(echoes, &packet, SocketAddr::new(to, 0), from)
    }

    fn send_datagram(
        &self,
        to: SocketAddr,
        from: Option<IpAddr>,
        (sequence, flow): (u16, usize),
        size: usize,
    ) -> io::Result<usize> {
        let Sockets { datagrams, asker, .. } = self.sockets(to.ip())?;
        let question = datagram::probe_packet(asker.identifier, sequence, size);
        send(&datagrams[flow % FLOWS], &question, to, from)
    }

    /// Hears what peers ask where that can tell something.
    fn listen(&mut self) {
        let requests = !self.paths.are_calm();
        if std::mem::replace(&mut self.hears_requests, requests) == requests {
            return;
        }
        for Sockets { family, echoes, asker, .. } in self.inet.iter().chain(&self.inet6) {
            if let Err(error) = family.filter(echoes, *asker, requests) {
                tracing::debug!(%error, "ICMP not filtered");
            }
        }
    }

    fn sockets(&self, to: IpAddr) -> io::Result<&Sockets> {
        let sockets = match Family::of(to) {
            Family::Inet => self.inet.as_ref(),
            Family::Inet6 => self.inet6.as_ref(),
        };
        sockets.ok_or_else(|| io::ErrorKind::Unsupported.into())
    }
}

impl Sockets {
    fn open(family: Family, identifier: u16) -> io::Result<Self> {
        let raw = family.open()?;
        raw.set_nonblocking(true)?;
        let mut asker = ProbeIdentity { identifier, ports: [0; FLOWS] };
        let mut datagrams = Vec::new();
        for port in &mut asker.ports {
            let socket = datagram::open(family, identifier)?;
            *port = socket.local_addr()?.port();
            datagrams.push(Arc::new(UdpSocket::from_std(socket)?));
        }
        let datagrams = datagrams.try_into().map_err(|_| io::ErrorKind::Other)?;
        family.filter(&raw, asker, true)?;
        // To tokio it is like any socket that sends and receives packets.
        let echoes = Arc::new(UdpSocket::from_std(raw.into())?);
        Ok(Self { family, echoes, datagrams, asker })
    }
}

fn send(
    socket: &UdpSocket,
    packet: &[u8],
    to: SocketAddr,
    from: Option<IpAddr>,
) -> io::Result<usize> {
    match from {
        Some(from) => icmp::send_from(socket, packet, to, from),
        None => socket.try_send_to(packet, to),
    }
}

async fn read_echoes(
    family: Family,
    socket: Arc<UdpSocket>,
    asker: ProbeIdentity,
    heard: mpsc::Sender<IcmpEvent>,
) {
    while !heard.is_closed() {
        let next = || family.receive(&*socket, asker);
        match socket.async_io(Interest::READABLE, next).await {
            // A loop that is busy sheds it, as a network would.
            Ok(message) => _ = message.map(|message| heard.try_send(message)),
            Err(error) => tracing::debug!(%error, "ICMP not read"),
        }
    }
}

async fn read_datagrams(
    socket: Arc<UdpSocket>,
    asker: ProbeIdentity,
    heard: mpsc::Sender<IcmpEvent>,
) {
    while !heard.is_closed() {
        let next = || datagram::receive(&*socket, asker);
        match socket.async_io(Interest::READABLE, next).await {
            Ok(message) => _ = message.map(|message| heard.try_send(message)),
            Err(error) => tracing::debug!(%error, "answers to datagrams not read"),
        }
    }
}

impl Agent {
    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.prober.inet.as_ref().or(self.prober.inet6.as_ref())?;
        self.kernel.wanted.as_ref().filter(|_| self.kernel.programmed_once)?;
        let due = self.prober.paths.next_due().map(|at| self.clock.instant(at));
        Some(due.map_or(self.prober.look_at, |due| due.min(self.prober.look_at)))
    }

    pub(super) fn probe(&mut self) {
        let now = Instant::now();
        if self.prober.look_at <= now {
            self.prober.look_at = now + LOOK;
            self.update_paths();
            self.ask_other_witnesses();
            self.judge_offload();
            self.check_path_mtu_reports();
        }
        self.receive_drops.look(now, self.transport.receive_buffer());
        let now = self.clock.now();
        while let Some(probe) = self.prober.paths.poll(now) {
            let from = self.probe_source(probe.node);
            let full = self.underlay.mtu.saturating_sub(Family::of(probe.to).headers());
            let sent = match probe.kind {
                Kind::Small => self.prober.send(probe.to, from, probe.sequence, icmp::SMALL),
                Kind::Full { less } => {
                    let payload = full.saturating_sub(less) as usize;
                    self.prober.send(probe.to, from, probe.sequence, payload)
                }
                Kind::Datagram { flow } | Kind::Flow { flow } => {
                    let port = self.node.address_of(probe.node).map_or(0, |address| address.port());
                    let to = SocketAddr::new(probe.to, port);
                    self.prober.send_datagram(to, from, (probe.sequence, flow), datagram::SIZE)
                }
            };
            if matches!(probe.kind, Kind::Full { less: 0 }) {
                self.fill_underlay(probe.node);
            }
            // What cannot be sent is not answered.
            if let Err(error) = sent {
                tracing::trace!(to = %probe.to, %error, "probe not sent");
            }
        }
        self.prober.listen();
    }

    /// Sends a peer's host one datagram as large as the underlay's interface takes it, without a tunnel. A
    /// router that would have to fragment it tells the kernel, which is asked later. Tunnel packets are
    /// fragmented in silence.
    pub(super) fn fill_underlay(&mut self, node: NodeId) {
        let peer = self.kernel.wanted.as_ref().and_then(|view| view.peers.get(&node));
        let (Some(peer), Some(gossip)) = (peer, self.node.address_of(node)) else { return };
        let to = SocketAddr::new(peer.vtep.underlay, gossip.port());
        let headers = Family::of(to.ip()).headers();
        let size = self.underlay.carried.saturating_sub(headers).min(DATAGRAM_MAX) as usize;
        let sequence = self.prober.next_sequence();
        if let Err(error) = self.prober.send_datagram(to, None, (sequence, 0), size) {
            tracing::trace!(%to, %error, "underlay not probed");
        }
        self.prober.reports.on_asked(to.ip(), sequence);
    }

    pub(super) fn on_icmp_event(&mut self, heard: IcmpEvent) {
        let now = self.clock.now();
        let holder = self.prober.paths.holder(heard.from);
        let is_direct = holder.is_some_and(|node| self.is_direct(node));
        let by_tunnel = self.kernel.device.map(|device| device == heard.interface);
        let elsewhere = by_tunnel.is_some_and(|by_tunnel| by_tunnel == is_direct);
        match heard.kind {
            IcmpKind::Answer(sequence) if self.on_ping_answer(heard.from, sequence) => return,
            IcmpKind::Answer(sequence) => {
                self.prober.paths.on_answer(now, heard.from, sequence, elsewhere);
            }
            IcmpKind::Request => self.prober.paths.on_packet(now, heard.from, elsewhere),
            IcmpKind::Arrival(sequence) => {
                self.prober.reports.on_arrival(now, heard.from, sequence);
                self.prober.paths.on_arrival(now, heard.from, sequence, By::Agent, elsewhere);
            }
            IcmpKind::Refusal(sequence) => {
                self.prober.reports.on_arrival(now, heard.from, sequence);
                self.prober.paths.on_arrival(now, heard.from, sequence, By::Kernel, elsewhere);
            }
        }
        if !self.kernel.withdrawn_peers.is_empty() {
            self.follow_paths();
        }
    }

    /// Tells the probe who there is, and what gossip holds of them.
    pub(super) fn update_paths(&mut self) {
        let Some(view) = &self.kernel.wanted else { return };
        let now = self.clock.now();
        let in_use = self.kernel.demand.in_use.as_ref();
        let news = in_use.is_none().then(|| (self.kernel.requested, self.node.opinions_hash()));
        if news.is_some() && self.prober.told == news {
            self.prober.paths.judge(now);
            return self.follow_paths();
        }
        self.prober.told = news;
        let opinions = self.node.opinions();
        let peers = view.peers.iter().filter_map(|(node, peer)| {
            let (_, subnets) = peer.leases.first()?;
            let liveness = opinions.get(node).copied();
            let subject = Subject {
                node: *node,
                vtep: subnets.first.network(),
                underlay: peer.vtep.underlay,
                liveness,
                // With entries on demand a question is a use, and would keep them for ever.
                ask: in_use.is_none() || self.is_in_doubt(*node, liveness),
            };
            in_use.is_none_or(|macs| macs.contains(&peer.vtep.mac)).then_some(subject)
        });
        let peers: Vec<Subject> = peers.collect();
        self.prober.paths.update(now, peers.into_iter());
        self.follow_paths();
    }

    /// Looks for other signs of life of peers that do not answer: what their agents send over the underlay,
    /// and what comes from them through the tunnel.
    fn ask_other_witnesses(&mut self) {
        let doubted: BTreeSet<NodeId> = self.prober.paths.doubted().map(|(node, _)| node).collect();
        let now = self.clock.now();
        self.prober.received.retain(|node, _| doubted.contains(node));
        for node in &doubted {
            let Some(received) = self.transport.received(*node) else { continue };
            let before = self.prober.received.insert(*node, received);
            let spoke = before.is_some_and(|before| received > before);
            self.prober.paths.on_agent(now, *node, spoke, self.transport.round_trip(*node));
        }
        if !doubted.is_empty() && self.config.firewall.guard {
            self.programmer.count();
        }
    }

    /// Hears how many tunnel packets have come from each member.
    pub(super) fn on_counted(&mut self, counted: BTreeMap<IpAddr, u64>) {
        let at = Instant::now();
        let before = self.prober.counted.replace((at, counted));
        let Some((_, before)) = before.filter(|(then, _)| at.duration_since(*then) < COUNTED)
        else {
            return;
        };
        let Some((_, counted)) = &self.prober.counted else { return };
        let came = |address: &IpAddr| Some(counted.get(address)? > before.get(address)?);
        let heard = self.prober.paths.doubted().filter(|(_, address)| came(address) == Some(true));
        let heard: Vec<(NodeId, IpAddr)> = heard.collect();
        let now = self.clock.now();
        for (node, address) in heard {
            let elsewhere = self.is_direct(node);
            self.prober.paths.on_packet(now, address, elsewhere);
        }
        self.follow_paths();
    }

    /// Where datagrams do not arrive through the tunnel, though echoes do, tries without checksum offload.
    fn judge_offload(&mut self) {
        let now = self.clock.now();
        let mut deaf = self.prober.paths.deaf();
        deaf.retain(|node| self.has_tunnel(*node));
        // Unless the kernel has what was last ordered, it is not known how it is.
        let is_settled = self.kernel.answered == self.kernel.requested;
        let is_on = self.kernel.checksum_offload.filter(|_| is_settled);
        let Prober { offload, paths, .. } = &mut self.prober;
        let (before, was_guilty) = (offload.wanted(), offload.is_guilty());
        if let Some(Ask { peers, count }) =
            offload.conclude(now, is_on, deaf, |node| paths.tally(node))
        {
            paths.ask_datagrams(now, &peers, count);
        }
        let (wanted, is_guilty) = (offload.wanted(), offload.is_guilty());
        if is_guilty != was_guilty {
            self.tell_of_offload(is_guilty);
        }
        if wanted != before {
            tracing::info!(
                ?wanted,
                "checksum offload is tried: echoes came back, datagrams did not"
            );
            self.program();
        }
    }

    fn tell_of_offload(&mut self, is_guilty: bool) {
        let (level, text) = match is_guilty {
            true => (
                EventLevel::Warn,
                "packets whose checksums were left to the network card do not arrive: checksum offload is \
                 turned off on this host's tunnel device",
            ),
            false => (
                EventLevel::Info,
                "packets whose checksums are left to the network card arrive again: checksum offload is \
                 turned on again",
            ),
        };
        tracing::warn!("{text}");
        self.journal.note(EventKind::Path, level, text.to_owned());
    }

    fn way_to(&self, node: NodeId) -> Option<Way> {
        let peer = self.kernel.wanted.as_ref()?.peers.get(&node)?;
        let (_, subnets) = peer.leases.first()?;
        Some(self.underlay.with_mode(self.config.mode).way(peer.vtep.underlay, subnets.first))
    }

    fn has_tunnel(&self, node: NodeId) -> bool {
        matches!(self.way_to(node), Some(Way::Overlay(_)))
    }

    fn is_direct(&self, node: NodeId) -> bool {
        matches!(self.way_to(node), Some(Way::Direct { .. }))
    }

    /// Whether nothing is answered by some peer that is spoken to directly.
    pub(super) fn is_lost_without_tunnel(&self) -> bool {
        let mut lost = self.path_states().filter(|(_, state, _)| self.is_lost(*state));
        lost.any(|(node, ..)| self.is_direct(node))
    }

    /// Without a tunnel the kernel takes an address of the underlay. What checks source addresses, at a host
    /// or on the way, then lets pass what it would drop of pods.
    pub(super) fn probe_source(&self, node: NodeId) -> Option<IpAddr> {
        self.kernel.device.filter(|_| self.is_direct(node))?;
        Some(self.kernel.wanted.as_ref()?.own.subnets.first.network())
    }

    /// Whether asking a peer could lead to its withdrawal.
    fn is_in_doubt(&self, node: NodeId, liveness: Option<Liveness>) -> bool {
        liveness != Some(Liveness::Alive)
            && self.config.withdraw_after.is_some()
            && !self.kernel.withdrawn_peers.contains(&node)
    }

    /// Whoever gossip holds as alive again is not unreachable for a moment longer.
    pub(super) fn restore_paths(&mut self) {
        if self.kernel.withdrawn_peers.iter().any(|node| self.node.is_active(*node)) {
            self.update_paths();
        }
    }

    fn follow_paths(&mut self) {
        self.follow_path_mtus();
        let withdrawn = self.prober.paths.withdrawn();
        if withdrawn == self.kernel.withdrawn_peers {
            return;
        }
        let name = |node: &NodeId| self.node.name_of(*node).to_owned();
        for node in withdrawn.difference(&self.kernel.withdrawn_peers) {
            let name = name(node);
            tracing::warn!(%node, name, "neither its agent nor its kernel answers: unreachable");
        }
        for node in self.kernel.withdrawn_peers.difference(&withdrawn) {
            tracing::info!(%node, name = name(node), "it answers again, or is gone: restored");
        }
        self.kernel.withdrawn_peers = withdrawn;
        self.program();
    }
}
