//! The event loop's side of the path probe: it sends requests, receives answers, and applies the results to
//! the kernel's desired state.

mod offload;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::libc::EPERM;
use tokio::{io::Interest, net::UdpSocket, sync::mpsc};

use crate::{
    agent::{Agent, diagnosis::auditor::Routing},
    core::Liveness,
    datagram,
    dataplane::{
        desired::RouteTarget,
        offload::OffloadTrials,
        path_mtu_reports::Reports,
        paths::{CHECK_INTERVAL, FLOWS, Kind, Paths, ProbedPeer, Responder},
    },
    icmp::{self, Family, IcmpEvent, IcmpKind, ProbeIdentity},
    model::NodeId,
    probe_packet,
};

/// Limit of received packets that wait for the event loop; further ones are dropped.
const EVENT_QUEUE_LEN: usize = 256;
/// Age from which an earlier count of packets is not compared any more.
const MAX_COUNT_AGE: Duration = Duration::from_secs(3);
/// Bytes in the largest UDP payload (RFC 768), less an IPv6 header.
const DATAGRAM_MAX: u32 = 65_487;

/// The sockets, where they could be opened, and what the probe knows.
pub(in crate::agent) struct Prober {
    inet: Option<Sockets>,
    inet6: Option<Sockets>,
    /// The state of the path to each peer.
    pub(in crate::agent) paths: Paths,
    /// What routers report about path MTUs.
    pub(in crate::agent) reports: Reports,
    /// The trial of checksum offload.
    offload: OffloadTrials,
    /// When to update the paths next.
    check_at: Instant,
    /// The version of the desired state, and the hash of gossip's opinions, that `paths` was last updated
    /// with.
    paths_version: Option<(u64, u64)>,
    /// Whether requests of peers are received too.
    receives_requests: bool,
    /// Packets received from the agents of unanswering peers, at the last check.
    received: BTreeMap<NodeId, u64>,
    /// Peers without answers to which the kernel refused to send the last probe (EPERM).
    pub(in crate::agent) refused: BTreeSet<NodeId>,
    /// Tunnel packets counted per member, and when.
    packet_counts: Option<(Instant, BTreeMap<IpAddr, u64>)>,
}

/// The sockets of one address family.
struct Sockets {
    family: Family,
    /// Raw ICMP socket.
    echoes: Arc<UdpSocket>,
    /// One socket for each flow.
    datagrams: [Arc<UdpSocket>; FLOWS],
    identity: ProbeIdentity,
}

impl Prober {
    /// Opens the sockets, and starts a task that reads each. Without the privilege (`CAP_NET_RAW`) no peer is
    /// probed or withdrawn.
    pub(in crate::agent) fn start(
        identifier: u16,
        withdraw_after: Option<Duration>,
    ) -> (Self, mpsc::Receiver<IcmpEvent>) {
        let (events, receiver) = mpsc::channel(EVENT_QUEUE_LEN);
        let start = |family: Family| {
            let opened = Sockets::open(family, identifier)
                .inspect_err(|error| tracing::debug!(?family, %error, "probe socket not opened"));
            let sockets = opened.ok()?;
            tokio::spawn(read_echoes(
                family,
                sockets.echoes.clone(),
                sockets.identity,
                events.clone(),
            ));
            for datagrams in &sockets.datagrams {
                tokio::spawn(read_datagrams(datagrams.clone(), sockets.identity, events.clone()));
            }
            Some(sockets)
        };
        let (inet, inet6) = (start(Family::Inet), start(Family::Inet6));
        let has_no_sockets = inet.is_none() && inet6.is_none();
        if has_no_sockets {
            tracing::warn!("overlay not probed: CAP_NET_RAW is missing");
        }
        let paths = Paths::new(withdraw_after.filter(|_| !has_no_sockets));
        let prober = Self {
            inet,
            inet6,
            paths,
            reports: Reports::default(),
            offload: OffloadTrials::default(),
            check_at: Instant::now(),
            paths_version: None,
            receives_requests: true,
            received: BTreeMap::new(),
            refused: BTreeSet::new(),
            packet_counts: None,
        };
        (prober, receiver)
    }

    /// Returns whether the device should use checksum offload; `None` if that is left as it is.
    pub(super) const fn wanted_offload(&self) -> Option<bool> {
        self.offload.wanted()
    }

    /// Whether packets whose checksums are left to the network card get lost.
    pub(in crate::agent) const fn is_offload_guilty(&self) -> bool {
        self.offload.is_broken()
    }

    /// Returns the next sequence number of a request.
    pub(in crate::agent) fn next_sequence(&mut self) -> u16 {
        self.paths.next_sequence()
    }

