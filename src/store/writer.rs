//! The thread that writes: batches go in, numbers of durable ones come out, in order.
//!
//! Batches that wait behind a slow disk are written as one: a later value of a key replaces the earlier
//! one, so what waits is never more than the database itself. One that fails is tried again until it
//! succeeds or the agent ends, because outputs of the node wait for it; the node itself goes on meanwhile.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Database, EssentialsCopy, StoreError};
use crate::{core::WriteSeq, wire::Key, worker::Thread};

const RETRY: Duration = Duration::from_secs(1);
/// Nothing was to be written for so long: the copy of the essential records is brought up to date.
const COPY_AFTER: Duration = Duration::from_millis(200);

/// News from the writer.
#[derive(Debug)]
pub enum Written {
    /// Everything up to this write of the core's is on disk.
    Durable(WriteSeq),
    /// So is what was to be saved under this number.
    Saved(u64),
    /// The disk does not take it; it is tried again and again.
    Failing(String),
    /// It does again.
    Recovered,
    /// The database had to be restarted and is empty but for what waited to be written.
    Emptied,
}

type Records = Vec<(Key, Vec<u8>)>;

/// On whose behalf something is written.
enum WriteOrigin {
    Core(WriteSeq),
    Shell(u64),
}

pub struct Writer {
    inbox: Inbox,
    thread: Thread,
}

impl Writer {
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        database: Database,
        path: PathBuf,
        copy: EssentialsCopy,
        report: impl Fn(Written) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let waiting = Arc::new(Waiting::default());
        let outbox = waiting.clone();
        let thread = Thread::start("store", move || {
            let mut disk = Disk { path, database: Some(database), copy, is_emptied: false, report };
            loop {
                let pause = (!disk.copy.is_current()).then_some(COPY_AFTER);
                match outbox.take(pause) {
                    Taken::Batch(pending) => disk.write(&outbox, pending),
                    Taken::Nothing => disk.copy.save(),
                    Taken::End => break,
                }
            }
            if !disk.copy.is_current() && disk.database.is_some() {
                disk.copy.save();
            }
        });
        let thread =
            thread.map_err(|error| StoreError::Database(format!("no thread for it: {error}")))?;
        Ok(Self { inbox: Inbox(waiting), thread })
    }

    pub fn write(&self, records: Records, seq: WriteSeq) {
        self.inbox.add(records, WriteOrigin::Core(seq));
    }

    /// Writes what is not the core's; an empty value removes its record.
    pub fn save(&self, records: Records, number: u64) {
        self.inbox.add(records, WriteOrigin::Shell(number));
    }

    /// For how long the disk has neither taken the oldest change that waits nor refused it.
    pub fn silent_for(&self) -> Option<Duration> {
        self.inbox.0.lock().since.map(|since| since.elapsed())
    }

    /// Whether its thread has ended, though nothing told it to.
    pub fn has_ended(&self) -> bool {
        self.thread.has_ended()
    }

    /// Ends it: what waits is written, unless the disk does not take it now, and the database is closed.
    pub fn end(self) -> Thread {
        self.thread
    }
}

/// Batches on their way to the disk, as one.
#[derive(Default)]
struct Pending {
    records: BTreeMap<Key, Vec<u8>>,
    seq: Option<WriteSeq>,
    saved: Vec<u64>,
    is_any: bool,
}

impl Pending {
    fn add(&mut self, records: Records, whose: WriteOrigin) {
        self.records.extend(records);
        self.is_any = true;
        match whose {
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

/// What the thread has to do next.
enum Taken {
    Batch(Pending),
    /// There was nothing to write for a while.
    Nothing,
    End,
}

/// What waits for the thread. A disk that hangs makes it no larger than the database.
#[derive(Default)]
struct Waiting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: Pending,
    /// When the disk was last heard of, or the first change began to wait; none while nothing waits.
    since: Option<Instant>,
    is_closed: bool,
}

impl Waiting {
    /// A panic with the lock held leaves a state that is as good as before.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk has taken a batch, or has refused it.
    fn heard(&self) {
        let mut state = self.lock();
        state.since = state.pending.is_any.then(Instant::now);
    }

    /// Waits for something to write, but not longer than `pause`, if there is one.
    fn take(&self, pause: Option<Duration>) -> Taken {
        let idle = |state: &mut State| !state.pending.is_any && !state.is_closed;
        let pause = pause.unwrap_or(Duration::MAX);
        let state = self.changed.wait_timeout_while(self.lock(), pause, idle);
        let (mut state, _) = state.unwrap_or_else(PoisonError::into_inner);
        if state.pending.is_any {
            Taken::Batch(std::mem::take(&mut state.pending))
        } else if state.is_closed {
            Taken::End
        } else {
            Taken::Nothing
        }
    }

    /// Gives what has come meanwhile, after a pause; nothing if the agent ends.
    fn take_later(&self) -> Option<Pending> {
        let open = |state: &mut State| !state.is_closed;
        let state = self.changed.wait_timeout_while(self.lock(), RETRY, open);
        let (mut state, _) = state.unwrap_or_else(PoisonError::into_inner);
        state.since = Some(Instant::now());
        (!state.is_closed).then(|| std::mem::take(&mut state.pending))
    }
}

/// The loop's end of it, which is closed with the writer.
struct Inbox(Arc<Waiting>);

impl Inbox {
    fn add(&self, records: Records, whose: WriteOrigin) {
        let mut state = self.0.lock();
        state.since.get_or_insert_with(Instant::now);
        state.pending.add(records, whose);
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

/// The database, which one failure makes unusable: sled remembers an error for as long as it is open.
struct Disk<R> {
    path: PathBuf,
    database: Option<Database>,
    copy: EssentialsCopy,
    /// It was told that the database is empty, and nothing was written since.
    is_emptied: bool,
    report: R,
}

impl<R: Fn(Written)> Disk<R> {
    fn write(&mut self, waiting: &Waiting, mut pending: Pending) {
        let mut failed = false;
        while let Err(why) = self.try_write(&pending) {
            if !failed {
                (self.report)(Written::Failing(why.clone()));
            }
            failed = true;
            waiting.heard();
            let Some(later) = waiting.take_later() else {
                tracing::error!(
                    %why,
                    records = pending.records.len(),
                    "the last changes were not written to the state directory"
                );
                return;
            };
            pending.merge(later);
        }
        waiting.heard();
        if failed {
            (self.report)(Written::Recovered);
        }
        if let Some(seq) = pending.seq {
            (self.report)(Written::Durable(seq));
        }
        pending.saved.into_iter().for_each(|number| (self.report)(Written::Saved(number)));
    }

    /// Writes to the open database, or to a newly opened one after a failure.
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
            self.copy.follow(&pending.records, batches);
            return Ok(());
        }
        // Closing an engine that has failed may fail as well.
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
            (self.report)(Written::Emptied);
        }
        opened.database.count_on(self.copy.batches());
        Ok(opened.database)
    }
}
