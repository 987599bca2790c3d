//! Whether packets of this host's pods come to pods of other hosts, and answers come back: from the agent's
//! own pod here to that of a peer.
//!
//! A few peers are tried in one round, each with several sorts of packets, and what is not answered is sent
//! again. Silence alone proves nothing, for the peer may be slow, or have no such pod. Its agent is therefore
//! asked over the underlay what has come. Only a packet that has not come there, though the pod was there all
//! the time, is lost on its way, and only one that has come and was answered is lost on its way back. Some
//! small packets are sent once, and counted: what is lost by chance. A state machine without a clock or a
//! socket.

mod round;
mod target;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use self::{
    round::Round,
    target::{Target, carries_large, sorts},
};
use super::{ANXIOUS, CALM, Kind, Losses, SEES_DATA, SMALL, Sort, Trials, Way};
use crate::{
    model::{Addresses, NodeId, Time},
    wire::Arrivals,
};

/// What is not answered is sent again at these moments of a round: losses by chance make no verdict.
const SENDS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1_000),
    Duration::from_millis(1_500),
];
/// The peer is asked then.
const ASK: Duration = Duration::from_millis(2_000);
/// A connection that is made later than this may carry data too late for that.
const CONNECTED: Duration = Duration::from_millis(1_000);
/// What it does not say by then it does not say.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An answer may come at least so long after the peer has told that it was sent.
const GRACE: Duration = Duration::from_millis(500);
/// A step that comes later than this after its time: this process had no turn, so the round proves no loss.
const STALL: Duration = Duration::from_secs(1);
/// Between two rounds while ways are closed, and for each peer on top of that, so that one bad host is not
/// asked by all others of a large cluster each second.
const WATCH: Duration = Duration::from_secs(3);
const WATCH_PER_PEER: Duration = Duration::from_millis(100);
/// Peers in one round, and those of them that may be in doubt while others wait.
const AT_ONCE: usize = 3;
const DOUBTED_AT_ONCE: usize = 2;
/// A peer without a pod is tried more and more rarely: up to so many times doubled.
const MAX_DOUBLED: u32 = 5;

/// A peer whose pod is to be tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub node: NodeId,
    /// Of its agent's own pod.
    pub addresses: Addresses,
    /// As large a packet as is sent to it.
    pub carried: u32,
    /// It is not known already that large packets to it are lost.
    pub takes_large: bool,
    /// What is asked of its host is not answered: that its pods answer is to be seen now.
    pub is_doubted: bool,
}

/// On which way packets are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Half {
    There,
    Back,
}

/// What is tried with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FarWay {
    pub node: NodeId,
    pub half: Half,
    pub sort: Sort,
}

/// What is lost by chance of the packets to a peer's pod, or of the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarLoss {
    pub node: NodeId,
    pub half: Half,
    pub percent: u32,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FarOutput {
    /// The round with this number begins: what follows is sent from other ports than before, as new
    /// connections are.
    Begin(u32),
    /// Datagrams of this size, as many as its kind has in one packet, a connection that carries so much, or
    /// without a size the first segment of one.
    Send { to: IpAddr, kind: Kind, number: u32, size: Option<usize> },
    /// These peers are to be asked what has come of a round.
    Ask(u32, Vec<NodeId>),
}

/// All peers.
#[derive(Debug, Default)]
pub struct FarPods {
    peers: BTreeMap<NodeId, Peer>,
    trials: Trials<FarWay>,
    /// What this host is known to drop itself.
    lost_here: Vec<Way>,
    /// For at least so long a peer is left alone after a trial in which all was well, if a trial has a price.
    rest: Option<Duration>,
    round: Option<Round>,
    /// Counts rounds.
    turn: u64,
    /// Of the next round.
    next: Time,
    outputs: VecDeque<FarOutput>,
}

#[derive(Debug)]
struct Peer {
    subject: Subject,
    /// In which round it was tried last.
    tried: u64,
    /// More came to it than it answers when it was tried last, so that what was not answered proves nothing.
    is_overrun: bool,
    /// Rounds in a row in which there was no pod, and until when it is left alone for that.
    absent: u32,
    rests_until: Time,
    losses: Losses,
}

