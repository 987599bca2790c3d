//! The thread that writes the small files: token, secrets, underlay, boot, lost pods, history and
//! `subnet.env`.
//!
//! A disk that hangs blocks this thread, not the event loop. A newer write replaces a waiting write of the
//! same file. A failed write is repeated until it succeeds or a newer one replaces it. Secrets are written
//! once: the caller decides what follows from a failure.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::TryRecvError,
    },
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    agent::{
        counted_line::CountedLine,
        workers::subnet_env::{self, SubnetFile},
    },
    api::ApiError,
    files,
    model::{OwnerChange, Problem, ProblemCode},
    store::{History, LostPod, StateDir},
    wire::{Keyring, Token},
    worker::{Order, Orders, Thread, Worker},
};

/// Time between attempts to write a file that could not be written.
const RETRY: Duration = Duration::from_secs(5);
/// Time between checks of the free space.
const SPACE_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Limit of history lines that wait for the disk. Further lines are dropped, and their number is logged.
const MAX_LINES: usize = 16_384;
/// Shortest time between log lines about that.
const DROP_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// An order to the thread.
#[derive(Debug)]
pub(in crate::agent) enum Job {
    /// Writes a file. The number counts the different contents of the subnet file ordered so far.
    Save(SavedFile, usize),
    /// Appends lines to the history.
    Append(Vec<OwnerChange>),
    /// Writes the secrets.
    Secrets(Keyring),
    /// Reads the history.
    Read(oneshot::Sender<Result<Vec<OwnerChange>, ApiError>>),
}

/// The new content of a file. A later one replaces an earlier one of the same file.
#[derive(Clone, Debug)]
pub(in crate::agent) enum SavedFile {
    /// The token of the cluster.
    Token(Token),
    /// The underlay address of this host, and the MTU of its overlay in bytes.
    Underlay(IpAddr, u32),
    /// The subnet file (`subnet.env`). `None`: it must not exist.
    Subnet(PathBuf, Option<SubnetFile>),
    /// The boot of this host that the pod records belong to.
    Boot,
    /// Pods that lose their network.
    LostPods(Vec<LostPod>),
}

impl SavedFile {
    fn is_same_file(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Token(_) => "token",
            Self::Underlay(..) => "underlay",
            Self::Subnet(..) => "subnet file",
            Self::Boot => "boot",
            Self::LostPods(_) => "lost pods",
        }
    }
}

impl Order for Job {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!((self, earlier), (Self::Save(new, _), Self::Save(old, _)) if new.is_same_file(old))
    }
}

/// What the thread reports to the event loop.
#[derive(Debug)]
pub(in crate::agent) enum ArchiveEvent {
    /// The subnet file is written, or cannot be written.
    SubnetFile,
    /// The secrets are on disk: the seed of this node's key. Or why they are not.
    Secrets(Result<[u8; 32], String>),
}

/// The event loop's handle of the thread.
pub(in crate::agent) struct Archive {
    /// The thread and its orders.
    pub(in crate::agent) worker: Worker<Job>,
    shared: Arc<Shared>,
    /// The path and content last ordered for the subnet file.
    subnet: Option<(PathBuf, Option<SubnetFile>)>,
    /// History lines that were dropped.
    drops: CountedLine,
}

/// State shared by the handle and the thread.
#[derive(Default)]
struct Shared {
    /// History lines that wait for the disk.
    lines: AtomicUsize,
    /// Number of different contents ordered for the subnet file.
    subnets: AtomicUsize,
    /// How many of them were written, replaced or refused.
    subnets_done: AtomicUsize,
    /// Why files are not written, by file name.
    failures: Mutex<BTreeMap<&'static str, String>>,
    /// Whether the file system of the state directory is full.
    is_full: AtomicBool,
}

impl Shared {
    fn note(&self, saved: &SavedFile, result: &Result<(), String>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => _ = failures.remove(saved.name()),
            Err(error) => _ = failures.insert(saved.name(), error.clone()),
        }
    }
}

