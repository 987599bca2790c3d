//! The threads that connect and disconnect pods, so that the event loop never waits for the kernel.
//!
//! The first thread also repairs the bridge and its ports: on change notifications of the kernel, and
//! every ten seconds.

mod absent;
mod foreign_ports;
mod jobs;
mod notifications;
mod successors;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    path::Path,
    sync::mpsc::{self, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot::Sender;

use self::absent::{Fetched, look, report_absent};
use crate::{
    agent::{host::repair_conflicts::RepairConflicts, workers::overruns::Overruns},
    api::{PodError, PodStatus},
    dataplane::{kernel::pod_tables::PodTables, repair_conflict::Kind},
    model::{Attachment, Mac, Pod, Problem, ProblemCode},
    netlink::monitor::Monitor,
    pods::{
        desired::{Bridge, RepairReport, Tenants},
        wiring::{ConnectedPod, End, Wiring, WiringError},
    },
    worker::{Order, Orders, Thread, Worker},
};

/// Longest time between two repairs of the bridge.
const RECHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Shortest time between two repairs, so that endless changes cannot use a whole CPU.
const MIN_REPAIR_INTERVAL: Duration = Duration::from_millis(20);

/// A task for the thread. Results are reported under the task's number.
#[derive(Debug)]
pub enum Job {
    /// Connects a pod.
    Connect {
        number: u64,
        bridge: Bridge,
        pod: Pod,
        /// The pod's MAC; `None` if another program assigns one that this process does not know.
        mac: Option<Mac>,
        /// Where the other end of the veth pair goes.
        end: End,
    },
    /// Disconnects a pod.
    Disconnect {
        number: u64,
        attachment: Attachment,
        /// Its namespace, if it is already open.
        netns: Option<File>,
    },
    /// Sets the bridge to repair from now on, with the pods on it.
    Keep { bridge: Bridge, tenants: Tenants },
    /// Checks whether pods could be connected to a bridge that does not exist yet.
    Expect(Bridge),
    /// Removes veth pairs that a killed agent has left, except those in `keep`.
    Sweep { bridge: String, keep: BTreeSet<String> },
    /// Checks a pod. The thread itself sends the reply.
    Check {
        pod: Pod,
        /// Its namespace, if it is already open.
        netns: Option<File>,
        /// The MAC that it must have.
        mac: Option<Mac>,
        reply: Sender<Result<Vec<IpAddr>, PodError>>,
    },
    /// Checks which of these pods are gone.
    FindGone { number: u64, pods: Vec<Suspect> },
    /// Marks pods without a veth pair as orphans. The thread itself sends the reply.
    List { pods: Vec<PodStatus>, reply: Sender<Vec<PodStatus>> },
}

/// A pod that may be gone.
#[derive(Debug)]
pub struct Suspect {
    /// Name of its veth pair's end on this host.
    pub link: String,
    /// Path of its network namespace.
    pub netns: String,
}

/// Pods that are gone or about to be, by the names of their veth pairs.
#[derive(Debug, Default)]
pub struct GonePods {
    /// The kernel has no such veth pair any more.
    pub gone: BTreeSet<String>,
    /// The veth pair exists, but the path does not lead to its namespace any more: the kernel may be
    /// removing both.
    pub going: BTreeSet<String>,
}

/// A result or an event of the threads.
#[derive(Debug)]
pub enum AttachResult {
    /// A pod was connected, or could not be.
    Connected { number: u64, result: Result<ConnectedPod, WiringError> },
    /// A pod was disconnected. The result is `false` if it had no veth pair.
    Disconnected { number: u64, attachment: Attachment, result: io::Result<bool> },
    /// Which pods are gone.
    GonePods { number: u64, result: io::Result<GonePods> },
    /// Veth pairs of pods that are missing, and those among them that have been missing for
    /// [`RECHECK_INTERVAL`].
    Absent { links: BTreeSet<String>, confirmed: BTreeSet<String> },
    /// The check of [`Job::Expect`] is complete. Its result was reported before.
    PlaceChecked,
    /// Why no pod can be connected; `None` once pods can be connected again.
    Refusal(Option<Problem>),
    /// The bridge was repaired, or its problems have changed.
    BridgeRepaired {
        /// What was repaired at the bridge and its ports, or why it could not be.
        result: io::Result<RepairReport>,
        /// Lasting problems of the bridge and its ports.
        problems: Vec<Problem>,
        /// Interfaces whose sysctls let pods change this host's routes.
        open: Vec<Problem>,
        /// Notices about ports of other programs.
        notices: Vec<Problem>,
    },
}

/// Handle of the threads.
pub struct AttachWorker {
    /// The thread.
    pub(in crate::agent) worker: Worker<Job>,
}

impl Order for Job {
    /// Each task has a reply, or concerns another pod.
    fn supersedes(&self, _: &Self) -> bool {
        false
    }
}

impl AttachWorker {
    /// Starts the threads. `report` receives their results.
    ///
    /// # Errors
    /// Fails if a socket cannot be opened or a thread cannot be created.
    pub fn start(report: impl Fn(AttachResult) + Send + Sync + 'static) -> io::Result<Self> {
        let (wiring, reaper) = (Wiring::open()?, Wiring::open()?);
        let monitor = Monitor::of_interfaces()?;
        let worker = Worker::start("pods", move |jobs| {
            let (pending_deletes, reaping) = mpsc::channel();
            thread::scope(|scope| {
                let work = || remove_veth_pairs(reaper, reaping, &report);
                if let Err(error) = thread::Builder::new().spawn_scoped(scope, work) {
                    return tracing::error!(%error, "thread that removes veth pairs not started");
                }
                let worker = PodWorker {
                    wiring,
                    monitor,
                    overruns: Overruns::default(),
                    jobs,
                    pending_deletes,
                    report: &report,
                    kept: None,
                    expected: None,
                    seen: None,
                    tenants: Tenants::new(),
                    tables: PodTables::open(),
                    touched: false,
                    table_touched: false,
                    checked_at: Instant::now(),
                    failing: None,
                    refusal: None,
                    repair_conflicts: RepairConflicts::new(),
                    problems: Vec::new(),
                    open: Vec::new(),
                    notices: Vec::new(),
                    fetched: Fetched::default(),
                    absent: BTreeMap::new(),
                    worked: Instant::now(),
                };
                worker.run();
            });
        })?;
        Ok(Self { worker })
    }

    /// Queues a task.
    pub fn ask(&self, job: Job) {
        self.worker.order(job);
    }

    /// Ends the threads after the current task.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// A veth pair to remove, by its index: another interface may have its name by then.
struct PendingDelete {
    number: u64,
    attachment: Attachment,
    index: u32,
}

/// The first thread: its tasks, and the state of the bridge.
struct PodWorker<'a, F> {
    wiring: Wiring,
    monitor: Monitor,
    overruns: Overruns,
    jobs: Orders<Job>,
    /// Veth pairs for the second thread.
    pending_deletes: mpsc::Sender<PendingDelete>,
    report: &'a F,
    /// The bridge to repair; set when the first pod is connected.
    kept: Option<Bridge>,
    /// The bridge that pods will be connected to, while none is.
    expected: Option<Bridge>,
    /// The settings with which the bridge was last found or made. A repair after a change of settings is
    /// not counted as a change by another program.
    seen: Option<Bridge>,
    tenants: Tenants,
    tables: PodTables,
    /// Whether the bridge or its ports have changed since the last repair.
    touched: bool,
    /// Whether the tables of pods' addresses have changed since the last repair.
    table_touched: bool,
    checked_at: Instant,
    /// Why the last repair failed.
    failing: Option<String>,
    /// The last reported refusal.
    refusal: Option<Problem>,
    repair_conflicts: RepairConflicts,
    /// The last reported problems.
    problems: Vec<Problem>,
    /// The last reported interfaces and notices.
    open: Vec<Problem>,
    notices: Vec<Problem>,
    fetched: Fetched,
    /// Missing veth pairs, and since when.
    absent: BTreeMap<String, Instant>,
    /// When the last task ended. Notifications of the thread's own changes are read after all requests
    /// have been answered.
    worked: Instant,
}

impl<F: Fn(AttachResult)> PodWorker<'_, F> {
    fn run(mut self) {
        while self.take_jobs() {
            if self.worked.elapsed() < MIN_REPAIR_INTERVAL {
                self.wait();
                continue;
            }
            self.listen();
            self.repair_bridge();
            self.wait();
        }
    }

    /// Carries out all queued tasks. Returns `false` once the agent has ended.
    fn take_jobs(&mut self) -> bool {
        loop {
            match self.jobs.take() {
                Ok(job) => {
                    self.work(job);
                    self.worked = Instant::now();
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Connect { number, bridge, pod, mac, end } => {
                let attachment = pod.attachment.clone();
                let result = self.connect(bridge, &pod, mac, &end);
                let is_connected = result.is_ok();
                (self.report)(AttachResult::Connected { number, result });
                if is_connected {
                    Wiring::close(&attachment, &end);
                }
            }
            Job::Disconnect { number, attachment, netns } => {
                self.disconnect(number, attachment, netns.as_ref());
            }
            Job::Keep { bridge, tenants } => {
                // An agent that has just started did not see whether Docker fetched the ends.
                let new = tenants.keys().filter(|veth| !self.tenants.contains_key(*veth));
                self.fetched.0.extend(new.cloned());
                (self.kept, self.tenants) = (Some(bridge), tenants);
                self.touched = true;
            }
            Job::Expect(bridge) => {
                self.expected = Some(bridge);
                self.check_place();
                (self.report)(AttachResult::PlaceChecked);
            }
            Job::Sweep { bridge, keep } => match self.wiring.sweep(&bridge, &keep) {
                Ok(0) => {}
                Ok(count) => tracing::warn!(count, "removed interfaces of unknown pods"),
                Err(error) => tracing::error!(%error, "interfaces of unknown pods not removed"),
            },
            Job::Check { pod, netns, mac, reply } => {
                let checked = self.wiring.check(&pod, netns.as_ref(), mac);
                let _ = reply.send(checked.map_err(PodError::from));
            }
            Job::FindGone { number, pods } => {
                let result = look(pods, &mut self.wiring, &self.fetched);
                (self.report)(AttachResult::GonePods { number, result });
            }
            Job::List { mut pods, reply } => {
                match self.wiring.links() {
                    Ok(links) => {
                        let is_orphan = |pod: &PodStatus| {
                            !pod.netns.is_empty() && !links.contains_key(&pod.link)
                        };
                        pods.iter_mut().for_each(|pod| pod.orphan = is_orphan(pod));
                    }
                    Err(error) => tracing::warn!(%error, "links not listed"),
                }
                let _ = reply.send(pods);
            }
        }
    }

    /// Repairs the bridge, its ports and the tables if it is time to, and reports changes.
    fn repair_bridge(&mut self) {
        if self.checked_at.elapsed() < self.pause() {
            return;
        }
        let Some(bridge) = &self.kept else {
            self.checked_at = Instant::now();
            (self.touched, self.table_touched) = (false, false);
            return self.check_place();
        };
        let mut result = self.wiring.repair(bridge, &self.tenants);
        for (veth, tenant) in self.tenants.iter_mut().filter(|(_, tenant)| tenant.mac.is_none()) {
            tenant.mac = self.wiring.mac_behind(veth, Path::new(&tenant.netns));
        }
        let foreign_ports = result.as_ref().ok().map(|mended| &mended.foreign_ports);
        let links = || Ok(self.wiring.links()?.into_keys().collect());
        let rewritten = self.tables.keep(bridge, &self.tenants, foreign_ports, links);
        self.checked_at = Instant::now();
        (self.touched, self.table_touched) = (false, false);
        let (mut problems, mut open, mut notices) = (Vec::new(), Vec::new(), Vec::new());
        let mut is_news = false;
        let as_before = self.seen.as_ref() == Some(bridge);
        if let Ok(mended) = &mut result {
            mended.spoofing = rewritten.len() as u64;
            if !as_before {
                self.seen = Some(bridge.clone());
                if mended.count() > 0 {
                    tracing::info!(bridge = %bridge.name, "bridge changed to the new settings");
                }
                mended.reset_counts();
            }
            let gone = self.fetched.gone(&self.tenants, mended);
            report_absent(&mut self.absent, &gone, self.checked_at, self.report);
            if let Some((object, link)) = mended.object() {
                self.repair_conflicts.note(Kind::Bridge, object, Some(link));
            }
            if mended.sysctls > 0 {
                self.repair_conflicts.note(Kind::Sysctls, &bridge.name, None);
            }
            is_news = mended.count() > 0;
            open.clone_from(&mended.open);
            notices.extend(foreign_ports::notice(bridge, &mended.foreign_ports));
        }
        for table in rewritten.iter().filter(|_| as_before) {
            self.repair_conflicts.note(Kind::Spoofing, table, None);
        }
        problems.extend(self.tables.problems().cloned());
        problems.extend(self.repair_conflicts.problems());
        is_news |= problems != self.problems || open != self.open || notices != self.notices;
        self.problems.clone_from(&problems);
        self.open.clone_from(&open);
        self.notices.clone_from(&notices);
        let why = result.as_ref().err().map(ToString::to_string);
        let refusal = self.refusal_of(why.as_deref());
        is_news |= why.is_some() && why != self.failing && refusal.is_none();
        self.failing = why;
        if is_news {
            (self.report)(AttachResult::BridgeRepaired { result, problems, open, notices });
        }
        self.report_refusal(refusal);
    }

    /// Checks the place of a bridge that no pod has needed yet.
    fn check_place(&mut self) {
        let Some(bridge) = &self.expected else { return };
        match self.wiring.obstacle(bridge) {
            Ok(obstacle) => self.report_refusal(obstacle),
            Err(error) => tracing::debug!(%error, "bridge not checked"),
        }
    }

    /// Returns why no pod can be connected, after a repair that failed with `why`. A first failure may
    /// be temporary, unless another interface has the bridge's name.
    fn refusal_of(&mut self, why: Option<&str>) -> Option<Problem> {
        let (why, bridge) = (why?, self.kept.as_ref()?);
        let obstacle = self.wiring.obstacle(bridge).ok().flatten();
        let again = self.failing.as_deref() == Some(why);
        let lasting = || {
            let what = format!("no pod can be connected: the bridge {}: {why}", bridge.name);
            Problem::new(ProblemCode::PodsRefused, &bridge.name, what, "")
        };
        obstacle.or_else(|| again.then(lasting))
    }

    fn report_refusal(&mut self, refusal: Option<Problem>) {
        if refusal != self.refusal {
            self.refusal.clone_from(&refusal);
            (self.report)(AttachResult::Refusal(refusal));
        }
    }

    /// Returns the time between two repairs of the bridge. It is longer while another program keeps
    /// changing it.
    fn pause(&self) -> Duration {
        let after = |touched: bool, kind| {
            touched.then(|| MIN_REPAIR_INTERVAL.max(self.repair_conflicts.pause(kind)))
        };
        let bridge = after(self.touched, Kind::Bridge);
        let table = after(self.table_touched, Kind::Spoofing);
        bridge.into_iter().chain(table).min().unwrap_or(RECHECK_INTERVAL)
    }

    fn wait(&mut self) {
        let quiet = MIN_REPAIR_INTERVAL.saturating_sub(self.worked.elapsed());
        if !quiet.is_zero() {
            self.jobs.sleeper.wait([], Some(quiet));
            return;
        }
        let looks = self.kept.as_ref().or(self.expected.as_ref());
        let repair_bridge = looks.map(|_| self.pause().saturating_sub(self.checked_at.elapsed()));
        let now = Instant::now();
        let lost = self.overruns.due(now).map(|due| due.saturating_duration_since(now));
        let repair_bridge = repair_bridge.into_iter().chain(lost).min();
        let changes = [Some(self.monitor.as_fd()), self.tables.changes()];
        self.jobs.sleeper.wait(changes.into_iter().flatten(), repair_bridge);
    }
}

/// Removes veth pairs. The kernel takes ten times as long to remove an interface as to make one, so a
/// second thread does it.
fn remove_veth_pairs(
    mut wiring: Wiring,
    pending_deletes: mpsc::Receiver<PendingDelete>,
    report: &impl Fn(AttachResult),
) {
    for PendingDelete { number, attachment, index } in pending_deletes {
        let result = wiring.delete(index);
        report(AttachResult::Disconnected { number, attachment, result });
    }
}
