//! Whether packets get through: what has been asked of each peer's kernel through the overlay, and what came
//! back.
//!
//! Gossip says whether an agent answers; this says whether a host's kernel forwards, which it does without
//! its agent too. Only where both are silent for long is a peer's subnet withdrawn. A state machine without
//! a clock or a socket: what is due is asked for by [`Paths::poll`], what came in is told. Nothing here
//! touches ownership.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use crate::{
    core::Liveness,
    model::{NodeId, PathState, Time},
};

/// [`Paths::judge`] and [`Paths::poll`] are to be called this often.
pub const LOOK: Duration = Duration::from_secs(1);
/// Between two requests to a peer with which all is well.
const CALM: Duration = Duration::from_secs(15);
/// The same while something is wrong: no answer, or gossip does not hold it as alive.
const ANXIOUS: Duration = Duration::from_secs(1);
/// The same once it is withdrawn.
const WITHDRAWN: Duration = Duration::from_secs(5);
/// Between any two requests while something is wrong with the peers that are asked, so that a large cluster
/// costs no more than a small one.
const GAP: Duration = Duration::from_millis(20);
/// Peers with which all is well are asked several at a time, for each time costs a sleeper its rest: so many,
const CALM_BURST: u32 = 5;
/// and then nobody until the next [`LOOK`], which may be a little early.
const CALM_GAP: Duration = Duration::from_millis(900);
/// Between two special requests of one kind to one peer.
const SPECIAL: Duration = Duration::from_secs(300);
/// The same after one was lost.
const SPECIAL_AGAIN: Duration = Duration::from_secs(3);
/// A request is lost when it has not been answered for so long.
const LOST: Duration = Duration::from_millis(900);
/// Requests lost in a row that make a verdict.
const VERDICT: u32 = 3;
/// A request of the peer's own that was heard within this time shows that its packets get here. Whoever gets
/// no answers asks once a second, and less often where that is a thousand.
const HEARD: Duration = Duration::from_secs(40);

/// A request that is to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub to: IpAddr,
    pub sequence: u16,
    pub kind: Kind,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A small echo.
    Small,
    /// An echo as large as the overlay's MTU allows.
    Full,
    /// A datagram that nobody waits for. A kernel says so only where its checksum is right.
    Datagram,
}

/// A peer as gossip and the view have it.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    pub node: NodeId,
    /// Its VTEP's overlay address, at which its kernel answers.
    pub vtep: IpAddr,
    /// From which it asks, where its packets come without a tunnel.
    pub underlay: IpAddr,
    pub liveness: Option<Liveness>,
    /// It may be asked; otherwise what is known of it stays as it is, for as long as gossip says the same.
    pub ask: bool,
}

