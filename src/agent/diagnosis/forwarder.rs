//! The thread that tests whether this host forwards packets of pods, and determines what drops them if
//! not.
//!
//! It has its own pod on the bridge (`pods::agent_pod`) while there are pods.
//! [`crate::dataplane::forwarding`] draws the conclusions. Nothing waits for this thread, and each step
//! has a time limit.

mod capture;
mod carried;
mod explain;
mod foreign;
mod gateway;
pub(super) mod ipsec;
mod marks;
mod no_trial;
mod notices;
mod output;
mod own_host;
mod partial;
mod pod;
mod report;
mod resolution;
mod setting;
mod test_pods;
mod transit;
mod trial;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use self::{
    explain::Reasons,
    no_trial::{NoTrial, no_trial_reason},
    setting::{Peer, TrialInput},
    test_pods::TestPods,
    transit::Transit,
    trial::{Outcome, Trial},
};
use crate::{
    api::CheckStatus,
    dataplane::forwarding::{Direction, TrialResult, TrialWay, Trials},
    model::{PacketSelector, Problem},
    netlink::{Netlink, nftables::Changes, route::Query},
    pods::agent_pod::PodNamespace,
    worker::{Order, Orders, Thread, Worker},
};

/// Time from a change of nftables rules to the next trial, so that related changes are complete.
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// Shortest time between two trials after changes of rules.
const MIN_TRIAL_INTERVAL: Duration = Duration::from_secs(2);
/// Number of consecutive failures to make a trial that is reported.
const FAILURES_UNTIL_REPORTED: u32 = 3;
/// Time until the next attempt if no trial is possible.
const RETRY_INTERVAL: Duration = Duration::from_secs(15);
/// The same if a first pod is about to create the bridge.
const SHORT_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two readings of the rules while packets are lost.
const MIN_READ_INTERVAL: Duration = Duration::from_secs(10);
/// There may be very many rules: reading them takes at most this fraction (1/n) of the time.
const READ_SHARE: u32 = 100;
/// The results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// The state of the check for the status.
    pub status: CheckStatus,
    /// The problems.
    pub problems: Vec<Problem>,
    /// Notices about losses of some packets, or about a missing test.
    pub notices: Vec<Problem>,
    /// Why tunnel packets of members do not arrive.
    pub input: Vec<Problem>,
    /// Whether this host drops everything that comes out of the tunnel, even packets to itself, as one
    /// of the problems says; for IPv4 and IPv6.
    pub drops_incoming: [bool; 2],
    /// Whether the kernel forbids the agent to send, even inside its own pod, where no rule of this host
    /// applies.
    pub is_forbidden: bool,
    /// Whether pods cannot resolve their gateway, as one of the problems says.
    pub lacks_gateway: bool,
    /// Ways on which packets are lost.
    pub closed: Vec<TrialWay>,
    /// Source addresses that replace those of other hosts' pods in incoming packets.
    pub arriving: BTreeSet<IpAddr>,
    /// Rules that may drop packets of pods to other hosts or answers to them, if such packets are lost.
    pub suspects: Vec<String>,
}

/// An event of the thread.
pub enum ForwarderEvent {
    /// The results have changed.
    State(Forwarding),
    /// Its pod was created or removed.
    PodNamespace(Option<PodNamespace>),
}

/// Handle of the thread.
pub struct Forwarder {
    /// The thread.
    pub(in crate::agent) worker: Worker<Option<TrialInput>>,
    /// The last setting that was passed to the thread.
    reported: Option<TrialInput>,
}

impl Order for Option<TrialInput> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl Forwarder {
    /// Starts the thread. `tell` receives its events.
    ///
    /// # Errors
    /// Fails if a netlink socket cannot be opened or the thread cannot be created.
    pub fn start(report: impl Fn(ForwarderEvent) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let begin = |orders| TrialRunner {
            netlink,
            changes: Changes::open().ok(),
            orders,
            report,
            setting: None,
            is_new: false,
            test_pods: None,
            trials: Trials::default(),
            translated: BTreeMap::new(),
            arriving: BTreeMap::new(),
            skipped: String::new(),
            failures: 0,
            is_forbidden: false,
            notices: Vec::new(),
            next_notices: None,
            turn: 0,
            due: Instant::now(),
            last_trial: None,
            next_reading: None,
            reasons: Reasons::default(),
            input: Vec::new(),
            transit: Transit::default(),
            reported: Forwarding::default(),
        };
        let worker = Worker::start("forwarding", move |orders| begin(orders).run())?;
        Ok(Self { worker, reported: None })
    }

