//! Whether packets get through: what has been asked of each peer through the overlay, and what came back.
//!
//! Gossip says whether an agent answers; this says whether a host's kernel forwards, which it does without
//! its agent too. There are several witnesses, for each of them alone may be silenced by a firewall: echoes
//! (ICMP), datagrams to the agent's port (answered by the agent, or refused by a kernel without one), and
//! packets that the peer sends of its own accord. A peer's subnet is withdrawn only where gossip and all of
//! them are silent, and one of those that are asked had answered until then. A state machine without a clock
//! or a socket: what is due is asked for by [`Paths::poll`], what came in is told. Nothing here touches
//! ownership.

mod flows;
mod path;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

pub use self::flows::FLOWS;
use self::path::Path;
use crate::{
    core::Liveness,
    model::{NodeId, PathState, Time},
};

/// [`Paths::judge`] and [`Paths::poll`] are to be called this often.
pub const LOOK: Duration = Duration::from_secs(1);
/// Called so much later than that, this process stood still, and has missed answers that were there.
const STALL: Duration = Duration::from_millis(500);
/// Between any two requests while something is wrong with the peers that are asked, so that a large cluster
/// costs no more than a small one.
const GAP: Duration = Duration::from_millis(20);
/// Peers with which all is well are asked several at a time, for each time costs a sleeper its rest: so many,
const CALM_BURST: u32 = 8;
/// and then nobody until the next [`LOOK`], which may be a little early.
const CALM_GAP: Duration = Duration::from_millis(900);

/// A request that is to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub node: NodeId,
    pub to: IpAddr,
    pub sequence: u16,
    pub kind: Kind,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A small echo.
    Small,
    /// An echo as large as the overlay's MTU allows, less so many bytes.
    Full { less: u32 },
    /// A datagram to the port of the peer's agent. The agent answers it, and a kernel without an agent
    /// refuses it; both only where its checksum is right.
    Datagram { flow: usize },
    /// The same, to learn whether this flow gets through: below [`FLOWS`].
    Flow { flow: usize },
}

impl Kind {
    const fn is_datagram(self) -> bool {
        matches!(self, Self::Datagram { .. } | Self::Flow { .. })
    }
}

/// Who has answered a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Agent,
    /// It has refused the datagram, which it does only while no agent runs.
    Kernel,
}

/// A peer as gossip and the view have it.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    pub node: NodeId,
    /// Its VTEP's overlay address, at which its kernel answers.
    pub vtep: IpAddr,
    /// From which its tunnel packets come, and its requests where they come without a tunnel.
    pub underlay: IpAddr,
    pub liveness: Option<Liveness>,
    /// It may be asked; otherwise what is known of it stays as it is, for as long as gossip says the same.
    pub ask: bool,
}

/// What became of datagrams that were asked for by [`Paths::ask_datagrams`], and sent while echoes came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub answered: u32,
    pub lost: u32,
}

/// All peers.
#[derive(Debug)]
pub struct Paths {
    peers: BTreeMap<NodeId, Path>,
    /// None where several peers share an address: what comes from there proves nothing about one of them.
    by_address: BTreeMap<IpAddr, Option<NodeId>>,
    sequence: u16,
    withdraw_after: Option<Duration>,
    awake: Awake,
    /// Who is asked when: first those in doubt, then those with whom all is well.
    queues: Queues,
    /// Nobody in a queue is asked earlier.
    not_before: [Time; 2],
    /// Asked in the present burst.
    burst: u32,
}

type Queues = [BTreeSet<(Time, NodeId)>; 2];
const DOUBTED: usize = 0;
const CALMED: usize = 1;

/// Leaves out of time what this process slept through, by whatever stopped it: a signal, a hypervisor, a
/// suspended machine. What it asked before that is answered or lost afterwards. All times within are such.
#[derive(Debug, Default)]
struct Awake {
    looked: Option<Time>,
    slept: Duration,
}

impl Awake {
    fn look(&mut self, now: Time) -> Time {
        let pause = self.looked.map_or(Duration::ZERO, |looked| now.since(looked));
        if pause > LOOK + STALL {
            self.slept += pause;
        }
        self.looked = Some(now);
        self.at(now)
    }

