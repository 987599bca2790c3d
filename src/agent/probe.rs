//! The loop's side of the data path probe: requests out, answers in, and what follows for the kernel.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::UdpSocket, sync::mpsc};

use super::Agent;
use crate::{
    api::PathStatus,
    dataplane::paths::{PathState, Paths},
    icmp::{self, Echo},
    model::NodeId,
};

/// What follows from time alone is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// Echoes that wait for the loop; more are shed.
const QUEUE: usize = 256;

/// The socket, if there is one, and what is known by it.
pub(super) struct Prober {
    socket: Option<Arc<UdpSocket>>,
    identifier: u16,
    paths: Paths,
    look_at: Instant,
}

impl Prober {
    /// Opens the socket and reads it in a task; without the privilege nobody is probed, and nobody withdrawn.
    pub(super) fn start(
        identifier: u16,
        withdraw_after: Option<Duration>,
    ) -> (Self, mpsc::Receiver<Echo>) {
        let (echoes, receiver) = mpsc::channel(QUEUE);
        let socket = open().inspect_err(|error| {
            tracing::warn!(%error, "the overlay is not probed: that takes CAP_NET_RAW");
        });
        let socket = socket.ok().map(Arc::new);
        if let Some(socket) = socket.clone() {
            tokio::spawn(read(socket, identifier, echoes));
        }
        let paths = Paths::new(withdraw_after.filter(|_| socket.is_some()));
        (Self { socket, identifier, paths, look_at: Instant::now() }, receiver)
    }
}

/// To tokio it is like any socket that sends and receives packets.
fn open() -> io::Result<UdpSocket> {
    let socket = icmp::open()?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket.into())
}

async fn read(socket: Arc<UdpSocket>, identifier: u16, echoes: mpsc::Sender<Echo>) {
    let mut buffer = [0; icmp::PARSED];
    while !echoes.is_closed() {
        match socket.recv(&mut buffer).await {
            Ok(length) => {
                if let Some(echo) = icmp::parse(identifier, &buffer[..length]) {
                    // A loop that is busy sheds them, as a network would.
                    let _ = echoes.try_send(echo);
                }
            }
            Err(error) => tracing::debug!(%error, "echo not read"),
        }
    }
}

impl Agent {
    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.prober.socket.as_ref()?;
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
        let full = self.underlay.mtu.saturating_sub(icmp::HEADERS) as usize;
        let now = self.clock.now();
        let Prober { socket: Some(socket), identifier, paths, .. } = &mut self.prober else {
            return;
        };
        while let Some(probe) = paths.poll(now) {
            let payload = if probe.full { full } else { icmp::SMALL };
            let packet = icmp::request(*identifier, probe.sequence, payload);
            // What cannot be sent is not answered.
            if let Err(error) = socket.try_send_to(&packet, SocketAddr::new(probe.to.into(), 0)) {
                tracing::trace!(to = %probe.to, %error, "probe not sent");
            }
        }
    }

    pub(super) fn on_echo(&mut self, echo: Echo) {
        let now = self.clock.now();
        match echo.answers {
            Some(sequence) => self.prober.paths.on_answer(now, echo.from, sequence),
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
        let peers = view.peers.iter().filter_map(|(node, peer)| {
            let (_, subnet) = peer.leases.first()?;
            Some((*node, subnet.network(), opinions.get(node).copied()))
        });
        self.prober.paths.update(self.clock.now(), peers);
        self.follow_paths();
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
        let (there, here) = (view.peers.get(&node)?.vtep.underlay, view.own.vtep.underlay);
        let (port, name) = (view.settings.vxlan_port, self.node.name_of(node));
        match state {
            PathState::Blocked => Some(format!(
                "the tunnel to {name} is blocked, though its agent answers: allow UDP {port} from {here} to \
                 {there} and back"
            )),
            PathState::OneWay => Some(format!(
                "packets to {name} are lost, those from it arrive: allow UDP {port} from {here} to {there}"
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
