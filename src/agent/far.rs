//! The thread that tries whether packets of pods come to pods of other hosts, and answers those of others.
//!
//! It has sockets in the pod that is the agent's own, for as long as there is one. What follows from what it
//! sees is decided in [`crate::dataplane::forwarding::FarPods`]. What came to it is told to agents that ask.

mod sockets;
mod streams;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use self::sockets::{Heard, RoomSockets};
use super::{Agent, clock::Clock, packet_filter::Sources, start::random};
use crate::{
    core::{Peer, ReplyId},
    dataplane::{
        desired::Way as Path,
        forwarding::{FarLoss, FarOutput, FarPods, FarWay, Subject, Way, Witness},
    },
    model::{NodeId, PathState, Subnets},
    pods::{gateway, last_addresses, standin::Room},
    wire::{Arrivals, Inquiry, Report},
    worker::{Order, Orders, Thread, Worker},
};

/// So long after their time entries on demand that are not used any more are gone, and trials of both sides
/// are over.
const UNTIL_AGED: Duration = Duration::from_secs(120);

/// Whom there is to try, and who may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    subjects: Vec<Subject>,
    /// What this host drops itself.
    lost_here: Vec<Way>,
    /// For how long a peer is left alone after a trial in which all was well, if that has a price.
    rest: Option<Duration>,
    /// Addresses of members' own pods, and those that their hosts may give them.
    askers: BTreeMap<IpAddr, NodeId>,
    /// The same as far as the kernel can tell them.
    sources: Vec<Sources>,
    /// Those of this host and others that its rules may have put in the place of a member's.
    own: BTreeSet<IpAddr>,
}

impl Setting {
    fn may_ask(&self, from: IpAddr) -> bool {
        self.askers.contains_key(&from) || self.own.contains(&from)
    }

    /// Whether what came from an address may be a member's. A round's number is known to that one alone.
    fn may_be_of(&self, from: IpAddr, node: NodeId) -> bool {
        self.askers.get(&from).map_or(self.own.contains(&from), |asker| *asker == node)
    }
}

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FarState {
    pub closed: Vec<FarWay>,
    /// Peers from whose pods answers come.
    pub answering: BTreeSet<NodeId>,
    /// Peers to which more came than they answer, so that nothing is known of them.
    pub overrun: Vec<NodeId>,
    /// What is lost by chance.
    pub losses: Vec<FarLoss>,
    /// Something was lost when it was last tried.
    pub is_in_doubt: bool,
    /// Peers to which large packets were lost then, and small ones were not.
    pub losing_large: BTreeSet<NodeId>,
}

/// What the thread tells.
pub enum Told {
    State(FarState),
    /// These members are to be asked what has come of a round.
    Ask(u32, Vec<NodeId>),
    /// What has come, for a member that has asked; none where there is no pod.
    Testimony(ReplyId, Option<Arrivals>),
}

pub(super) enum Command {
    Room(Option<Room>),
    Setting(Setting),
    /// This member asks about this round.
    Testify(ReplyId, NodeId, u32),
    /// What members have told of a round.
    Heard(u32, BTreeMap<NodeId, Arrivals>),
}

impl Order for Command {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!(
            (self, earlier),
            (Self::Room(_), Self::Room(_)) | (Self::Setting(_), Self::Setting(_))
        )
    }
}

pub struct Far {
    pub(super) worker: Worker<Command>,
    told: Setting,
    /// The pod where it listens.
    room: Option<Room>,
}

impl Far {
    pub fn start(tell: impl Fn(Told) + Send + 'static) -> io::Result<Self> {
        let worker = Worker::start("far pods", move |orders| {
            let runner = Runner {
                orders,
                tell,
                clock: Clock(Instant::now()),
                setting: Setting::default(),
                far: FarPods::default(),
                place: None,
                told: FarState::default(),
            };
            runner.run();
        })?;
        Ok(Self { worker, told: Setting::default(), room: None })
    }

    pub fn set_room(&mut self, room: Option<Room>) {
        self.room.clone_from(&room);
        self.worker.order(Command::Room(room));
    }

    pub fn room(&self) -> Option<Room> {
        self.room.clone()
    }