    fn at(&self, now: Time) -> Time {
        Time::ZERO + now.since(Time::ZERO + self.slept)
    }
}

impl Paths {
    /// Without a span nothing is ever withdrawn.
    pub fn new(withdraw_after: Option<Duration>) -> Self {
        Self {
            peers: BTreeMap::new(),
            by_address: BTreeMap::new(),
            sequence: 0,
            not_before: [Time::ZERO; 2],
            burst: 0,
            withdraw_after,
            awake: Awake::default(),
            queues: Queues::default(),
        }
    }

    /// Who there is.
    pub fn update(&mut self, now: Time, peers: impl Iterator<Item = Subject>) {
        let at = self.awake.look(now);
        let mut before = std::mem::take(&mut self.peers);
        self.by_address.clear();
        self.queues = Queues::default();
        for Subject { node, vtep, underlay, liveness, ask } in peers {
            let known = before.remove(&node).filter(|path| path.address == vtep);
            let mut path = known.unwrap_or_else(|| Path::new(at, vtep));
            path.underlay = underlay;
            path.opine(at, liveness);
            path.ask = ask;
            if let Some((queue, due)) = path.place() {
                self.queues[queue].insert((due, node));
            }
            self.peers.insert(node, path);
            for address in [vtep, underlay] {
                let of_one = |holder: &mut Option<NodeId>| *holder = holder.filter(|n| *n == node);
                self.by_address.entry(address).and_modify(of_one).or_insert(Some(node));
            }
        }
        self.judge(now);
    }

    /// The next request, if one is due.
    pub fn poll(&mut self, now: Time) -> Option<Probe> {
        let at = self.awake.look(now);
        let mut turns = [DOUBTED, CALMED].into_iter().filter_map(|queue| self.turn(queue));
        let (_, node) = turns.find(|(due, _)| *due <= at)?;
        let sequence = self.next_sequence();
        let (probe, is_calm) = self.change(node, |path| {
            let (kind, to) = (path.ask(at, sequence), path.address);
            (Probe { node, to, sequence, kind }, path.is_calm())
        })?;
        self.burst = (self.burst + u32::from(is_calm)) % CALM_BURST;
        match (is_calm, self.burst) {
            (false, _) => self.not_before[DOUBTED] = at + GAP,
            (true, 0) => self.not_before[CALMED] = at + CALM_GAP,
            (true, _) => {}
        }
        Some(probe)
    }

    /// All is well with everybody, so that requests of the peers' own tell nothing.
    pub fn are_calm(&self) -> bool {
        self.queues[DOUBTED].is_empty()
    }

    /// A number for a request of somebody else's, that no request of ours has.
    pub const fn next_sequence(&mut self) -> u16 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// When [`Paths::poll`] has something to do that does not wait for [`LOOK`].
    pub fn next_due(&self) -> Option<Time> {
        Some(self.turn(DOUBTED)?.0 + self.awake.slept)
    }

    /// Who is asked next from a queue, and when.
    fn turn(&self, queue: usize) -> Option<(Time, NodeId)> {
        let (due, node) = self.queues[queue].first()?;
        Some((*due.max(&self.not_before[queue]), *node))
    }

    /// An echo of a peer's kernel, through the tunnel or from elsewhere.
    pub fn on_answer(&mut self, now: Time, from: IpAddr, sequence: u16, elsewhere: bool) {
        self.change_at(now, from, |path, at| path.on_echo(at, sequence, elsewhere));
    }

    /// A datagram has arrived at a peer.
    pub fn on_arrival(&mut self, now: Time, from: IpAddr, sequence: u16, by: By, elsewhere: bool) {
        self.change_at(now, from, |path, at| path.on_arrival(at, sequence, by, elsewhere));
    }

    /// A packet that a peer has sent of its own accord, as packets to it go or from elsewhere.
    pub fn on_packet(&mut self, now: Time, from: IpAddr, elsewhere: bool) {
        self.change_at(now, from, |path, at| path.hear(at, elsewhere));
    }

