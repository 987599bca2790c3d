//! The thread that writes to the database. It receives batches and reports the durable ones, in order.
//!
//! Batches that wait for a slow disk are merged: a later value of a key replaces the earlier one, so the
//! queue is never larger than the database. A batch that fails is retried until it succeeds or the agent
//! ends, because outputs of the node wait for it. The node itself continues in the meantime.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Database, EssentialsCopy, StoreError};
use crate::{model::WriteSeq, wire::Key, worker::Thread};

const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Time without new batches after which the copy of the essential records is written.
const COPY_IDLE_DELAY: Duration = Duration::from_millis(200);

/// An event of the writer.
#[derive(Debug)]
pub enum WriteEvent {
    /// All writes of the core up to this one are on disk.
    Durable(WriteSeq),
    /// The records saved by the shell under this number are on disk.
    Saved(u64),
    /// A write failed. It is retried. Has the reason.
    Failing(String),
    /// Writes succeed again.
    Recovered,
    /// The database had to be reopened and is empty, except for the batches that wait.
    Emptied,
}

/// Encoded records. An empty value removes its record.
type Records = Vec<(Key, Vec<u8>)>;

/// The requester of a write.
enum WriteOrigin {
    Core(WriteSeq),
    Shell(u64),
}

/// The writing thread and its queue.
pub struct Writer {
    inbox: Inbox,
    thread: Thread,
}

impl Writer {
    /// Starts the thread. `path` is the database's path, to reopen it after a failure. `report` receives the
    /// events on the thread.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        database: Database,
        path: PathBuf,
        copy: EssentialsCopy,
        report: impl Fn(WriteEvent) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let waiting = Arc::new(Queue::default());
        let outbox = waiting.clone();
        let thread = Thread::start("store", move || {
            let mut disk = Disk { path, database: Some(database), copy, is_emptied: false, report };
            loop {
                let pause = (!disk.copy.is_current()).then_some(COPY_IDLE_DELAY);
                match outbox.take(pause) {
                    Step::Batch(pending) => disk.write(&outbox, pending),
                    Step::Nothing => disk.copy.save(),
                    Step::End => break,
                }
            }
            if !disk.copy.is_current() && disk.database.is_some() {
                disk.copy.save();
            }
        });
        let thread = thread
            .map_err(|error| StoreError::Database(format!("cannot start its thread: {error}")))?;
        Ok(Self { inbox: Inbox(waiting), thread })
    }

    /// Queues records of the core.
    pub fn write(&self, records: Records, seq: WriteSeq) {
        self.inbox.add(records, WriteOrigin::Core(seq));
    }

    /// Queues records of the shell.
    pub fn save(&self, records: Records, number: u64) {
        self.inbox.add(records, WriteOrigin::Shell(number));
    }

    /// Returns for how long the disk has neither written nor refused the oldest waiting change. `None` if
    /// nothing waits.
    pub fn silent_for(&self) -> Option<Duration> {
        self.inbox.0.lock().since.map(|since| since.elapsed())
    }

    /// Returns whether the thread has ended without [`Self::end`].
    pub fn has_ended(&self) -> bool {
        self.thread.has_ended()
    }

    /// Ends the thread after it has written what waits and closed the database. It does not retry a failing
    /// write.
    pub fn end(self) -> Thread {
        self.thread
    }
}

/// Merged batches that wait for the disk.
#[derive(Default)]
struct Pending {
    records: BTreeMap<Key, Vec<u8>>,
    seq: Option<WriteSeq>,
    saved: Vec<u64>,
    is_any: bool,
}

impl Pending {
    fn add(&mut self, records: Records, origin: WriteOrigin) {
        self.records.extend(records);
        self.is_any = true;
        match origin {
            WriteOrigin::Core(seq) => self.seq = self.seq.max(Some(seq)),
            WriteOrigin::Shell(number) => self.saved.push(number),
        }
    }

    fn merge(&mut self, later: Self) {
        self.records.extend(later.records);
        self.seq = self.seq.max(later.seq);
        self.saved.extend(later.saved);
    }
}

/// The thread's next step.
enum Step {
    /// Write a batch.
    Batch(Pending),
    /// No batch came within the pause.
    Nothing,
    /// End the thread.
    End,
}