    /// Answers a member that asks what has come of a round.
    pub fn testify(&self, reply: ReplyId, from: NodeId, round: u32) {
        self.worker.order(Command::Testify(reply, from, round));
    }

    fn set(&mut self, setting: Setting) {
        if self.told != setting {
            self.told.clone_from(&setting);
            self.worker.order(Command::Setting(setting));
        }
    }

    fn hear(&self, round: u32, told: BTreeMap<NodeId, Arrivals>) {
        self.worker.order(Command::Heard(round, told));
    }

    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// Where it listens, and what came there.
struct Place {
    sockets: RoomSockets,
    witness: Witness,
}

struct Runner<F> {
    orders: Orders<Command>,
    tell: F,
    clock: Clock,
    setting: Setting,
    far: FarPods,
    place: Option<Place>,
    told: FarState,
}

impl<F: Fn(Told)> Runner<F> {
    fn run(mut self) {
        while self.take_orders() {
            self.hear();
            self.act();
            self.report();
            let now = self.clock.now();
            let due = self.place.as_ref().and_then(|_| self.far.next_due());
            let pause = due.map(|due| due.since(now));
            let fds = self.place.iter().flat_map(|place| place.sockets.fds());
            let writable = self.place.iter().flat_map(|place| place.sockets.writable());
            self.orders.sleeper.wait_for(fds, writable, pause);
        }
    }

