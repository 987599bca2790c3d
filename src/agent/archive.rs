//! The thread that keeps the small files: token, secrets, underlay, boot, history and `subnet.env`.
//!
//! A disk that hangs keeps this thread, and not the loop. What is written later replaces what waits; a file
//! that could not be written is tried again until it is, or until there is something newer. Secrets are
//! written once: what ordered that decides what follows.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::TryRecvError,
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::sync::oneshot;

use super::subnet_env::{self, SubnetFile};
use crate::{
    store::{History, StateDir},
    wire::{Keyring, Token},
    worker::{Order, Orders, Thread, Worker},
};

/// A file that could not be written is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// Lines of the history that wait for the disk; more are lost, and their number is logged.
const MAX_LINES: usize = 16_384;

/// What is to be done with the files.
#[derive(Debug)]
pub(super) enum Job {
    /// With the number of contents that the subnet file has had.
    Save(Saved, usize),
    Append(Vec<Value>),
    Secrets(Keyring),
    Read(oneshot::Sender<Result<Vec<Value>, String>>),
}

/// The content of a file. A later one replaces an earlier one of the same kind.
#[derive(Clone, Debug)]
pub(super) enum Saved {
    Token(Token),
    /// The address of this host and the MTU of its overlay.
    Underlay(IpAddr, u32),
    Subnet(PathBuf, SubnetFile),
    /// Which start of this host the records of pods are of.
    Boot,
}

impl Saved {
    fn is_same_file(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Token(_) => "token",
            Self::Underlay(..) => "underlay",
            Self::Subnet(..) => "subnet file",
            Self::Boot => "boot",
        }
    }
}

impl Order for Job {
    fn supersedes(&self, earlier: &Self) -> bool {
        matches!((self, earlier), (Self::Save(new, _), Self::Save(old, _)) if new.is_same_file(old))
    }
}

/// What the loop is told of.
#[derive(Debug)]
pub(super) enum Kept {
    /// The subnet file says what it should, or cannot be written.
    Subnet,
    /// The secrets are on disk, with the seed of this node's key; or why they are not.
    Secrets(Result<[u8; 32], String>),
}

/// The loop's end of it.
pub(super) struct Archive {
    pub(super) worker: Worker<Job>,
    shared: Arc<Shared>,
    /// What the subnet file is to say.
    subnet: Option<(PathBuf, SubnetFile)>,
}

/// What both ends know.
#[derive(Default)]
struct Shared {
    /// Lines of the history that wait.
    lines: AtomicUsize,
    /// Different contents of the subnet file so far, and how many of them were written, replaced, or refused.
    subnets: AtomicUsize,
    subnets_done: AtomicUsize,
    /// Why files are not written, by their names.
    failures: Mutex<BTreeMap<&'static str, String>>,
}

impl Shared {
    fn note(&self, saved: &Saved, result: &Result<(), String>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => _ = failures.remove(saved.name()),
            Err(error) => _ = failures.insert(saved.name(), error.clone()),
        }
    }
}

