//! One peer in one round: what was sent to it, and what became of that.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    super::{Direction, Kind, Seen, Sort, Transport, Way},
    Subject,
};
use crate::wire::Arrivals;

#[derive(Debug, Default)]
pub struct Target {
    pub open: BTreeSet<Sort>,
    pub answered: BTreeSet<Sort>,
    /// Families of which connections were made early in the round, so that they have carried data.
    pub connected: BTreeSet<bool>,
    /// Of which family the packets are that are counted, how many were sent, and how many were answered.
    pub sampled: Option<IpAddr>,
    pub samples: u16,
    pub samples_answered: u16,
    /// What its agent has told; none if it says that there is no pod, or nothing.
    pub arrivals: Option<Arrivals>,
}

impl Target {
    pub fn is_answered(&self) -> bool {
        self.open.is_empty() && self.samples_answered >= self.samples
    }

    /// How many of those that are counted have come there; none if that is not known, or where a small packet
    /// that is sent again and again does not get through either, so that nothing is lost by chance.
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

    /// What became of each sort on its way there, and on its way back.
    pub fn verdicts(&self, proves_loss: bool) -> impl Iterator<Item = (Sort, Seen, Seen)> {
        let arrivals = self.arrivals.filter(|arrivals| proves_loss && !arrivals.shed);
        let answered = self.answered.iter().map(|sort| (*sort, Seen::Passed, Seen::Passed));
        let open =
            self.open.iter().map(move |sort| match arrivals.filter(|_| self.is_tried(*sort)) {
                None => (*sort, Seen::Unclear, Seen::Unclear),
                Some(Arrivals { came, .. }) if came & sort.bit() == 0 => {
                    (*sort, Seen::Lost, Seen::Unclear)
                }
                Some(_) => (*sort, Seen::Passed, Seen::Lost),
            });
        answered.chain(open.filter(move |_| proves_loss))
    }

    /// Whether silence says something about packets of this sort, and not about others that had to pass
    /// first: data takes a connection, and large segments come where large packets do.
    fn is_tried(&self, sort: Sort) -> bool {
        let is_lost = |kind| self.open.contains(&Sort { kind, ..sort });
        sort.kind != Kind::Data
            || self.connected.contains(&sort.ipv4)
                && !is_lost(Kind::Segment)
                && !is_lost(Kind::Large)
    }
}

/// What is tried with a peer.
pub fn sorts(subject: &Subject, lost_here: &[Way]) -> impl Iterator<Item = Sort> {
    let Subject { addresses, carried, takes_large, .. } = *subject;
    let all = addresses.iter().flat_map(move |ip| {
        let is_sendable =
            move |kind: &Kind| *kind == Kind::Segment || kind.size(ip, carried).is_some();
        Kind::ALL.into_iter().filter(is_sendable).map(move |kind| Sort { ipv4: ip.is_ipv4(), kind })
    });
    all.filter(move |sort| {
        let is_lost = lost_here.iter().any(|way| explains(*way, *sort));
        !is_lost && (takes_large || !sort.kind.is_large())
    })
}

/// Whether large packets are not known to be lost on the way to a peer.
pub fn carries_large(subject: &Subject, lost_here: &[Way], ipv4: bool) -> bool {
    let large = Way { direction: Direction::LargeOut, ipv4 };
    subject.takes_large && !lost_here.contains(&large)
}

/// Whether packets of a sort are lost where this host drops those on a way.
fn explains(way: Way, sort: Sort) -> bool {
    let is_of = |transport: Transport| sort.kind.transport() == transport;
    let concerns = match way.direction {
        Direction::Out(transport) | Direction::In(transport) => is_of(transport),
        Direction::LargeOut => sort.kind.is_large(),
        Direction::Carried | Direction::Gateway => true,
        Direction::TooLarge
        | Direction::Between(_)
        | Direction::Finding
        | Direction::ToHost
        | Direction::FromHost(_) => false,
    };
    concerns && way.ipv4 == sort.ipv4
}
