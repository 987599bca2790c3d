//! The thread that writes: batches go in, numbers of durable ones come out, in order.
//!
//! Batches that wait behind a slow disk are written as one: a later value of a key replaces the earlier
//! one, so what waits is never more than the database itself. One that fails is tried again until it
//! succeeds, because outputs of the node wait for it; the node itself goes on meanwhile.

use std::{collections::BTreeMap, sync::mpsc, thread, time::Duration};

use super::{Database, StoreError};
use crate::{core::WriteSeq, wire::Key};

const RETRY: Duration = Duration::from_secs(1);

/// News from the writer.
#[derive(Debug)]
pub enum Written {
    /// Everything up to this write is on disk.
    Durable(WriteSeq),
    /// A batch failed and will be tried again.
    Failing(String),
    /// The batch that failed is written now.
    Recovered,
}

type Batch = (Vec<(Key, Vec<u8>)>, Option<WriteSeq>);

pub struct Writer {
    batches: Option<mpsc::Sender<Batch>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Writer {
    pub fn start(
        database: Database,
        report: impl Fn(Written) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let (batches, queue) = mpsc::channel::<Batch>();
        let thread = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                while let Ok(first) = queue.recv() {
                    let mut pending = Pending::default();
                    pending.add(first);
                    write(&database, &queue, pending, &report);
                }
            })
            .map_err(|error| StoreError::Database(format!("no thread for it: {error}")))?;
        Ok(Self { batches: Some(batches), thread: Some(thread) })
    }

    pub fn write(&self, records: Vec<(Key, Vec<u8>)>, seq: Option<WriteSeq>) {
        if let Some(batches) = &self.batches {
            // The receiver lives as long as its thread, which ends only when we drop the sender.
            let _ = batches.send((records, seq));
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
}

impl Pending {
    fn add(&mut self, (records, seq): Batch) {
        self.records.extend(records);
        self.seq = self.seq.max(seq);
    }
}

fn write(
    database: &Database,
    queue: &mpsc::Receiver<Batch>,
    mut pending: Pending,
    report: &impl Fn(Written),
) {
    let mut failed = false;
    loop {
        queue.try_iter().for_each(|batch| pending.add(batch));
        let Err(error) = database.write(&pending.records, pending.seq.is_some()) else { break };
        if !failed {
            report(Written::Failing(error.to_string()));
        }
        failed = true;
        thread::sleep(RETRY);
    }
    if failed {
        report(Written::Recovered);
    }
    if let Some(seq) = pending.seq {
        report(Written::Durable(seq));
    }
}