    /// Sends an echo request with a payload of this many bytes, from the given address of this host, if any.
    ///
    /// # Errors
    /// Fails when there is no socket of the family, or the kernel refuses the packet.
    pub(in crate::agent) fn send(
        &self,
        to: IpAddr,
        from: Option<IpAddr>,
        sequence: u16,
        payload: usize,
    ) -> io::Result<usize> {
        let Sockets { family, echoes, identity, .. } = self.sockets(to)?;
        let packet = family.request(identity.identifier, sequence, payload);
        send(echoes, &packet, SocketAddr::new(to, 0), from)
    }

    /// Sends a probe datagram of this many bytes to the agent of a peer.
    fn send_datagram(
        &self,
        to: SocketAddr,
        from: Option<IpAddr>,
        (sequence, flow): (u16, usize),
        size: usize,
    ) -> io::Result<usize> {
        let Sockets { datagrams, identity, .. } = self.sockets(to.ip())?;
        let packet = probe_packet::probe_packet(identity.identifier, sequence, size);
        send(&datagrams[flow % FLOWS], &packet, to, from)
    }

    /// Adapts the socket filters: requests of peers are received while some path is not healthy.
    fn update_filters(&mut self) {
        let requests = !self.paths.are_healthy();
        if std::mem::replace(&mut self.receives_requests, requests) == requests {
            return;
        }
        for Sockets { family, echoes, identity, .. } in self.inet.iter().chain(&self.inet6) {
            if let Err(error) = family.filter(echoes, *identity, requests) {
                tracing::debug!(%error, "ICMP filter not set");
            }
        }
    }

    /// Returns the sockets of the family of an address.
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
        let mut identity = ProbeIdentity { identifier, ports: [0; FLOWS] };
        let mut datagrams = Vec::new();
        for port in &mut identity.ports {
            let socket = datagram::open(family, identifier)?;
            *port = socket.local_addr()?.port();
            datagrams.push(Arc::new(UdpSocket::from_std(socket)?));
        }
        let datagrams = datagrams.try_into().map_err(|_| io::ErrorKind::Other)?;
        family.filter(&raw, identity, true)?;
        // Tokio treats a raw socket like any datagram socket.
        let echoes = Arc::new(UdpSocket::from_std(raw.into())?);
        Ok(Self { family, echoes, datagrams, identity })
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

/// Reads ICMP packets, and sends them to the event loop.
async fn read_echoes(
    family: Family,
    socket: Arc<UdpSocket>,
    identity: ProbeIdentity,
    events: mpsc::Sender<IcmpEvent>,
) {
    while !events.is_closed() {
        let next = || family.receive(&*socket, identity);
        match socket.async_io(Interest::READABLE, next).await {
            // A full queue drops the packet, as a network would.
            Ok(message) => _ = message.map(|message| events.try_send(message)),
            Err(error) => tracing::debug!(%error, "ICMP not read"),
        }
    }
}

/// Reads answers to datagrams, and sends them to the event loop.
async fn read_datagrams(
    socket: Arc<UdpSocket>,
    identity: ProbeIdentity,
    events: mpsc::Sender<IcmpEvent>,
) {
    while !events.is_closed() {
        let next = || datagram::receive(&*socket, identity);
        match socket.async_io(Interest::READABLE, next).await {
            Ok(message) => _ = message.map(|message| events.try_send(message)),
            Err(error) => tracing::debug!(%error, "answers to datagrams not read"),
        }
    }
}

impl Agent {
    /// Returns when to probe next; `None` while nothing is probed.
    pub(in crate::agent) fn next_probe(&self) -> Option<Instant> {
        self.prober.inet.as_ref().or(self.prober.inet6.as_ref())?;
        self.kernel.programmed_view()?;
        let due = self.prober.paths.next_due().map(|at| self.clock.instant(at));
        Some(due.map_or(self.prober.check_at, |due| due.min(self.prober.check_at)))
    }

