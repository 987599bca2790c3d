//! The thread that tests whether pods of other hosts are reachable, and answers their hosts' tests.
//!
//! It has sockets in the agent's own pod while that exists. [`crate::dataplane::forwarding::RemoteTrials`]
//! draws the conclusions. Agents of other hosts can query which of their packets arrived.

mod setting;
mod sockets;
mod streams;
mod texts;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use ipnet::IpNet;

pub use self::setting::TrialInput;
use self::sockets::{NamespaceSockets, SocketEvent};
use crate::{
    agent::{Agent, clock::Clock, diagnosis::packet_filter::Sources},
    core::{Peer, ReplyId},
    dataplane::{
        desired::RouteTarget,
        forwarding::{
            ArrivalLog, InwardLosses, InwardWay, RemoteLoss, RemoteOutput, RemotePeer,
            RemoteTrials, RemoteWay,
        },
    },
    model::{NodeId, PathState, Subnets},
    pods::{agent_pod::PodNamespace, gateway, last_addresses},
    random::random,
    wire::{Arrivals, Inquiry, Report},
    worker::{Order, Orders, Thread, Worker},
};

/// Time until the entries on demand of an unused peer are removed and trials of both hosts have ended.
const AGING_TIME: Duration = Duration::from_secs(120);

/// The results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemotePodsState {
    /// Ways on which packets are lost.
    pub closed: Vec<RemoteWay>,
    /// Peers whose pods have answered.
    pub answering: BTreeSet<NodeId>,
    /// Peers that receive more probes than they answer, so that nothing is known about them.
    pub overrun: Vec<NodeId>,
    /// Random partial losses.
    pub losses: Vec<RemoteLoss>,
    /// Whether something was lost in the last trial.
    pub is_in_doubt: bool,
    /// Peers to which only large packets were lost in the last trial.
    pub losing_large: BTreeSet<NodeId>,
    /// Ways on which members report that all their packets to pods here are lost.
    pub inward: Vec<InwardWay>,
}

/// An event of the thread.
pub enum RemotePodsEvent {
    /// The results have changed.
    State(RemotePodsState),
    /// These members must be queried for arrivals of this round.
    Ask(u32, Vec<NodeId>),
    /// The arrivals that a member queried; `None` without a pod.
    Testimony(ReplyId, Option<Arrivals>),
}

/// An order for the thread.
pub(in crate::agent) enum Command {
    /// The agent's own pod has changed.
    PodNamespace(Option<PodNamespace>),
    /// The peers have changed.
    Setting(TrialInput),
    /// A member queries the arrivals of this round.
    Testify(ReplyId, NodeId, u32),
    /// Arrivals of a round that members have reported.
    Arrivals(u32, BTreeMap<NodeId, Arrivals>),
}

impl Order for Command {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!(
            (self, earlier),
            (Self::PodNamespace(_), Self::PodNamespace(_)) | (Self::Setting(_), Self::Setting(_))
        )
    }
}

/// Handle of the thread.
pub struct RemotePods {
    /// The thread.
    pub(in crate::agent) worker: Worker<Command>,
    /// The last setting that was passed to the thread.
    reported: TrialInput,
    /// The pod that has the sockets.
    namespace: Option<PodNamespace>,
}

impl RemotePods {
    /// Starts the thread. `tell` receives its events.
    ///
    /// # Errors
    /// Fails if the thread cannot be created.
    pub fn start(report: impl Fn(RemotePodsEvent) + Send + 'static) -> io::Result<Self> {
        let worker = Worker::start("remote pods", move |orders| {
            let runner = Runner {
                orders,
                report,
                clock: Clock(Instant::now()),
                setting: TrialInput::default(),
                remote_pods: RemoteTrials::default(),
                inward: InwardLosses::default(),
                place: None,
                reported: RemotePodsState::default(),
            };
            runner.run();
        })?;
        Ok(Self { worker, reported: TrialInput::default(), namespace: None })
    }

    /// Sets the pod in which the thread has its sockets.
    pub fn set_namespace(&mut self, namespace: Option<PodNamespace>) {
        self.namespace.clone_from(&namespace);
        self.worker.order(Command::PodNamespace(namespace));
    }

    /// Returns the pod in which the thread has its sockets.
    pub fn namespace(&self) -> Option<PodNamespace> {
        self.namespace.clone()
    }

    /// Queues the answer to a member that queries the arrivals of a round.
    pub fn testify(&self, reply: ReplyId, from: NodeId, round: u32) {
        self.worker.order(Command::Testify(reply, from, round));
    }

    fn set(&mut self, setting: TrialInput) {
        if self.reported != setting {
            self.reported.clone_from(&setting);
            self.worker.order(Command::Setting(setting));
        }
    }