/// All peers.
#[derive(Debug)]
pub struct Paths {
    peers: BTreeMap<NodeId, Path>,
    by_address: BTreeMap<IpAddr, NodeId>,
    sequence: u16,
    withdraw_after: Option<Duration>,
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

#[derive(Debug)]
struct Path {
    address: IpAddr,
    liveness: Option<Liveness>,
    ask: bool,
    due: Time,
    /// On its way.
    open: Option<(Probe, Time)>,
    /// Lost since the last answer.
    lost: u32,
    full: Special,
    datagram: Special,
    /// Since when nothing was answered that was asked.
    silent_since: Option<Time>,
    heard: Option<Time>,
    round_trip: Option<Duration>,
    /// The last answer came from elsewhere.
    astray: bool,
    withdrawn: bool,
}

/// Requests of one kind that are made now and then, and only while small echoes are answered.
#[derive(Clone, Copy, Debug)]
struct Special {
    due: Time,
    /// Since the last answer.
    lost: u32,
    /// Since it was begun.
    answered: bool,
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
            queues: Queues::default(),
        }
    }

    /// Who there is.
    pub fn update(&mut self, now: Time, peers: impl Iterator<Item = Subject>) {
        let mut before = std::mem::take(&mut self.peers);
        self.by_address.clear();
        self.queues = Queues::default();
        for Subject { node, vtep, underlay, liveness, ask } in peers {
            let known = before.remove(&node).filter(|path| path.address == vtep);
            let mut path = known.unwrap_or_else(|| Path::new(now, vtep));
            if liveness != path.liveness && liveness != Some(Liveness::Alive) {
                path.due = path.due.min(now);
            }
            path.liveness = liveness;
            path.ask = ask;
            if let Some((queue, due)) = path.place() {
                self.queues[queue].insert((due, node));
            }
            self.peers.insert(node, path);
            self.by_address.extend([(vtep, node), (underlay, node)]);
        }
        self.judge(now);
    }

    /// The next request, if one is due.
    pub fn poll(&mut self, now: Time) -> Option<Probe> {
        let mut turns = [DOUBTED, CALMED].into_iter().filter_map(|queue| self.turn(queue));
        let (_, node) = turns.find(|(due, _)| *due <= now)?;
        let sequence = self.next_sequence();
        let (probe, is_calm) = self.change(node, |path| {
            path.lose(now);
            let kind = path.kind_due(now);
            let asked = Probe { to: path.address, sequence, kind };
            path.open = Some((asked, now));
            path.due = now + path.pause();
            if let Some(special) = path.special(kind) {
                special.due = now + SPECIAL;
            }
            (asked, path.is_calm())
        })?;
        self.burst = (self.burst + u32::from(is_calm)) % CALM_BURST;
        match (is_calm, self.burst) {
            (false, _) => self.not_before[DOUBTED] = now + GAP,
            (true, 0) => self.not_before[CALMED] = now + CALM_GAP,
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
        Some(self.turn(DOUBTED)?.0)
    }

    /// Who is asked next from a queue, and when.
    fn turn(&self, queue: usize) -> Option<(Time, NodeId)> {
        let (due, node) = self.queues[queue].first()?;
        Some((*due.max(&self.not_before[queue]), *node))
    }

    /// An answer of a peer's kernel, through the tunnel or from elsewhere.
    pub fn on_answer(&mut self, now: Time, from: IpAddr, sequence: u16, elsewhere: bool) {
        let echo = |probe: &Probe| probe.kind != Kind::Datagram && probe.sequence == sequence;
        self.change_at(from, |path| {
            let Some((probe, sent)) = path.open.take_if(|(probe, _)| echo(probe)) else { return };
            path.round_trip = Some(now.since(sent));
            path.astray = elsewhere;
            path.answered(now, probe.kind);
        });
    }

    /// A peer's kernel has said that nobody waits for a datagram.
    pub fn on_refusal(&mut self, now: Time, from: IpAddr) {
        self.change_at(from, |path| {
            if path.open.take_if(|(probe, _)| probe.kind == Kind::Datagram).is_some() {
                path.answered(now, Kind::Datagram);
            }
        });
    }

    /// Peers from which echoes come back, and no answers to datagrams.
    pub fn deaf(&self) -> BTreeSet<NodeId> {
        let deaf = self.peers.iter().filter(|(_, path)| path.datagrams() == Some(false));
        deaf.map(|(node, _)| *node).collect()
    }

    /// Forgets what became of datagrams to these peers, and sends new ones.
    pub fn ask_anew(&mut self, now: Time, peers: &BTreeSet<NodeId>) {
        for node in peers {
            self.change(*node, |path| {
                path.datagram = Special::new(now);
                path.due = path.due.min(now);
            });
        }
    }

    /// Whether datagrams to a peer arrive, once that is clear; false for one that is gone.
    pub fn datagrams(&self, node: NodeId) -> Option<bool> {
        self.peers.get(&node).map_or(Some(false), Path::datagrams)
    }

    /// A request by a peer, which our kernel has answered.
    pub fn on_request(&mut self, now: Time, from: IpAddr) {
        self.change_at(from, |path| path.heard = Some(now));
    }

    /// Peers that neither gossip nor their kernel has answered for.
    pub fn withdrawn(&self) -> BTreeSet<NodeId> {
        let withdrawn = self.peers.iter().filter(|(_, path)| path.withdrawn);
        withdrawn.map(|(node, _)| *node).collect()
    }

    /// What is known of the way to each peer, and the last round trip.
    pub fn states(
        &self,
        now: Time,
    ) -> impl Iterator<Item = (NodeId, PathState, Option<Duration>)> + '_ {
        self.peers.iter().map(move |(node, path)| (*node, path.state(now), path.round_trip))
    }

    /// Withdraws and restores. To be called often: being withdrawn follows from time.
    pub fn judge(&mut self, now: Time) {
        let Some(patience) = self.withdraw_after else { return };
        for (node, path) in &mut self.peers {
            path.change(*node, &mut self.queues, |path| {
                path.lose(now);
                let silent = path.silent_since.is_some_and(|since| now.since(since) >= patience);
                path.withdrawn = path.is_down() && (path.withdrawn || silent) && path.lost > 0;
            });
        }
    }

    fn change_at(&mut self, address: IpAddr, what: impl FnOnce(&mut Path)) {
        if let Some(node) = self.by_address.get(&address) {
            self.change(*node, what);
        }
    }

    fn change<T>(&mut self, node: NodeId, what: impl FnOnce(&mut Path) -> T) -> Option<T> {
        let path = self.peers.get_mut(&node)?;
        Some(path.change(node, &mut self.queues, what))
    }
}

