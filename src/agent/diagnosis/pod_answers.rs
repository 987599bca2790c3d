//! The thread that checks, in rotation, whether the pods of this host answer ARP or neighbor discovery, and
//! finds out what drops the packets of a pod that does not.
//!
//! [`crate::dataplane::answers`] draws the conclusions. Nothing waits for this thread, and each step is
//! bounded in time.

mod explain;
mod ports;

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use self::{explain::Explanations, ports::Ports};
use crate::{
    agent::{
        Agent,
        diagnosis::tap::{Asker, Tap},
    },
    api::{CheckState, CheckStatus},
    dataplane::answers::{PodResults, Round},
    docker::{self, mac_of},
    model::{Mac, Pod, Problem, ProblemCode, Subnets},
    netlink::{Netlink, link::Link},
    pods::{
        gateway, port,
        wiring::{Wiring, link_name},
    },
    worker::{Order, Orders, Thread, Worker},
};

/// Limit of queries per pod and round: a queue may be full.
const MAX_QUERIES: u32 = 3;
/// How long to wait for an answer, counted from the query: a kernel answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(150);
/// The same for a pod that did not answer in the round before: under load packets wait for a CPU.
const RETRY_ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit of packets read per query.
const MAX_PACKETS: u32 = 10_000;
/// Time between updates of the roster: a new pod need not be queried at once.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Limit of pods that are named, each with its cause.
const MAX_NAMED: usize = 3;

/// The pods to query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoster {
    /// Name of the pods' bridge.
    pub bridge: String,
    /// Subnets of this node.
    pub subnets: Subnets,
    /// Pods by the name of their interface on this host.
    pub pods: BTreeMap<String, RosterPod>,
}

/// A pod to query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterPod {
    /// Its record.
    pub pod: Pod,
    /// Its MAC; `None` where another program has given it an unknown one.
    pub mac: Option<Mac>,
}

/// What is known about the answers of pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodAnswers {
    /// Number of pods that answered their last query.
    answering: usize,
    /// Number of pods that do not answer.
    silent: usize,
    /// One sentence with a remedy for each silent pod, up to a limit.
    pub problems: Vec<Problem>,
    /// The same for what may drop some packets of single pods.
    pub notices: Vec<Problem>,
}

/// The event loop's handle of the thread.
pub struct PodAnswerCheck {
    /// The thread and its orders.
    pub(in crate::agent) worker: Worker<Option<PodRoster>>,
    /// The roster last ordered.
    ordered: Option<PodRoster>,
    /// When the roster was last computed.
    refreshed_at: Option<Instant>,
}

impl Order for Option<PodRoster> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl PodAnswerCheck {
    /// Starts the thread; `report` is called when what is known changes.
    ///
    /// # Errors
    /// Fails when the system refuses a netlink socket or the thread.
    pub fn start(report: impl Fn(PodAnswers) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let worker = Worker::start("answers", move |orders| {
            // Opened by the thread that uses it.
            match Wiring::open() {
                Ok(wiring) => AnswerChecker::new(netlink, wiring, orders, report).run(),
                Err(error) => tracing::error!(%error, "answers of pods are not checked"),
            }
        })?;
        Ok(Self { worker, ordered: None, refreshed_at: None })
    }

    /// Orders a roster, if it has changed.
    fn set(&mut self, roster: Option<PodRoster>) {
        if self.ordered == roster {
            return;
        }
        self.ordered.clone_from(&roster);
        self.worker.order(roster);
    }

