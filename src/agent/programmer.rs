//! The thread that owns the kernel: it makes it equal to the latest view, keeps it so, and says how that
//! went.
//!
//! Netlink calls block, so they have a thread of their own. It wakes for a new goal, for a change that
//! somebody else made to our part of the kernel, and by a slow timer. Only the newest goal counts: those that
//! piled up behind a slow kernel are skipped.

mod looks;

use std::{
    collections::BTreeSet,
    io,
    sync::mpsc::TryRecvError,
    thread,
    time::{Duration, Instant},
};

use super::{
    auditor::Auditor,
    overruns::Overruns,
    surroundings::Surroundings,
    told::{DemandState, Outcome, Told},
    underlay::{Chosen, Flaps, Watch},
};
use crate::{
    config::Config,
    dataplane::{
        demand::Demand,
        desired::{self, Desired},
        fight::Kind,
        firewall::Firewall,
        kernel::{Kernel, KernelError, Report, Touched, next_hops::NextHops},
        plan::{Actual, Op},
    },
    model::Pool,
    netlink::Netlink,
    worker::{Order, Orders, Thread, Worker},
};

/// The kernel is compared with the goal at least this often with up to so many routes. With more of them it
/// takes longer, and is done less often.
const RECONCILE: Duration = Duration::from_secs(10);
const RECONCILED: f64 = 250.0;
const RECONCILE_MAX: Duration = Duration::from_secs(60);
/// Again after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// At least so long between two looks at the interfaces: containers come and go in crowds.
const LOOK_GAP: Duration = Duration::from_millis(100);
/// At least so long between two repairs: what changes without end must not take a whole CPU.
const REPAIR_GAP: Duration = Duration::from_millis(20);

/// What to make the kernel equal to; the number tells the answers apart.
pub struct Goal {
    pub number: u64,
    pub state: State,
}

/// The tables as they should be, and what is there.
pub type Tables = (desired::Tables, Actual);
type Look = Box<dyn FnOnce(Result<Tables, String>) + Send>;

pub(super) enum Task {
    Goal(Goal),
    Look(Look),
    Count,
}

impl Order for Task {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!((self, earlier), (Self::Goal(_), Self::Goal(_)) | (Self::Count, Self::Count))
    }
}

pub enum State {
    Overlay(Box<Desired>, Box<Firewall>),
    /// No device of this name, no entry on it, no table of nftables that is called like it, and no route of
    /// ours into this pool's networks.
    Nothing {
        device: String,
        pool: Pool,
    },
}

pub struct Programmer {
    pub(super) worker: Worker<Task>,
}

impl Programmer {
    pub fn start(
        kernel: Kernel,
        config: Config,
        chosen: Chosen,
        tell: impl Fn(Told) + Send + 'static,
    ) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let surroundings = Surroundings::open(config.mode, config.set_sysctls);
        let begin = |orders| Reconciler {
            demand: Demand::new(config.program),
            part: None,
            part_is_new: false,
            adopted: false,
            demand_told: DemandState::default(),
            demand_told_at: Instant::now(),
            surroundings,
            table_touched: false,
            kernel,
            netlink,
            config,
            underlay: Watch::new(Instant::now(), chosen),
            flaps: Flaps::default(),
            flapping: None,
            looked: None,
            orders,
            tell,
            lookers: Vec::new(),
            count: false,
            goal: None,
            reached: false,
            touched: Touched::default(),
            overruns: Overruns::default(),
            overlaps: Vec::new(),
            auditor: Auditor::new(Instant::now()),
            next_hops: NextHops::default(),
            due: None,
            worked: None,
        };
        Ok(Self { worker: Worker::start("kernel", move |orders| begin(orders).run())? })
    }

    pub fn program(&self, goal: Goal) {
        self.worker.order(Task::Goal(goal));
    }

    /// Reads the kernel's tables, once what was ordered before is under way.
    pub fn look(&self, then: impl FnOnce(Result<Tables, String>) + Send + 'static) {
        self.worker.order(Task::Look(Box::new(then)));
    }

    /// Reads how many tunnel packets have come from each member.
    pub fn count(&self) {
        self.worker.order(Task::Count);
    }

    /// Ends it after the pass under way. Once the thread has ended nothing touches the kernel any more.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