    /// Says whether the agent still runs.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(Command::Room(room)) => self.settle(room),
                Ok(Command::Setting(setting)) => {
                    self.setting = setting;
                    self.update();
                    if let Some(place) = &mut self.place {
                        place.witness.keep(|from| self.setting.may_ask(from));
                        if let Err(error) = place.sockets.admit(&self.setting.sources) {
                            tracing::debug!(%error, "no filter of questions");
                        }
                    }
                }
                Ok(Command::Testify(reply, node, round)) => {
                    // What waits to be read has come, too.
                    self.hear();
                    let now = self.clock.now();
                    let is_its = |from| self.setting.may_be_of(from, node);
                    let place = self.place.as_ref();
                    let told = place.map(|place| place.witness.testify(now, round, is_its));
                    (self.tell)(Told::Testimony(reply, told));
                }
                Ok(Command::Heard(round, told)) => {
                    self.hear();
                    self.far.on_told(self.clock.now(), round, &told);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Nothing that was known in another pod counts.
    fn settle(&mut self, room: Option<Room>) {
        self.place = None;
        self.far = FarPods::default();
        self.update();
        let Some(room) = room else { return };
        match RoomSockets::open(room, &self.setting.sources) {
            Ok(sockets) => {
                self.place = Some(Place { sockets, witness: Witness::new(self.clock.now()) });
            }
            Err(error) => tracing::debug!(%error, "pods of other hosts are not tried"),
        }
    }

    fn update(&mut self) {
        self.far.set_rest(self.setting.rest);
        self.far.update(&self.setting.subjects, &self.setting.lost_here);
    }

    /// Takes what has come.
    fn hear(&mut self) {
        let Some(Place { sockets, witness }) = &mut self.place else { return };
        let (far, setting, clock) = (&mut self.far, &self.setting, &self.clock);
        sockets.hear(|heard| {
            let now = clock.now();
            match heard {
                Heard::Question { from, round, sort } => {
                    let is_answered =
                        setting.may_ask(from) && witness.on_question(now, from, round, sort);
                    if is_answered {
                        far.on_question(now, from);
                    }
                    is_answered
                }
                Heard::Connected { to, round } => {
                    far.on_connected(now, to, round);
                    false
                }
                Heard::Overflow => {
                    witness.on_overflow(now);
                    false
                }
                Heard::Answer { from, round, kind } => {
                    far.on_answer(from, kind, round);
                    false
                }
            }
        });
    }

    fn act(&mut self) {
        let Some(Place { sockets, .. }) = &mut self.place else { return };
        // Without luck there is no round.
        let Ok(luck) = random() else { return };
        while let Some(output) = self.far.poll(self.clock.now(), u32::from_ne_bytes(luck)) {
            match output {
                FarOutput::Begin(round) => {
                    if let Err(error) = sockets.renew(round) {
                        tracing::debug!(%error, "no fresh port");
                    }
                }
                FarOutput::Send { to, kind, number, size } => {
                    let sent = sockets.send(to, kind, number, size);
                    // The kernel may be too old, or the offload it needs be off.
                    if sent.is_err() && kind.segments() > 1 {
                        self.far.on_unsent(to, kind, number);
                    }
                }
                FarOutput::Ask(round, nodes) => (self.tell)(Told::Ask(round, nodes)),
            }
        }
    }

    fn report(&mut self) {
        let now = FarState {
            closed: self.far.closed(),
            answering: self.far.answering(),
            overrun: self.far.overrun(),
            losses: self.far.losses(),
            is_in_doubt: self.far.is_in_doubt(),
            losing_large: self.far.losing_large(),
        };
        if now != self.told {
            self.told.clone_from(&now);
            (self.tell)(Told::State(now));
        }
    }
}

/// Under which a member's own pod may ask: its own, or one of its host's, should that translate them. Not
/// those of other pods.
fn askers(subnets: Subnets, underlay: IpAddr) -> impl Iterator<Item = IpAddr> {
    subnets.iter().flat_map(move |subnet| ends(subnets, subnet)).chain([underlay])
}

/// The same in all subnets of the overlay's networks, of which these are this host's.
fn sources(networks: Subnets, own: Subnets) -> Vec<Sources> {
    let pairs = networks.iter().zip(own.iter());
    pairs.map(|(network, subnet)| Sources::new(network, subnet, ends(own, subnet))).collect()
}

/// Addresses in one of a host's subnets: those of the host, and that of the agent's own pod.
fn ends(subnets: Subnets, subnet: IpNet) -> impl Iterator<Item = IpAddr> {
    let own = last_addresses(subnets).iter().filter(move |ip| subnet.contains(ip));
    [subnet.network(), gateway(subnet)].into_iter().chain(own)
}

impl Agent {
    pub(super) fn on_far(&mut self, told: Told) {
        match told {
            Told::State(state) => {
                let words = |agent: &Self| [agent.far_problems(), agent.far_warnings()].concat();
                let before = words(self);
                // A link on the way may carry less than before.
                let clock = self.clock.now();
                for node in state.losing_large.difference(&self.kernel.far.losing_large) {
                    self.prober.paths.doubt_size(clock, *node);
                }
                self.kernel.far = state;
                let now = words(self);
                let new = now.iter().filter(|problem| !before.contains(problem));
                new.for_each(|problem| tracing::warn!("{problem}"));
                self.update_forwarder();
            }
            Told::Ask(round, nodes) => {
                let asked = self.survey(nodes, Inquiry::Arrivals(round), move |agent, found| {
                    let told =
                        |(node, report): (NodeId, Option<Report>)| Some((node, report?.arrivals?));
                    agent.far.hear(round, found.into_iter().filter_map(told).collect());
                });
                if !asked {
                    self.far.hear(round, BTreeMap::new());
                }
            }
            Told::Testimony(reply, arrivals) => {
                self.node.report(reply, Report { arrivals, ..Report::default() });
            }
        }
    }

    /// Tells the thread whom to try, if that has changed.
    pub(super) fn update_far(&mut self) {
        let setting = self.far_setting().unwrap_or_default();
        self.far.set(setting);
    }

