//! The thread that tries whether this host forwards packets of pods, and finds out what drops them if not.
//!
//! It has a pod of its own on the bridge (`pods::standin`), for as long as there are pods and none needs its
//! address. What follows from what it sees is decided in [`crate::dataplane::forwarding`]. Nothing waits
//! for it, and each step is bounded.

mod capture;
mod carried;
mod explain;
mod finding;
mod gateway;
mod home;
mod ipsec;
mod marks;
mod output;
mod partial;
mod pod;
mod report;
mod setting;
mod stage;
mod trial;
mod warnings;

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
    setting::{Peer, Setting},
    stage::Stage,
    trial::{Outcome, Trial},
};
use crate::{
    api::CheckStatus,
    dataplane::forwarding::{Direction, Seen, Trials, Way},
    model::Transport,
    netlink::{Netlink, nftables::Changes, route::Query},
    pods::standin::Room,
    worker::{Order, Orders, Thread, Worker},
};

/// Rules of nftables have changed: what belongs together should be over.
const SETTLE: Duration = Duration::from_millis(200);
/// At least so long between two trials that changes of rules have caused.
const GAP: Duration = Duration::from_secs(2);
/// So many trials in a row that cannot be made are told.
const FAILURES: u32 = 3;
/// Where nothing can be tried, it is looked again whether it can.
const LOOK: Duration = Duration::from_secs(15);
/// The same where a first pod is about to bring the bridge.
const LOOK_SOON: Duration = Duration::from_secs(1);
/// Rules are read again after so long, while they are in the way.
const READ: Duration = Duration::from_secs(10);
/// They may be very many: reading them takes no more than one part in so many of the time.
const SHARE: u32 = 100;
/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    pub status: CheckStatus,
    /// As sentences with what helps.
    pub problems: Vec<String>,
    /// What may hurt some packets, or keeps this host from knowing; the same.
    pub warnings: Vec<String>,
    /// Why tunnel packets of members do not get in.
    pub input: Vec<String>,
    /// Whatever comes out of the tunnel is dropped here, for this host itself too, as one of the problems
    /// says: with IPv4, and with IPv6.
    pub drops_incoming: [bool; 2],
    /// Pods do not find their gateway, as one of the problems says.
    pub lacks_gateway: bool,
    /// Ways that packets do not pass.
    pub closed: Vec<Way>,
    /// Under which packets of other hosts' pods arrive at pods here in place of their own.
    pub arriving: BTreeSet<IpAddr>,
    /// What may drop packets of pods to other hosts, or answers to them, where such are lost.
    pub suspects: Vec<String>,
}

/// What the thread tells.
pub enum ForwarderNews {
    State(Forwarding),
    /// Its pod is there now, or is not any more.
    Room(Option<Room>),
}

pub struct Forwarder {
    pub(super) worker: Worker<Option<Setting>>,
    told: Option<Setting>,
}

impl Order for Option<Setting> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl Forwarder {
    pub fn start(tell: impl Fn(ForwarderNews) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let begin = |orders| TrialRunner {
            netlink,
            changes: Changes::open().ok(),
            orders,
            tell,
            setting: None,
            is_new: false,
            stage: None,
            trials: Trials::default(),
            translated: BTreeMap::new(),
            arriving: BTreeMap::new(),
            skipped: String::new(),
            failures: 0,
            warnings: Vec::new(),
            warnings_read: None,
            turn: 0,
            due: Instant::now(),
            tried: None,
            read_at: None,
            reasons: Reasons::default(),
            input: Vec::new(),
            told: Forwarding::default(),
        };
        let worker = Worker::start("forwarding", move |orders| begin(orders).run())?;
        Ok(Self { worker, told: None })
    }

    fn set(&mut self, setting: Option<Setting>) {
        if self.told == setting {
            return;
        }
        self.told.clone_from(&setting);
        self.worker.order(setting);
    }

    /// Ends it after the step under way. Once the thread has ended its pod is gone.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

struct TrialRunner<F> {
    netlink: Netlink,
    changes: Option<Changes>,
    orders: Orders<Option<Setting>>,
    tell: F,
    setting: Option<Setting>,
    /// It is another one than that of the last trial.
    is_new: bool,
    stage: Option<Stage>,
    trials: Trials,
    /// Which address packets of pods leave under in place of theirs, by whether it is IPv4.
    translated: BTreeMap<bool, IpAddr>,
    /// The same of packets that come in, under which they arrive at pods.
    arriving: BTreeMap<bool, IpAddr>,
    /// Why there was no trial; empty if there was one.
    skipped: String,
    /// Trials in a row that could not be made.
    failures: u32,
    warnings: Vec<String>,
    /// Before this, rules that are warned of are not read again.
    warnings_read: Option<Instant>,
    turn: usize,
    due: Instant,
    tried: Option<Instant>,
    /// Before this, rules are not read again.
    read_at: Option<Instant>,
    /// What may drop packets, by what was last read.
    reasons: Reasons,
    input: Vec<String>,
    told: Forwarding,
}

impl<F: Fn(ForwarderNews)> TrialRunner<F> {
    fn run(mut self) {
        while self.take_orders() {
            let now = Instant::now();
            if self.have_rules_changed() {
                let earliest = self.tried.map_or(now, |tried| tried + GAP);
                self.due = self.due.min(earliest.max(now + SETTLE));
                (self.read_at, self.warnings_read) = (None, None);
            }
            if self.due <= now {
                self.look(now);
                self.report();
            }
            let pause = self.due.saturating_duration_since(Instant::now());
            let changes = self.changes.as_ref().map(|changes| changes.as_fd());
            self.orders.sleeper.wait(changes, Some(pause));
        }
        self.give_up();
    }

