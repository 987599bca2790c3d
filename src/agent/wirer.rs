//! The threads that plug pods in and pull them out: the loop never waits for them.
//!
//! What pods are plugged into is kept as it should be: this wakes when the kernel tells of a change to it,
//! and by a slow timer.

mod absent;
mod guests;
mod news;
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

use self::absent::{Fetched, look, note_absent};
use super::{overruns::Overruns, repair_conflicts::RepairConflicts};
use crate::{
    api::{PodError, PodStatus},
    dataplane::{fight::Kind, kernel::pod_tables::PodTables},
    model::{Attachment, Mac, Pod},
    netlink::monitor::Monitor,
    pods::{
        bridge::{Bridge, RepairReport, Tenant, Tenants},
        wiring::{ConnectedPod, End, Wiring, WiringError, link_name},
    },
    worker::{Order, Orders, Thread, Worker},
};

/// The bridge is looked at this often, whatever the kernel tells.
const LOOK: Duration = Duration::from_secs(10);
/// At least so long between two repairs: what changes without end must not take a whole CPU.
const GAP: Duration = Duration::from_millis(20);

/// What is to be done, and the number under which it is answered.
#[derive(Debug)]
pub enum Job {
    Connect {
        number: u64,
        bridge: Bridge,
        pod: Pod,
        /// None where another program gives it one that this process has not heard of.
        mac: Option<Mac>,
        end: End,
    },
    Disconnect {
        number: u64,
        attachment: Attachment,
        /// Its namespace, where it was opened already.
        netns: Option<File>,
    },
    /// Keeps a bridge as it is to be from now on, with the ports of all pods on it.
    Keep { bridge: Bridge, tenants: Tenants },
    /// Looks whether pods could be plugged into a bridge that no pod has needed yet.
    Expect(Bridge),
    /// Removes what an agent that ended in the middle has left.
    Sweep { bridge: String, keep: BTreeSet<String> },
    /// Answered by the thread itself, for nothing follows from it.
    Check {
        pod: Pod,
        /// Its namespace, where it was opened already.
        netns: Option<File>,
        /// What it is held to.
        mac: Option<Mac>,
        reply: Sender<Result<Vec<IpAddr>, PodError>>,
    },
    /// Looks which of these pods are gone.
    Look { number: u64, pods: Vec<Suspect> },
    /// Answered by the thread itself.
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

/// Which pods are gone, by the names of their veth pairs.
#[derive(Debug, Default)]
pub struct Looked {
    /// The kernel has no such veth pair.
    pub gone: BTreeSet<String>,
    /// The kernel still has the veth pair, but the path does not lead to its namespace any more: it may be
    /// removing both.
    pub going: BTreeSet<String>,
}

/// How it went.
#[derive(Debug)]
pub enum AttachResult {
    Connected {
        number: u64,
        result: Result<ConnectedPod, WiringError>,
    },
    Disconnected {
        number: u64,
        attachment: Attachment,
        result: io::Result<bool>,
    },
    Looked {
        number: u64,
        result: io::Result<Looked>,
    },
    /// Veth pairs of pods that the kernel does not have, and those of them that it did not have a while ago.
    Absent {
        links: BTreeSet<String>,
        confirmed: BTreeSet<String>,
    },
    /// It has been looked whether pods could be plugged in. What was found came before.
    LookedAhead,
    /// Why no pod can be plugged in; none, when pods can be again.
    Refusal(Option<String>),
    RepairReport {
        /// How much of the bridge and its ports was not as it should be, or why that is not known.
        result: io::Result<RepairReport>,
        /// What is wrong with them in the long run.
        problems: Vec<String>,
        /// Where sysctls let pods give this host routes.
        open: Vec<String>,
        /// A warning about ports of other programs.
        guests: Option<String>,
    },
}

pub struct Wirer {
    pub(super) worker: Worker<Job>,
}

impl Order for Job {
    /// Each is answered, or is about a pod of its own.
    fn supersedes(&self, _: &Self) -> bool {
        false
    }
}

impl Wirer {
    pub fn start(report: impl Fn(AttachResult) + Send + Sync + 'static) -> io::Result<Self> {
        let (wiring, reaper) = (Wiring::open()?, Wiring::open()?);
        let monitor = Monitor::of_interfaces()?;
        let worker = Worker::start("pods", move |jobs| {
            let (doomed, reaping) = mpsc::channel();
            thread::scope(|scope| {
                let work = || reap(reaper, reaping, &report);
                if let Err(error) = thread::Builder::new().spawn_scoped(scope, work) {
                    return tracing::error!(%error, "no thread that removes veth pairs");
                }
                let worker = PodWorker {
                    wiring,
                    monitor,
                    overruns: Overruns::default(),
                    jobs,
                    doomed,
                    report: &report,
                    kept: None,
                    expected: None,
                    seen: None,
                    tenants: Tenants::new(),
                    tables: PodTables::open(),
                    touched: false,
                    table_touched: false,
                    looked: Instant::now(),
                    failing: None,
                    refusal: None,
                    repair_conflicts: RepairConflicts::new(),
                    problems: Vec::new(),
                    open: Vec::new(),
                    guests: None,
                    fetched: Fetched::default(),
                    absent: BTreeMap::new(),
                    worked: Instant::now(),
                };
                worker.run();
            });
        })?;
        Ok(Self { worker })
    }