struct Reconciler<F> {
    kernel: Kernel,
    demand: Demand,
    /// What of the goal is to be in the kernel now; none, if that is all of it.
    part: Option<Box<Desired>>,
    /// It is another one than the kernel was last made equal to.
    part_is_new: bool,
    adopted: bool,
    demand_told: DemandState,
    demand_told_at: Instant,
    surroundings: Surroundings,
    table_touched: bool,
    netlink: Netlink,
    config: Config,
    underlay: Watch,
    flaps: Flaps,
    /// As last told.
    flapping: Option<String>,
    /// When the interfaces were last looked at.
    looked: Option<Instant>,
    orders: Orders<Task>,
    /// Who wants to see the tables.
    lookers: Vec<Look>,
    count: bool,
    tell: F,
    goal: Option<Goal>,
    /// The kernel has been equal to the goal.
    reached: bool,
    touched: Touched,
    overruns: Overruns,
    /// As last told.
    overlaps: Vec<String>,
    auditor: Auditor,
    next_hops: NextHops,
    due: Option<Instant>,
    worked: Option<Instant>,
}

impl<F: Fn(Told)> Reconciler<F> {
    fn run(mut self) {
        while self.take_goals() {
            if let Err(error) = self.listen() {
                tracing::error!(%error, "cannot hear of changes in the kernel");
                self.touched = Touched::EVERYTHING;
                thread::sleep(RETRY);
            }
            let now = Instant::now();
            if self.overruns.take(now) {
                self.touched = Touched::EVERYTHING;
            }
            if self.underlay_due(now).is_some_and(|due| due <= now) {
                self.look_at_underlay(now);
            }
            let is_due = self.due.is_some_and(|due| due <= now);
            let may_repair = |kind| self.repair_at(kind).is_none_or(|at| now >= at);
            let firewall_touched = self.table_touched || self.touched.rules;
            let verify = firewall_touched && may_repair(Kind::Firewall) || is_due && self.reached;
            let may_repair = may_repair(Kind::Entries);
            if is_due || verify {
                self.see_to_table(verify);
            }
            if is_due || (self.touched.ours && may_repair) {
                self.work();
            }
            if is_due && self.surroundings.is_table_unread() {
                self.see_to_table(true);
            }
            if is_due {
                self.look_around();
            }
            self.audit();
            self.show_tables();
            if std::mem::take(&mut self.count) {
                self.count_packets();
            }
            self.wait();
        }
    }

    /// Before this nothing of that kind is repaired once more.
    fn repair_at(&self, kind: Kind) -> Option<Instant> {
        let gap = REPAIR_GAP.max(self.surroundings.opponents.pause(kind));
        self.worked.map(|worked| worked + gap)
    }

    fn show_tables(&mut self) {
        for then in std::mem::take(&mut self.lookers) {
            let Some(Goal { state: State::Overlay(all, _), .. }) = &self.goal else {
                then(Err("this node has nothing in the kernel yet".to_owned()));
                continue;
            };
            let desired = self.part.as_ref().unwrap_or(all);
            let actual = self.kernel.observe(&desired.device.name, Some(&desired.pool));
            let tables = actual.map(|actual| (desired.tables.clone(), actual));
            then(tables.map_err(|error| error.to_string()));
        }
    }

    fn count_packets(&mut self) {
        let Some(Goal { state: State::Overlay(_, firewall), .. }) = &self.goal else { return };
        if let Some(counted) = self.surroundings.count_packets(&firewall.table) {
            (self.tell)(Told::Counted(counted));
        }
    }