impl FarPods {
    /// Whom there is to try, and which ways this host is known to drop packets on: that is told already, and
    /// what takes such a way is not tried.
    pub fn update(&mut self, subjects: &[Subject], lost_here: &[Way]) {
        let mut before = std::mem::take(&mut self.peers);
        self.lost_here = lost_here.to_vec();
        for subject in subjects {
            let known = before.remove(&subject.node);
            let known = known.filter(|peer| peer.subject.addresses == subject.addresses);
            let was_doubted = known.as_ref().is_some_and(|peer| peer.subject.is_doubted);
            let is_new_doubt = subject.is_doubted && !was_doubted;
            let known = known.filter(|_| !is_new_doubt);
            if is_new_doubt {
                // What was seen before proves nothing now.
                self.trials.keep(|way| way.node != subject.node);
                self.round.iter_mut().for_each(|round| _ = round.targets.remove(&subject.node));
                self.next = Time::ZERO;
            }
            let fresh = Peer {
                subject: subject.clone(),
                tried: 0,
                is_overrun: false,
                absent: 0,
                rests_until: Time::ZERO,
                losses: Losses::default(),
            };
            let peer = Peer { subject: subject.clone(), ..known.unwrap_or(fresh) };
            self.peers.insert(subject.node, peer);
        }
        let (peers, lost) = (&self.peers, &self.lost_here);
        let is_tried = |node: &NodeId, sort: &Sort| {
            peers.get(node).is_some_and(|peer| sorts(&peer.subject, lost).any(|s| s == *sort))
        };
        self.trials.keep(|way| is_tried(&way.node, &way.sort));
        let counted = |node: &NodeId| {
            [true, false]
                .iter()
                .any(|ipv4| is_tried(node, &Sort { ipv4: *ipv4, kind: Kind::Small }))
        };
        let uncounted: Vec<NodeId> =
            self.peers.keys().filter(|node| !counted(node)).copied().collect();
        if let Some(round) = &mut self.round {
            round.targets.retain(|node, target| {
                target.open.retain(|sort| is_tried(node, sort));
                peers.contains_key(node)
            });
        }
        for node in uncounted {
            self.peers.entry(node).and_modify(|peer| peer.losses = Losses::default());
        }
    }

    /// Where entries are there on demand, a trial is a use of them. Peers are left alone for so long that no
    /// entry is kept by trials alone, neither here nor at the peer.
    pub const fn set_rest(&mut self, rest: Option<Duration>) {
        self.rest = rest;
    }

    /// The next thing to do, if it is time. The number is for a new round, and cannot be guessed.
    pub fn poll(&mut self, now: Time, number: u32) -> Option<FarOutput> {
        if self.outputs.is_empty() {
            self.step(now, number);
        }
        self.outputs.pop_front()
    }

    /// When [`FarPods::poll`] has something to do.
    pub fn next_due(&self) -> Option<Time> {
        match &self.round {
            Some(round) => Some(round.next_due()),
            None => {
                let rested = self.peers.values().map(|peer| peer.rests_until).min()?;
                Some(self.next.max(rested))
            }
        }
    }

    /// An answer has come from a peer's pod.
    pub fn on_answer(&mut self, from: IpAddr, kind: Kind, number: u32) {
        let sort = Sort { ipv4: from.is_ipv4(), kind };
        let Some(target) = self.target(from, number) else { return };
        if kind == Kind::Sample {
            target.samples_answered = target.samples_answered.saturating_add(1);
        } else if target.open.remove(&sort) {
            target.answered.insert(sort);
        }
    }

    /// A connection to a peer's pod is made, and data is on its way.
    pub fn on_connected(&mut self, now: Time, to: IpAddr, number: u32) {
        let begun = self.round.as_ref().map_or(now, |round| round.begun);
        let is_early = now.since(begun) <= CONNECTED;
        if let Some(target) = self.target(to, number).filter(|_| is_early) {
            target.connected.insert(to.is_ipv4());
        }
    }

    /// In the round with this number.
    fn target(&mut self, address: IpAddr, number: u32) -> Option<&mut Target> {
        let round = self.round.as_mut().filter(|round| round.number == number)?;
        let has_it = |node: &NodeId| {
            let peer = self.peers.get(node);
            peer.is_some_and(|peer| peer.subject.addresses.iter().any(|ip| ip == address))
        };
        round.targets.iter_mut().find(|(node, _)| has_it(node)).map(|(_, target)| target)
    }

    /// A packet could not be sent for want of something on this host, which says nothing about its way.
    pub fn on_unsent(&mut self, to: IpAddr, kind: Kind, number: u32) {
        let sort = Sort { ipv4: to.is_ipv4(), kind };
        if let Some(target) = self.target(to, number) {
            target.open.remove(&sort);
        }
    }