    /// Passes the arrivals that members have reported to the thread.
    fn pass_arrivals(&self, round: u32, reported: BTreeMap<NodeId, Arrivals>) {
        self.worker.order(Command::Arrivals(round, reported));
    }

    /// Ends the thread.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The sockets, and what has arrived there.
struct Place {
    sockets: NamespaceSockets,
    witness: ArrivalLog,
}

/// The state of the thread.
struct Runner<F> {
    orders: Orders<Command>,
    report: F,
    clock: Clock,
    setting: TrialInput,
    remote_pods: RemoteTrials,
    inward: InwardLosses,
    place: Option<Place>,
    reported: RemotePodsState,
}

impl<F: Fn(RemotePodsEvent)> Runner<F> {
    fn run(mut self) {
        while self.take_orders() {
            self.receive();
            self.act();
            self.report();
            let now = self.clock.now();
            let due = self.place.as_ref().and_then(|_| self.remote_pods.next_due());
            let pause = due.map(|due| due.since(now));
            let fds = self.place.iter().flat_map(|place| place.sockets.fds());
            let writable = self.place.iter().flat_map(|place| place.sockets.writable());
            self.orders.sleeper.wait_for(fds, writable, pause);
        }
    }

    /// Carries out all queued orders. Returns `false` once the agent has ended.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(Command::PodNamespace(namespace)) => self.set_pod(namespace),
                Ok(Command::Setting(setting)) => {
                    self.setting = setting;
                    self.update();
                    if let Some(place) = &mut self.place {
                        place.witness.keep(|from| self.setting.may_probe(from));
                        if let Err(error) = place.sockets.admit(&self.setting.sources) {
                            tracing::debug!(%error, "socket filters not set");
                        }
                    }
                }
                Ok(Command::Testify(reply, node, round)) => {
                    // Unread packets have arrived, too.
                    self.receive();
                    let now = self.clock.now();
                    let is_its = |from| self.setting.may_be_of(from, node);
                    let place = self.place.as_ref();
                    let reported = place.map(|place| place.witness.arrivals(now, round, is_its));
                    if let Some(report) = &reported {
                        let is_tried = |ipv4| self.remote_pods.tries(node, ipv4);
                        self.inward.on_request(now, node, report, is_tried);
                    }
                    (self.report)(RemotePodsEvent::Testimony(reply, reported));
                }
                Ok(Command::Arrivals(round, reported)) => {
                    self.receive();
                    self.remote_pods.on_arrivals_reported(self.clock.now(), round, &reported);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Moves to another pod. Results of the previous one are discarded.
    fn set_pod(&mut self, namespace: Option<PodNamespace>) {
        self.place = None;
        (self.remote_pods, self.inward) = (RemoteTrials::default(), InwardLosses::default());
        self.update();
        let Some(namespace) = namespace else { return };
        match NamespaceSockets::open(namespace, &self.setting.sources) {
            Ok(sockets) => {
                self.place = Some(Place { sockets, witness: ArrivalLog::new(self.clock.now()) });
            }
            Err(error) => tracing::debug!(%error, "pods of other hosts not tested"),
        }
    }

    fn update(&mut self) {
        self.remote_pods.set_rest(self.setting.rest);
        self.remote_pods.update(&self.setting.subjects, &self.setting.lost_here);
    }

    /// Reads everything received.
    fn receive(&mut self) {
        let Some(Place { sockets, witness }) = &mut self.place else { return };
        let (remote_pods, inward) = (&mut self.remote_pods, &mut self.inward);
        let (setting, clock) = (&self.setting, &self.clock);
        sockets.receive_all(|heard| {
            let now = clock.now();
            match heard {
                SocketEvent::Question { from, round, sort } => {
                    let is_answered =
                        setting.may_probe(from) && witness.on_question(now, from, round, sort);
                    if is_answered {
                        remote_pods.on_question(now, from);
                        if let Some(node) = setting.probers.get(&from) {
                            inward.on_question(*node, from.is_ipv4());
                        }
                    }
                    is_answered
                }
                SocketEvent::Connected { to, round } => {
                    remote_pods.on_connected(now, to, round);
                    false
                }
                SocketEvent::Overflow => {
                    witness.on_overflow(now);
                    false
                }
                SocketEvent::Answer { from, round, kind } => {
                    remote_pods.on_answer(from, kind, round);
                    false
                }
            }
        });
    }

    /// Carries out what the trials require.
    fn act(&mut self) {
        let Some(Place { sockets, .. }) = &mut self.place else { return };
        // A round needs an unpredictable number.
        let Ok(random_bytes) = random() else { return };
        while let Some(output) =
            self.remote_pods.poll(self.clock.now(), u32::from_ne_bytes(random_bytes))
        {
            match output {
                RemoteOutput::Begin(round) => {
                    if let Err(error) = sockets.start_round(round) {
                        tracing::debug!(%error, "sockets not renewed");
                    }
                }
                RemoteOutput::Send { to, kind, number, size } => {
                    let sent = sockets.send(to, kind, number, size);
                    // The kernel may be too old, or the required offload may be off.
                    if sent.is_err() && kind.segments() > 1 {
                        self.remote_pods.on_unsent(to, kind, number);
                    }
                }
                RemoteOutput::RequestReports(round, nodes) => {
                    (self.report)(RemotePodsEvent::Ask(round, nodes))
                }
            }
        }
    }

    /// Reports the results if they have changed.
    fn report(&mut self) {
        let is_tried = |node, ipv4| self.remote_pods.tries(node, ipv4);
        self.inward.retain(self.clock.now(), is_tried);
        let now = RemotePodsState {
            closed: self.remote_pods.closed(),
            answering: self.remote_pods.answering(),
            overrun: self.remote_pods.overloaded(),
            losses: self.remote_pods.losses(),
            is_in_doubt: self.remote_pods.has_recent_loss(),
            losing_large: self.remote_pods.losing_large(),
            inward: self.inward.closed(),
        };
        if now != self.reported {
            self.reported.clone_from(&now);
            (self.report)(RemotePodsEvent::State(now));
        }
    }
}

/// Returns the addresses from which a member's own pod may send probes: its own, and those of its host,
/// in case the host translates them; not those of other pods.
fn probers(subnets: Subnets, underlay: IpAddr) -> impl Iterator<Item = IpAddr> {
    subnets.iter().flat_map(move |subnet| host_addresses(subnets, subnet)).chain([underlay])
}

/// Returns filters for these addresses in all subnets of the overlay. `own` are this host's subnets.
fn sources(networks: Subnets, own: Subnets) -> Vec<Sources> {
    let pairs = networks.iter().zip(own.iter());
    pairs
        .map(|(network, subnet)| Sources::new(network, subnet, host_addresses(own, subnet)))
        .collect()
}

/// Returns the addresses of a host and of the agent's own pod in one of the host's subnets.
fn host_addresses(subnets: Subnets, subnet: IpNet) -> impl Iterator<Item = IpAddr> {
    let own = last_addresses(subnets).iter().filter(move |ip| subnet.contains(ip));
    [subnet.network(), gateway(subnet)].into_iter().chain(own)
}

impl Agent {
    /// Handles an event of the thread.
    pub(in crate::agent) fn on_remote_pods(&mut self, reported: RemotePodsEvent) {
        match reported {
            RemotePodsEvent::State(state) => {
                let words = |agent: &Self| {
                    [agent.remote_pod_problems(), agent.remote_pod_notices()].concat()
                };
                let before = words(self);
                // A link of the path may carry less than before.
                let clock = self.clock.now();
                for node in
                    state.losing_large.difference(&self.kernel.diagnoses.remote_pods.losing_large)
                {
                    self.prober.paths.request_size_check(clock, *node);
                }
                self.kernel.diagnoses.remote_pods = state;
                let now = words(self);
                let new = now.iter().filter(|problem| !before.contains(problem));
                new.for_each(|problem| tracing::warn!("{problem}"));
                self.update_forwarder();
            }
            RemotePodsEvent::Ask(round, nodes) => {
                let asked = self.survey(nodes, Inquiry::Arrivals(round), move |agent, found| {
                    let reported =
                        |(node, report): (NodeId, Option<Report>)| Some((node, report?.arrivals?));
                    let arrivals = found.into_iter().filter_map(reported).collect();
                    agent.threads.monitors.remote_pods.pass_arrivals(round, arrivals);
                });
                if !asked {
                    self.threads.monitors.remote_pods.pass_arrivals(round, BTreeMap::new());
                }
            }
            RemotePodsEvent::Testimony(reply, arrivals) => {
                self.send_report(reply, Report { arrivals, ..Report::default() });
            }
        }
    }