    /// Ends the thread after the present round.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The state of the thread.
struct AnswerChecker<F> {
    netlink: Netlink,
    wiring: Wiring,
    orders: Orders<Option<PodRoster>>,
    report: F,
    roster: Option<PodRoster>,
    roll: PodResults,
    /// The sender of queries, and the index of the bridge that it sends by.
    sender: Option<(u32, Asker)>,
    /// When the next round is due.
    due: Instant,
    explained: Explanations,
    ports: Ports,
    /// What was last reported.
    reported: PodAnswers,
}

impl<F: Fn(PodAnswers)> AnswerChecker<F> {
    fn new(netlink: Netlink, wiring: Wiring, orders: Orders<Option<PodRoster>>, report: F) -> Self {
        Self {
            netlink,
            wiring,
            orders,
            report,
            roster: None,
            roll: PodResults::default(),
            sender: None,
            due: Instant::now(),
            explained: Explanations::default(),
            ports: Ports::default(),
            reported: PodAnswers::default(),
        }
    }

    fn run(mut self) {
        while self.apply_orders() {
            let now = Instant::now();
            if self.due <= now {
                if let Some(roster) = self.roster.clone() {
                    if let Err(error) = self.query_pods(&roster) {
                        tracing::debug!(%error, "pods not queried");
                    }
                    if let Err(error) = self.ports.check(&mut self.netlink, &roster) {
                        tracing::debug!(%error, "ports of pods not read");
                    }
                    self.report_state(&roster);
                }
                self.due = now + self.roll.pause();
            }
            let pause = self.roster.as_ref().map(|_| self.due.saturating_duration_since(now));
            self.orders.sleeper.wait([], pause);
        }
    }