    /// Says whether the agent still runs.
    fn take_goals(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(Task::Look(then)) => self.lookers.push(then),
                Ok(Task::Count) => self.count = true,
                Ok(Task::Goal(goal)) => {
                    let had_peers = self.underlays().next().is_some();
                    self.goal = Some(goal);
                    // Which uplink leads to them is known only now.
                    self.touched.underlay |= !had_peers && self.underlays().next().is_some();
                    self.choose_part();
                    self.reached = false;
                    self.due = Some(Instant::now());
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let Some(Goal { state: State::Overlay(all, firewall), .. }) = &self.goal else {
            // Read all the same: what is not read wakes this thread again and again.
            self.surroundings.touched("")?;
            let heard = self.kernel.listen(None)?;
            self.touched.merge(heard.touched);
            self.overruns.note(heard.overrun);
            return Ok(());
        };
        let desired = self.part.as_ref().unwrap_or(all);
        let heard = self.kernel.listen(Some(desired))?;
        self.touched.merge(heard.touched);
        self.overruns.note(heard.overrun);
        self.table_touched |= self.surroundings.touched(&firewall.table)?;
        if heard.misses.is_empty() {
            return Ok(());
        }
        let ops: Vec<Op> =
            heard.misses.into_iter().flat_map(|miss| self.demand.answer(all, miss)).collect();
        let answered = self.kernel.answer(&ops);
        self.choose_part();
        self.tell_demand();
        answered
    }

    /// With entries on demand only a part of the goal is to be in the kernel.
    fn choose_part(&mut self) {
        let Some(Goal { state: State::Overlay(all, _), .. }) = &self.goal else {
            self.part = None;
            return;
        };
        if self.demand.in_use().is_none() {
            return;
        }
        self.demand.keep_peers(all);
        let part = self.demand.part_of(all);
        self.part_is_new |= self.part.as_ref().is_none_or(|before| **before != part);
        self.part = Some(Box::new(part));
    }

    /// Peers that an earlier process had in use. Until they are known nothing is removed.
    fn adopt(&mut self) -> Result<(), KernelError> {
        let Some(Goal { state: State::Overlay(all, _), .. }) = &self.goal else { return Ok(()) };
        if self.adopted || self.demand.in_use().is_none() {
            return Ok(());
        }
        let actual = self.kernel.observe(&all.device.name, None)?;
        self.demand.adopt(actual.fdb.iter().map(|(mac, _)| *mac));
        self.adopted = true;
        self.choose_part();
        Ok(())
    }

    fn tell_demand(&mut self) {
        let Demand { answered, unknown, .. } = self.demand;
        let state = DemandState { answered, unknown, in_use: self.demand.in_use().cloned() };
        // Questions about nobody may come in any number.
        let only_unknown = DemandState { unknown, ..self.demand_told.clone() } == state;
        if state == self.demand_told || only_unknown && self.demand_told_at.elapsed() < RETRY {
            return;
        }
        self.demand_told = state.clone();
        self.demand_told_at = Instant::now();
        (self.tell)(Told::Demand(state));
    }

    /// Takes away what nobody needs any more.
    fn age(&mut self) -> io::Result<()> {
        if self.demand.in_use().is_none() {
            return Ok(());
        }
        let idle = self.kernel.idle(self.config.idle_after)?;
        self.demand.age(idle.into_iter());
        // Those that let a first packet go, and those that nobody could answer: a pod that tries all
        // addresses must not fill the kernel's table.
        let passing: Vec<Op> =
            self.kernel.passing()?.into_iter().map(Op::RemoveNeighbour).collect();
        self.kernel.answer(&passing)?;
        self.choose_part();
        self.tell_demand();
        Ok(())
    }

    /// Before the tunnels: a new member is let in before it is spoken to. It does not wait for the whole
    /// table to be read.
    fn see_to_table(&mut self, verify: bool) {
        let Some(Goal { state: State::Overlay(_, firewall), .. }) = &self.goal else { return };
        if verify {
            self.table_touched = false;
            self.surroundings.verify_table(firewall);
        } else {
            self.surroundings.write_table(firewall);
        }
        self.touched.rules = false;
        self.surroundings.keep_users_out(firewall);
        self.worked = Some(Instant::now());
        self.tell_host();
    }

    fn look_around(&mut self) {
        let Some(Goal { state: State::Overlay(desired, _), .. }) = &self.goal else { return };
        let bridge = self.config.bridge_name(desired.device.vni);
        self.surroundings.look(desired, &bridge, &self.underlay.present().name);
        self.tell_host();
        self.look_for_overlaps();
        // An event may have been lost.
        self.touched.underlay = true;
    }

    fn tell_host(&mut self) {
        if let Some(state) = self.surroundings.news() {
            (self.tell)(Told::Host(state));
        }
    }

    fn work(&mut self) {
        self.touched.ours = false;
        let result = self.adopt().and_then(|()| self.bring_about());
        let now = Instant::now();
        self.worked = Some(now);
        let Some(Goal { number, state }) = &self.goal else { return };
        let clean = result.as_ref().is_ok_and(|report| report.failed.is_empty());
        let routes = match state {
            State::Overlay(all, _) => self.part.as_ref().unwrap_or(all).tables.routes.len(),
            State::Nothing { .. } => 0,
        };
        let pause = RECONCILE.mul_f64(routes as f64 / RECONCILED);
        let pause = pause.clamp(RECONCILE, RECONCILE_MAX);
        let next = now + if clean { pause } else { RETRY };
        // Repairs that follow one another must not put off what is looked at by the clock alone.
        self.due = Some(self.due.filter(|due| *due > now).map_or(next, |due| due.min(next)));
        // What follows from another part of the goal is nobody's doing.
        let repair = self.reached && !std::mem::take(&mut self.part_is_new);
        self.touched.routing |= !self.reached;
        self.reached |= result.is_ok();
        let done = result.as_ref().ok().filter(|report| repair && !report.done.is_empty());
        if let Some(report) = done {
            let kinds: Vec<&str> = report.done.keys().copied().collect();
            self.surroundings.opponents.note(Kind::Entries, &kinds.join(", "), report.device);
        }
        (self.tell)(Told::Outcome(Outcome { number: *number, repair, result }));
        self.tell_host();
    }

    fn bring_about(&mut self) -> Result<Report, KernelError> {
        if let Err(error) = self.age() {
            tracing::debug!(%error, "peers that are not used any more not found out");
        }
        match &self.goal {
            Some(Goal { state: State::Overlay(all, _), .. }) => {
                let report = self.kernel.reconcile(self.part.as_ref().unwrap_or(all))?;
                // Without it only events tell of missing entries; on demand there would be none at all.
                match self.kernel.be_asked() {
                    Err(error) if self.demand.in_use().is_some() => Err(error.into()),
                    _ => Ok(report),
                }
            }
            Some(Goal { state: State::Nothing { device, pool }, .. }) => {
                if let Err(error) = self.surroundings.remove(device) {
                    tracing::error!(%error, "the table of nftables was not removed");
                }
                if let Err(error) = self.next_hops.keep(&mut self.netlink, &BTreeSet::new()) {
                    tracing::error!(%error, "neighbor entries of next hops were not given back");
                }
                self.kernel.remove(device, pool).map(|()| Report::default())
            }
            None => Ok(Report::default()),
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        let entries = self.touched.ours.then(|| self.repair_at(Kind::Entries));
        let firewall_touched = self.table_touched || self.touched.rules;
        let table = firewall_touched.then(|| self.repair_at(Kind::Firewall));
        let repairs = entries.into_iter().chain(table).flatten();
        let until = self.due.into_iter().chain(repairs).chain(self.underlay_due(now));
        let until = until.chain(self.overruns.due(now)).chain([self.auditor.due()]).min();
        let pause = until.map(|until| until.saturating_duration_since(now));
        let changes = [Some(self.kernel.changes()), self.surroundings.changes()];
        self.orders.sleeper.wait(changes.into_iter().flatten(), pause);
    }
}