impl Archive {
    /// `report` is called with what was written, or could not be.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn start(
        state: Arc<StateDir>,
        report: impl Fn(Kept) + Send + 'static,
    ) -> io::Result<Self> {
        let history = state.history();
        let of_secrets = state.clone();
        let keep_secrets = move |keyring: &Keyring| {
            let kept = of_secrets.save_keyring(keyring).and_then(|()| of_secrets.node_key());
            let seed = kept.map_err(|error| error.to_string())?;
            seed.ok_or_else(|| "this node has no key any more".to_owned())
        };
        let save = move |saved: &Saved| match saved {
            Saved::Token(token) => state.save_token(token).map_err(|error| error.to_string()),
            Saved::Underlay(address, mtu) => {
                state.save_underlay(*address, *mtu).map_err(|error| error.to_string())
            }
            Saved::Subnet(path, file) => subnet_env::write(path, file)
                .map_err(|error| format!("{}: {error}", path.display())),
            Saved::Boot => state.note_boot().map_err(|error| error.to_string()),
        };
        Self::start_with(history, save, keep_secrets, report)
    }

    fn start_with(
        history: History,
        save: impl FnMut(&Saved) -> Result<(), String> + Send + 'static,
        keep_secrets: impl Fn(&Keyring) -> Result<[u8; 32], String> + Send + 'static,
        report: impl Fn(Kept) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let worker = Worker::start("archive", move |orders| {
            keep(&orders, history, save, keep_secrets, report, &of_thread);
        })?;
        Ok(Self { worker, shared, subnet: None })
    }

    pub(super) fn save(&mut self, saved: Saved) {
        let subnets = &self.shared.subnets;
        if let Saved::Subnet(path, file) = &saved {
            let new = Some((path.clone(), file.clone()));
            // The same once more restores a file that was removed, and is nothing new to wait for.
            if self.subnet != new {
                self.subnet = new;
                subnets.fetch_add(1, Ordering::Relaxed);
            }
        }
        let number = subnets.load(Ordering::Relaxed);
        self.worker.order(Job::Save(saved, number));
    }

    /// Whether the subnet file says what it should, or cannot be written.
    pub(super) fn is_subnet_told(&self) -> bool {
        let Shared { subnets, subnets_done, .. } = &*self.shared;
        subnets_done.load(Ordering::Acquire) == subnets.load(Ordering::Relaxed)
    }

    /// Files that are not written now, as sentences.
    pub(super) fn problems(&self) -> Vec<String> {
        let failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |(name, error): (&&str, &String)| {
            format!("{name}: not written: {error}; it is tried again every {} s", RETRY.as_secs())
        };
        failures.iter().map(told).collect()
    }

    /// Adds lines to the history.
    pub(super) fn append(&self, lines: Vec<Value>) {
        if lines.is_empty() {
            return;
        }
        let count = lines.len();
        if self.shared.lines.fetch_add(count, Ordering::Relaxed) + count > MAX_LINES {
            self.shared.lines.fetch_sub(count, Ordering::Relaxed);
            tracing::error!(count, "lines of the history are lost: the disk does not take them");
            return;
        }
        self.worker.order(Job::Append(lines));
    }

    /// Writes the secrets, which are not to be used before that.
    pub(super) fn save_secrets(&self, keyring: Keyring) {
        self.worker.order(Job::Secrets(keyring));
    }

    /// Answers with the lines of the history.
    pub(super) fn read(&self, reply: oneshot::Sender<Result<Vec<Value>, String>>) {
        self.worker.order(Job::Read(reply));
    }

    pub(super) fn end(self) -> Thread {
        self.worker.end()
    }
}

