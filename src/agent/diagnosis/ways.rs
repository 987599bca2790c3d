//! Ways of tunnel packets other than by the underlay interface that are known to reach their hosts: they are
//! intended, and not the reason if such a host falls silent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::auditor::Detour;
use crate::model::Time;

/// Time for which a way must be the same before and after an answered probe is sent: the kernel is queried
/// every ten seconds, so a shorter one might have been another way.
const CERTAIN_AFTER: Duration = Duration::from_secs(15);
/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(5);
/// Limit of ways known per host.
const MAX_WAYS: usize = 4;

/// Ways that are known to reach their hosts.
#[derive(Debug, Default)]
pub struct ProvenWays {
    by_host: BTreeMap<IpAddr, Ways>,
    due: Time,
}

/// The ways to one host.
#[derive(Debug)]
struct Ways {
    present: Detour,
    /// Since when packets take the present way.
    since: Time,
    /// When the first probe was sent by the present way that was answered.
    answered: Option<Time>,
    proven: Vec<Detour>,
}

impl ProvenWays {
    /// Records the present ways. `answered` returns when the probe was sent that a host answered last;
    /// `on_link` are hosts that answer ARP or neighbor discovery on the interface of their way. Hosts for
    /// which `is_peer` is false are forgotten.
    pub fn update(
        &mut self,
        now: Time,
        detours: &BTreeMap<IpAddr, Detour>,
        on_link: &BTreeSet<IpAddr>,
        answered: impl Fn(IpAddr) -> Option<Time>,
        is_peer: impl Fn(IpAddr) -> bool,
    ) {
        if now < self.due {
            return;
        }
        self.due = now + INTERVAL;
        self.by_host.retain(|host, _| is_peer(*host));
        for (host, detour) in detours {
            let ways = self.by_host.entry(*host).or_insert_with(|| Ways {
                present: detour.clone(),
                since: now,
                answered: None,
                proven: Vec::new(),
            });
            if ways.present != *detour {
                (ways.present, ways.since, ways.answered) = (detour.clone(), now, None);
            }
            let is_refused = matches!(detour, Detour::Refused(_) | Detour::RefusedBy(_));
            if ways.proven.contains(detour) || is_refused {
                continue;
            }
            let sent = answered(*host).filter(|sent| *sent >= ways.since);
            ways.answered = ways.answered.or(sent);
            let is_certain = |sent: Time| now.since(sent) >= CERTAIN_AFTER;
            if ways.answered.is_some_and(is_certain) || on_link.contains(host) {
                ways.proven.truncate(MAX_WAYS - 1);
                ways.proven.insert(0, detour.clone());
            }
        }
    }

    /// Returns whether packets are known to reach the host by this way.
    pub fn reaches(&self, host: IpAddr, detour: &Detour) -> bool {
        self.by_host.get(&host).is_some_and(|ways| ways.proven.contains(detour))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 99, 3, 2));

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn way(gateway: u8) -> Detour {
        Detour::Redirected { gateway: [10, 99, 2, gateway].into() }
    }

    fn update(ways: &mut ProvenWays, now: u64, detour: Option<Detour>, answered: Option<u64>) {
        let detours = detour.map(|detour| (HOST, detour)).into_iter().collect();
        ways.update(at(now), &detours, &BTreeSet::new(), |_| answered.map(at), |_| true);
    }

    #[test]
    fn way_is_proven_by_an_answer_while_it_lasts() {
        let mut ways = ProvenWays::default();
        update(&mut ways, 0, Some(way(1)), None);
        update(&mut ways, 10, Some(way(1)), Some(8));
        assert!(!ways.reaches(HOST, &way(1)), "the answer may have used an earlier way");
        update(&mut ways, 24, Some(way(1)), Some(22));
        assert!(ways.reaches(HOST, &way(1)) && !ways.reaches(HOST, &way(2)));
        update(&mut ways, 30, Some(way(2)), Some(22));
        update(&mut ways, 60, Some(way(2)), Some(22));
        assert!(!ways.reaches(HOST, &way(2)), "answered before it appeared");
        assert!(ways.reaches(HOST, &way(1)), "it may come back");
        ways.update(at(65), &BTreeMap::new(), &BTreeSet::new(), |_| None, |_| false);
        assert!(!ways.reaches(HOST, &way(1)));
    }

    #[test]
    fn way_to_host_on_link_is_proven_and_a_refusal_never_is() {
        let mut ways = ProvenWays::default();
        let on_link = BTreeSet::from([HOST]);
        for (seconds, detour) in [(1, way(1)), (10, Detour::Refused("no".to_owned()))] {
            let detours = BTreeMap::from([(HOST, detour.clone())]);
            ways.update(at(seconds), &detours, &on_link, |_| None, |_| true);
            assert_eq!(ways.reaches(HOST, &detour), detour == way(1));
        }
    }
}
