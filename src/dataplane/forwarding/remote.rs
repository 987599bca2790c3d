//! Whether packets of this host's pods reach pods of other hosts, and answers return: trials from the agent's
//! own pod on this host to the one of a peer.
//!
//! A round tries a few peers, each with several sorts of packets, and repeats what is not answered. A missing
//! answer alone proves nothing: the peer may be slow, or have no such pod. So the peer's agent is asked over
//! the underlay which packets arrived. A packet is lost on the way there only if it did not arrive although
//! the pod existed all the time, and lost on the way back only if it arrived and was answered. Some small
//! packets are sent once and counted, to measure random loss. A state machine without clock or sockets.

mod half;
mod loss;
pub mod message;
mod output;
mod round;
mod target;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

pub use self::{
    half::Half,
    output::{RemoteLoss, RemoteOutput, RemoteWay},
};
use self::{
    loss::Losses,
    message::{Kind, SEES_DATA, SMALL, Sort},
    round::Round,
    target::{Target, carries_large, sorts},
};
use super::{SUSPECT_TRIAL_INTERVAL, TRIAL_INTERVAL, TrialWay, Trials};
use crate::{
    model::{Addresses, NodeId, Time},
    wire::Arrivals,
};

/// Times within a round at which unanswered packets are sent, so that random loss gives no verdict.
const SEND_TIMES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1_000),
    Duration::from_millis(1_500),
];
/// Time within a round at which the peers are asked which packets arrived.
const REPORT_REQUEST_TIME: Duration = Duration::from_millis(2_000);
/// Time within a round up to which a connection must be established, so that its data can arrive in time.
const MAX_CONNECT_TIME: Duration = Duration::from_millis(1_000);
/// Time that a peer has to report which packets arrived.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum time for answers to arrive after the peers' reports.
const MIN_ANSWER_GRACE: Duration = Duration::from_millis(500);
/// A step that is later than this after its time means that the process was stopped, so the round proves no
/// loss.
const MAX_STEP_DELAY: Duration = Duration::from_secs(1);
/// Interval of rounds while losses are known, plus `CLOSED_ROUND_INTERVAL_PER_PEER` for each peer, so that
/// the members of a large cluster do not all try one bad host every second.
const CLOSED_ROUND_INTERVAL: Duration = Duration::from_secs(3);
/// See `CLOSED_ROUND_INTERVAL`.
const CLOSED_ROUND_INTERVAL_PER_PEER: Duration = Duration::from_millis(100);
/// Number of peers per round.
const PEERS_PER_ROUND: usize = 3;
/// Number of unresponsive peers per round while other peers wait.
const UNRESPONSIVE_PER_ROUND: usize = 2;
/// The interval of trials with a peer without a pod doubles up to this many times.
const MAX_DOUBLINGS: u32 = 5;

/// A peer whose pod is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemotePeer {
    /// The peer's node id.
    pub node: NodeId,
    /// Addresses of its agent's own pod.
    pub addresses: Addresses,
    /// Size in bytes of the largest packet that is sent to it.
    pub carried: u32,
    /// Large packets to the peer are not already known to be lost.
    pub takes_large: bool,
    /// The peer's host does not answer probes, so whether its pods answer must be known soon.
    pub is_unresponsive: bool,
}

/// The trials with all peers.
#[derive(Debug, Default)]
pub struct RemoteTrials {
    peers: BTreeMap<NodeId, Peer>,
    trials: Trials<RemoteWay>,
    /// Ways on which this host is known to drop packets itself.
    ways_lost_here: Vec<TrialWay>,
    /// Minimum time between trials with a peer while nothing is lost; `None` if a trial causes no cost.
    rest: Option<Duration>,
    round: Option<Round>,
    /// Number of rounds so far.
    round_count: u64,
    /// Earliest time of the next round.
    next_round: Time,
    outputs: VecDeque<RemoteOutput>,
}

