//! Whether packets reach each peer: probes sent through the overlay, and their answers.
//!
//! Gossip shows whether a peer's agent answers. The probes show whether its kernel forwards packets, which it
//! also does without an agent. A firewall may drop any single kind of packet, so there are several signs of
//! life: answers to echoes (ICMP), answers to datagrams to the agent's port (from the agent, or a refusal by
//! a kernel without one), and packets that the peer sends unprompted. A peer's subnet is withdrawn only if
//! gossip reports the peer as down, all these signs are missing, and one kind of probe had been answered
//! until then.
//!
//! A state machine without clock or sockets: [`Paths::poll`] returns the probes to send, and the `on_*`
//! methods take what arrives. It does not touch slot ownership.

mod flows;
mod path;
mod replies;
mod running;
mod size_search;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

pub use self::flows::FLOWS;
use self::path::Path;
use crate::model::{Liveness, NodeId, PathState, Time};

/// Interval at which [`Paths::update_withdrawn`] and [`Paths::poll`] must be called.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A call that is later than this after its time means that the process was suspended and missed answers.
const MAX_CHECK_DELAY: Duration = Duration::from_millis(500);
/// Minimum time between two probes to suspect peers, so that probes of a large cluster cost no more than
/// those of a small one.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// Healthy peers are probed in bursts, because each wakeup costs power: number of probes in a burst.
const HEALTHY_BURST: u32 = 8;
/// Time between two bursts. Slightly less than [`CHECK_INTERVAL`], because a check may come a little early.
const HEALTHY_BURST_INTERVAL: Duration = Duration::from_millis(900);

/// A probe to send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The probed peer.
    pub node: NodeId,
    /// Overlay address of the peer's VTEP.
    pub to: IpAddr,
    /// Sequence number, which the answer repeats.
    pub sequence: u16,
    /// What to send.
    pub kind: Kind,
}

/// The kinds of probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A small ICMP echo.
    Small,
    /// An ICMP echo of a size near the overlay's MTU.
    Full {
        /// Bytes less than the overlay's MTU.
        less: u32,
    },
    /// A datagram to the port of the peer's agent. The agent answers it, and a kernel without an agent
    /// refuses it; both require that its checksum is correct.
    Datagram {
        /// Number of the flow, below [`FLOWS`]; it selects the source port.
        flow: usize,
    },
    /// The same datagram, sent to learn whether this flow reaches the peer.
    Flow {
        /// Number of the flow, below [`FLOWS`].
        flow: usize,
    },
}

impl Kind {
    const fn is_datagram(self) -> bool {
        matches!(self, Self::Datagram { .. } | Self::Flow { .. })
    }
}

/// The sender of the answer to a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Responder {
    /// The peer's agent.
    Agent,
    /// The peer's kernel: it refused the datagram, which it does only while no agent runs.
    Kernel,
}

/// A peer as reported by gossip and the view.
#[derive(Clone, Copy, Debug)]
pub struct ProbedPeer {
    /// The peer's node id.
    pub node: NodeId,
    /// Overlay address of its VTEP, at which its kernel answers.
    pub vtep: IpAddr,
    /// Underlay address: the source of its tunnel packets, and of its probes if they arrive without a tunnel.
    pub underlay: IpAddr,
    /// The state reported by gossip; `None` if gossip does not know the node.
    pub liveness: Option<Liveness>,
    /// Whether the peer may be probed. If not, its path keeps its state while gossip reports the same
    /// liveness.
    pub may_probe: bool,
}

/// Results of the datagrams requested by [`Paths::request_datagrams`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of answered datagrams.
    pub answered: u32,
    /// Number of lost datagrams.
    pub lost: u32,
}

/// The paths to all peers.
#[derive(Debug)]
pub struct Paths {
    peers: BTreeMap<NodeId, Path>,
    /// Peers by VTEP and underlay address; `None` if several peers share the address, so that a packet from
    /// it proves nothing.
    by_address: BTreeMap<IpAddr, Option<NodeId>>,
    sequence: u16,
    withdraw_after: Option<Duration>,
    clock: AwakeClock,
    /// Order of the next probes: the queues of suspect and of healthy peers.
    queues: Queues,
    /// Earliest time of the next probe from each queue.
    not_before: [Time; 2],
    /// Number of probes sent in the current burst.
    burst: u32,
}

type Queues = [BTreeSet<(Time, NodeId)>; 2];
const SUSPECT: usize = 0;
const HEALTHY: usize = 1;

/// A clock that leaves out the time during which this process was stopped, for example by a signal, a
/// hypervisor or a suspend. So a probe sent before the stop gets its full timeout afterwards. All times in
/// `Path` are of this clock.
#[derive(Debug, Default)]
struct AwakeClock {
    last_call: Option<Time>,
    stopped: Duration,
}

impl AwakeClock {
    fn advance(&mut self, now: Time) -> Time {
        let pause = self.last_call.map_or(Duration::ZERO, |last_call| now.since(last_call));
        if pause > CHECK_INTERVAL + MAX_CHECK_DELAY {
            self.stopped += pause;
        }
        self.last_call = Some(now);
        self.at(now)
    }

