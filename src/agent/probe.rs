//! The loop's side of the data path probe: requests out, answers in, and what follows for the kernel.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::Interest, net::UdpSocket, sync::mpsc};

use super::{Agent, ping::milliseconds};
use crate::{
    api::PathStatus,
    core::Liveness,
    dataplane::{
        desired::Way,
        offload::Offload,
        paths::{Kind, LOOK, Paths, Subject},
    },
    icmp::{self, Asker, Family, Heard, What},
    model::{NodeId, PathState},
};

/// What was heard and waits for the loop; more is shed.
const QUEUE: usize = 256;
/// A port at which nobody waits for datagrams, as traceroute has it.
const NOBODY: u16 = 33_434;

/// What cures it, for the log.
const TRIAL: &str = "with checksums filled in by the kernel";

/// The sockets, if there are any, and what is known by them.
pub(super) struct Prober {
    inet: Option<Sockets>,
    inet6: Option<Sockets>,
    paths: Paths,
    offload: Offload,
    look_at: Instant,
    /// The goal of the kernel, and the hash of gossip's opinions, that `paths` was told of.
    told: Option<(u64, u64)>,
    /// Whether requests of others are heard, too.
    hears_requests: bool,
}

/// Of one family.
struct Sockets {
    family: Family,
    echoes: Arc<UdpSocket>,
    /// Never read: what is said of its datagrams is heard by the other one.
    datagrams: std::net::UdpSocket,
    asker: Asker,
}

impl Prober {
    /// Opens the sockets, each read by a task; without the privilege nobody is probed, and nobody withdrawn.
    pub(super) fn start(
        identifier: u16,
        withdraw_after: Option<Duration>,
    ) -> (Self, mpsc::Receiver<Heard>) {
        let (heard, receiver) = mpsc::channel(QUEUE);
        let start = |family: Family| {
            let opened = Sockets::open(family, identifier)
                .inspect_err(|error| tracing::debug!(?family, %error, "no socket to probe with"));
            let sockets = opened.ok()?;
            tokio::spawn(read(family, sockets.echoes.clone(), sockets.asker, heard.clone()));
            Some(sockets)
        };
        let (inet, inet6) = (start(Family::Inet), start(Family::Inet6));
        let blind = inet.is_none() && inet6.is_none();
        if blind {
            tracing::warn!("the overlay is not probed: that takes CAP_NET_RAW");
        }
        let paths = Paths::new(withdraw_after.filter(|_| !blind));
        let (offload, look_at) = (Offload::default(), Instant::now());
        (Self { inet, inet6, paths, offload, look_at, told: None, hears_requests: true }, receiver)
    }

    /// How the checksum offload should be on the device; none, if that is not our business.
    pub(super) const fn wanted_offload(&self) -> Option<bool> {
        self.offload.wanted()
    }

    pub(super) fn next_sequence(&mut self) -> u16 {
        self.paths.next_sequence()
    }

    /// Asks for an echo.
    pub(super) fn send(&self, to: IpAddr, sequence: u16, payload: usize) -> io::Result<usize> {
        let Sockets { family, echoes, asker, .. } = self.sockets(to)?;
        let packet = family.request(asker.identifier, sequence, payload);
        echoes.try_send_to(&packet, SocketAddr::new(to, 0))
    }