    /// What peers have told of a round; those that have told nothing are left out.
    pub fn on_arrivals_told(&mut self, now: Time, number: u32, told: &BTreeMap<NodeId, Arrivals>) {
        let Some(round) = self.round.as_mut().filter(|round| round.number == number) else {
            return;
        };
        let Some(asked) = round.asked.filter(|_| round.judged_at.is_none()) else { return };
        for (node, arrivals) in told {
            // A pod that is younger than the round could not hear all of it.
            let age = Duration::from_millis(arrivals.pod_age_ms.into());
            if let Some(target) = round.targets.get_mut(node)
                && age >= now.since(round.begun)
            {
                target.arrivals = Some(*arrivals);
                let sees_data = arrivals.came & SEES_DATA != 0;
                target.open.retain(|sort| sees_data || sort.kind != Kind::Data);
            }
        }
        // What is on its way back takes about as long as what was told has taken.
        round.judged_at = Some(now + now.since(asked).max(GRACE));
    }

    /// A peer's pod has sent something of its own accord, so there is one.
    pub fn on_question(&mut self, now: Time, from: IpAddr) {
        let has_it = |peer: &&mut Peer| peer.subject.addresses.iter().any(|ip| ip == from);
        let Some(peer) = self.peers.values_mut().find(has_it) else { return };
        let is_new = std::mem::take(&mut peer.absent) > 0;
        match self.rest {
            _ if is_new => {
                peer.rests_until = now;
                self.next = self.next.min(now);
            }
            // What it asks is a use, too.
            Some(rest) if peer.rests_until > now => peer.rests_until = now + rest,
            _ => {}
        }
    }

    /// Ways that packets do not take.
    pub fn closed(&self) -> Vec<FarWay> {
        self.trials.closed()
    }

    /// Peers from whose pods answers come.
    pub fn answering(&self) -> BTreeSet<NodeId> {
        let open = self.trials.open();
        open.iter().filter(|way| way.half == Half::Back).map(|way| way.node).collect()
    }

    /// What is lost by chance.
    pub fn losses(&self) -> Vec<FarLoss> {
        let of_peer = |peer: &Peer| {
            let told = |half| {
                let percent = peer.losses.told(half)?;
                Some(FarLoss { node: peer.subject.node, half, percent })
            };
            [Half::There, Half::Back].into_iter().filter_map(told).collect::<Vec<_>>()
        };
        self.peers.values().flat_map(of_peer).collect()
    }

    /// Peers of which nothing is known, because more came to them than they answer.
    pub fn overrun(&self) -> Vec<NodeId> {
        let overrun = self.peers.values().filter(|peer| peer.is_overrun);
        overrun.map(|peer| peer.subject.node).collect()
    }

    /// Whether something was lost when it was last tried.
    pub fn is_in_doubt(&self) -> bool {
        self.trials.doubted().next().is_some()
    }

    /// Peers to which large packets were lost when they were last tried, and small ones were not.
    pub fn losing_large(&self) -> BTreeSet<NodeId> {
        let lost = |is_large: bool| {
            let of_size =
                self.trials.doubted().filter(move |way| way.sort.kind.is_large() == is_large);
            of_size.map(|way| way.node).collect::<BTreeSet<NodeId>>()
        };
        &lost(true) - &lost(false)
    }

    /// Peers to which something was lost when they were last tried, or many packets by chance.
    fn doubted(&self) -> BTreeSet<NodeId> {
        let lossy = self.peers.values().filter(|peer| peer.losses.is_unsettled());
        let lossy = lossy.map(|peer| peer.subject.node);
        self.trials.doubted().map(|way| way.node).chain(lossy).collect()
    }

    fn step(&mut self, now: Time, number: u32) {
        let Some(due) = self.next_due().filter(|due| *due <= now) else { return };
        let Some(mut round) = self.round.take() else { return self.begin(now, number) };
        if round.is_answered() {
            return self.end(now, &round, true);
        }
        if now.since(due) > STALL {
            return self.end(now, &round, false);
        }
        if round.sent < SENDS.len() {
            self.send(&mut round);
        } else if round.asked.is_none() {
            round.asked = Some(now);
            let silent = round.targets.iter().filter(|(_, target)| !target.is_answered());
            let silent = silent.map(|(node, _)| *node).collect();
            self.outputs.push_back(FarOutput::Ask(round.number, silent));
        } else {
            return self.end(now, &round, true);
        }
        self.round = Some(round);
    }