    /// Passes a setting to the thread if it has changed.
    fn set(&mut self, setting: Option<TrialInput>) {
        if self.reported == setting {
            return;
        }
        self.reported.clone_from(&setting);
        self.worker.order(setting);
    }

    /// Ends the thread after the current step. It removes its pod before it ends.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The state of the thread.
struct TrialRunner<F> {
    netlink: Netlink,
    changes: Option<Changes>,
    orders: Orders<Option<TrialInput>>,
    report: F,
    setting: Option<TrialInput>,
    /// Whether the setting has changed since the last trial.
    is_new: bool,
    test_pods: Option<TestPods>,
    trials: Trials,
    /// Source address that replaces the pod's in outgoing packets, by whether it is IPv4.
    translated: BTreeMap<bool, IpAddr>,
    /// Source address that replaces the sender's in incoming packets, by whether it is IPv4.
    arriving: BTreeMap<bool, IpAddr>,
    /// Why there was no trial; empty if there was one.
    skipped: String,
    /// Number of consecutive trials that could not be made.
    failures: u32,
    /// Whether the last trial failed because the kernel forbids this process to send.
    is_forbidden: bool,
    notices: Vec<Problem>,
    /// Earliest time to read the rules behind the notices again.
    next_notices: Option<Instant>,
    /// Number of the last trial.
    turn: usize,
    due: Instant,
    /// Time of the last trial.
    last_trial: Option<Instant>,
    /// Earliest time to read the rules again.
    next_reading: Option<Instant>,
    /// Possible causes of losses, from the last reading of the rules.
    reasons: Reasons,
    input: Vec<Problem>,
    transit: Transit,
    /// The last reported results.
    reported: Forwarding,
}

impl<F: Fn(ForwarderEvent)> TrialRunner<F> {
    fn run(mut self) {
        while self.take_orders() {
            let now = Instant::now();
            if self.have_rules_changed() {
                let earliest = self.last_trial.map_or(now, |tried| tried + MIN_TRIAL_INTERVAL);
                self.due = self.due.min(earliest.max(now + SETTLE_TIME));
                (self.next_reading, self.next_notices) = (None, None);
                self.transit.on_changed_rules();
            }
            if self.due <= now {
                self.run_due(now);
                self.report();
            }
            let pause = self.due.saturating_duration_since(Instant::now());
            let changes = self.changes.as_ref().map(|changes| changes.as_fd());
            self.orders.sleeper.wait(changes, Some(pause));
        }
        self.remove_test_pods();
    }