    fn at(&self, now: Time) -> Time {
        Time::ZERO + now.since(Time::ZERO + self.stopped)
    }
}

impl Paths {
    /// Creates an empty set of paths. With `withdraw_after: None`, no peer is ever withdrawn.
    pub fn new(withdraw_after: Option<Duration>) -> Self {
        Self {
            peers: BTreeMap::new(),
            by_address: BTreeMap::new(),
            sequence: 0,
            not_before: [Time::ZERO; 2],
            burst: 0,
            withdraw_after,
            clock: AwakeClock::default(),
            queues: Queues::default(),
        }
    }

    /// Replaces the set of peers.
    pub fn update(&mut self, now: Time, peers: impl Iterator<Item = ProbedPeer>) {
        let at = self.clock.advance(now);
        let mut known_peers = std::mem::take(&mut self.peers);
        self.by_address.clear();
        self.queues = Queues::default();
        for ProbedPeer { node, vtep, underlay, liveness, may_probe } in peers {
            let known = known_peers.remove(&node).filter(|path| path.address == vtep);
            let mut path = known.unwrap_or_else(|| Path::new(at, vtep));
            path.underlay = underlay;
            path.set_liveness(at, liveness);
            path.may_probe = may_probe;
            if let Some((queue, due)) = path.queue_position() {
                self.queues[queue].insert((due, node));
            }
            self.peers.insert(node, path);
            for address in [vtep, underlay] {
                let of_one = |holder: &mut Option<NodeId>| *holder = holder.filter(|n| *n == node);
                self.by_address.entry(address).and_modify(of_one).or_insert(Some(node));
            }
        }
        self.update_withdrawn(now);
    }

    /// Returns the next probe, if one is due.
    pub fn poll(&mut self, now: Time) -> Option<Probe> {
        let at = self.clock.advance(now);
        let mut candidates = [SUSPECT, HEALTHY].into_iter().filter_map(|queue| self.next_of(queue));
        let (_, node) = candidates.find(|(due, _)| *due <= at)?;
        let sequence = self.next_sequence();
        let (probe, is_healthy) = self.update_path(node, |path| {
            let (kind, to) = (path.next_probe(at, sequence), path.address);
            (Probe { node, to, sequence, kind }, path.is_healthy())
        })?;
        self.burst = (self.burst + u32::from(is_healthy)) % HEALTHY_BURST;
        match (is_healthy, self.burst) {
            (false, _) => self.not_before[SUSPECT] = at + MIN_PROBE_INTERVAL,
            (true, 0) => self.not_before[HEALTHY] = at + HEALTHY_BURST_INTERVAL,
            (true, _) => {}
        }
        Some(probe)
    }

    /// Returns whether all peers are healthy, so that their own probes give no additional information.
    pub fn are_healthy(&self) -> bool {
        self.queues[SUSPECT].is_empty()
    }

    /// Returns a sequence number for a request made elsewhere, distinct from those of pending probes.
    pub const fn next_sequence(&mut self) -> u16 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Returns when [`Paths::poll`] must be called for a suspect peer, before the next [`CHECK_INTERVAL`]
    /// ends.
    pub fn next_due(&self) -> Option<Time> {
        Some(self.next_of(SUSPECT)?.0 + self.clock.stopped)
    }

    /// Returns the next peer of a queue, and when its probe is due.
    fn next_of(&self, queue: usize) -> Option<(Time, NodeId)> {
        let (due, node) = self.queues[queue].first()?;
        Some((*due.max(&self.not_before[queue]), *node))
    }

    /// Records an echo reply from a peer's kernel. `diverted`: it arrived by another interface than the
    /// overlay's.
    pub fn on_answer(&mut self, now: Time, from: IpAddr, sequence: u16, diverted: bool) {
        self.update_path_at(now, from, |path, at| path.on_echo(at, sequence, diverted));
    }

    /// Records the answer to a datagram. `diverted`: it arrived by another interface than the overlay's.
    pub fn on_arrival(
        &mut self,
        now: Time,
        from: IpAddr,
        sequence: u16,
        by: Responder,
        diverted: bool,
    ) {
        self.update_path_at(now, from, |path, at| path.on_arrival(at, sequence, by, diverted));
    }

    /// Records a packet that a peer sent unprompted. `diverted`: it arrived by another way than packets to
    /// the peer take.
    pub fn on_packet(&mut self, now: Time, from: IpAddr, diverted: bool) {
        self.update_path_at(now, from, |path, at| path.on_packet(at, diverted));
    }

    /// Records what is known of a suspect peer's agent: whether a packet of it has arrived since the last
    /// [`CHECK_INTERVAL`] (`has_sent`), and the round trip over the underlay.
    pub fn on_agent(
        &mut self,
        now: Time,
        node: NodeId,
        has_sent: bool,
        round_trip: Option<Duration>,
    ) {
        let at = self.clock.advance(now);
        self.update_path(node, |path| path.on_agent(at, has_sent, round_trip));
    }

