//! The thread that writes: batches go in, numbers of durable ones come out, in order.
//!
//! Batches that wait behind a slow disk are written as one: a later value of a key replaces the earlier
//! one, so what waits is never more than the database itself. One that fails is tried again until it
//! succeeds, because outputs of the node wait for it; the node itself goes on meanwhile.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::mpsc,
    thread,
    time::Duration,
};

use super::{Database, StoreError};
use crate::{core::WriteSeq, wire::Key};

const RETRY: Duration = Duration::from_secs(1);

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
    /// The database had to be started anew and is empty but for what waited to be written.
    Emptied,
}

type Records = Vec<(Key, Vec<u8>)>;

/// On whose behalf something is written.
enum Whose {
    Core(WriteSeq),
    Shell(u64),
}

type Batch = (Records, Whose);

pub struct Writer {
    batches: Option<mpsc::Sender<Batch>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    pub fn start(
        database: Database,
        path: PathBuf,
        report: impl Fn(Written) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let (batches, queue) = mpsc::channel::<Batch>();
        let thread = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let mut disk = Disk { path, database: Some(database), report };
                while let Ok(first) = queue.recv() {
                    let mut pending = Pending::default();
                    pending.add(first);
                    disk.write(&queue, pending);
                }
            })
            .map_err(|error| StoreError::Database(format!("no thread for it: {error}")))?;
        Ok(Self { batches: Some(batches), thread: Some(thread) })
    }

    pub fn write(&self, records: Records, seq: WriteSeq) {
        self.send((records, Whose::Core(seq)));
    }

    /// Writes what is not the core's; an empty value removes its record.
    pub fn save(&self, records: Records, number: u64) {
        self.send((records, Whose::Shell(number)));
    }

    fn send(&self, batch: Batch) {
        if let Some(batches) = &self.batches {
            // The receiver lives as long as its thread, which ends only when we drop the sender.
            let _ = batches.send(batch);
        }
    }
}

/// Waits for everything to be written, and for the database to be closed.
impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Batches on their way to the disk, as one.
#[derive(Default)]
struct Pending {
    records: BTreeMap<Key, Vec<u8>>,
    seq: Option<WriteSeq>,
    saved: Vec<u64>,
}

impl Pending {
    fn add(&mut self, (records, whose): Batch) {
        self.records.extend(records);
        match whose {
            Whose::Core(seq) => self.seq = self.seq.max(Some(seq)),
            Whose::Shell(number) => self.saved.push(number),
        }
    }
}

/// The database, which one failure makes unusable: sled remembers an error for as long as it is open.
struct Disk<R> {
    path: PathBuf,
    database: Option<Database>,
    report: R,
}

impl<R: Fn(Written)> Disk<R> {
    fn write(&mut self, queue: &mpsc::Receiver<Batch>, mut pending: Pending) {
        let mut failed = false;
        loop {
            queue.try_iter().for_each(|batch| pending.add(batch));
            let Err(why) = self.try_write(&pending) else { break };
            if !failed {
                (self.report)(Written::Failing(why));
            }
            failed = true;
            thread::sleep(RETRY);
        }
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
            self.database = Some(database);
            return Ok(());
        }
        // Closing an engine that has failed may fail as well.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
        match written {
            Ok(Err(error)) => Err(error.to_string()),
            _ => Err("the database engine failed".to_owned()),
        }
    }

    fn reopen(&self) -> Result<Database, String> {
        let opened = Database::open(&self.path).map_err(|error| error.to_string())?;
        if opened.quarantined.is_some() || opened.records.is_empty() {
            (self.report)(Written::Emptied);
        }
        Ok(opened.database)
    }
}