    pub fn ask(&self, job: Job) {
        self.worker.order(job);
    }

    /// Ends it after what is under way.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// An interface that is to be removed, by its index: its name may be another's by then.
struct PendingDelete {
    number: u64,
    attachment: Attachment,
    index: u32,
}

struct PodWorker<'a, F> {
    wiring: Wiring,
    monitor: Monitor,
    overruns: Overruns,
    jobs: Orders<Job>,
    doomed: mpsc::Sender<PendingDelete>,
    report: &'a F,
    /// What is to be kept right: since the first pod came.
    kept: Option<Bridge>,
    /// What pods will be plugged into, as long as there was none.
    expected: Option<Bridge>,
    /// What the bridge was last found or made like. What another value changes about it is of this agent's
    /// settings, and of no other program.
    seen: Option<Bridge>,
    tenants: Tenants,
    tables: PodTables,
    touched: bool,
    table_touched: bool,
    looked: Instant,
    /// As last told.
    failing: Option<String>,
    /// As last told.
    refusal: Option<String>,
    repair_conflicts: RepairConflicts,
    /// As last told.
    problems: Vec<String>,
    /// As last told.
    open: Vec<String>,
    /// As last told.
    guests: Option<String>,
    fetched: Fetched,
    /// Since when veth pairs of pods are not there.
    absent: BTreeMap<String, Instant>,
    /// What the kernel tells of our own work is read when those who wait for it have their answers.
    worked: Instant,
}

impl<F: Fn(AttachResult)> PodWorker<'_, F> {
    fn run(mut self) {
        while self.take_jobs() {
            if self.worked.elapsed() < GAP {
                self.wait();
                continue;
            }
            self.listen();
            self.mend();
            self.wait();
        }
    }

