//! The thread that programs the kernel: it makes the kernel equal to the latest desired state, repairs
//! it, and reports the results.
//!
//! Netlink calls block, so they have their own thread. It runs for a new desired state, for a change by
//! another program to gossamer's part of the kernel, and by a slow timer. Only the newest desired state
//! counts: older ones that queue up behind a slow kernel are skipped.

mod change;
mod checks;
mod schedule;

use std::{
    io,
    net::IpAddr,
    sync::mpsc::TryRecvError,
    thread,
    time::{Duration, Instant},
};

use self::{
    change::Established,
    schedule::{Changes, RepairSchedule},
};
use crate::{
    agent::{
        diagnosis::auditor::Auditor,
        workers::host_checks::HostChecks,
        workers::{
            kernel_event::{DemandState, KernelEvent, Outcome},
            overruns::Overruns,
        },
    },
    config::Config,
    dataplane::{
        demand::Demand,
        desired::{self, Desired},
        firewall::Firewall,
        kernel::{Extent, Kernel, KernelError, Recheck, Report, next_hops::NextHops},
        plan::{Actual, EntryOp},
        repair_conflict::Kind,
    },
    model::{Pool, Problem},
    netlink::Netlink,
    underlay::{ChosenUnderlay, Flaps, Watch},
    worker::{Order, Orders, Thread, Worker},
};

/// Time until the next attempt after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two checks of the interfaces: many containers may start at once.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// A state to establish in the kernel.
pub struct DesiredState {
    /// Number that identifies the results.
    pub number: u64,
    /// The state.
    pub state: State,
}

/// The desired tables and those of the kernel.
pub type Tables = (desired::Tables, Actual);
/// Receives the tables.
type TableRequest = Box<dyn FnOnce(Result<Tables, String>) + Send>;

/// A task for the thread.
pub(in crate::agent) enum Task {
    /// Establish a desired state.
    DesiredState(DesiredState),
    /// Read the tables.
    TableRequest(TableRequest),
    /// Read the packet counters of members.
    Count,
    /// Forget a wrong path MTU to this underlay address, in bytes.
    ForgetPath(IpAddr, u32),
}

impl Order for Task {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!(
            (self, earlier),
            (Self::DesiredState(_), Self::DesiredState(_)) | (Self::Count, Self::Count)
        )
    }
}

/// What the kernel has to hold.
pub enum State {
    /// The device, the entries and the firewall table.
    Overlay(Box<Desired>, Box<Firewall>),
    /// No device of this name, no entry on it, no nftables table of that name, and no route of
    /// gossamer's into this pool's networks.
    Nothing {
        /// Name of the VXLAN device.
        device: String,
        /// The cluster's pool.
        pool: Pool,
    },
}

/// Handle of the kernel thread.
pub struct Programmer {
    /// The thread.
    pub(in crate::agent) worker: Worker<Task>,
}