    /// Takes all queued settings. Returns `false` once the agent has ended.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(setting) => {
                    self.setting = setting;
                    self.is_new = true;
                    self.due = Instant::now();
                    let shape = self.setting.as_ref().and_then(|setting| setting.shape.as_ref());
                    if shape.is_none() {
                        // Another pod has the address.
                        self.remove_test_pods();
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn have_rules_changed(&mut self) -> bool {
        let changed = self.changes.as_mut().map_or(Ok(false), Changes::any);
        changed.unwrap_or_else(|error| {
            tracing::debug!(%error, "nftables notifications not read");
            self.changes = None;
            false
        })
    }

    /// Makes a trial, and reads the rules if packets are lost.
    fn run_due(&mut self, now: Instant) {
        self.is_new = false;
        let Some(mut setting) = self.setting.clone() else {
            self.remove_test_pods();
            self.transit = Transit::default();
            self.discard_results("this node has no subnet in use".to_owned());
            self.due = now + RETRY_INTERVAL;
            return;
        };
        let foreign = match setting.has_pods {
            true => None,
            false => foreign::bridge(&mut self.netlink, &setting),
        };
        let tried = self.run_trial(&setting, foreign.as_deref());
        self.is_forbidden = tried.as_ref().is_err_and(NoTrial::is_forbidden);
        match tried {
            Ok(()) => {
                self.failures = 0;
                self.due = now + self.trials.pause();
            }
            Err(NoTrial::Idle(why)) => {
                self.failures = 0;
                self.discard_results(why);
                let is_coming = setting.has_pods && setting.shape.is_some();
                self.due = now + if is_coming { SHORT_RETRY_INTERVAL } else { RETRY_INTERVAL };
            }
            Err(NoTrial::Failed(error)) => {
                tracing::debug!(%error, "forwarding not tested");
                self.failures = self.failures.saturating_add(1);
                let is_certain = self.failures >= FAILURES_UNTIL_REPORTED;
                if is_certain {
                    self.discard_results(no_trial_reason(&error));
                }
                self.due = now + if is_certain { RETRY_INTERVAL } else { SHORT_RETRY_INTERVAL };
            }
        }
        if self.is_new {
            self.due = now;
            return;
        }
        if let Some(bridge) = foreign.filter(|_| self.test_pods.is_none()) {
            (setting.bridge, setting.has_pods) = (bridge, true);
        }
        self.last_trial = Some(now);
        self.read_rules(&setting);
        self.read_notices(&setting);
        self.watch_transit(&setting);
    }

    /// Reads rules for notices about what a trial cannot detect.
    fn read_notices(&mut self, setting: &TrialInput) {
        let begun = Instant::now();
        if self.next_notices.is_some_and(|at| at > begun) {
            return;
        }
        self.notices.clear();
        let is_untested = self.failures >= FAILURES_UNTIL_REPORTED;
        if is_untested {
            self.notices.extend(notices::untried(setting, &self.skipped));
        }
        let closed = self.trials.closed();
        let is_of_host =
            |way: &TrialWay| way.direction.is_of_host() || way.direction == Direction::TooLarge;
        if (setting.has_pods || setting.unanswered) && closed.iter().all(is_of_host) {
            self.notices.extend(notices::of_host(setting, &closed));
            self.notices.extend(match is_untested {
                true => partial::untested(&mut self.netlink, setting, &self.notices),
                false => partial::notices(&mut self.netlink, setting),
            });
            self.notices.extend(ipsec::selecting(setting));
            self.notices.extend(notices::programs(&mut self.netlink, setting));
        }
        for (ipv4, address) in &self.arriving {
            self.notices.push(notices::arriving(setting, *ipv4, *address));
        }
        self.next_notices = Some(begun + begun.elapsed() * READ_SHARE);
    }

    /// Makes one trial of each way. `foreign` is the bridge of another program that has the pods.
    ///
    /// # Errors
    /// Fails with the reason if no trial is possible.
    fn run_trial(&mut self, setting: &TrialInput, foreign: Option<&str>) -> Result<(), NoTrial> {
        let idle = |why: &str| NoTrial::Idle(why.to_owned());
        let Some(shape) = &setting.shape else {
            let occupant = setting.occupant.as_deref().unwrap_or("another pod has its address");
            return Err(NoTrial::Failed(io::Error::other(format!(
                "the agent needs a pod of its own at the last address of the subnet, and {occupant}: \
                 replace that pod, or use subnets with more than one address for pods"
            ))));
        };
        if setting.peers.is_empty() && !setting.has_pods && foreign.is_none() {
            self.remove_test_pods();
            return Err(idle("there are no pods, and no peer to test with"));
        }
        let between = explain::are_bridged_filtered(&mut self.netlink, setting);
        let with_second_pod = between.contains(&true);
        let mut test_pods = self.take_test_pods(shape, with_second_pod, foreign)?;
        self.turn = self.turn.wrapping_add(1);
        let found = test_pods.gateway.find(|pause| self.wait(&[], pause));
        // Without a gateway, nothing else can be tested.
        let has_gateway =
            found.is_empty() || found.iter().any(|(_, seen)| *seen != TrialResult::Lost);
        found.into_iter().for_each(|(way, seen)| self.trials.note(way, seen));
        // Results of ways that are no longer tested are discarded.
        self.trials.retain(|way| match way.direction {
            Direction::Between(_) | Direction::NeighborDiscovery => between[usize::from(!way.ipv4)],
            Direction::Out(_) | Direction::In(_) => !setting.peers.is_empty(),
            Direction::Carried | Direction::LargeOut | Direction::TooLarge => {
                setting.peers.iter().any(|peer| peer.tunnelled)
            }
            Direction::Gateway | Direction::ToHost | Direction::FromHost(_) => true,
        });
        if has_gateway && !self.is_new {
            let seen = test_pods.own_host.run(|fds, pause| self.wait(fds, pause));
            let seen = seen.inspect_err(
                |error| tracing::debug!(%error, "packets between pods and this host not tested"),
            );
            let seen = seen.unwrap_or_default().into_iter();
            seen.for_each(|(way, seen)| self.trials.note(way, seen));
        }
        let mut tried = Ok(());
        if has_gateway && !self.is_new {
            tried = self.try_peers(setting, &test_pods, between);
        }
        let shape = self.setting.as_ref().and_then(|setting| setting.shape.as_ref());
        let is_wanted = shape.is_some();
        self.test_pods = Some(test_pods);
        if !is_wanted {
            self.remove_test_pods();
        }
        tried?;
        self.skipped.clear();
        Ok(())
    }

    /// Tests packets between pods, and between a pod and peers.
    fn try_peers(
        &mut self,
        setting: &TrialInput,
        test_pods: &TestPods,
        between: [bool; 2],
    ) -> io::Result<()> {
        let mut trace = self.reasons.trace(setting, &self.trials.closed());
        let (turn, spread) = (self.turn, self.spread(setting));
        let trial = Trial { setting, sockets: &test_pods.sockets, between, turn, spread };
        let mut tried = Ok(());
        match trial.run(|fds, pause| self.wait(fds, pause)) {
            Ok(Some(Outcome { seen, translated, arriving, stray })) => {
                seen.into_iter().for_each(|(way, seen)| self.trials.note(way, seen));
                self.translated = translated;
                if self.arriving != arriving {
                    (self.arriving, self.next_notices) = (arriving, None);
                }
                if let Some(index) = stray {
                    let links = self.netlink.links().unwrap_or_default();
                    let link = links.into_iter().find(|link| link.index == index);
                    self.reasons.diverted_interface = link.map(|link| link.name);
                }
            }
            Ok(None) => {}
            Err(error) => tried = Err(error),
        }
        if let Some(trace) = &mut trace {
            self.reasons.note_traced(setting, trace);
        }
        tried
    }

    /// Returns peers to whose underlay addresses several next hops lead, so that packets leave by any of
    /// them.
    fn spread(&mut self, setting: &TrialInput) -> BTreeSet<IpAddr> {
        let hosts = setting.peers.iter().filter(|peer| peer.tunnelled).map(|peer| peer.underlay);
        let query = |host| Query {
            output: setting.pinned,
            transport: Some(PacketSelector::udp_to(setting.port)),
            ..Query::to(host)
        };
        let leads_to_several = |host: &IpAddr| {
            self.netlink.route_entry(&query(*host)).is_ok_and(|entry| entry.is_multipath)
        };
        hosts.filter(leads_to_several).collect()
    }

    /// Waits and returns whether to continue: a new order does not wait for the end of a trial.
    fn wait(&mut self, fds: &[BorrowedFd<'_>], pause: Duration) -> bool {
        self.orders.sleeper.wait(fds.iter().copied(), Some(pause));
        self.take_orders() && !self.is_new
    }

    /// Discards all results, for this reason.
    fn discard_results(&mut self, why: String) {
        self.trials.clear();
        self.translated.clear();
        self.arriving.clear();
        self.skipped = why;
    }

    /// Removes the pods and sockets of the trials.
    fn remove_test_pods(&mut self) {
        if let Some(test_pods) = self.test_pods.take() {
            (self.report)(ForwarderEvent::PodNamespace(None));
            test_pods.remove(&mut self.netlink);
        }
    }

    /// Reads the rules if packets are lost.
    fn read_rules(&mut self, setting: &TrialInput) {
        let closed = self.trials.closed();
        self.reasons.keep(&closed, setting.is_remote_lost);
        if !setting.unanswered {
            self.input.clear();
        }
        let begun = Instant::now();
        let translated = &self.translated;
        let is_explained = self.reasons.explains_all(&closed, translated)
            && setting.is_remote_lost == self.reasons.remote.is_some();
        let is_early = self.next_reading.is_some_and(|at| at > begun) && is_explained;
        let is_well = closed.is_empty()
            && translated.is_empty()
            && !setting.unanswered
            && !setting.is_remote_lost;
        if is_well || is_early {
            return;
        }
        let port = self.test_pods.as_ref().map(TestPods::port);
        self.reasons =
            self.reasons.read_again(&mut self.netlink, setting, port, &closed, translated);
        if setting.unanswered {
            self.input = explain::input(setting);
        }
        self.next_reading = Some(begun + MIN_READ_INTERVAL.max(begun.elapsed() * READ_SHARE));
    }
}