    fn far_setting(&self) -> Option<Setting> {
        let view = self.kernel.wanted.as_ref().filter(|_| self.kernel.programmed_once)?;
        let askers_of = |(node, peer): (&NodeId, &Peer)| {
            let (_, subnets) = peer.leases.first()?;
            let node = *node;
            Some(askers(*subnets, peer.vtep.underlay).map(move |from| (from, node)))
        };
        let own = askers(view.own.subnets, view.own.vtep.underlay);
        let arriving = self.kernel.forwarding.arriving.iter().copied();
        let own = own.chain([self.underlay.local]).chain(arriving).collect();
        let askers = view.peers.iter().filter_map(askers_of).flatten().collect();
        let sources = sources(view.settings.pool.networks(), view.own.subnets);
        let lost_here = self.kernel.forwarding.closed.clone();
        // Where entries are there on demand, peers without any are not tried: each trial is a use.
        let in_use = self.kernel.demand.in_use.as_ref();
        let rest = in_use.map(|_| self.config.idle_after + UNTIL_AGED);
        // Where nothing gets to any peer, that is told already.
        let is_told = self.kernel.underlay_problem.is_some() || self.kernel.host.is_table_full;
        if is_told {
            return Some(Setting { subjects: Vec::new(), lost_here, rest, askers, sources, own });
        }
        let underlay = self.underlay.with_mode(self.config.mode);
        let subject = |(node, state, _): (NodeId, PathState, Option<Duration>)| {
            // Firewalls may drop what is asked of a host, and none of its pods' packets.
            let is_doubted = matches!(state, PathState::Unanswered | PathState::OneWay);
            let is_usable = is_doubted
                || matches!(state, PathState::Ok | PathState::Asymmetric | PathState::MtuTooLarge);
            // Those in use that live are not asked: so little is known.
            let is_usable = is_usable || in_use.is_some() && state == PathState::Unknown;
            let peer = view.peers.get(&node)?;
            let is_in_use = in_use.is_none_or(|macs| macs.contains(&peer.vtep.mac));
            let (_, subnets) = peer.leases.first()?;
            let is_astray =
                subnets.iter().any(|subnet| self.kernel.routing.astray.contains(&subnet));
            let way = underlay.way(peer.vtep.underlay, subnets.first);
            let is_reached = is_in_use && is_usable && !is_astray && self.node.is_active(node);
            let narrow = self.kernel.narrow.get(&node).copied();
            let subject = Subject {
                node,
                addresses: last_addresses(*subnets),
                carried: narrow.unwrap_or(self.underlay.tunnel_mtu),
                takes_large: state != PathState::MtuTooLarge || narrow.is_some(),
                is_doubted,
            };
            (is_reached && !matches!(way, Path::Unreachable)).then_some(subject)
        };
        let subjects = self.path_states().filter_map(subject).collect();
        Some(Setting { subjects, lost_here, rest, askers, sources, own })
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
    fn pod_of_a_member_may_not_ask_and_its_own_one_may_also_if_its_host_translates_it() {
        let underlay = IpAddr::from([10, 99, 0, 11]);
        let askers: BTreeSet<IpAddr> = askers(dual(), underlay).collect();
        for last in [0, 1, 254] {
            assert!(askers.contains(&IpAddr::from([10, 42, 1, last])), "{last}");
        }
        assert!(!askers.contains(&IpAddr::from([10, 42, 1, 2])) && askers.contains(&underlay));
        assert_eq!(askers.iter().filter(|ip| ip.is_ipv6()).count(), 3);
    }

    #[test]
    fn filter_of_the_sockets_lets_in_those_who_may_ask_in_both_families() {
        let net = |text: &str| text.parse().expect("a network");
        let networks = Subnets { first: net("10.42.0.0/16"), second: Some(net("fd42::/48")) };
        let asks: Vec<IpAddr> = askers(dual(), IpAddr::from([10, 99, 0, 11])).collect();
        assert!(last_addresses(dual()).iter().all(|last| asks.contains(&last)), "{asks:?}");
        let expected = networks.iter().zip(dual().iter()).map(|(network, subnet)| {
            let of_subnet = asks.iter().copied().filter(|ip| subnet.contains(ip));
            Sources::new(network, subnet, of_subnet)
        });
        assert_eq!(sources(networks, dual()), expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_came_under_an_address_of_this_host_may_be_of_any_member_and_of_a_member_only_its_own() {
        let [first, second] = [1, 2].map(|number| NodeId::from_bytes([number; 8]));
        let [member, own, pod] =
            [[10, 42, 1, 254], [10, 42, 2, 1], [10, 42, 2, 2]].map(IpAddr::from);
        let setting = Setting {
            askers: BTreeMap::from([(member, first)]),
            own: BTreeSet::from([own]),
            ..Setting::default()
        };
        assert!(setting.may_ask(member) && setting.may_ask(own) && !setting.may_ask(pod));
        assert!(setting.may_be_of(member, first) && !setting.may_be_of(member, second));
        assert!(setting.may_be_of(own, first) && setting.may_be_of(own, second));
        assert!(!setting.may_be_of(pod, first));
    }
}