#[derive(Debug)]
struct Peer {
    info: RemotePeer,
    /// The round in which it was tried last.
    last_round: u64,
    /// The pod received more than it answers in the last round, so missing answers proved nothing.
    is_overloaded: bool,
    /// Consecutive rounds in which the peer had no pod.
    rounds_without_pod: u32,
    /// Time before which the peer is not tried.
    next_trial: Time,
    losses: Losses,
}

impl RemoteTrials {
    /// Replaces the peers to try and the ways on which this host drops packets. Losses on these ways are
    /// reported elsewhere, and packets that would take them are not sent.
    pub fn update(&mut self, peers_to_try: &[RemotePeer], ways_lost_here: &[TrialWay]) {
        let mut before = std::mem::take(&mut self.peers);
        self.ways_lost_here = ways_lost_here.to_vec();
        for info in peers_to_try {
            let known = before.remove(&info.node);
            let known = known.filter(|peer| peer.info.addresses == info.addresses);
            let was_unresponsive = known.as_ref().is_some_and(|peer| peer.info.is_unresponsive);
            let is_newly_unresponsive = info.is_unresponsive && !was_unresponsive;
            let known = known.filter(|_| !is_newly_unresponsive);
            if is_newly_unresponsive {
                // Earlier results say nothing about the present state.
                self.trials.retain(|way| way.node != info.node);
                self.round.iter_mut().for_each(|round| _ = round.targets.remove(&info.node));
                self.next_round = Time::ZERO;
            }
            let fresh = Peer {
                info: info.clone(),
                last_round: 0,
                is_overloaded: false,
                rounds_without_pod: 0,
                next_trial: Time::ZERO,
                losses: Losses::default(),
            };
            let peer = Peer { info: info.clone(), ..known.unwrap_or(fresh) };
            self.peers.insert(info.node, peer);
        }
        let (peers, lost) = (&self.peers, &self.ways_lost_here);
        let is_tried = |node: &NodeId, sort: &Sort| {
            peers.get(node).is_some_and(|peer| sorts(&peer.info, lost).any(|s| s == *sort))
        };
        self.trials.retain(|way| is_tried(&way.node, &way.sort));
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

    /// Sets the minimum time between trials with a peer. With entries on demand, a trial counts as use of the
    /// peer's entries; the interval is long enough that trials alone keep no entry, on either host.
    pub const fn set_rest(&mut self, rest: Option<Duration>) {
        self.rest = rest;
    }

    /// Returns the next action that is due. `number` becomes the number of a new round; it must be
    /// unpredictable.
    pub fn poll(&mut self, now: Time, number: u32) -> Option<RemoteOutput> {
        if self.outputs.is_empty() {
            self.step(now, number);
        }
        self.outputs.pop_front()
    }

    /// Returns when [`RemoteTrials::poll`] must be called.
    pub fn next_due(&self) -> Option<Time> {
        match &self.round {
            Some(round) => Some(round.next_due()),
            None => {
                let rested = self.peers.values().map(|peer| peer.next_trial).min()?;
                Some(self.next_round.max(rested))
            }
        }
    }

    /// Records an answer from a peer's pod.
    pub fn on_answer(&mut self, from: IpAddr, kind: Kind, number: u32) {
        let sort = Sort { ipv4: from.is_ipv4(), kind };
        let Some(target) = self.target(from, number) else { return };
        if kind == Kind::Sample {
            target.samples_answered = target.samples_answered.saturating_add(1);
        } else if target.open.remove(&sort) {
            target.answered.insert(sort);
        }
    }

    /// Records that a connection to a peer's pod is established and its data has been sent.
    pub fn on_connected(&mut self, now: Time, to: IpAddr, number: u32) {
        let begun = self.round.as_ref().map_or(now, |round| round.begun);
        let is_early = now.since(begun) <= MAX_CONNECT_TIME;
        if let Some(target) = self.target(to, number) {
            let families =
                if is_early { &mut target.connected } else { &mut target.connected_late };
            families.insert(to.is_ipv4());
        }
    }

    /// Returns the peer with this address in the round with this number.
    fn target(&mut self, address: IpAddr, number: u32) -> Option<&mut Target> {
        let round = self.round.as_mut().filter(|round| round.number == number)?;
        let has_address = |node: &NodeId| {
            let peer = self.peers.get(node);
            peer.is_some_and(|peer| peer.info.addresses.iter().any(|ip| ip == address))
        };
        round.targets.iter_mut().find(|(node, _)| has_address(node)).map(|(_, target)| target)
    }

    /// Records that this host could not send a packet. This says nothing about the way.
    pub fn on_unsent(&mut self, to: IpAddr, kind: Kind, number: u32) {
        let sort = Sort { ipv4: to.is_ipv4(), kind };
        if let Some(target) = self.target(to, number) {
            target.open.remove(&sort);
        }
    }

    /// Records the peers' reports about a round. Peers without a report are not in `reports`.
    pub fn on_arrivals_reported(
        &mut self,
        now: Time,
        number: u32,
        reports: &BTreeMap<NodeId, Arrivals>,
    ) {
        let Some(round) = self.round.as_mut().filter(|round| round.number == number) else {
            return;
        };
        let Some(report_requested) = round.report_requested.filter(|_| round.ends_at.is_none())
        else {
            return;
        };
        for (node, arrivals) in reports {
            // A pod younger than the round may have missed packets.
            let age = Duration::from_millis(arrivals.pod_age_ms.into());
            if let Some(target) = round.targets.get_mut(node)
                && age >= now.since(round.begun)
            {
                target.arrivals = Some(*arrivals);
                let sees_data = arrivals.came & SEES_DATA != 0;
                target.open.retain(|sort| sees_data || sort.kind != Kind::Data);
            }
        }
        // Answers take about as long as the reports have taken.
        round.ends_at = Some(now + now.since(report_requested).max(MIN_ANSWER_GRACE));
    }

    /// Records an unprompted packet of a peer's pod; it shows that the pod exists.
    pub fn on_question(&mut self, now: Time, from: IpAddr) {
        let has_address = |peer: &&mut Peer| peer.info.addresses.iter().any(|ip| ip == from);
        let Some(peer) = self.peers.values_mut().find(has_address) else { return };
        let is_new = std::mem::take(&mut peer.rounds_without_pod) > 0;
        match self.rest {
            _ if is_new => {
                peer.next_trial = now;
                self.next_round = self.next_round.min(now);
            }
            // The peer's packets use the entries as well.
            Some(rest) if peer.next_trial > now => peer.next_trial = now + rest,
            _ => {}
        }
    }

    /// Returns whether packets of a family are sent to a peer's pod.
    pub fn tries(&self, node: NodeId, ipv4: bool) -> bool {
        let peer = self.peers.get(&node);
        peer.is_some_and(|peer| {
            sorts(&peer.info, &self.ways_lost_here).any(|sort| sort.ipv4 == ipv4)
        })
    }

    /// Returns the ways that packets do not pass.
    pub fn closed(&self) -> Vec<RemoteWay> {
        self.trials.closed()
    }

    /// Returns the peers from whose pods answers arrive.
    pub fn answering(&self) -> BTreeSet<NodeId> {
        let open = self.trials.open();
        open.iter().filter(|way| way.half == Half::Back).map(|way| way.node).collect()
    }

    /// Returns the random losses.
    pub fn losses(&self) -> Vec<RemoteLoss> {
        let of_peer = |peer: &Peer| {
            let loss_on = |half| {
                let percent = peer.losses.reported(half)?;
                Some(RemoteLoss { node: peer.info.node, half, percent })
            };
            [Half::There, Half::Back].into_iter().filter_map(loss_on).collect::<Vec<_>>()
        };
        self.peers.values().flat_map(of_peer).collect()
    }

    /// Returns the peers whose pods received more than they answer, so that nothing is known about them.
    pub fn overloaded(&self) -> Vec<NodeId> {
        let overloaded = self.peers.values().filter(|peer| peer.is_overloaded);
        overloaded.map(|peer| peer.info.node).collect()
    }

    /// Returns whether any packet was lost in the last trial of its way.
    pub fn has_recent_loss(&self) -> bool {
        self.trials.last_lost().next().is_some()
    }

    /// Returns the peers to which large packets were lost in their last trial, and small ones were not.
    pub fn losing_large(&self) -> BTreeSet<NodeId> {
        let lost = |is_large: bool| {
            let of_size =
                self.trials.last_lost().filter(move |way| way.sort.kind.is_large() == is_large);
            of_size.map(|way| way.node).collect::<BTreeSet<NodeId>>()
        };
        &lost(true) - &lost(false)
    }

    /// Returns the peers with lost packets in their last trial, or with unexplained random loss.
    fn lossy_peers(&self) -> BTreeSet<NodeId> {
        let lossy = self.peers.values().filter(|peer| peer.losses.has_priority());
        let lossy = lossy.map(|peer| peer.info.node);
        self.trials.last_lost().map(|way| way.node).chain(lossy).collect()
    }

    fn step(&mut self, now: Time, number: u32) {
        let Some(due) = self.next_due().filter(|due| *due <= now) else { return };
        let Some(mut round) = self.round.take() else { return self.begin(now, number) };
        if round.is_answered() {
            return self.end(now, &round, true);
        }
        if now.since(due) > MAX_STEP_DELAY {
            return self.end(now, &round, false);
        }
        if round.sent < SEND_TIMES.len() {
            self.send(&mut round);
        } else if round.report_requested.is_none() {
            round.report_requested = Some(now);
            let silent = round.targets.iter().filter(|(_, target)| !target.is_answered());
            let silent = silent.map(|(node, _)| *node).collect();
            self.outputs.push_back(RemoteOutput::RequestReports(round.number, silent));
        } else {
            return self.end(now, &round, true);
        }
        self.round = Some(round);
    }

    fn begin(&mut self, now: Time, number: u32) {
        self.round_count += 1;
        let lossy = self.lossy_peers();
        let mut nodes: Vec<(u64, NodeId)> = self
            .peers
            .values()
            .filter(|peer| peer.next_trial <= now)
            .map(|peer| (peer.last_round, peer.info.node))
            .collect();
        nodes.sort_unstable();
        let (first, others): (Vec<NodeId>, Vec<NodeId>) =
            nodes.into_iter().map(|(_, node)| node).partition(|node| lossy.contains(node));
        let (first, rest) = first.split_at(first.len().min(UNRESPONSIVE_PER_ROUND));
        let chosen = first.iter().chain(&others).chain(rest).take(PEERS_PER_ROUND);
        let mut targets = BTreeMap::new();
        for node in chosen {
            let Some(peer) = self.peers.get_mut(node) else { continue };
            peer.last_round = self.round_count;
            let open: BTreeSet<Sort> = sorts(&peer.info, &self.ways_lost_here).collect();
            if open.is_empty() {
                continue;
            }
            let is_counted =
                |ip: &IpAddr| open.contains(&Sort { ipv4: ip.is_ipv4(), kind: Kind::Small });
            let sampled = peer.info.addresses.iter().find(is_counted);
            let samples = sampled.map_or(0, |_| peer.losses.samples());
            targets.insert(*node, Target { open, sampled, samples, ..Target::default() });
        }
        if targets.is_empty() {
            self.next_round = now + TRIAL_INTERVAL;
            return;
        }
        self.outputs.push_back(RemoteOutput::Begin(number));
        let mut round =
            Round { number, begun: now, sent: 0, report_requested: None, ends_at: None, targets };
        self.send(&mut round);
        for target in round.targets.values() {
            let Some(to) = target.sampled else { continue };
            let (kind, size) = (Kind::Sample, Kind::Sample.size(to, u32::MAX));
            let sample = || RemoteOutput::Send { to, kind, number, size };
            self.outputs.extend((0..target.samples).map(|_| sample()));
        }
        self.round = Some(round);
    }

    fn send(&mut self, round: &mut Round) {
        round.sent += 1;
        for (node, target) in &round.targets {
            let Some(Peer { info, .. }) = self.peers.get(node) else { continue };
            for sort in &target.open {
                let of_family = |ip: &IpAddr| ip.is_ipv4() == sort.ipv4;
                let Some(to) = info.addresses.iter().find(of_family) else { continue };
                let is_small = sort.kind == Kind::Data
                    && !carries_large(info, &self.ways_lost_here, sort.ipv4);
                let whole = sort.kind.size(to, info.carried);
                let size = if is_small { Some(SMALL) } else { whole };
                let number = round.number;
                self.outputs.push_back(RemoteOutput::Send { to, kind: sort.kind, number, size });
            }
        }
    }

    /// Evaluates a round. Answered packets count as passed even if the round proves no loss.
    fn end(&mut self, now: Time, round: &Round, proves_loss: bool) {
        for (node, target) in &round.targets {
            for (sort, there, back) in target.verdicts(proves_loss) {
                let way = |half| RemoteWay { node: *node, half, sort };
                self.trials.note(way(Half::There), there);
                self.trials.note(way(Half::Back), back);
            }
            let Some(peer) = self.peers.get_mut(node).filter(|_| proves_loss) else { continue };
            peer.is_overloaded =
                !target.is_answered() && target.arrivals.is_some_and(|arrivals| arrivals.shed);
            match target.samples_came() {
                Some(came) => peer.losses.note(target.samples, came, target.samples_answered),
                None => peer.losses.note_unclear(),
            }
            if target.answered.is_empty() && target.arrivals.is_none() {
                let doubled = 1 << peer.rounds_without_pod.min(MAX_DOUBLINGS);
                peer.next_trial = now + TRIAL_INTERVAL * doubled;
                peer.rounds_without_pod += 1;
            } else {
                peer.rounds_without_pod = 0;
            }
        }
        if let Some(rest) = self.rest {
            let lossy = self.lossy_peers();
            for (node, target) in &round.targets {
                let Some(peer) = self.peers.get_mut(node) else { continue };
                // After a partial answer, the rest is still to be determined.
                let is_partly = !target.answered.is_empty() && !target.is_answered();
                let is_open = is_partly || lossy.contains(node);
                let rested = peer.next_trial.max(now + rest);
                peer.next_trial = if is_open { now } else { rested };
            }
        }
        let closed = self.trials.closed();
        let is_known = |way: &&RemoteWay| closed.binary_search(way).is_ok();
        let answering = self.answering();
        let is_untried_suspect = |peer: &Peer| {
            let RemotePeer { node, is_unresponsive, .. } = &peer.info;
            *is_unresponsive
                && peer.next_trial <= now
                && !answering.contains(node)
                && peer.last_round == 0
        };
        let is_short_interval = self.trials.last_lost().any(|way| !is_known(&way))
            || self.peers.values().any(is_untried_suspect);
        let is_short_interval =
            is_short_interval || self.peers.values().any(|peer| peer.losses.is_suspect());
        let is_lossless =
            closed.is_empty() && !self.peers.values().any(|peer| peer.losses.is_reported());
        self.next_round = now
            + if is_short_interval {
                SUSPECT_TRIAL_INTERVAL
            } else if is_lossless {
                TRIAL_INTERVAL
            } else {
                CLOSED_ROUND_INTERVAL + CLOSED_ROUND_INTERVAL_PER_PEER * self.peers.len() as u32
            };
    }
}

#[cfg(test)]
mod tests;