impl Path {
    const fn new(now: Time, address: IpAddr) -> Self {
        Self {
            address,
            liveness: None,
            ask: true,
            due: now,
            open: None,
            lost: 0,
            full: Special::new(now),
            datagram: Special::new(now),
            silent_since: None,
            heard: None,
            round_trip: None,
            astray: false,
            withdrawn: false,
        }
    }

    /// Whatever changes, this path stands in the queue where it belongs.
    fn change<T>(
        &mut self,
        node: NodeId,
        queues: &mut Queues,
        what: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let before = self.place();
        let result = what(self);
        let after = self.place();
        if before != after {
            before.map(|(queue, due)| queues[queue].remove(&(due, node)));
            after.map(|(queue, due)| queues[queue].insert((due, node)));
        }
        result
    }

    /// In which queue it waits, and until when.
    fn place(&self) -> Option<(usize, Time)> {
        self.ask.then(|| (if self.is_calm() { CALMED } else { DOUBTED }, self.due))
    }

    fn is_down(&self) -> bool {
        matches!(self.liveness, None | Some(Liveness::Down))
    }

    /// Counts the open request as lost when its time is over.
    fn lose(&mut self, now: Time) {
        let over = |(_, sent): &mut (Probe, Time)| now.since(*sent) >= LOST;
        let Some((probe, sent)) = self.open.take_if(over) else { return };
        if let Some(special) = self.special(probe.kind) {
            special.lost += 1;
            special.due = sent
                + match probe.kind {
                    _ if special.lost < VERDICT => SPECIAL_AGAIN,
                    Kind::Full => CALM,
                    // A firewall may drop them for ever.
                    _ => SPECIAL,
                };
            // A small one follows, which tells whether it was the kind.
            self.due = self.due.min(now);
            return;
        }
        self.lost += 1;
        self.silent_since.get_or_insert(sent);
        self.due = self.due.min(sent + self.pause());
    }

    fn answered(&mut self, now: Time, kind: Kind) {
        (self.lost, self.silent_since, self.withdrawn) = (0, None, false);
        if let Some(special) = self.special(kind) {
            (special.lost, special.answered) = (0, true);
        }
        let next = self.full.due.min(self.datagram.due);
        self.due = (now + self.pause()).min(next.max(now));
    }

    fn kind_due(&self, now: Time) -> Kind {
        match self.lost {
            0 if self.full.due <= now => Kind::Full,
            0 if self.datagram.due <= now => Kind::Datagram,
            _ => Kind::Small,
        }
    }

    const fn special(&mut self, kind: Kind) -> Option<&mut Special> {
        match kind {
            Kind::Small => None,
            Kind::Full => Some(&mut self.full),
            Kind::Datagram => Some(&mut self.datagram),
        }
    }

    fn datagrams(&self) -> Option<bool> {
        let clear = self.datagram.answered || self.datagram.lost >= VERDICT && self.lost == 0;
        clear.then_some(self.datagram.lost == 0)
    }

    fn is_calm(&self) -> bool {
        let undecided = |special: Special| (1..VERDICT).contains(&special.lost);
        let is_clear = self.round_trip.is_some() && self.lost == 0;
        let is_clear = is_clear && !undecided(self.full) && !undecided(self.datagram);
        self.liveness == Some(Liveness::Alive) && is_clear
    }

    fn pause(&self) -> Duration {
        match self.liveness {
            _ if self.withdrawn => WITHDRAWN,
            Some(Liveness::Alive) if self.lost == 0 => CALM,
            _ => ANXIOUS,
        }
    }

    fn state(&self, now: Time) -> PathState {
        let heard = self.heard.is_some_and(|at| now.since(at) < HEARD);
        match self.round_trip {
            _ if self.withdrawn => PathState::Withdrawn,
            _ if self.lost >= VERDICT && self.is_down() => PathState::Dead,
            _ if self.lost >= VERDICT && heard => PathState::OneWay,
            _ if self.lost >= VERDICT => PathState::Blocked,
            _ if self.full.lost >= VERDICT => PathState::MtuTooLarge,
            Some(_) if self.astray => PathState::Asymmetric,
            Some(_) => PathState::Ok,
            None => PathState::Unknown,
        }
    }
}

impl Special {
    const fn new(now: Time) -> Self {
        Self { due: now, lost: 0, answered: false }
    }
}

#[cfg(test)]
mod tests;