    /// Applies waiting orders. Returns false once the agent has ended.
    fn apply_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(roster) => {
                    if self.roster.is_none() {
                        self.due = Instant::now();
                    }
                    self.roster = roster;
                    let pods = self.roster.as_ref().map(|roster| &roster.pods);
                    self.roll.retain(|port| pods.is_some_and(|pods| pods.contains_key(port)));
                    if let Some(roster) = self.roster.clone() {
                        self.report_state(&roster);
                    } else {
                        self.report_if_changed(PodAnswers::default());
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Runs one round of queries.
    fn query_pods(&mut self, roster: &PodRoster) -> io::Result<()> {
        let Some(bridge) = self.netlink.link(&roster.bridge)?.filter(|bridge| bridge.up) else {
            return Ok(());
        };
        let mut queried: BTreeMap<IpAddr, (&str, Option<Mac>)> = BTreeMap::new();
        let mut ports = BTreeMap::new();
        for name in self.roll.select_pods(roster.pods.keys()) {
            let link = self.netlink.link(&name)?.filter(|link| can_be_queried(link, &bridge));
            match (link, roster.pods.get_key_value(&name)) {
                (Some(link), Some((name, RosterPod { pod, mac }))) => {
                    queried.insert(pod.addresses.first, (name, *mac));
                    ports.insert(pod.addresses.first, link.index);
                }
                _ => self.roll.clear_misses(&name),
            }
        }
        if queried.is_empty() {
            return Ok(());
        }
        let watches_ports = queried.values().any(|(name, _)| self.roll.is_suspect(name));
        // A pod that has never answered may have another MAC than the recorded one: broadcast the query.
        for (name, mac) in queried.values_mut() {
            mac.take_if(|_| self.roll.is_suspect(name) && !self.roll.has_answered(name));
        }
        // The bridge sends the queries, so answers are addressed to its MAC.
        let watched = bridge.mac.filter(|_| watches_ports);
        let taps = taps(queried.keys(), watched)?;
        let mut round = Round::new(bridge.index, ports);
        let timeout = if watches_ports { RETRY_ANSWER_TIMEOUT } else { ANSWER_TIMEOUT };
        for _ in 0..MAX_QUERIES {
            for (address, (_, mac)) in &queried {
                if !round.is_answered(*address) {
                    self.send_query(roster, &bridge, *address, *mac)?;
                }
            }
            self.read_answers(&taps, &mut round, timeout)?;
            if round.is_over() {
                break;
            }
        }
        if taps.iter().any(Tap::has_missed) {
            round.note_overflow();
        }
        for (address, (name, _)) in queried {
            self.roll.note(name, round.reply(address, watched.is_some()));
        }
        Ok(())
    }

    /// Sends a query for the address of a pod, with the address of its gateway as the source.
    fn send_query(
        &mut self,
        roster: &PodRoster,
        bridge: &Link,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> io::Result<()> {
        let is_usable = |(index, sender): &(u32, Asker)| {
            *index == bridge.index && Some(sender.mac()) == bridge.mac
        };
        let sender = match self.sender.take().filter(is_usable) {
            Some(known) => known,
            None => (bridge.index, Asker::open(&bridge.name)?),
        };
        let (_, sender) = self.sender.insert(sender);
        let gateways = roster.subnets.iter().map(gateway);
        for gateway in gateways {
            match (gateway, address) {
                (IpAddr::V4(gateway), IpAddr::V4(pod)) => {
                    sender.ask(mac, gateway.octets(), pod.octets())?;
                }
                (IpAddr::V6(gateway), IpAddr::V6(pod)) => sender.solicit(mac, gateway, pod)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads answers until the pause is over. Packets that arrived by then are read even if this thread gets
    /// a CPU late.
    fn read_answers(&self, taps: &[Tap], round: &mut Round, pause: Duration) -> io::Result<()> {
        let until = Instant::now() + pause;
        let mut packets = 0;
        loop {
            for tap in taps {
                while packets < MAX_PACKETS && tap.next(|packet| round.on_packet(packet))?.is_some()
                {
                    packets += 1;
                }
            }
            let remaining = until.saturating_duration_since(Instant::now());
            if packets >= MAX_PACKETS {
                round.note_overflow();
            }
            if remaining.is_zero() || round.is_over() {
                return Ok(());
            }
            // A tap that is no longer read must not wake this thread.
            let fds = taps.iter().filter(|_| packets < MAX_PACKETS).map(|tap| tap.as_fd());
            self.orders.sleeper.wait(fds, Some(remaining));
        }
    }

    /// Reports the silent pods with their causes, and the notices about ports.
    fn report_state(&mut self, roster: &PodRoster) {
        let silent: Vec<_> =
            self.roll.silent().map(|(port, loss)| (port.to_owned(), loss)).collect();
        let mut problems =
            self.explained.problems(&mut self.netlink, &mut self.wiring, roster, &silent);
        let notices = self.ports.notices(roster, silent.iter().map(|(port, _)| port.as_str()));
        let silent = problems.len();
        let more = silent.saturating_sub(MAX_NAMED);
        problems.truncate(MAX_NAMED);
        if more > 0 {
            let what = format!(
                "{more} more pods of this host do not answer ARP or neighbor discovery, likely for the \
                 same causes"
            );
            problems.push(Problem::new(ProblemCode::PodSilent, "other pods", what, ""));
        }
        self.report_if_changed(PodAnswers {
            answering: self.roll.answering(),
            silent,
            problems,
            notices,
        });
    }

    /// Reports what is known, if it has changed.
    fn report_if_changed(&mut self, now: PodAnswers) {
        if now != self.reported {
            self.reported.clone_from(&now);
            (self.report)(now);
        }
    }
}

impl PodAnswers {
    /// Returns the status of forwarding extended by the answers of pods: silent pods make it fail.
    pub fn added_to(&self, forwarding: &CheckStatus) -> CheckStatus {
        let CheckStatus { state, detail } = forwarding.clone();
        match (self.silent, self.answering) {
            (0, 0) => CheckStatus { state, detail },
            (0, count) => {
                let pods =
                    if count == 1 { "1 pod answers" } else { &format!("{count} pods answer") };
                CheckStatus { state, detail: format!("{detail}; {pods} when asked") }
            }
            (silent, answering) => CheckStatus {
                state: CheckState::Failing,
                detail: format!(
                    "{detail}; {silent} of {} pods do not answer when asked",
                    silent + answering
                ),
            },
        }
    }
}

/// Opens the packet sockets that receive the answers. With `watched`, the MAC of the bridge, they show what
/// arrives at the ports too, so that answers lost before the bridge are seen.
fn taps<'a>(
    mut addresses: impl Iterator<Item = &'a IpAddr> + Clone,
    watched: Option<Mac>,
) -> io::Result<Vec<Tap>> {
    if let Some(bridge) = watched {
        return Ok(vec![Tap::of_neighbors(bridge)?]);
    }
    let mut taps = Vec::new();
    if addresses.clone().any(IpAddr::is_ipv4) {
        taps.push(Tap::of_arp()?);
    }
    if addresses.any(IpAddr::is_ipv6) {
        taps.push(Tap::of_discovery()?);
    }
    Ok(taps)
}

/// Whether both ends of a pod's veth pair are up, and its port on the bridge is as it should be.
fn can_be_queried(port: &Link, bridge: &Link) -> bool {
    port.up && port.carrier && port.is_plugged_into(bridge.index) && port::is_right(port)
}

impl Agent {
    /// Updates the roster if [`CHECK_INTERVAL`] has passed.
    pub(in crate::agent) fn refresh_roster(&mut self) {
        if self
            .threads
            .monitors
            .answer_check
            .refreshed_at
            .is_none_or(|at| at.elapsed() >= CHECK_INTERVAL)
        {
            self.update_roster();
        }
    }

    /// Computes the pods to query, and orders them if they have changed.
    pub(in crate::agent) fn update_roster(&mut self) {
        self.threads.monitors.answer_check.refreshed_at = Some(Instant::now());
        let roster = self.roster();
        self.threads.monitors.answer_check.set(roster);
    }

    /// Returns the connected pods with an address of the present subnet; `None` if there is none.
    fn roster(&self) -> Option<PodRoster> {
        let bridge = self.pods.bridge.as_ref()?;
        let is_connected = |pod: &&Pod| {
            let is_held = pod.owner == docker::OWNER && pod.netns.is_empty();
            !is_held && self.is_present(pod) && !self.pods.is_attaching(&pod.attachment)
        };
        // Another problem reports pods with an address of an earlier subnet.
        let is_inside =
            |pod: &&Pod| bridge.subnets.iter().any(|subnet| subnet.contains(&pod.addresses.first));
        let pods = self.pods.table.iter().filter(is_connected).filter(is_inside);
        let entry = |pod: &Pod| {
            let roster_pod = RosterPod { pod: pod.clone(), mac: mac_of(pod) };
            (link_name(&pod.attachment), roster_pod)
        };
        let pods: BTreeMap<String, RosterPod> = pods.map(entry).collect();
        let (bridge, subnets) = (bridge.name.clone(), bridge.subnets);
        (!pods.is_empty()).then_some(PodRoster { bridge, subnets, pods })
    }

    /// Stores what the thread reports, and logs what is new.
    pub(in crate::agent) fn on_answers(&mut self, state: PodAnswers) {
        let findings = |answers: &PodAnswers| [&answers.problems[..], &answers.notices].concat();
        let before = findings(&self.kernel.diagnoses.answers);
        let new = findings(&state).into_iter().filter(|found| !before.contains(found));
        new.for_each(|found| tracing::warn!("{found}"));
        self.kernel.diagnoses.answers = state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_to_fails_for_silent_pods_and_keeps_the_state_otherwise() {
        let status = |state| CheckStatus { state, detail: "packets pass".to_owned() };
        let answers = |answering, silent| PodAnswers { answering, silent, ..PodAnswers::default() };
        for state in [CheckState::Ok, CheckState::Failing, CheckState::Skipped] {
            assert_eq!(answers(0, 0).added_to(&status(state)), status(state));
            assert_eq!(answers(2, 0).added_to(&status(state)).state, state);
            let failing = answers(2, 1).added_to(&status(state));
            assert_eq!(failing.state, CheckState::Failing);
            assert_eq!(failing.detail, "packets pass; 1 of 3 pods do not answer when asked");
        }
    }
}
