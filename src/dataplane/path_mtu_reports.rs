//! Path MTUs that routers have reported to the kernel, and which of them are correct.
//!
//! Any host can claim by ICMP that a packet was too large ("fragmentation needed", RFC 1191). The kernel
//! accepts the claim for ten minutes, and tunnel packets become small and slow. The agent therefore tests
//! each report: it sends the host datagrams of the interface's full size that routers must not fragment. An
//! answer shows that the report is false, and the kernel is made to drop it. If the report is correct, no
//! answer arrives, because a router rejects the datagrams. Pure.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use crate::model::Time;

/// Datagrams sent to test one report.
const MAX_TRIES: u32 = 3;
/// Time between two datagrams.
const TRY_INTERVAL: Duration = Duration::from_secs(1);
/// Time from the last datagram until the report counts as correct.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval between tests of a correct report, because the path may change.
const RETEST_INTERVAL: Duration = Duration::from_secs(300);
/// Minimum time between two requests to the kernel to drop the reports about one host.
const MIN_DROP_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of unanswered datagrams whose sequence numbers are stored.
const MAX_PENDING: usize = 64;

/// The reports about all hosts.
#[derive(Debug, Default)]
pub struct Reports {
    hosts: BTreeMap<IpAddr, Report>,
    /// Sequence numbers of unanswered datagrams, and the hosts they were sent to.
    pending: VecDeque<(u16, IpAddr)>,
}

#[derive(Clone, Copy, Debug)]
struct Report {
    /// The reported path MTU in bytes.
    mtu: u32,
    state: TestState,
    due: Time,
    tries: u32,
    /// How often the kernel was made to drop it.
    drops: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TestState {
    /// Not tested yet.
    Untested,
    /// Full-size datagrams are lost, so the report is correct.
    Correct,
    /// A full-size datagram was answered, so the report is false.
    False,
}

/// An action for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this host a full-size datagram.
    SendFullSize(IpAddr),
    /// Make the kernel drop its report about this host: the path MTU in bytes.
    DropReport(IpAddr, u32),
}

impl Reports {
    /// Replaces the reports with those that the kernel holds now: path MTUs in bytes by host.
    pub fn update(&mut self, now: Time, mtus: &BTreeMap<IpAddr, u32>) {
        self.hosts.retain(|host, _| mtus.contains_key(host));
        for (&host, &mtu) in mtus {
            let new = Report { mtu, state: TestState::Untested, due: now, tries: 0, drops: 0 };
            let report = self.hosts.entry(host).or_insert(new);
            // After a false report, the next one about the host counts as false, too.
            if report.mtu != mtu && report.state == TestState::Correct {
                *report = new;
            }
            report.mtu = mtu;
        }
    }

    /// Returns the next action that is due.
    pub fn poll(&mut self, now: Time) -> Option<Action> {
        let (&host, report) = self.hosts.iter_mut().find(|(_, report)| report.due <= now)?;
        Some(match report.state {
            TestState::Untested if report.tries == MAX_TRIES => {
                (report.state, report.due) = (TestState::Correct, now + RETEST_INTERVAL);
                return self.poll(now);
            }
            TestState::Untested => {
                report.tries += 1;
                report.due =
                    now + if report.tries == MAX_TRIES { ANSWER_TIMEOUT } else { TRY_INTERVAL };
                Action::SendFullSize(host)
            }
            TestState::Correct => {
                report.due = now + RETEST_INTERVAL;
                Action::SendFullSize(host)
            }
            TestState::False => {
                report.drops += 1;
                report.due = now + MIN_DROP_INTERVAL;
                Action::DropReport(host, report.mtu)
            }
        })
    }

    /// Records the sequence number of a datagram sent to a host.
    pub fn on_sent(&mut self, host: IpAddr, number: u16) {
        if self.pending.len() == MAX_PENDING {
            self.pending.pop_front();
        }
        self.pending.push_back((number, host));
    }

    /// Records the answer to a full-size datagram.
    pub fn on_answer(&mut self, now: Time, host: IpAddr, number: u16) {
        let Some(index) = self.pending.iter().position(|pending| *pending == (number, host)) else {
            return;
        };
        self.pending.remove(index);
        if let Some(report) = self.hosts.get_mut(&host).filter(|r| r.state != TestState::False) {
            (report.state, report.due) = (TestState::False, now);
        }
    }

    /// Returns the path MTU in bytes to a host, if a report exists and has been tested as correct.
    pub fn correct_mtu(&self, host: IpAddr) -> Option<u32> {
        let report = self.hosts.get(&host)?;
        (report.state == TestState::Correct).then_some(report.mtu)
    }

    /// Returns the reported MTU in bytes if a false report has reappeared after the kernel dropped it.
    pub fn recurring_false_mtu(&self, host: IpAddr) -> Option<u32> {
        let report = self.hosts.get(&host)?;
        (report.state == TestState::False && report.drops > 1).then_some(report.mtu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn mtu(mtu: u32) -> BTreeMap<IpAddr, u32> {
        BTreeMap::from([(HOST, mtu)])
    }

    #[test]
    fn report_is_correct_when_three_full_size_datagrams_are_lost() {
        let mut reports = Reports::default();
        for second in 0..MAX_TRIES.into() {
            reports.update(at(second), &mtu(1400));
            assert_eq!(reports.poll(at(second)), Some(Action::SendFullSize(HOST)), "{second}");
            assert_eq!(reports.poll(at(second)), None);
            assert_eq!(reports.correct_mtu(HOST), None);
        }
        assert_eq!(reports.poll(at(5)), None);
        assert_eq!(reports.correct_mtu(HOST), Some(1400));
        // A changed report is tested separately, and a correct one is tested again later.
        reports.update(at(6), &mtu(1300));
        assert_eq!(
            (reports.correct_mtu(HOST), reports.poll(at(6))),
            (None, Some(Action::SendFullSize(HOST)))
        );
        let mut reports = Reports::default();
        reports.update(at(0), &mtu(1400));
        for second in 0..6 {
            reports.poll(at(second));
        }
        assert_eq!(reports.poll(at(400)), Some(Action::SendFullSize(HOST)));
        assert_eq!(reports.correct_mtu(HOST), Some(1400), "until an answer arrives");
        reports.on_sent(HOST, 7);
        reports.on_answer(at(400), HOST, 7);
        assert_eq!(reports.correct_mtu(HOST), None);
        reports.update(at(401), &BTreeMap::new());
        assert_eq!(reports.poll(at(500)), None, "no report left");
    }

    #[test]
    fn report_is_dropped_when_full_size_datagram_is_answered_and_recurring_when_it_reappears() {
        let mut reports = Reports::default();
        reports.update(at(0), &mtu(552));
        assert_eq!(reports.poll(at(0)), Some(Action::SendFullSize(HOST)));
        reports.on_sent(HOST, 9);
        reports.on_answer(at(0), HOST, 8);
        reports.on_answer(at(0), [192, 0, 2, 9].into(), 9);
        assert_eq!(reports.poll(at(0)), None, "wrong sequence number, wrong host");
        reports.on_answer(at(0), HOST, 9);
        assert_eq!(reports.poll(at(0)), Some(Action::DropReport(HOST, 552)));
        assert_eq!((reports.poll(at(5)), reports.recurring_false_mtu(HOST)), (None, None));
        reports.update(at(10), &mtu(600));
        assert_eq!(reports.poll(at(10)), Some(Action::DropReport(HOST, 600)));
        assert_eq!(
            (reports.recurring_false_mtu(HOST), reports.correct_mtu(HOST)),
            (Some(600), None)
        );
    }
}
