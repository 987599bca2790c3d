//! The thread that writes: batches go in, numbers of durable ones come out, in order.
//!
//! A batch that fails is tried again until it succeeds, because outputs of the node wait for it; the
//! node itself goes on meanwhile. The queue is bounded by the loop, which has one batch a turn.

use std::{sync::mpsc, thread, time::Duration};

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
            .spawn(move || queue.into_iter().for_each(|batch| write(&database, batch, &report)))
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

fn write(database: &Database, (records, seq): Batch, report: &impl Fn(Written)) {
    let mut failed = false;
    while let Err(error) = database.write(&records, seq.is_some()) {
        if !failed {
            report(Written::Failing(error.to_string()));
        }
        failed = true;
        thread::sleep(RETRY);
    }
    if failed {
        report(Written::Recovered);
    }
    if let Some(seq) = seq {
        report(Written::Durable(seq));
    }
}