impl Programmer {
    /// Starts the thread. `tell` receives its events.
    ///
    /// # Errors
    /// Fails if a netlink socket cannot be opened or the thread cannot be created.
    pub fn start(
        kernel: Kernel,
        config: Config,
        chosen: ChosenUnderlay,
        report: impl Fn(KernelEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let host_checks = HostChecks::open(config.mode, config.set_sysctls);
        let begin = |orders| Reconciler {
            demand: Demand::new(config.program),
            part: None,
            part_is_new: false,
            has_adopted: false,
            reported_demand: DemandState::default(),
            demand_reported_at: Instant::now(),
            host_checks,
            table_touched: false,
            is_forwarding_switched: false,
            host_checked_at: None,
            kernel,
            netlink,
            config,
            underlay: Watch::new(Instant::now(), chosen),
            flaps: Flaps::default(),
            flapping: None,
            underlay_checked_at: None,
            orders,
            report,
            table_requests: Vec::new(),
            count: false,
            desired_state: None,
            established: None,
            is_new: false,
            reached: false,
            recheck: Recheck::default(),
            overruns: Overruns::default(),
            overlaps: Vec::new(),
            auditor: Auditor::new(Instant::now()),
            next_hops: NextHops::default(),
            schedule: RepairSchedule::default(),
        };
        Ok(Self { worker: Worker::start("kernel", move |orders| begin(orders).run())? })
    }

    /// Queues a desired state.
    pub fn program(&self, desired_state: DesiredState) {
        self.worker.order(Task::DesiredState(desired_state));
    }

    /// Reads the kernel's tables after the tasks queued before, and passes them to `then`.
    pub fn read_tables(&self, then: impl FnOnce(Result<Tables, String>) + Send + 'static) {
        self.worker.order(Task::TableRequest(Box::new(then)));
    }

    /// Reads the number of tunnel packets from each member.
    pub fn count(&self) {
        self.worker.order(Task::Count);
    }

    /// Makes the kernel forget the wrong path MTU `told` to an underlay address.
    pub fn forget_path(&self, host: IpAddr, told: u32) {
        self.worker.order(Task::ForgetPath(host, told));
    }

    /// Ends the thread after the current pass. Afterwards nothing changes the kernel.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The state of the thread.
struct Reconciler<F> {
    kernel: Kernel,
    demand: Demand,
    /// The part of the desired state that is needed now; `None` if all of it is.
    part: Option<Box<Desired>>,
    /// Whether the part has changed since the kernel last equaled it.
    part_is_new: bool,
    /// Whether the entries of an earlier process have been read.
    has_adopted: bool,
    /// The last reported state, and when it was reported.
    reported_demand: DemandState,
    demand_reported_at: Instant,
    host_checks: HostChecks,
    /// Whether the nftables table has changed since its last repair.
    table_touched: bool,
    /// Whether a forwarding sysctl has changed since the last check of the host, and when that was.
    is_forwarding_switched: bool,
    host_checked_at: Option<Instant>,
    netlink: Netlink,
    config: Config,
    underlay: Watch,
    flaps: Flaps,
    /// The last reported problem.
    flapping: Option<Problem>,
    /// When the interfaces were last checked.
    underlay_checked_at: Option<Instant>,
    orders: Orders<Task>,
    /// Requests for the tables.
    table_requests: Vec<TableRequest>,
    /// Whether the packet counters are requested.
    count: bool,
    report: F,
    desired_state: Option<DesiredState>,
    /// What the kernel equaled after the last pass; `None` if that is not certain.
    established: Option<Established>,
    /// Whether the desired state has not been programmed yet.
    is_new: bool,
    /// Whether the kernel has equaled the desired state.
    reached: bool,
    recheck: Recheck,
    overruns: Overruns,
    /// The last reported overlaps.
    overlaps: Vec<Problem>,
    auditor: Auditor,
    next_hops: NextHops,
    schedule: RepairSchedule,
}

impl<F: Fn(KernelEvent)> Reconciler<F> {
    fn run(mut self) {
        while self.take_orders() {
            if let Err(error) = self.read_notifications() {
                tracing::error!(%error, "kernel notifications not read");
                self.recheck = Recheck::EVERYTHING;
                thread::sleep(RETRY_INTERVAL);
            }
            let now = Instant::now();
            if self.overruns.take(now) {
                self.recheck = Recheck::EVERYTHING;
            }
            if self.underlay_due(now).is_some_and(|due| due <= now) {
                self.check_underlay(now);
            }
            if std::mem::take(&mut self.is_new) && !self.program_change() {
                self.schedule.compare_now(now);
            }
            let due = self.schedule.due(now, self.changes());
            let is_due = due.comparison;
            let verify = due.table || is_due && self.reached;
            if is_due || verify {
                self.update_table(verify);
            }
            if is_due || due.entries {
                self.reconcile();
            }
            if is_due && self.host_checks.is_table_unread() {
                self.update_table(true);
            }
            self.is_forwarding_switched |= self.host_checks.read_switches();
            if is_due || self.host_check_due().is_some_and(|due| due <= now) {
                self.check_host();
            }
            self.audit();
            self.answer_table_requests();
            if std::mem::take(&mut self.count) {
                self.count_packets();
            }
            self.wait();
        }
    }

    /// Returns the changes by other programs that are not repaired yet.
    fn changes(&self) -> Changes {
        let pause = |kind| self.host_checks.repair_conflicts.pause(kind);
        let is_table_changed = self.table_touched || self.recheck.rules;
        Changes {
            entries: self.recheck.ours.then(|| pause(Kind::Entries)),
            table: is_table_changed.then(|| pause(Kind::Firewall)),
        }
    }

    /// Answers the requests for the tables.
    fn answer_table_requests(&mut self) {
        for then in std::mem::take(&mut self.table_requests) {
            let Some(DesiredState { state: State::Overlay(all, _), .. }) = &self.desired_state
            else {
                then(Err("this node has not programmed the kernel yet".to_owned()));
                continue;
            };
            let desired = self.part.as_ref().unwrap_or(all);
            let actual = self.kernel.observe(&desired.device.name, Some(&desired.pool));
            let tables = actual.map(|actual| (desired.tables.clone(), actual));
            then(tables.map_err(|error| error.to_string()));
        }
    }

    /// Takes all queued tasks. Returns `false` once the agent has ended.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(Task::TableRequest(then)) => self.table_requests.push(then),
                Ok(Task::Count) => self.count = true,
                Ok(Task::ForgetPath(host, told)) => self.forget_path(host, told),
                Ok(Task::DesiredState(desired_state)) => {
                    let had_peers = self.underlays().next().is_some();
                    self.desired_state = Some(desired_state);
                    // Only now is it known which uplink leads to the peers.
                    self.recheck.underlay |= !had_peers && self.underlays().next().is_some();
                    self.choose_part();
                    self.reached = false;
                    self.is_new = true;
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Reads the kernel's change notifications and requests for missing entries.
    fn read_notifications(&mut self) -> io::Result<()> {
        let Some(DesiredState { state: State::Overlay(all, firewall), .. }) = &self.desired_state
        else {
            // Unread notifications would wake this thread again and again.
            self.host_checks.touched("")?;
            let heard = self.kernel.listen(None)?;
            self.recheck.merge(heard.recheck);
            self.overruns.note(heard.overrun);
            return Ok(());
        };
        let desired = self.part.as_ref().unwrap_or(all);
        let heard = self.kernel.listen(Some(desired))?;
        self.recheck.merge(heard.recheck);
        self.overruns.note(heard.overrun);
        self.table_touched |= self.host_checks.touched(&firewall.table)?;
        if heard.misses.is_empty() {
            return Ok(());
        }
        let ops: Vec<EntryOp> =
            heard.misses.into_iter().flat_map(|miss| self.demand.answer(all, miss)).collect();
        let answered = self.kernel.answer(&ops);
        self.choose_part();
        self.report_demand();
        answered
    }

    /// Chooses the needed part of the desired state, if entries are made on demand.
    fn choose_part(&mut self) {
        let Some(DesiredState { state: State::Overlay(all, _), .. }) = &self.desired_state else {
            self.part = None;
            return;
        };
        if self.demand.in_use().is_none() {
            return;
        }
        self.demand.keep_peers(all);
        let part = self.demand.select(all);
        self.part_is_new |= self.part.as_ref().is_none_or(|before| **before != part);
        self.part = Some(Box::new(part));
    }

    /// Adopts the peers that an earlier process had in use. No entry is removed before that.
    fn adopt(&mut self) -> Result<(), KernelError> {
        let Some(DesiredState { state: State::Overlay(all, _), .. }) = &self.desired_state else {
            return Ok(());
        };
        if self.has_adopted || self.demand.in_use().is_none() {
            return Ok(());
        }
        let actual = self.kernel.observe(&all.device.name, None)?;
        self.demand.adopt(actual.fdb.iter().map(|(mac, _)| *mac));
        self.has_adopted = true;
        self.choose_part();
        Ok(())
    }

    /// Reports the counters and the peers in use if they have changed.
    fn report_demand(&mut self) {
        let Demand { answered, unknown, .. } = self.demand;
        let state = DemandState { answered, unknown, in_use: self.demand.in_use().cloned() };
        // Requests for unknown addresses may be very frequent.
        let only_unknown = DemandState { unknown, ..self.reported_demand.clone() } == state;
        if state == self.reported_demand
            || only_unknown && self.demand_reported_at.elapsed() < RETRY_INTERVAL
        {
            return;
        }
        self.reported_demand = state.clone();
        self.demand_reported_at = Instant::now();
        (self.report)(KernelEvent::Demand(state));
    }

    /// Removes entries that are no longer used.
    fn remove_idle(&mut self) -> io::Result<()> {
        if self.demand.in_use().is_none() {
            return Ok(());
        }
        let idle = self.kernel.idle_macs(self.config.idle_after)?;
        self.demand.remove_idle(idle.into_iter());
        // Removes neighbor entries for first packets and for unknown addresses: a pod that tries all
        // addresses must not fill the kernel's table.
        let passing: Vec<EntryOp> =
            self.kernel.temporary_neighbors()?.into_iter().map(EntryOp::RemoveNeighbor).collect();
        self.kernel.answer(&passing)?;
        self.choose_part();
        self.report_demand();
        Ok(())
    }

    /// Writes or verifies the nftables table. This happens before the tunnels are programmed, so that a
    /// new member is admitted before packets are sent to it.
    fn update_table(&mut self, verify: bool) {
        let Some(DesiredState { state: State::Overlay(_, firewall), .. }) = &self.desired_state
        else {
            return;
        };
        if verify {
            self.table_touched = false;
            self.host_checks.verify_table(firewall);
        } else {
            self.host_checks.write_table(firewall);
        }
        self.recheck.rules = false;
        self.host_checks.block_users(firewall);
        self.schedule.on_repair(Instant::now());
        self.report_host();
    }

    /// Makes the kernel equal to the desired state and reports the result.
    fn reconcile(&mut self) {
        self.recheck.ours = false;
        let result = self.adopt().and_then(|()| self.program_kernel());
        let now = Instant::now();
        self.schedule.on_repair(now);
        let Some(DesiredState { number, state }) = &self.desired_state else { return };
        let clean = result.as_ref().is_ok_and(|report| report.failed.is_empty());
        let routes = match state {
            State::Overlay(all, _) => self.part.as_ref().unwrap_or(all).tables.routes.len(),
            State::Nothing { .. } => 0,
        };
        self.schedule.on_comparison(now, routes, clean);
        // A change of the needed part is not a change by another program.
        let repair = self.reached && !std::mem::take(&mut self.part_is_new);
        self.recheck.routing |= !self.reached;
        self.reached |= result.is_ok();
        self.established =
            result.as_ref().ok().and_then(|report| Established::after(report, state));
        let done = result.as_ref().ok().filter(|report| repair && !report.done.is_empty());
        if let Some(report) = done {
            let kinds: Vec<&str> = report.done.keys().copied().collect();
            self.host_checks.repair_conflicts.note(Kind::Entries, &kinds.join(", "), report.device);
        }
        (self.report)(KernelEvent::Outcome(Outcome { number: *number, repair, result }));
        self.report_host();
    }

    /// Programs the kernel once.
    fn program_kernel(&mut self) -> Result<Report, KernelError> {
        if let Err(error) = self.remove_idle() {
            tracing::debug!(%error, "unused peers not determined");
        }
        match &self.desired_state {
            Some(DesiredState { state: State::Overlay(all, _), .. }) => {
                let report = self.kernel.reconcile(self.part.as_ref().unwrap_or(all))?;
                // Without requests for missing entries, only notifications reveal them; entries on
                // demand would not work.
                match self.kernel.request_misses() {
                    Err(error) if self.demand.in_use().is_some() => Err(error.into()),
                    _ => Ok(report),
                }
            }
            Some(DesiredState { state: State::Nothing { device, pool }, .. }) => {
                // The pods' rules stay as long as their bridge.
                let extent = Extent::Overlay { device, pool, with_pods: false };
                let found = self.kernel.leftovers(extent)?;
                self.host_checks.forget_removed();
                self.next_hops = NextHops::default();
                self.kernel.sweep(found)?;
                Ok(Report::default())
            }
            None => Ok(Report::default()),
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        let checks = self.host_check_due().into_iter().chain(self.underlay_due(now));
        let until = self.schedule.next(now, self.changes()).into_iter().chain(checks);
        let until = until.chain(self.overruns.due(now)).chain([self.auditor.due()]).min();
        let pause = until.map(|until| until.saturating_duration_since(now));
        let changes = [self.host_checks.changes(), self.host_checks.switches()];
        let changes = changes.into_iter().flatten().chain([self.kernel.changes()]);
        self.orders.sleeper.wait(changes, pause);
    }
}
