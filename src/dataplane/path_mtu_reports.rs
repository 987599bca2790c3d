//! Path MTUs that routers have told the kernel, and which of them to believe.
//!
//! Any host may say by ICMP that a packet of ours was too large ("fragmentation needed", RFC 1191), and the
//! kernel believes it for ten minutes: tunnel packets become small and slow. So each report is tried: the
//! host is sent datagrams of the interface's full size that no router may fragment. One that is answered
//! shows that the report is false; then the kernel is to forget it. A router that has told the truth answers
//! for the host. Pure.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use crate::model::Time;

/// Datagrams sent for one report, and the time between two, and until the verdict.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(3);
/// A report that was believed is tried again, for the path may be another one.
const AGAIN: Duration = Duration::from_secs(300);
/// The kernel is made to forget at most so often.
const FORGET: Duration = Duration::from_secs(10);
/// Datagrams whose numbers are remembered.
const REMEMBERED: usize = 64;

/// The reports about all hosts.
#[derive(Debug, Default)]
pub struct Reports {
    hosts: BTreeMap<IpAddr, Report>,
    asked: VecDeque<(u16, IpAddr)>,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    told: u32,
    verdict: Verdict,
    due: Time,
    tries: u32,
    /// How often the kernel was made to forget it.
    forgotten: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Open,
    Right,
    Wrong,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this host a datagram of full size.
    Ask(IpAddr),
    /// Have the kernel forget what it was told of this host: the MTU.
    Forget(IpAddr, u32),
}

impl Reports {
    /// What the kernel holds now: every host of which something was told, and the MTU.
    pub fn update(&mut self, now: Time, told: &BTreeMap<IpAddr, u32>) {
        self.hosts.retain(|host, _| told.contains_key(host));
        for (&host, &told) in told {
            let new = Report { told, verdict: Verdict::Open, due: now, tries: 0, forgotten: 0 };
            let report = self.hosts.entry(host).or_insert(new);
            // A false one is false whatever it says next.
            if report.told != told && report.verdict == Verdict::Right {
                *report = new;
            }
            report.told = told;
        }
    }

    /// What is due.
    pub fn poll(&mut self, now: Time) -> Option<Action> {
        let (&host, report) = self.hosts.iter_mut().find(|(_, report)| report.due <= now)?;
        Some(match report.verdict {
            Verdict::Open if report.tries == TRIES => {
                (report.verdict, report.due) = (Verdict::Right, now + AGAIN);
                return self.poll(now);
            }
            Verdict::Open => {
                report.tries += 1;
                report.due = now + if report.tries == TRIES { TIMEOUT } else { PAUSE };
                Action::Ask(host)
            }
            Verdict::Right => {
                report.due = now + AGAIN;
                Action::Ask(host)
            }
            Verdict::Wrong => {
                report.forgotten += 1;
                report.due = now + FORGET;
                Action::Forget(host, report.told)
            }
        })
    }

    /// The number of a datagram that was sent to a host.
    pub fn on_asked(&mut self, host: IpAddr, number: u16) {
        if self.asked.len() == REMEMBERED {
            self.asked.pop_front();
        }
        self.asked.push_back((number, host));
    }

    /// A datagram of full size has arrived at this host.
    pub fn on_arrival(&mut self, now: Time, host: IpAddr, number: u16) {
        let Some(place) = self.asked.iter().position(|asked| *asked == (number, host)) else {
            return;
        };
        self.asked.remove(place);
        if let Some(report) = self.hosts.get_mut(&host).filter(|r| r.verdict != Verdict::Wrong) {
            (report.verdict, report.due) = (Verdict::Wrong, now);
        }
    }

    /// The MTU of the path to a host, where a report was tried and is not false.
    pub fn believed(&self, host: IpAddr) -> Option<u32> {
        let report = self.hosts.get(&host)?;
        (report.verdict == Verdict::Right).then_some(report.told)
    }

    /// The same where a false one is there again although the kernel has forgotten it.
    pub fn lasting(&self, host: IpAddr) -> Option<u32> {
        let report = self.hosts.get(&host)?;
        (report.verdict == Verdict::Wrong && report.forgotten > 1).then_some(report.told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn told(mtu: u32) -> BTreeMap<IpAddr, u32> {
        BTreeMap::from([(HOST, mtu)])
    }

    #[test]
    fn report_is_believed_when_three_datagrams_of_full_size_are_lost() {
        let mut reports = Reports::default();
        for second in 0..TRIES.into() {
            reports.update(at(second), &told(1400));
            assert_eq!(reports.poll(at(second)), Some(Action::Ask(HOST)), "{second}");
            assert_eq!(reports.poll(at(second)), None);
            assert_eq!(reports.believed(HOST), None);
        }
        assert_eq!(reports.poll(at(5)), None);
        assert_eq!(reports.believed(HOST), Some(1400));
        // Another one is tried for itself, and so is this one after a while.
        reports.update(at(6), &told(1300));
        assert_eq!((reports.believed(HOST), reports.poll(at(6))), (None, Some(Action::Ask(HOST))));
        let mut reports = Reports::default();
        reports.update(at(0), &told(1400));
        for second in 0..6 {
            reports.poll(at(second));
        }
        assert_eq!(reports.poll(at(400)), Some(Action::Ask(HOST)));
        assert_eq!(reports.believed(HOST), Some(1400), "until it is answered");
        reports.on_asked(HOST, 7);
        reports.on_arrival(at(400), HOST, 7);
        assert_eq!(reports.believed(HOST), None);
        reports.update(at(401), &BTreeMap::new());
        assert_eq!(reports.poll(at(500)), None, "nothing is told any more");
    }

    #[test]
    fn report_is_forgotten_when_a_datagram_of_full_size_arrives_and_lasting_when_it_comes_back() {
        let mut reports = Reports::default();
        reports.update(at(0), &told(552));
        assert_eq!(reports.poll(at(0)), Some(Action::Ask(HOST)));
        reports.on_asked(HOST, 9);
        reports.on_arrival(at(0), HOST, 8);
        reports.on_arrival(at(0), [192, 0, 2, 9].into(), 9);
        assert_eq!(reports.poll(at(0)), None, "not what was asked");
        reports.on_arrival(at(0), HOST, 9);
        assert_eq!(reports.poll(at(0)), Some(Action::Forget(HOST, 552)));
        assert_eq!((reports.poll(at(5)), reports.lasting(HOST)), (None, None));
        reports.update(at(10), &told(600));
        assert_eq!(reports.poll(at(10)), Some(Action::Forget(HOST, 600)));
        assert_eq!((reports.lasting(HOST), reports.believed(HOST)), (Some(600), None));
    }
}