    /// Sends the probes that are due, and updates what follows from earlier ones.
    pub(in crate::agent) fn probe(&mut self) {
        let now = Instant::now();
        let is_check = self.prober.check_at <= now;
        if is_check {
            self.prober.check_at = now + CHECK_INTERVAL;
            self.update_paths();
            self.update_proven_ways();
            self.check_other_signs_of_life();
            self.update_running_hosts();
            self.update_offload();
            self.check_path_mtu_reports();
            self.transport.close_unused(self.node.neighbors());
        }
        self.gossip.receive_drops.look(now, self.transport.receive_buffer());
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
                    self.prober.send_datagram(to, from, (probe.sequence, flow), probe_packet::SIZE)
                }
            };
            if matches!(probe.kind, Kind::Full { less: 0 }) {
                self.fill_underlay(probe.node);
            }
            let errno = sent.as_ref().err().and_then(io::Error::raw_os_error);
            match errno == Some(EPERM) {
                true => self.prober.refused.insert(probe.node),
                false => self.prober.refused.remove(&probe.node),
            };
            // An unsent probe stays without answer.
            if let Err(error) = sent {
                tracing::trace!(to = %probe.to, %error, "probe not sent");
            }
        }
        self.prober.update_filters();
        // Each of these takes a pass over all peers, and suspect peers are probed up to 50 times a second.
        if is_check {
            self.update_forwarder();
            self.update_remote_pods();
            self.refresh_roster();
            self.update_silence_diagnosis();
        }
    }

    /// Sends the host of a peer, outside the tunnel, one datagram as large as the underlay's interface
    /// accepts. A router that would have to fragment it reports its MTU to the kernel, which is queried
    /// later. Tunnel packets are fragmented without a report.
    pub(in crate::agent) fn fill_underlay(&mut self, node: NodeId) {
        let peer = self.kernel.wanted.view.as_ref().and_then(|view| view.peers.get(&node));
        let (Some(peer), Some(gossip)) = (peer, self.node.address_of(node)) else { return };
        let to = SocketAddr::new(peer.vtep.underlay, gossip.port());
        let headers = Family::of(to.ip()).headers();
        let size = self.underlay.carried.saturating_sub(headers).min(DATAGRAM_MAX) as usize;
        let sequence = self.prober.next_sequence();
        if let Err(error) = self.prober.send_datagram(to, None, (sequence, 0), size) {
            tracing::trace!(%to, %error, "underlay not probed");
        }
        self.prober.reports.on_sent(to.ip(), sequence);
    }

    /// Applies a received packet to pings and paths.
    pub(in crate::agent) fn on_icmp_event(&mut self, event: IcmpEvent) {
        let now = self.clock.now();
        let holder = self.prober.paths.holder(event.from);
        let is_direct = holder.is_some_and(|node| self.is_direct(node));
        let by_tunnel = self.kernel.device.index.map(|device| device == event.interface);
        let elsewhere = by_tunnel.is_some_and(|by_tunnel| by_tunnel == is_direct);
        match event.kind {
            IcmpKind::Answer(sequence) if self.on_ping_answer(event.from, sequence) => return,
            IcmpKind::Answer(sequence) => {
                self.prober.paths.on_answer(now, event.from, sequence, elsewhere);
            }
            IcmpKind::Request => self.prober.paths.on_packet(now, event.from, elsewhere),
            IcmpKind::Arrival(sequence) | IcmpKind::Refusal(sequence) => {
                let by = match event.kind {
                    IcmpKind::Arrival(_) => Responder::Agent,
                    _ => Responder::Kernel,
                };
                self.prober.reports.on_answer(now, event.from, sequence);
                self.prober.paths.on_arrival(now, event.from, sequence, by, elsewhere);
            }
        }
        if !self.kernel.wanted.withdrawn_peers.is_empty() {
            self.apply_path_changes();
        }
    }

    /// Records which ways of tunnel packets are known to reach their hosts.
    fn update_proven_ways(&mut self) {
        let (now, paths) = (self.clock.now(), &self.prober.paths);
        let Routing { detours, on_link, .. } = &self.kernel.diagnoses.routing;
        let answered = |host| paths.answered_probe(paths.holder(host)?);
        let is_peer = |host| paths.holder(host).is_some();
        self.kernel.diagnoses.ways.update(now, detours, on_link, answered, is_peer);
    }

    /// Updates the probed peers, and what gossip knows about them.
    pub(super) fn update_paths(&mut self) {
        let Some(view) = &self.kernel.wanted.view else { return };
        let now = self.clock.now();
        let in_use = self.kernel.demand.in_use.as_ref();
        let version =
            in_use.is_none().then(|| (self.kernel.progress.requested, self.node.opinions_hash()));
        if version.is_some() && self.prober.paths_version == version {
            self.prober.paths.update_withdrawn(now);
            return self.apply_path_changes();
        }
        self.prober.paths_version = version;
        let opinions = self.node.opinions();
        let peers = view.peers.iter().filter_map(|(node, peer)| {
            let (_, subnets) = peer.leases.first()?;
            let liveness = opinions.get(node).copied();
            let subject = ProbedPeer {
                node: *node,
                vtep: subnets.first.network(),
                underlay: peer.vtep.underlay,
                liveness,
                // With entries on demand a probe counts as a use, and would keep the entries indefinitely.
                may_probe: in_use.is_none() || self.may_be_withdrawn(*node, liveness),
            };
            in_use.is_none_or(|macs| macs.contains(&peer.vtep.mac)).then_some(subject)
        });
        let peers: Vec<ProbedPeer> = peers.collect();
        self.prober.paths.update(now, peers.into_iter());
        self.apply_path_changes();
    }

    /// Checks peers that do not answer for other signs of life: packets of their agents over the underlay,
    /// and packets from them through the tunnel.
    fn check_other_signs_of_life(&mut self) {
        let unanswering: BTreeSet<NodeId> =
            self.prober.paths.suspects().map(|(node, _)| node).collect();
        let now = self.clock.now();
        self.prober.received.retain(|node, _| unanswering.contains(node));
        self.prober.refused.retain(|node| unanswering.contains(node));
        for node in &unanswering {
            let Some(received) = self.transport.received(*node) else { continue };
            let before = self.prober.received.insert(*node, received);
            let has_sent = before.is_some_and(|before| received > before);
            self.prober.paths.on_agent(now, *node, has_sent, self.transport.round_trip(*node));
        }
        if !unanswering.is_empty() && self.config.firewall.guard {
            self.threads.programmer.count();
        }
    }

    /// Compares the tunnel packets counted per member with the last count: new ones are a sign of life.
    pub(super) fn on_packet_counts(&mut self, counts: BTreeMap<IpAddr, u64>) {
        let at = Instant::now();
        let before = self.prober.packet_counts.replace((at, counts));
        let Some((_, before)) = before.filter(|(then, _)| at.duration_since(*then) < MAX_COUNT_AGE)
        else {
            return;
        };
        let Some((_, counts)) = &self.prober.packet_counts else { return };
        let has_new = |address: &IpAddr| Some(counts.get(address)? > before.get(address)?);
        let alive =
            self.prober.paths.suspects().filter(|(_, address)| has_new(address) == Some(true));
        let alive: Vec<(NodeId, IpAddr)> = alive.collect();
        let now = self.clock.now();
        for (node, address) in alive {
            let elsewhere = self.is_direct(node);
            self.prober.paths.on_packet(now, address, elsewhere);
        }
        self.apply_path_changes();
    }

    /// Returns how packets reach a peer, through the tunnel or directly.
    fn way_to(&self, node: NodeId) -> Option<RouteTarget> {
        let peer = self.kernel.wanted.view.as_ref()?.peers.get(&node)?;
        let (_, subnets) = peer.leases.first()?;
        Some(self.underlay_to(peer.vtep.underlay).way(peer.vtep.underlay, subnets.first))
    }

    /// Whether packets to a peer use the tunnel.
    fn has_tunnel(&self, node: NodeId) -> bool {
        matches!(self.way_to(node), Some(RouteTarget::Overlay(_)))
    }

    /// Whether packets to a peer are routed without the tunnel.
    fn is_direct(&self, node: NodeId) -> bool {
        matches!(self.way_to(node), Some(RouteTarget::Direct { .. }))
    }

    /// Whether a peer reached without the tunnel does not answer.
    pub(in crate::agent) fn is_lost_without_tunnel(&self) -> bool {
        let mut lost = self.path_states().filter(|(_, state, _)| state.is_lost());
        lost.any(|(node, ..)| self.is_direct(node))
    }

    /// Returns the source address of probes to a peer without the tunnel: the VTEP's own, where the kernel
    /// would choose an address of the underlay. Checks of source addresses, on a host or on the way, would
    /// let that pass and drop packets of pods.
    pub(in crate::agent) fn probe_source(&self, node: NodeId) -> Option<IpAddr> {
        self.kernel.device.index.filter(|_| self.is_direct(node))?;
        Some(self.kernel.wanted.view.as_ref()?.own.subnets.first.network())
    }

    /// Whether probing a peer may lead to its withdrawal.
    fn may_be_withdrawn(&self, node: NodeId, liveness: Option<Liveness>) -> bool {
        liveness != Some(Liveness::Alive)
            && self.config.withdraw_after.is_some()
            && !self.kernel.wanted.withdrawn_peers.contains(&node)
    }

    /// Restores the routes to withdrawn peers at once when gossip considers them alive again.
    pub(in crate::agent) fn restore_paths(&mut self) {
        if self.kernel.wanted.withdrawn_peers.iter().any(|node| self.node.is_active(*node)) {
            self.update_paths();
        }
    }

    /// Orders a new desired state when peers become withdrawn or restored.
    fn apply_path_changes(&mut self) {
        self.follow_path_mtus();
        let withdrawn = self.prober.paths.withdrawn();
        if withdrawn == self.kernel.wanted.withdrawn_peers {
            return;
        }
        let name = |node: &NodeId| self.node.name_of(*node).to_owned();
        for node in withdrawn.difference(&self.kernel.wanted.withdrawn_peers) {
            let name = name(node);
            tracing::warn!(%node, name, "peer withdrawn: neither its agent nor its kernel answers");
        }
        for node in self.kernel.wanted.withdrawn_peers.difference(&withdrawn) {
            let name = name(node);
            tracing::info!(%node, name, "peer restored: it answers again, or is no longer a member");
        }
        self.kernel.wanted.withdrawn_peers = withdrawn;
        self.program();
    }
}
