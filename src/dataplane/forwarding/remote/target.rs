//! One peer in one round: the packets sent to it, and their results.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    super::{Direction, TrialProtocol, TrialResult, TrialWay},
    RemotePeer,
    message::{Kind, Sort},
};
use crate::wire::Arrivals;

/// The state of one peer in a round.
#[derive(Debug, Default)]
pub struct Target {
    /// Sorts without an answer.
    pub open: BTreeSet<Sort>,
    /// Sorts with an answer.
    pub answered: BTreeSet<Sort>,
    /// Families (true: IPv4) whose connection was established early enough to carry data.
    pub connected: BTreeSet<bool>,
    /// Families whose connection was established too late for that.
    pub connected_late: BTreeSet<bool>,
    /// Destination of the samples; `None` if none were sent.
    pub sampled: Option<IpAddr>,
    /// Number of samples sent.
    pub samples: u16,
    /// Number of samples answered.
    pub samples_answered: u16,
    /// The report of the peer's agent; `None` if it reported that it has no pod, or nothing.
    pub arrivals: Option<Arrivals>,
}

impl Target {
    /// Returns whether all packets are answered.
    pub fn is_answered(&self) -> bool {
        self.open.is_empty() && self.samples_answered >= self.samples
    }

    /// Returns how many samples arrived at the peer. `None` if that is unknown, or if the repeated small
    /// packet is not answered either, so that the loss is not random.
    pub fn samples_came(&self) -> Option<u16> {
        let small = Sort { ipv4: self.sampled?.is_ipv4(), kind: Kind::Small };
        if !self.answered.contains(&small) {
            return None;
        }
        if self.samples_answered >= self.samples {
            return Some(self.samples);
        }
        self.arrivals.filter(|arrivals| !arrivals.shed).map(|arrivals| arrivals.samples)
    }

    /// Returns for each sort the results of the way there and of the way back.
    pub fn verdicts(
        &self,
        proves_loss: bool,
    ) -> impl Iterator<Item = (Sort, TrialResult, TrialResult)> {
        let arrivals = self.arrivals.filter(|arrivals| proves_loss && !arrivals.shed);
        let answered =
            self.answered.iter().map(|sort| (*sort, TrialResult::Passed, TrialResult::Passed));
        let open = self.open.iter().map(move |sort| {
            match arrivals.filter(|_| self.is_conclusive(*sort)) {
                None => (*sort, TrialResult::Unclear, TrialResult::Unclear),
                Some(Arrivals { came, .. }) if came & sort.bit() == 0 => {
                    (*sort, TrialResult::Lost, TrialResult::Unclear)
                }
                Some(_) => (*sort, TrialResult::Passed, TrialResult::Lost),
            }
        });
        answered.chain(open.filter(move |_| proves_loss))
    }

    /// Returns whether a missing answer is evidence about this sort, and not about another one that must pass
    /// first: data passes only where first segments and large packets do. A connection that is established
    /// late proves nothing. One that is never established although first segments are answered is lost: a
    /// rule may match what only connections have.
    fn is_conclusive(&self, sort: Sort) -> bool {
        let is_lost = |kind| self.open.contains(&Sort { kind, ..sort });
        sort.kind != Kind::Data
            || (self.connected.contains(&sort.ipv4) || !self.connected_late.contains(&sort.ipv4))
                && !is_lost(Kind::Segment)
                && !is_lost(Kind::Large)
    }
}

/// Returns the sorts of packets to try with a peer.
pub fn sorts(info: &RemotePeer, ways_lost_here: &[TrialWay]) -> impl Iterator<Item = Sort> {
    let RemotePeer { addresses, carried, takes_large, .. } = *info;
    let all = addresses.iter().flat_map(move |ip| {
        let is_sendable =
            move |kind: &Kind| *kind == Kind::Segment || kind.size(ip, carried).is_some();
        Kind::ALL.into_iter().filter(is_sendable).map(move |kind| Sort { ipv4: ip.is_ipv4(), kind })
    });
    all.filter(move |sort| {
        let is_lost = ways_lost_here.iter().any(|way| implies_loss(*way, *sort));
        !is_lost && (takes_large || !sort.kind.is_large())
    })
}

/// Returns whether large packets to a peer are not known to be lost.
pub fn carries_large(info: &RemotePeer, ways_lost_here: &[TrialWay], ipv4: bool) -> bool {
    let large = TrialWay { direction: Direction::LargeOut, ipv4 };
    info.takes_large && !ways_lost_here.contains(&large)
}

/// Returns whether losses of `sort` follow from this host dropping packets on `way`.
fn implies_loss(way: TrialWay, sort: Sort) -> bool {
    let is_of = |transport: TrialProtocol| sort.kind.transport() == transport;
    let concerns = match way.direction {
        Direction::Out(transport) | Direction::In(transport) => is_of(transport),
        Direction::LargeOut => sort.kind.is_large(),
        Direction::Carried | Direction::Gateway => true,
        Direction::TooLarge
        | Direction::Between(_)
        | Direction::NeighborDiscovery
        | Direction::ToHost
        | Direction::FromHost(_) => false,
    };
    concerns && way.ipv4 == sort.ipv4
}