    /// Says whether the agent still runs.
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
                let veth = link_name(&pod.attachment);
                let tenant = Tenant::new(&pod, mac);
                self.tables.admit(&bridge, &veth, &tenant, &self.tenants);
                let result = self.wiring.connect(&bridge, &pod, mac, &end);
                if result.is_ok() {
                    self.seen = Some(bridge.clone());
                }
                // Ports of others may be on a bridge that has not been looked at.
                self.touched |= self.kept.as_ref() != Some(&bridge);
                self.kept = Some(bridge);
                self.fetched.0.remove(&veth);
                if result.is_ok() {
                    self.tenants.insert(veth, tenant);
                } else {
                    self.tables.revoke(&veth, &tenant);
                }
                let attachment = result.is_ok().then(|| pod.attachment.clone());
                (self.report)(AttachResult::Connected { number, result });
                if let Some(attachment) = attachment {
                    Wiring::close(&attachment, &end);
                }
            }
            Job::Disconnect { number, attachment, netns } => {
                let veth = link_name(&attachment);
                let tenant = self.tenants.remove(&veth);
                if let Some(tenant) = &tenant {
                    self.tables.revoke(&veth, tenant);
                    self.wiring.forget_neighbors(tenant.addresses);
                }
                // Its addresses are of the container's other veth pairs too.
                let is_its = |other: &Tenant| other.container == attachment.container();
                self.touched |= self.tenants.values().any(is_its);
                let gone = |result| {
                    (self.report)(AttachResult::Disconnected {
                        number,
                        attachment: attachment.clone(),
                        result,
                    })
                };
                match self.wiring.index(&attachment) {
                    Ok(Some(index)) => {
                        self.hand_over(&attachment, tenant.as_ref(), netns.as_ref(), index);
                        // The other thread lives as long as this one.
                        let _ = self.doomed.send(PendingDelete { number, attachment, index });
                    }
                    Ok(None) => gone(Ok(false)),
                    Err(error) => gone(Err(error)),
                }
            }
            Job::Keep { bridge, tenants } => {
                // An agent that has just started was not there to see it.
                let new = tenants.keys().filter(|veth| !self.tenants.contains_key(*veth));
                self.fetched.0.extend(new.cloned());
                (self.kept, self.tenants) = (Some(bridge), tenants);
                self.touched = true;
            }
            Job::Expect(bridge) => {
                self.expected = Some(bridge);
                self.look_ahead();
                (self.report)(AttachResult::LookedAhead);
            }
            Job::Sweep { bridge, keep } => match self.wiring.sweep(&bridge, &keep) {
                Ok(0) => {}
                Ok(count) => tracing::warn!(count, "removed interfaces of pods that nobody knows"),
                Err(error) => tracing::error!(%error, "interfaces of pods not looked at"),
            },
            Job::Check { pod, netns, mac, reply } => {
                let checked = self.wiring.check(&pod, netns.as_ref(), mac);
                let _ = reply.send(checked.map_err(PodError::from));
            }
            Job::Look { number, pods } => {
                let result = look(pods, &mut self.wiring, &self.fetched);
                (self.report)(AttachResult::Looked { number, result });
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

    fn mend(&mut self) {
        if self.looked.elapsed() < self.pause() {
            return;
        }
        let Some(bridge) = &self.kept else {
            self.looked = Instant::now();
            (self.touched, self.table_touched) = (false, false);
            return self.look_ahead();
        };
        let mut result = self.wiring.repair(bridge, &self.tenants);
        for (veth, tenant) in self.tenants.iter_mut().filter(|(_, tenant)| tenant.mac.is_none()) {
            tenant.mac = self.wiring.mac_behind(veth, Path::new(&tenant.netns));
        }
        let foreign_ports = result.as_ref().ok().map(|mended| &mended.foreign_ports);
        let links = || Ok(self.wiring.links()?.into_keys().collect());
        let rewritten = self.tables.keep(bridge, &self.tenants, foreign_ports, links);
        self.looked = Instant::now();
        (self.touched, self.table_touched) = (false, false);
        let (mut problems, mut open, mut guests) = (Vec::new(), Vec::new(), None);
        let mut is_news = false;
        let as_before = self.seen.as_ref() == Some(bridge);
        if let Ok(mended) = &mut result {
            mended.spoofing = rewritten.len() as u64;
            if !as_before {
                self.seen = Some(bridge.clone());
                if mended.count() > 0 {
                    tracing::info!(bridge = %bridge.name, "the pods' bridge is as the settings want it");
                }
                mended.reset_counts();
            }
            let gone = self.fetched.gone(&self.tenants, mended);
            note_absent(&mut self.absent, &gone, self.looked, self.report);
            if let Some((object, link)) = mended.object() {
                self.repair_conflicts.note(Kind::Bridge, object, Some(link));
            }
            if mended.sysctls > 0 {
                self.repair_conflicts.note(Kind::Sysctls, &bridge.name, None);
            }
            is_news = mended.count() > 0;
            open.clone_from(&mended.open);
            guests = guests::warning(bridge, &mended.foreign_ports);
        }
        for table in rewritten.iter().filter(|_| as_before) {
            self.repair_conflicts.note(Kind::Spoofing, table, None);
        }
        problems.extend(self.tables.problems().cloned());
        problems.extend(self.repair_conflicts.problems());
        is_news |= problems != self.problems || open != self.open || guests != self.guests;
        self.problems.clone_from(&problems);
        self.open.clone_from(&open);
        self.guests.clone_from(&guests);
        let why = result.as_ref().err().map(ToString::to_string);
        let refusal = self.refusal_of(why.as_deref());
        is_news |= why.is_some() && why != self.failing && refusal.is_none();
        self.failing = why;
        if is_news {
            (self.report)(AttachResult::RepairReport { result, problems, open, guests });
        }
        self.tell_refusal(refusal);
    }

    /// Looks at the place of a bridge that may not be needed yet.
    fn look_ahead(&mut self) {
        let Some(bridge) = &self.expected else { return };
        match self.wiring.obstacle(bridge) {
            Ok(obstacle) => self.tell_refusal(obstacle),
            Err(error) => tracing::debug!(%error, "the pods' bridge not looked at"),
        }
    }

    /// Why no pod can be plugged in, after a look at the bridge that failed with `why`. What fails once may
    /// do the next time, unless another interface has the bridge's name.
    fn refusal_of(&mut self, why: Option<&str>) -> Option<String> {
        let (why, bridge) = (why?, self.kept.as_ref()?);
        let obstacle = self.wiring.obstacle(bridge).ok().flatten();
        let again = self.failing.as_deref() == Some(why);
        let lasting = || format!("no pod can be connected: the bridge {}: {why}", bridge.name);
        obstacle.or_else(|| again.then(lasting))
    }

    fn tell_refusal(&mut self, refusal: Option<String>) {
        if refusal != self.refusal {
            self.refusal.clone_from(&refusal);
            (self.report)(AttachResult::Refusal(refusal));
        }
    }

    /// Between two looks at the bridge. One that another program fights about is looked at more rarely.
    fn pause(&self) -> Duration {
        let after =
            |touched: bool, kind| touched.then(|| GAP.max(self.repair_conflicts.pause(kind)));
        let bridge = after(self.touched, Kind::Bridge);
        let table = after(self.table_touched, Kind::Spoofing);
        bridge.into_iter().chain(table).min().unwrap_or(LOOK)
    }

    fn wait(&mut self) {
        let quiet = GAP.saturating_sub(self.worked.elapsed());
        if !quiet.is_zero() {
            self.jobs.sleeper.wait([], Some(quiet));
            return;
        }
        let looks = self.kept.as_ref().or(self.expected.as_ref());
        let mend = looks.map(|_| self.pause().saturating_sub(self.looked.elapsed()));
        let now = Instant::now();
        let lost = self.overruns.due(now).map(|due| due.saturating_duration_since(now));
        let mend = mend.into_iter().chain(lost).min();
        let changes = [Some(self.monitor.as_fd()), self.tables.changes()];
        self.jobs.sleeper.wait(changes.into_iter().flatten(), mend);
    }
}

/// The kernel takes ten times as long to remove an interface as to make one: nobody waits behind that.
fn reap(mut wiring: Wiring, doomed: mpsc::Receiver<PendingDelete>, report: &impl Fn(AttachResult)) {
    for PendingDelete { number, attachment, index } in doomed {
        let result = wiring.delete(index);
        report(AttachResult::Disconnected { number, attachment, result });
    }
}