impl Archive {
    /// Starts the thread; `report` is called when a file is written, or cannot be.
    ///
    /// # Errors
    /// Fails when the system refuses the thread.
    pub(in crate::agent) fn start(
        state: Arc<StateDir>,
        report: impl Fn(ArchiveEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let history = state.history();
        let space_state = state.clone();
        let is_full = move || space_state.is_full().unwrap_or(false);
        let secrets_state = state.clone();
        let keep_secrets = move |keyring: &Keyring| {
            let kept = secrets_state.save_keyring(keyring).and_then(|()| secrets_state.node_key());
            let seed = kept.map_err(|error| error.to_string())?;
            seed.ok_or_else(|| "the state directory holds no node key".to_owned())
        };
        let save = move |saved: &SavedFile| match saved {
            SavedFile::Token(token) => state.save_token(token).map_err(|error| error.to_string()),
            SavedFile::Underlay(address, mtu) => {
                state.save_underlay(*address, *mtu).map_err(|error| error.to_string())
            }
            SavedFile::Subnet(path, file) => {
                let kept = match file {
                    Some(file) => subnet_env::write(path, file),
                    None => files::remove(path),
                };
                kept.map_err(|error| format!("{}: {error}", path.display()))
            }
            SavedFile::Boot => state.note_boot().map_err(|error| error.to_string()),
            SavedFile::LostPods(pods) => {
                state.save_lost_pods(pods).map_err(|error| error.to_string())
            }
        };
        Self::start_with(history, save, keep_secrets, is_full, report)
    }

    fn start_with(
        history: History,
        save: impl FnMut(&SavedFile) -> Result<(), String> + Send + 'static,
        keep_secrets: impl Fn(&Keyring) -> Result<[u8; 32], String> + Send + 'static,
        is_full: impl Fn() -> bool + Send + 'static,
        report: impl Fn(ArchiveEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread_shared = shared.clone();
        let worker = Worker::start("archive", move |orders| {
            run(&orders, history, save, (keep_secrets, is_full), report, &thread_shared);
        })?;
        Ok(Self { worker, shared, subnet: None, drops: CountedLine::new(DROP_LOG_INTERVAL) })
    }

    /// Orders the content of a file.
    pub(in crate::agent) fn save(&mut self, saved: SavedFile) {
        let subnets = &self.shared.subnets;
        if let SavedFile::Subnet(path, file) = &saved {
            let new = Some((path.clone(), file.clone()));
            // Repeating the same content restores a removed file; it is not a new content to wait for.
            if self.subnet != new {
                self.subnet = new;
                subnets.fetch_add(1, Ordering::Relaxed);
            }
        }
        let number = subnets.load(Ordering::Relaxed);
        self.worker.order(Job::Save(saved, number));
    }

    /// Whether the newest content of the subnet file was written or refused.
    pub(in crate::agent) fn is_subnet_file_current(&self) -> bool {
        let Shared { subnets, subnets_done, .. } = &*self.shared;
        subnets_done.load(Ordering::Acquire) == subnets.load(Ordering::Relaxed)
    }

    /// Returns whether the file system of the state directory was full at the last check.
    pub(in crate::agent) fn is_full(&self) -> bool {
        self.shared.is_full.load(Ordering::Relaxed)
    }

    /// Returns one problem for each file that cannot be written at present.
    pub(in crate::agent) fn problems(&self) -> Vec<Problem> {
        let failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = |(name, error): (&&str, &String)| {
            let what =
                format!("{name}: not written: {error}; retrying every {} s", RETRY.as_secs());
            Problem::new(ProblemCode::FileNotWritten, name, what, "")
        };
        failures.iter().map(problem).collect()
    }

    /// Appends lines to the history. Drops them, and logs their number, when too many wait.
    pub(in crate::agent) fn append(&mut self, mut lines: Vec<OwnerChange>) {
        if lines.is_empty() {
            return;
        }
        let waiting = self.shared.lines.load(Ordering::Relaxed);
        let dropped = lines.split_off(lines.len().min(MAX_LINES.saturating_sub(waiting))).len();
        if let Some(dropped) = self.drops.add(Instant::now(), dropped as u64) {
            tracing::error!(dropped, "history lines dropped: too many wait to be written");
        }
        if lines.is_empty() {
            return;
        }
        self.shared.lines.fetch_add(lines.len(), Ordering::Relaxed);
        self.worker.order(Job::Append(lines));
    }

    /// Writes the secrets. They must not be used before [`ArchiveEvent::Secrets`] confirms the write.
    pub(in crate::agent) fn save_secrets(&self, keyring: Keyring) {
        self.worker.order(Job::Secrets(keyring));
    }

    /// Replies with the lines of the history.
    pub(in crate::agent) fn read(
        &self,
        reply: oneshot::Sender<Result<Vec<OwnerChange>, ApiError>>,
    ) {
        self.worker.order(Job::Read(reply));
    }

    /// Ends the thread after the waiting orders.
    pub(in crate::agent) fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The thread: carries out orders, and repeats failed writes every [`RETRY`].
fn run(
    orders: &Orders<Job>,
    mut history: History,
    mut save: impl FnMut(&SavedFile) -> Result<(), String>,
    (keep_secrets, is_full): (impl Fn(&Keyring) -> Result<[u8; 32], String>, impl Fn() -> bool),
    report: impl Fn(ArchiveEvent),
    shared: &Shared,
) {
    let mut failed: Vec<SavedFile> = Vec::new();
    let (mut retry, mut check) = (Instant::now(), Instant::now());
    loop {
        if check <= Instant::now() {
            shared.is_full.store(is_full(), Ordering::Relaxed);
            check = Instant::now() + SPACE_CHECK_INTERVAL;
        }
        match orders.take() {
            Ok(Job::Save(saved, number)) => {
                let has_failed_before = failed.iter().any(|earlier| earlier.is_same_file(&saved));
                failed.retain(|earlier| !earlier.is_same_file(&saved));
                let is_subnet = matches!(saved, SavedFile::Subnet(..));
                let result = save(&saved);
                shared.note(&saved, &result);
                if is_subnet {
                    shared.subnets_done.store(number, Ordering::Release);
                    report(ArchiveEvent::SubnetFile);
                }
                if let Err(error) = result {
                    if !has_failed_before {
                        tracing::error!(file = saved.name(), %error, "file not written");
                    }
                    if failed.is_empty() {
                        retry = Instant::now() + RETRY;
                    }
                    failed.push(saved);
                }
            }
            Ok(Job::Append(lines)) => {
                history.append(&lines);
                shared.lines.fetch_sub(lines.len(), Ordering::Relaxed);
            }
            Ok(Job::Secrets(keyring)) => report(ArchiveEvent::Secrets(keep_secrets(&keyring))),
            Ok(Job::Read(reply)) => {
                let lines = history.read().map_err(|error| format!("history: {error}").into());
                let _ = reply.send(lines);
            }
            Err(TryRecvError::Empty) => {
                let until = if failed.is_empty() { check } else { check.min(retry) };
                let remaining = until.saturating_duration_since(Instant::now());
                orders.sleeper.wait([], Some(remaining));
                // A new order or a check ends the wait early.
                if failed.is_empty() || Instant::now() < retry {
                    continue;
                }
                retry = Instant::now() + RETRY;
                failed.retain(|saved| {
                    let result = save(saved);
                    shared.note(saved, &result);
                    result.is_err()
                });
            }
            Err(TryRecvError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::model::{SlotState, Subnets};

    fn no_secrets(_: &Keyring) -> Result<[u8; 32], String> {
        Err("none".to_owned())
    }

    fn underlay(mtu: u32) -> SavedFile {
        SavedFile::Underlay([192, 0, 2, 1].into(), mtu)
    }

    #[tokio::test]
    async fn save_disk_hangs_blocks_only_the_thread_and_writes_the_newest_content() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (release, released) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let save = move |saved: &SavedFile| {
            let _ = released.recv();
            if let SavedFile::Underlay(_, mtu) = saved {
                let _ = report.send(*mtu);
            }
            Ok(())
        };
        let mut archive =
            Archive::start_with(History::new(dir.path()), save, no_secrets, || false, |_| ())
                .expect("a thread");
        for mtu in 1..=1_000 {
            archive.save(underlay(mtu));
        }
        let change = OwnerChange {
            at: 0,
            subnets: String::new(),
            from: None,
            to: String::new(),
            state: SlotState::Free,
            by: String::new(),
            epoch: 0,
        };
        for _ in 0..MAX_LINES + 10 {
            archive.append(vec![change.clone()]);
        }
        assert!(archive.shared.lines.load(Ordering::Relaxed) <= MAX_LINES);
        drop(release);
        let thread = archive.end();
        assert_eq!(thread.join(Instant::now() + Duration::from_secs(60)).await, Ok(()));
        let written: Vec<u32> = reported.iter().collect();
        assert!(written.len() <= 2 && written.last() == Some(&1_000), "{written:?}");
    }

    /// A file that is written after its removal would name a subnet that this host has given back.
    #[tokio::test]
    async fn subnet_file_removal_replaces_a_write_that_waits() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (release, released) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let save = move |saved: &SavedFile| {
            let _ = released.recv();
            if let SavedFile::Subnet(_, file) = saved {
                let _ = report.send(file.is_some());
            }
            Ok(())
        };
        let mut archive =
            Archive::start_with(History::new(dir.path()), save, no_secrets, || false, |_| ())
                .expect("a thread");
        archive.save(underlay(1_450));
        archive.save(SavedFile::Subnet(PathBuf::new(), Some(SubnetFile::default())));
        archive.save(SavedFile::Subnet(PathBuf::new(), None));
        drop(release);
        let thread = archive.end();
        assert_eq!(thread.join(Instant::now() + Duration::from_secs(60)).await, Ok(()));
        assert_eq!(reported.iter().last(), Some(false));
    }

    #[test]
    fn failed_write_is_repeated_until_it_succeeds() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (report, reported) = mpsc::channel();
        let mut tries = 0;
        let save = move |_: &SavedFile| {
            tries += 1;
            let _ = report.send(tries);
            if tries < 3 { Err("full".to_owned()) } else { Ok(()) }
        };
        let mut archive =
            Archive::start_with(History::new(dir.path()), save, no_secrets, || false, |_| ())
                .expect("a thread");
        archive.save(underlay(1_450));
        archive.save(SavedFile::Subnet(PathBuf::new(), Some(SubnetFile::default())));
        assert!(!archive.is_subnet_file_current());
        let wait = || reported.recv_timeout(Duration::from_secs(60));
        assert_eq!([wait(), wait()], [Ok(1), Ok(2)]);
        let begun = Instant::now();
        while archive.problems().is_empty() && begun.elapsed() < Duration::from_secs(4) {
            std::thread::yield_now();
        }
        let problems = archive.problems()[0].to_string();
        assert!(problems.ends_with("not written: full; retrying every 5 s"), "{problems}");
        assert_eq!([wait(), wait()], [Ok(3), Ok(4)]);
        assert!(archive.is_subnet_file_current(), "an attempt was made");
        while !archive.problems().is_empty() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::yield_now();
        }
        assert_eq!(archive.problems(), []);
    }

    #[test]
    fn subnet_file_same_content_stays_current_other_content_does_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (release, released) = mpsc::channel::<()>();
        let (reports, reported) = mpsc::channel();
        let save = move |_: &SavedFile| {
            let _ = released.recv();
            Ok(())
        };
        let report = move |_| reports.send(()).expect("the test receives");
        let mut archive =
            Archive::start_with(History::new(dir.path()), save, no_secrets, || false, report)
                .expect("a thread");
        let mut order = |mtu| {
            let subnets =
                Subnets { first: "10.42.1.0/24".parse().expect("a network"), second: None };
            let file = SubnetFile::new(subnets, subnets, mtu, true);
            archive.save(SavedFile::Subnet(PathBuf::new(), Some(file)));
            archive.is_subnet_file_current()
        };
        let finish = || {
            release.send(()).expect("the thread waits");
            reported.recv_timeout(Duration::from_secs(60)).expect("a report");
        };
        assert!(!order(1_450));
        finish();
        assert!(order(1_450), "the content is the same");
        finish();
        assert!(!order(1_400));
        finish();
        assert!(archive.is_subnet_file_current());
    }
}