    fn begin(&mut self, now: Time, number: u32) {
        self.turn += 1;
        let doubted = self.doubted();
        let mut nodes: Vec<(u64, NodeId)> = self
            .peers
            .values()
            .filter(|peer| peer.rests_until <= now)
            .map(|peer| (peer.tried, peer.subject.node))
            .collect();
        nodes.sort_unstable();
        let (first, others): (Vec<NodeId>, Vec<NodeId>) =
            nodes.into_iter().map(|(_, node)| node).partition(|node| doubted.contains(node));
        let (first, rest) = first.split_at(first.len().min(DOUBTED_AT_ONCE));
        let chosen = first.iter().chain(&others).chain(rest).take(AT_ONCE);
        let mut targets = BTreeMap::new();
        for node in chosen {
            let Some(peer) = self.peers.get_mut(node) else { continue };
            peer.tried = self.turn;
            let open: BTreeSet<Sort> = sorts(&peer.subject, &self.lost_here).collect();
            if open.is_empty() {
                continue;
            }
            let is_counted =
                |ip: &IpAddr| open.contains(&Sort { ipv4: ip.is_ipv4(), kind: Kind::Small });
            let sampled = peer.subject.addresses.iter().find(is_counted);
            let samples = sampled.map_or(0, |_| peer.losses.samples());
            targets.insert(*node, Target { open, sampled, samples, ..Target::default() });
        }
        if targets.is_empty() {
            self.next = now + CALM;
            return;
        }
        self.outputs.push_back(FarOutput::Begin(number));
        let mut round =
            Round { number, begun: now, sent: 0, asked: None, judged_at: None, targets };
        self.send(&mut round);
        for target in round.targets.values() {
            let Some(to) = target.sampled else { continue };
            let (kind, size) = (Kind::Sample, Kind::Sample.size(to, u32::MAX));
            let sample = || FarOutput::Send { to, kind, number, size };
            self.outputs.extend((0..target.samples).map(|_| sample()));
        }
        self.round = Some(round);
    }

    fn send(&mut self, round: &mut Round) {
        round.sent += 1;
        for (node, target) in &round.targets {
            let Some(Peer { subject, .. }) = self.peers.get(node) else { continue };
            for sort in &target.open {
                let of_family = |ip: &IpAddr| ip.is_ipv4() == sort.ipv4;
                let Some(to) = subject.addresses.iter().find(of_family) else { continue };
                let is_small =
                    sort.kind == Kind::Data && !carries_large(subject, &self.lost_here, sort.ipv4);
                let whole = sort.kind.size(to, subject.carried);
                let size = if is_small { Some(SMALL) } else { whole };
                let number = round.number;
                self.outputs.push_back(FarOutput::Send { to, kind: sort.kind, number, size });
            }
        }
    }

    /// Draws conclusions. What was answered has passed in any case.
    fn end(&mut self, now: Time, round: &Round, proves_loss: bool) {
        for (node, target) in &round.targets {
            for (sort, there, back) in target.verdicts(proves_loss) {
                let way = |half| FarWay { node: *node, half, sort };
                self.trials.note(way(Half::There), there);
                self.trials.note(way(Half::Back), back);
            }
            let Some(peer) = self.peers.get_mut(node).filter(|_| proves_loss) else { continue };
            peer.is_overrun =
                !target.is_answered() && target.arrivals.is_some_and(|arrivals| arrivals.shed);
            match target.samples_came() {
                Some(came) => peer.losses.note(target.samples, came, target.samples_answered),
                None => peer.losses.note_unclear(),
            }
            if target.answered.is_empty() && target.arrivals.is_none() {
                let doubled = 1 << peer.absent.min(MAX_DOUBLED);
                peer.rests_until = now + CALM * doubled;
                peer.absent += 1;
            } else {
                peer.absent = 0;
            }
        }
        if let Some(rest) = self.rest {
            let doubted = self.doubted();
            for (node, target) in &round.targets {
                let Some(peer) = self.peers.get_mut(node) else { continue };
                // Where a part was answered, what became of the rest is still to be found out.
                let is_partly = !target.answered.is_empty() && !target.is_answered();
                let is_open = is_partly || doubted.contains(node);
                let rested = peer.rests_until.max(now + rest);
                peer.rests_until = if is_open { now } else { rested };
            }
        }
        let closed = self.trials.closed();
        let is_known = |way: &&FarWay| closed.binary_search(way).is_ok();
        let answering = self.answering();
        let is_urgent = |peer: &Peer| {
            let Subject { node, is_doubted, .. } = &peer.subject;
            *is_doubted && peer.rests_until <= now && !answering.contains(node) && peer.tried == 0
        };
        let is_anxious =
            self.trials.doubted().any(|way| !is_known(&way)) || self.peers.values().any(is_urgent);
        let is_anxious = is_anxious || self.peers.values().any(|peer| peer.losses.is_in_doubt());
        let is_well = closed.is_empty() && !self.peers.values().any(|peer| peer.losses.is_told());
        self.next = now
            + if is_anxious {
                ANXIOUS
            } else if is_well {
                CALM
            } else {
                WATCH + WATCH_PER_PEER * self.peers.len() as u32
            };
    }
}

#[cfg(test)]
mod tests;