/// The queue between the loop and the thread.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: Pending,
    /// When the disk last finished or refused a batch, or the first change began to wait. `None` while
    /// nothing waits.
    since: Option<Instant>,
    is_closed: bool,
}

impl Queue {
    /// Locks the state. A panic with the lock held leaves the state consistent, so a poisoned lock is used.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the disk has written or refused a batch.
    fn note_disk_response(&self) {
        let mut state = self.lock();
        state.since = state.pending.is_any.then(Instant::now);
    }

    /// Waits for a batch, at most for `pause`.
    fn take(&self, pause: Option<Duration>) -> Step {
        let idle = |state: &mut State| !state.pending.is_any && !state.is_closed;
        let pause = pause.unwrap_or(Duration::MAX);
        let state = self.changed.wait_timeout_while(self.lock(), pause, idle);
        let (mut state, _) = state.unwrap_or_else(PoisonError::into_inner);
        if state.pending.is_any {
            Step::Batch(std::mem::take(&mut state.pending))
        } else if state.is_closed {
            Step::End
        } else {
            Step::Nothing
        }
    }

    /// Waits before a retry. Returns the batches queued in the meantime; `None` if the agent ends.
    fn take_later(&self) -> Option<Pending> {
        let open = |state: &mut State| !state.is_closed;
        let state = self.changed.wait_timeout_while(self.lock(), RETRY_INTERVAL, open);
        let (mut state, _) = state.unwrap_or_else(PoisonError::into_inner);
        state.since = Some(Instant::now());
        (!state.is_closed).then(|| std::mem::take(&mut state.pending))
    }
}

/// The loop's end of the queue. Dropping it closes the queue.
struct Inbox(Arc<Queue>);

impl Inbox {
    fn add(&self, records: Records, origin: WriteOrigin) {
        let mut state = self.0.lock();
        state.since.get_or_insert_with(Instant::now);
        state.pending.add(records, origin);
        drop(state);
        self.0.changed.notify_one();
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_one();
    }
}

/// The database with its path. After one failure it must be reopened, because sled keeps an error until it is
/// closed.
struct Disk<R> {
    path: PathBuf,
    database: Option<Database>,
    copy: EssentialsCopy,
    /// Whether the database was reported as empty and has not been written since.
    is_emptied: bool,
    report: R,
}

impl<R: Fn(WriteEvent)> Disk<R> {
    fn write(&mut self, waiting: &Queue, mut pending: Pending) {
        let mut failed = false;
        while let Err(why) = self.try_write(&pending) {
            if !failed {
                (self.report)(WriteEvent::Failing(why.clone()));
            }
            failed = true;
            waiting.note_disk_response();
            let Some(later) = waiting.take_later() else {
                tracing::error!(
                    %why,
                    records = pending.records.len(),
                    "last changes not written to the state directory"
                );
                return;
            };
            pending.merge(later);
        }
        waiting.note_disk_response();
        if failed {
            (self.report)(WriteEvent::Recovered);
        }
        if let Some(seq) = pending.seq {
            (self.report)(WriteEvent::Durable(seq));
        }
        pending.saved.into_iter().for_each(|number| (self.report)(WriteEvent::Saved(number)));
    }

    /// Writes to the open database, or reopens it after a failure.
    fn try_write(&mut self, pending: &Pending) -> Result<(), String> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.reopen()?,
        };
        let written = catch_unwind(AssertUnwindSafe(|| database.write(&pending.records)));
        if let Ok(Ok(())) = written {
            let batches = database.batches();
            self.database = Some(database);
            self.is_emptied = false;
            self.copy.apply_batch(&pending.records, batches);
            return Ok(());
        }
        // After a failure, closing may panic as well.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
        match written {
            Ok(Err(error)) => Err(error.to_string()),
            _ => Err("the database engine failed".to_owned()),
        }
    }

    fn reopen(&mut self) -> Result<Database, String> {
        let opened =
            Database::open(&self.path, self.copy.node()).map_err(|error| error.to_string())?;
        let is_empty = opened.quarantined.is_some() || opened.records.is_empty();
        if is_empty && !std::mem::replace(&mut self.is_emptied, true) {
            tracing::error!("database lost, rewriting it");
            (self.report)(WriteEvent::Emptied);
        }
        opened.database.raise_batches(self.copy.batches());
        Ok(opened.database)
    }
}