    /// Returns the peers for which other signs of life are needed, with their underlay addresses.
    pub fn suspects(&self) -> impl Iterator<Item = (NodeId, IpAddr)> + '_ {
        let suspects = self.peers.iter().filter(|(_, path)| path.is_suspect());
        suspects.map(|(node, path)| (*node, path.underlay))
    }

    /// Returns the peer with this VTEP or underlay address; `None` if several peers share it.
    pub fn holder(&self, address: IpAddr) -> Option<NodeId> {
        self.by_address.get(&address).copied().flatten()
    }

    /// Returns when the probe was sent to which a peer answered last.
    pub fn answered_probe(&self, node: NodeId) -> Option<Time> {
        let sent = self.peers.get(&node)?.answered_probe?;
        Some(sent + self.clock.stopped)
    }

    /// Returns whether packets that the peer sends unprompted arrive by another way than packets to it take.
    pub fn is_diverted_inbound(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|path| path.is_diverted_inbound)
    }

    /// Returns whether the last liveness reported by gossip is alive.
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(Path::is_alive)
    }

    /// Returns for how long neither the kernel nor the agent of a peer has sent anything; `None` if one of
    /// them has, or if answers have been missing only for a moment.
    pub fn silent_span(&self, now: Time, node: NodeId) -> Option<Duration> {
        let since = self.peers.get(&node)?.silent_since()?;
        Some(self.clock.at(now).since(since))
    }

    /// Returns how many bytes smaller than the overlay's MTU packets to a peer must be; `None` if full-size
    /// packets pass or the size is not known yet.
    pub fn mtu_reduction(&self, node: NodeId) -> Option<u32> {
        self.peers.get(&node).and_then(Path::mtu_reduction)
    }

    /// Requests immediate probes of all peers, because packets may take another way than before.
    pub fn request_probes(&mut self, now: Time) {
        let at = self.clock.advance(now);
        for node in self.peers.keys().copied().collect::<Vec<_>>() {
            self.update_path(node, |path| path.due = path.due.min(at));
        }
    }

    /// Requests an immediate full-size probe, because large packets to the peer were lost elsewhere while
    /// small ones were not.
    pub fn request_size_check(&mut self, now: Time, node: NodeId) {
        let at = self.clock.advance(now);
        self.update_path(node, |path| path.request_size_check(at));
    }

    /// Returns whether the largest packet size to a peer is still being determined.
    pub fn is_measuring_size(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(Path::is_measuring_size)
    }

    /// Returns the numbers of lost flows and of flows with a known result; `None` if no flow or all are lost.
    pub fn flows(&self, node: NodeId) -> Option<(usize, usize)> {
        self.peers.get(&node).and_then(Path::flows)
    }

    /// Returns peers that answer echoes but no datagrams, except those that lose only some flows.
    pub fn losing_datagrams(&self) -> BTreeSet<NodeId> {
        let peers = self
            .peers
            .iter()
            .filter(|(_, path)| path.is_losing_datagrams() && path.flows().is_none());
        peers.map(|(node, _)| *node).collect()
    }

    /// Sends `count` datagrams to each of these peers, one per second, and resets their tallies.
    pub fn request_datagrams(&mut self, now: Time, peers: &BTreeSet<NodeId>, count: u32) {
        let at = self.clock.advance(now);
        for node in peers {
            self.update_path(*node, |path| path.begin_trial(at, count));
        }
    }

    /// Returns the results of the requested datagrams; `None` if the peer is gone.
    pub fn tally(&self, node: NodeId) -> Option<Tally> {
        self.peers.get(&node).map(|path| path.tally)
    }

    /// Returns the peers whose subnets must be unreachable.
    pub fn withdrawn(&self) -> BTreeSet<NodeId> {
        let withdrawn = self.peers.iter().filter(|(_, path)| path.withdrawn);
        withdrawn.map(|(node, _)| *node).collect()
    }

    /// Returns the state of each path, with the last round trip.
    pub fn states(
        &self,
        now: Time,
    ) -> impl Iterator<Item = (NodeId, PathState, Option<Duration>)> + '_ {
        let at = self.clock.at(now);
        self.peers.iter().map(move |(node, path)| (*node, path.state(at), path.round_trip))
    }

    /// Withdraws and restores peers. To be called periodically, because withdrawal depends on time.
    pub fn update_withdrawn(&mut self, now: Time) {
        let at = self.clock.advance(now);
        for (node, path) in &mut self.peers {
            path.update_path(*node, &mut self.queues, |path| {
                path.update_withdrawn(at, self.withdraw_after)
            });
        }
    }

    fn update_path_at(&mut self, now: Time, address: IpAddr, change: impl FnOnce(&mut Path, Time)) {
        let at = self.clock.advance(now);
        if let Some(Some(node)) = self.by_address.get(&address) {
            self.update_path(*node, |path| change(path, at));
        }
    }

    fn update_path<T>(&mut self, node: NodeId, change: impl FnOnce(&mut Path) -> T) -> Option<T> {
        let path = self.peers.get_mut(&node)?;
        Some(path.update_path(node, &mut self.queues, change))
    }
}

#[cfg(test)]
mod tests;