    /// What is known of the agent of a peer in doubt: whether a packet of it has come since the last
    /// [`LOOK`], and the round trip over the underlay.
    pub fn on_agent(&mut self, now: Time, node: NodeId, spoke: bool, round_trip: Option<Duration>) {
        let at = self.awake.look(now);
        self.change(node, |path| path.on_agent(at, spoke, round_trip));
    }

    /// Peers about which other witnesses are to be asked, with their underlay addresses.
    pub fn doubted(&self) -> impl Iterator<Item = (NodeId, IpAddr)> + '_ {
        let doubted = self.peers.iter().filter(|(_, path)| path.is_doubted());
        doubted.map(|(node, path)| (*node, path.underlay))
    }

    /// The peer with this address, in the overlay or below it, if only one has it.
    pub fn holder(&self, address: IpAddr) -> Option<NodeId> {
        self.by_address.get(&address).copied().flatten()
    }

    /// Whether what a peer sends of its own accord comes by another way than packets to it go.
    pub fn is_diverted_inbound(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|path| path.is_diverted_inbound)
    }

    /// Whether gossip holds a peer as alive, as last told.
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(Path::is_alive)
    }

    /// How much smaller than the overlay's MTU packets to a peer have to be; none, if they need not be, or it
    /// is not known yet.
    pub fn narrower_by(&self, node: NodeId) -> Option<u32> {
        self.peers.get(&node).and_then(Path::narrower_by)
    }

    /// Large packets of others to a peer were lost where small ones were not: asks at once whether full ones
    /// get through.
    pub fn doubt_size(&mut self, now: Time, node: NodeId) {
        let at = self.awake.look(now);
        self.change(node, |path| path.doubt_size(at));
    }

    /// Whether it is being found out how large packets to a peer may be.
    pub fn is_measured(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(Path::is_measured)
    }

    /// How many flows to a peer are lost, of how many; none where that is not so, or all are.
    pub fn flows(&self, node: NodeId) -> Option<(usize, usize)> {
        self.peers.get(&node).and_then(Path::flows)
    }

    /// Peers from which echoes come back, and no answers to datagrams.
    pub fn deaf(&self) -> BTreeSet<NodeId> {
        let deaf = self.peers.iter().filter(|(_, path)| path.is_deaf() && path.flows().is_none());
        deaf.map(|(node, _)| *node).collect()
    }

    /// Sends so many datagrams to each of these peers, one a second, and counts from now on.
    pub fn ask_datagrams(&mut self, now: Time, peers: &BTreeSet<NodeId>, count: u32) {
        let at = self.awake.look(now);
        for node in peers {
            self.change(*node, |path| path.begin_trial(at, count));
        }
    }

    /// What became of them; none for a peer that is gone.
    pub fn tally(&self, node: NodeId) -> Option<Tally> {
        self.peers.get(&node).map(|path| path.tally)
    }

    /// Peers for which neither gossip nor any other witness speaks.
    pub fn withdrawn(&self) -> BTreeSet<NodeId> {
        let withdrawn = self.peers.iter().filter(|(_, path)| path.withdrawn);
        withdrawn.map(|(node, _)| *node).collect()
    }

    /// What is known of the way to each peer, and the last round trip.
    pub fn states(
        &self,
        now: Time,
    ) -> impl Iterator<Item = (NodeId, PathState, Option<Duration>)> + '_ {
        let at = self.awake.at(now);
        self.peers.iter().map(move |(node, path)| (*node, path.state(at), path.round_trip))
    }

    /// Withdraws and restores. To be called often: being withdrawn follows from time.
    pub fn judge(&mut self, now: Time) {
        let at = self.awake.look(now);
        for (node, path) in &mut self.peers {
            path.change(*node, &mut self.queues, |path| path.judge(at, self.withdraw_after));
        }
    }

    fn change_at(&mut self, now: Time, address: IpAddr, what: impl FnOnce(&mut Path, Time)) {
        let at = self.awake.look(now);
        if let Some(Some(node)) = self.by_address.get(&address) {
            self.change(*node, |path| what(path, at));
        }
    }

    fn change<T>(&mut self, node: NodeId, what: impl FnOnce(&mut Path) -> T) -> Option<T> {
        let path = self.peers.get_mut(&node)?;
        Some(path.change(node, &mut self.queues, what))
    }
}

#[cfg(test)]
mod tests;