    /// Passes the peers to test to the thread if they have changed.
    pub(in crate::agent) fn update_remote_pods(&mut self) {
        let setting = self.remote_pods_setting().unwrap_or_default();
        self.threads.monitors.remote_pods.set(setting);
    }

    fn remote_pods_setting(&self) -> Option<TrialInput> {
        let view = self.kernel.programmed_view()?;
        let probers_of = |(&node, peer): (&NodeId, &Peer)| {
            let (_, subnets) = peer.leases.first()?;
            Some(probers(*subnets, peer.vtep.underlay).map(move |from| (from, node)))
        };
        let own = probers(view.own.subnets, view.own.vtep.underlay);
        let arriving = self.kernel.diagnoses.forwarding.arriving.iter().copied();
        let own = own.chain([self.underlay.local]).chain(arriving).collect();
        let probers = view.peers.iter().filter_map(probers_of).flatten().collect();
        let sources = sources(view.settings.pool.networks(), view.own.subnets);
        let lost_here = self.kernel.diagnoses.forwarding.closed.clone();
        // With entries on demand, peers without entries are not tested, because a test counts as a use.
        let in_use = self.kernel.demand.in_use.as_ref();
        let rest = in_use.map(|_| self.config.idle_after + AGING_TIME);
        let none = TrialInput { subjects: Vec::new(), lost_here, rest, probers, sources, own };
        // That no peer is reachable is already reported.
        if self.lacks_underlay() || self.kernel.host.is_table_full {
            return Some(none);
        }
        let underlay = self.current_underlay();
        let subject = |(node, state, _): (NodeId, PathState, Option<Duration>)| {
            // Firewalls may drop probes of a host, but pass packets of its pods.
            let is_unresponsive = matches!(state, PathState::Unanswered | PathState::OneWay);
            let is_usable = is_unresponsive
                || matches!(state, PathState::Ok | PathState::Asymmetric | PathState::MtuTooLarge);
            // Peers in use that are alive are not probed, so their state may be unknown.
            let is_usable = is_usable || in_use.is_some() && state == PathState::Unknown;
            let peer = view.peers.get(&node)?;
            let is_in_use = in_use.is_none_or(|macs| macs.contains(&peer.vtep.mac));
            let (_, subnets) = peer.leases.first()?;
            let is_diverted = subnets
                .iter()
                .any(|subnet| self.kernel.diagnoses.routing.diverted.contains(&subnet));
            let way = underlay.way(peer.vtep.underlay, subnets.first);
            let is_reached = is_in_use && is_usable && !is_diverted && self.node.is_active(node);
            let narrow = self.kernel.wanted.narrow.get(&node).copied();
            let subject = RemotePeer {
                node,
                addresses: last_addresses(*subnets),
                carried: narrow.unwrap_or(self.underlay.tunnel_mtu),
                takes_large: state != PathState::MtuTooLarge || narrow.is_some(),
                is_unresponsive,
            };
            (is_reached && !matches!(way, RouteTarget::Unreachable)).then_some(subject)
        };
        let subjects = self.path_states().filter_map(subject).collect();
        Some(TrialInput { subjects, ..none })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dual() -> Subnets {
        let net = |text: &str| text.parse().expect("a subnet");
        Subnets { first: net("10.42.1.0/24"), second: Some(net("fd42:0:0:1::/64")) }
    }

    #[test]
    fn prober_addresses_contain_own_pod_and_host_but_no_other_pod() {
        let underlay = IpAddr::from([10, 99, 0, 11]);
        let probers: BTreeSet<IpAddr> = probers(dual(), underlay).collect();
        for last in [0, 1, 254] {
            assert!(probers.contains(&IpAddr::from([10, 42, 1, last])), "{last}");
        }
        assert!(!probers.contains(&IpAddr::from([10, 42, 1, 2])) && probers.contains(&underlay));
        assert_eq!(probers.iter().filter(|ip| ip.is_ipv6()).count(), 3);
    }

    #[test]
    fn socket_filters_accept_all_prober_addresses_of_both_families() {
        let net = |text: &str| text.parse().expect("a network");
        let networks = Subnets { first: net("10.42.0.0/16"), second: Some(net("fd42::/48")) };
        let prober_addresses: Vec<IpAddr> =
            probers(dual(), IpAddr::from([10, 99, 0, 11])).collect();
        assert!(
            last_addresses(dual()).iter().all(|last| prober_addresses.contains(&last)),
            "{prober_addresses:?}"
        );
        let expected = networks.iter().zip(dual().iter()).map(|(network, subnet)| {
            let of_subnet = prober_addresses.iter().copied().filter(|ip| subnet.contains(ip));
            Sources::new(network, subnet, of_subnet)
        });
        assert_eq!(sources(networks, dual()), expected.collect::<Vec<_>>());
    }

    #[test]
    fn packet_from_own_address_may_be_any_members_and_from_member_address_only_its_own() {
        let [first, second] = [1, 2].map(|number| NodeId::from_bytes([number; 8]));
        let [member, own, pod] =
            [[10, 42, 1, 254], [10, 42, 2, 1], [10, 42, 2, 2]].map(IpAddr::from);
        let setting = TrialInput {
            probers: BTreeMap::from([(member, first)]),
            own: BTreeSet::from([own]),
            ..TrialInput::default()
        };
        assert!(setting.may_probe(member) && setting.may_probe(own) && !setting.may_probe(pod));
        assert!(setting.may_be_of(member, first) && !setting.may_be_of(member, second));
        assert!(setting.may_be_of(own, first) && setting.may_be_of(own, second));
        assert!(!setting.may_be_of(pod, first));
    }
}
