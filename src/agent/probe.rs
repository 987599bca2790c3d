//! The loop's side of the data path probe: requests out, answers in, and what follows for the kernel.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::Interest, net::UdpSocket, sync::mpsc};

use super::Agent;
use crate::{
    api::PathStatus,
    core::Liveness,
    dataplane::{
        desired::Way,
        paths::{PathState, Paths, Subject},
    },
    icmp::{self, Echo, Family},
    model::NodeId,
};

/// What follows from time alone is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// Echoes that wait for the loop; more are shed.
const QUEUE: usize = 256;

/// The sockets, if there are any, and what is known by them.
pub(super) struct Prober {
    inet: Option<Arc<UdpSocket>>,
    inet6: Option<Arc<UdpSocket>>,
    identifier: u16,
    paths: Paths,
    look_at: Instant,
}

impl Prober {
    /// Opens the sockets, each read by a task; without the privilege nobody is probed, and nobody withdrawn.
    pub(super) fn start(
        identifier: u16,
        withdraw_after: Option<Duration>,
    ) -> (Self, mpsc::Receiver<Echo>) {
        let (echoes, receiver) = mpsc::channel(QUEUE);
        let start = |family: Family| {
            let socket = open(family)
                .inspect_err(|error| tracing::debug!(?family, %error, "no socket to probe with"));
            let socket = Arc::new(socket.ok()?);
            tokio::spawn(read(family, socket.clone(), identifier, echoes.clone()));
            Some(socket)
        };
        let (inet, inet6) = (start(Family::Inet), start(Family::Inet6));
        let blind = inet.is_none() && inet6.is_none();
        if blind {
            tracing::warn!("the overlay is not probed: that takes CAP_NET_RAW");
        }
        let paths = Paths::new(withdraw_after.filter(|_| !blind));
        (Self { inet, inet6, identifier, paths, look_at: Instant::now() }, receiver)
    }

    pub(super) fn next_sequence(&mut self) -> u16 {
        self.paths.next_sequence()
    }

    pub(super) fn send(&self, to: IpAddr, sequence: u16, payload: usize) -> io::Result<usize> {
        let family = Family::of(to);
        let socket = match family {
            Family::Inet => self.inet.as_ref(),
            Family::Inet6 => self.inet6.as_ref(),
        };
        let packet = family.request(self.identifier, sequence, payload);
        socket.ok_or(io::ErrorKind::Unsupported)?.try_send_to(&packet, SocketAddr::new(to, 0))
    }
}

/// To tokio it is like any socket that sends and receives packets.
fn open(family: Family) -> io::Result<UdpSocket> {
    let socket = family.open()?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket.into())
}

async fn read(family: Family, socket: Arc<UdpSocket>, identifier: u16, echoes: mpsc::Sender<Echo>) {
    while !echoes.is_closed() {
        let next = || family.receive(&*socket, identifier);
        match socket.async_io(Interest::READABLE, next).await {
            // A loop that is busy sheds them, as a network would.
            Ok(echo) => _ = echo.map(|echo| echoes.try_send(echo)),
            Err(error) => tracing::debug!(%error, "echo not read"),
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
        }
        let now = self.clock.now();
        while let Some(probe) = self.prober.paths.poll(now) {
            let full = self.underlay.mtu.saturating_sub(Family::of(probe.to).headers());
            let payload = if probe.full { full as usize } else { icmp::SMALL };
            // What cannot be sent is not answered.
            if let Err(error) = self.prober.send(probe.to, probe.sequence, payload) {
                tracing::trace!(to = %probe.to, %error, "probe not sent");
            }
        }
    }

    pub(super) fn on_echo(&mut self, echo: Echo) {
        if self.on_ping_echo(&echo) {
            return;
        }
        let now = self.clock.now();
        match echo.answers {
            Some(sequence) => {
                let elsewhere = self.kernel.device.is_some_and(|device| device != echo.interface);
                self.prober.paths.on_answer(now, echo.from, sequence, elsewhere);
            }
            None => self.prober.paths.on_request(now, echo.from),
        }
        if !self.kernel.withdrawn_peers.is_empty() {
            self.follow_paths();
        }
    }

    /// Tells the probe who there is, and what gossip holds of them.
    pub(super) fn update_paths(&mut self) {
        let Some(view) = &self.kernel.wanted else { return };
        let opinions = self.node.opinions();
        let in_use = self.kernel.demand.in_use.as_ref();
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
        self.prober.paths.update(self.clock.now(), peers.into_iter());
        self.follow_paths();
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
        let states = self.prober.paths.states(self.clock.now());
        let status =
            |(node, state, round_trip): (NodeId, PathState, Option<Duration>)| PathStatus {
                node,
                name: self.node.name_of(node).to_owned(),
                state,
                round_trip_ms: round_trip.map(|span| span.as_secs_f64() * 1000.0),
                problem: self.path_problem(node, state),
            };
        states.map(status).collect()
    }

    /// What is wrong, and what helps.
    fn path_problem(&self, node: NodeId, state: PathState) -> Option<String> {
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