    /// Says whether the agent still runs.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(setting) => {
                    self.setting = setting;
                    self.is_new = true;
                    self.due = Instant::now();
                    let shape = self.setting.as_ref().and_then(|setting| setting.shape.as_ref());
                    if shape.is_none() {
                        // A pod needs the address now.
                        self.give_up();
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
            tracing::debug!(%error, "cannot hear of changes of nftables");
            self.changes = None;
            false
        })
    }

    fn look(&mut self, now: Instant) {
        self.is_new = false;
        let Some(setting) = self.setting.clone() else {
            self.give_up();
            self.skip("this node has no subnet in use".to_owned());
            self.due = now + LOOK;
            return;
        };
        match self.try_it(&setting) {
            Ok(()) => {
                self.failures = 0;
                self.due = now + self.trials.pause();
            }
            Err(Untried::Idle(why)) => {
                self.failures = 0;
                self.skip(why);
                let is_coming = setting.has_pods && setting.shape.is_some();
                self.due = now + if is_coming { LOOK_SOON } else { LOOK };
            }
            Err(Untried::Failed(error)) => {
                tracing::debug!(%error, "forwarding was not tried");
                self.failures = self.failures.saturating_add(1);
                let is_certain = self.failures >= FAILURES;
                if is_certain {
                    self.skip(cannot(&error));
                }
                self.due = now + if is_certain { LOOK } else { LOOK_SOON };
            }
        }
        if self.is_new {
            self.due = now;
            return;
        }
        self.tried = Some(now);
        self.read_rules(&setting);
        self.read_warnings(&setting);
    }

    /// What the trial could not see.
    fn read_warnings(&mut self, setting: &Setting) {
        let begun = Instant::now();
        if self.warnings_read.is_some_and(|at| at > begun) {
            return;
        }
        self.warnings.clear();
        if self.failures >= FAILURES {
            self.warnings.extend(warnings::untried(setting, &self.skipped));
        }
        let closed = self.trials.closed();
        let is_of_host =
            |way: &Way| way.direction.is_of_host() || way.direction == Direction::TooLarge;
        if (setting.has_pods || setting.unanswered) && closed.iter().all(is_of_host) {
            self.warnings.extend(warnings::of_host(setting, &closed));
            self.warnings.extend(partial::warnings(&mut self.netlink, setting));
            self.warnings.extend(ipsec::selecting(setting));
            self.warnings.extend(warnings::programs(&mut self.netlink, setting));
        }
        for (ipv4, address) in &self.arriving {
            self.warnings.push(warnings::arriving(setting, *ipv4, *address));
        }
        self.warnings_read = Some(begun + begun.elapsed() * SHARE);
    }

    /// One trial of each way.
    ///
    /// # Errors
    /// Why there was none.
    fn try_it(&mut self, setting: &Setting) -> Result<(), Untried> {
        let idle = |why: &str| Untried::Idle(why.to_owned());
        let Some(shape) = &setting.shape else {
            return Err(idle("a pod has the address that it is tried from"));
        };
        if setting.peers.is_empty() && !setting.has_pods {
            self.give_up();
            return Err(idle("there are no pods, and no peer to try it with"));
        }
        let between = explain::are_bridged_filtered(&mut self.netlink, setting);
        let with_mate = between.contains(&true);
        let is_right = match &self.stage {
            Some(stage) => stage.is(&mut self.netlink, shape, with_mate)?,
            None => false,
        };
        if !is_right {
            self.give_up();
            let set = Stage::set(&mut self.netlink, shape, with_mate)?;
            if let Some(stage) = &set {
                (self.tell)(ForwarderNews::Room(Some(stage.room())));
            }
            self.stage = set;
        }
        let stage = self.stage.take();
        let mut stage = stage.ok_or_else(|| idle("there are no pods on a bridge of gossamer's"))?;
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn;
        let found = stage.gateway.find(|pause| self.wait(&[], pause));
        // Without a gateway nothing else can be found out.
        let has_gateway = found.is_empty() || found.iter().any(|(_, seen)| *seen != Seen::Lost);
        found.into_iter().for_each(|(way, seen)| self.trials.note(way, seen));
        // What is not tried any more is not known any more.
        self.trials.keep(|way| match way.direction {
            Direction::Between(_) | Direction::Finding => between[usize::from(!way.ipv4)],
            Direction::Out(_) | Direction::In(_) => !setting.peers.is_empty(),
            Direction::Carried | Direction::LargeOut | Direction::TooLarge => {
                setting.peers.iter().any(|peer| peer.tunnelled)
            }
            Direction::Gateway | Direction::ToHost | Direction::FromHost(_) => true,
        });
        if has_gateway && !self.is_new {
            let seen = stage.home.run(|fds, pause| self.wait(fds, pause));
            let seen = seen.inspect_err(|error| tracing::debug!(%error, "not tried"));
            let seen = seen.unwrap_or_default().into_iter();
            seen.for_each(|(way, seen)| self.trials.note(way, seen));
        }
        let mut tried = Ok(());
        if has_gateway && !self.is_new {
            let mut trace = self.reasons.trace(setting, &self.trials.closed());
            let spread = self.spread(setting);
            let trial = Trial { setting, sockets: &stage.sockets, between, turn, spread };
            match trial.run(|fds, pause| self.wait(fds, pause)) {
                Ok(Some(Outcome { seen, translated, arriving, stray })) => {
                    seen.into_iter().for_each(|(way, seen)| self.trials.note(way, seen));
                    self.translated = translated;
                    if self.arriving != arriving {
                        (self.arriving, self.warnings_read) = (arriving, None);
                    }
                    if let Some(index) = stray {
                        let links = self.netlink.links().unwrap_or_default();
                        let link = links.into_iter().find(|link| link.index == index);
                        self.reasons.stray = link.map(|link| link.name);
                    }
                }
                Ok(None) => {}
                Err(error) => tried = Err(error),
            }
            if let Some(trace) = &mut trace {
                self.reasons.note_traced(setting, trace);
            }
        }
        let shape = self.setting.as_ref().and_then(|setting| setting.shape.as_ref());
        let is_wanted = shape.is_some();
        self.stage = Some(stage);
        if !is_wanted {
            self.give_up();
        }
        tried?;
        self.skipped.clear();
        Ok(())
    }

    /// Peers to whose tunnels several next hops lead, so that packets leave by any of these.
    fn spread(&mut self, setting: &Setting) -> BTreeSet<IpAddr> {
        let hosts = setting.peers.iter().filter(|peer| peer.tunnelled).map(|peer| peer.underlay);
        let query = |host| Query {
            output: setting.pinned,
            transport: Some(Transport::udp_to(setting.port)),
            ..Query::to(host)
        };
        let leads_to_several = |host: &IpAddr| {
            self.netlink.route_entry(&query(*host)).is_ok_and(|entry| entry.is_multipath)
        };
        hosts.filter(leads_to_several).collect()
    }

    /// Says whether to go on: what wants something else does not wait for the end of a trial.
    fn wait(&mut self, fds: &[BorrowedFd<'_>], pause: Duration) -> bool {
        self.orders.sleeper.wait(fds.iter().copied(), Some(pause));
        self.take_orders() && !self.is_new
    }

    fn skip(&mut self, why: String) {
        self.trials.forget();
        self.translated.clear();
        self.arriving.clear();
        self.skipped = why;
    }

    fn give_up(&mut self) {
        if let Some(stage) = self.stage.take() {
            (self.tell)(ForwarderNews::Room(None));
            stage.remove(&mut self.netlink);
        }
    }

    /// What may be in the way, where something is.
    fn read_rules(&mut self, setting: &Setting) {
        let closed = self.trials.closed();
        self.reasons.keep(&closed, setting.is_far_lost);
        if !setting.unanswered {
            self.input.clear();
        }
        let begun = Instant::now();
        let translated = &self.translated;
        let is_explained = self.reasons.explain(&closed, translated)
            && setting.is_far_lost == self.reasons.far.is_some();
        let is_early = self.read_at.is_some_and(|at| at > begun) && is_explained;
        let is_well = closed.is_empty()
            && translated.is_empty()
            && !setting.unanswered
            && !setting.is_far_lost;
        if is_well || is_early {
            return;
        }
        let port = self.stage.as_ref().map(Stage::port);
        self.reasons =
            self.reasons.read_again(&mut self.netlink, setting, port, &closed, translated);
        if setting.unanswered {
            self.input = explain::input(setting);
        }
        self.read_at = Some(begun + READ.max(begun.elapsed() * SHARE));
    }
}

/// Why a trial was not made.
enum Untried {
    /// There is nothing to try.
    Idle(String),
    Failed(io::Error),
}

impl From<io::Error> for Untried {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn cannot(error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::PermissionDenied => "that takes CAP_SYS_ADMIN and CAP_NET_RAW".to_owned(),
        // user_namespaces(7)
        io::ErrorKind::StorageFull => "no more network namespaces can be made: raise \
                                       user.max_net_namespaces (sysctl), or end what makes so many"
            .to_owned(),
        _ => error.to_string(),
    };
    format!("it cannot be tried: {why}")
}