    fn send_datagram(&self, to: IpAddr) -> io::Result<usize> {
        self.sockets(to)?.datagrams.send_to(&[], SocketAddr::new(to, NOBODY))
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
        let any = match family {
            Family::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let datagrams = std::net::UdpSocket::bind((any, 0))?;
        datagrams.set_nonblocking(true)?;
        // As little as the kernel allows, for nobody reads it.
        socket2::SockRef::from(&datagrams).set_recv_buffer_size(0)?;
        let asker = Asker { identifier, port: datagrams.local_addr()?.port() };
        family.filter(&raw, asker, true)?;
        // To tokio it is like any socket that sends and receives packets.
        let echoes = Arc::new(UdpSocket::from_std(raw.into())?);
        Ok(Self { family, echoes, datagrams, asker })
    }
}

async fn read(family: Family, socket: Arc<UdpSocket>, asker: Asker, heard: mpsc::Sender<Heard>) {
    while !heard.is_closed() {
        let next = || family.receive(&*socket, asker);
        match socket.async_io(Interest::READABLE, next).await {
            // A loop that is busy sheds it, as a network would.
            Ok(message) => _ = message.map(|message| heard.try_send(message)),
            Err(error) => tracing::debug!(%error, "ICMP not read"),
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
            self.judge_offload();
        }
        let now = self.clock.now();
        while let Some(probe) = self.prober.paths.poll(now) {
            let full = self.underlay.mtu.saturating_sub(Family::of(probe.to).headers());
            let sent = match probe.kind {
                Kind::Small => self.prober.send(probe.to, probe.sequence, icmp::SMALL),
                Kind::Full => self.prober.send(probe.to, probe.sequence, full as usize),
                Kind::Datagram => self.prober.send_datagram(probe.to),
            };
            // What cannot be sent is not answered.
            if let Err(error) = sent {
                tracing::trace!(to = %probe.to, %error, "probe not sent");
            }
        }
        self.prober.listen();
    }

    pub(super) fn on_heard(&mut self, heard: Heard) {
        let now = self.clock.now();
        match heard.what {
            What::Answer(sequence) if self.on_ping_answer(heard.from, sequence) => return,
            What::Answer(sequence) => {
                let elsewhere = self.kernel.device.is_some_and(|device| device != heard.interface);
                self.prober.paths.on_answer(now, heard.from, sequence, elsewhere);
            }
            What::Request => self.prober.paths.on_request(now, heard.from),
            What::Refusal => self.prober.paths.on_refusal(now, heard.from),
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
        let news = in_use.is_none().then(|| (self.kernel.goals, self.node.opinions_hash()));
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

    /// Where datagrams do not arrive through the tunnel, though echoes do, tries without checksum offload.
    fn judge_offload(&mut self) {
        let now = self.clock.now();
        let mut deaf = self.prober.paths.deaf();
        deaf.retain(|node| self.has_tunnel(*node));
        let Prober { offload, paths, .. } = &mut self.prober;
        let (before, was_guilty) = (offload.wanted(), offload.is_guilty());
        let is_on = self.kernel.checksum_offload;
        if let Some(peers) = offload.conclude(now, is_on, deaf, |node| paths.datagrams(node)) {
            tracing::info!(
                peers = peers.len(),
                "echoes come back and datagrams do not: trying {TRIAL}"
            );
            paths.ask_anew(now, &peers);
        } else if offload.is_guilty() && !was_guilty {
            tracing::warn!(
                "packets whose checksums were left to the network card did not arrive: {TRIAL} from now on"
            );
            self.count_repair("checksum offload", 1);
        }
        if self.prober.offload.wanted() != before {
            self.program();
        }
    }

    fn has_tunnel(&self, node: NodeId) -> bool {
        let peer = self.kernel.wanted.as_ref().and_then(|view| view.peers.get(&node));
        let first = peer.and_then(|peer| Some((peer.vtep.underlay, peer.leases.first()?.1.first)));
        let underlay = self.underlay.with_mode(self.config.mode);
        first.is_some_and(|(there, subnet)| matches!(underlay.way(there, subnet), Way::Overlay(_)))
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

    pub(super) fn path_statuses(&self) -> Vec<PathStatus> {
        let status =
            |(node, state, round_trip): (NodeId, PathState, Option<Duration>)| PathStatus {
                node,
                name: self.node.name_of(node).to_owned(),
                state,
                round_trip_ms: round_trip.map(milliseconds),
                underlay_round_trip_ms: self.transport.round_trip(node).map(milliseconds),
                problem: self.path_problem(node, state),
            };
        self.path_states().map(status).collect()
    }

    /// The way to each peer with a subnet, and how long the last answer took.
    pub(super) fn path_states(
        &self,
    ) -> impl Iterator<Item = (NodeId, PathState, Option<Duration>)> + '_ {
        self.prober.paths.states(self.clock.now())
    }

    /// What is wrong, and what helps.
    pub(super) fn path_problem(&self, node: NodeId, state: PathState) -> Option<String> {
        let view = self.kernel.wanted.as_ref()?;
        let peer = view.peers.get(&node)?;
        let (there, here) = (peer.vtep.underlay, view.own.vtep.underlay);
        let (port, name) = (view.settings.vxlan_port, self.node.name_of(node));
        let (_, subnets) = peer.leases.first()?;
        let lost = matches!(state, PathState::Blocked | PathState::OneWay);
        let underlay = self.underlay.with_mode(self.config.mode);
        let ways: Vec<Way> = subnets.iter().map(|subnet| underlay.way(there, subnet)).collect();
        match ways[0] {
            Way::Unreachable => {
                return Some(format!(
                    "{name} ({there}) is not on this host's underlay network, and mode host-gw uses no \
                     tunnels: use mode = \"direct\" on all nodes"
                ));
            }
            _ if ways.contains(&Way::Unreachable) => {
                return Some(format!(
                    "the IPv6 subnet of {name} is unreachable: mode host-gw cannot route it by its underlay \
                     address {there}; use mode = \"direct\" on all nodes"
                ));
            }
            Way::Direct { .. } if lost => {
                return Some(format!(
                    "packets to {name} go to {there} without a tunnel, and are lost: let the underlay carry \
                     {} (in a cloud: turn off its check of source and destination), or use mode = \"vxlan\"",
                    view.settings.pool.network()
                ));
            }
            // Whoever is spoken to directly may answer as it likes.
            Way::Direct { .. } if state == PathState::Asymmetric => return None,
            _ => {}
        }
        match state {
            PathState::Blocked => Some(format!(
                "the tunnel to {name} is blocked, though its agent answers: allow UDP {port} from {here} to \
                 {there} and back"
            )),
            PathState::OneWay => Some(format!(
                "packets to {name} are lost, those from it arrive: allow UDP {port} from {here} to {there}"
            )),
            PathState::Asymmetric => Some(format!(
                "packets to {name} go through the tunnel, and its answers come without: another route or \
                 another mode leads it here (there: ip route get {}); rp_filter and firewalls may drop that",
                view.own.subnets.first.network()
            )),
            PathState::MtuTooLarge => Some(format!(
                "packets of {} bytes to {name} are lost, small ones arrive: some link between {here} and \
                 {there} carries less than this host's; set a smaller mtu on all nodes",
                self.underlay.mtu
            )),
            _ => None,
        }
    }
}