fn keep(
    orders: &Orders<Job>,
    mut history: History,
    mut save: impl FnMut(&Saved) -> Result<(), String>,
    keep_secrets: impl Fn(&Keyring) -> Result<[u8; 32], String>,
    report: impl Fn(Kept),
    shared: &Shared,
) {
    let mut failed: Vec<Saved> = Vec::new();
    let mut retry = Instant::now();
    loop {
        match orders.take() {
            Ok(Job::Save(saved, number)) => {
                let is_known = failed.iter().any(|earlier| earlier.is_same_file(&saved));
                failed.retain(|earlier| !earlier.is_same_file(&saved));
                let is_subnet = matches!(saved, Saved::Subnet(..));
                let result = save(&saved);
                shared.note(&saved, &result);
                if is_subnet {
                    shared.subnets_done.store(number, Ordering::Release);
                    report(Kept::Subnet);
                }
                if let Err(error) = result {
                    if !is_known {
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
            Ok(Job::Secrets(keyring)) => report(Kept::Secrets(keep_secrets(&keyring))),
            Ok(Job::Read(reply)) => {
                let lines = history.read().map_err(|error| format!("history: {error}"));
                let _ = reply.send(lines);
            }
            Err(TryRecvError::Empty) => {
                let rest = retry.saturating_duration_since(Instant::now());
                orders.sleeper.wait([], (!failed.is_empty()).then_some(rest));
                // An order ends the wait, too.
                if Instant::now() < retry {
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
    use crate::model::Subnets;

    fn no_secrets(_: &Keyring) -> Result<[u8; 32], String> {
        Err("none".to_owned())
    }

    fn underlay(mtu: u32) -> Saved {
        Saved::Underlay([192, 0, 2, 1].into(), mtu)
    }

    #[tokio::test]
    async fn disk_that_hangs_keeps_the_thread_alone_and_the_newest_content_is_written_then() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (release, released) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let save = move |saved: &Saved| {
            let _ = released.recv();
            if let Saved::Underlay(_, mtu) = saved {
                let _ = report.send(*mtu);
            }
            Ok(())
        };
        let mut archive = Archive::start_with(History::new(dir.path()), save, no_secrets, |_| ())
            .expect("a thread");
        for mtu in 1..=1_000 {
            archive.save(underlay(mtu));
        }
        for _ in 0..MAX_LINES + 10 {
            archive.append(vec![Value::Null]);
        }
        assert!(archive.shared.lines.load(Ordering::Relaxed) <= MAX_LINES);
        drop(release);
        let thread = archive.end();
        assert_eq!(thread.join(Instant::now() + Duration::from_secs(60)).await, Ok(()));
        let written: Vec<u32> = reported.iter().collect();
        assert!(written.len() <= 2 && written.last() == Some(&1_000), "{written:?}");
    }

    #[test]
    fn file_that_was_not_written_is_tried_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (report, reported) = mpsc::channel();
        let mut tries = 0;
        let save = move |_: &Saved| {
            tries += 1;
            let _ = report.send(tries);
            if tries < 3 { Err("full".to_owned()) } else { Ok(()) }
        };
        let mut archive = Archive::start_with(History::new(dir.path()), save, no_secrets, |_| ())
            .expect("a thread");
        archive.save(underlay(1_450));
        archive.save(Saved::Subnet(PathBuf::new(), SubnetFile::default()));
        assert!(!archive.is_subnet_told());
        let wait = || reported.recv_timeout(Duration::from_secs(60));
        assert_eq!([wait(), wait()], [Ok(1), Ok(2)]);
        let begun = Instant::now();
        while archive.problems().is_empty() && begun.elapsed() < Duration::from_secs(4) {
            std::thread::yield_now();
        }
        let told = archive.problems().join("");
        assert!(told.ends_with("not written: full; it is tried again every 5 s"), "{told}");
        assert_eq!([wait(), wait()], [Ok(3), Ok(4)]);
        assert!(archive.is_subnet_told(), "it was tried");
        while !archive.problems().is_empty() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::yield_now();
        }
        assert_eq!(archive.problems(), Vec::<String>::new());
    }

    #[test]
    fn subnet_file_that_is_written_once_more_stays_told_and_another_content_does_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (release, released) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let save = move |_: &Saved| {
            let _ = released.recv();
            Ok(())
        };
        let told = move |_| report.send(()).expect("the test listens");
        let mut archive = Archive::start_with(History::new(dir.path()), save, no_secrets, told)
            .expect("a thread");
        let mut order = |mtu| {
            let subnets =
                Subnets { first: "10.42.1.0/24".parse().expect("a network"), second: None };
            let file = SubnetFile::new(subnets, subnets, mtu, true);
            archive.save(Saved::Subnet(PathBuf::new(), file));
            archive.is_subnet_told()
        };
        let finish = || {
            release.send(()).expect("the thread waits");
            reported.recv_timeout(Duration::from_secs(60)).expect("it was told");
        };
        assert!(!order(1_450));
        finish();
        assert!(order(1_450), "nothing is new");
        finish();
        assert!(!order(1_400));
        finish();
        assert!(archive.is_subnet_told());
    }
}
