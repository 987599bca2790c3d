//! A host's disk: flushed records and queued batches.
//!
//! Batches are flushed in order. A killed process loses all queued batches. In a power cut, a random number
//! of them was flushed.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    core::WriteSeq,
    wire::{Key, Record},
};

/// Encoded records by key, as the database holds them.
pub type Contents = BTreeMap<Key, Vec<u8>>;

/// The database of one host.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Records that survive a power cut.
    flushed: Contents,
    /// Batches that the process has submitted, each with its number.
    queued: VecDeque<(Contents, WriteSeq)>,
}

impl Disk {
    /// Queues a batch.
    pub fn queue(&mut self, records: Vec<(Key, Vec<u8>)>, seq: WriteSeq) {
        self.queued.push_back((records.into_iter().collect(), seq));
    }

    /// Whether no batch is queued.
    pub fn is_idle(&self) -> bool {
        self.queued.is_empty()
    }

    /// Flushes the first queued batch. Returns its number and records.
    pub fn write_next(&mut self) -> Option<(WriteSeq, Contents)> {
        let (written, seq) = self.queued.pop_front()?;
        self.flushed.extend(written.clone());
        Some((seq, written))
    }

    /// Drops all queued batches.
    pub fn discard_queued(&mut self) {
        self.queued.clear();
    }

    /// Flushes the first `completed` batches, drops the others, and returns the records that were flushed.
    pub fn cut_power(&mut self, completed: usize) -> Contents {
        let written: Contents =
            self.queued.drain(..completed).flat_map(|(contents, _)| contents).collect();
        self.flushed.extend(written.clone());
        self.queued.clear();
        written
    }

    /// Returns the number of queued batches.
    pub fn queued_batches(&self) -> usize {
        self.queued.len()
    }

    /// Returns the flushed records.
    pub fn contents(&self) -> &Contents {
        &self.flushed
    }

    /// Returns one flushed record.
    pub fn flushed(&self, key: Key) -> Option<Record> {
        let bytes = self.flushed.get(&key)?;
        Record::decode(key.to_string().as_bytes(), bytes).ok().map(|(_, record)| record)
    }

    /// Decodes all flushed records.
    ///
    /// # Errors
    /// The first record that cannot be decoded; only a defect in the product's own encoding causes this.
    pub fn records(&self) -> Result<Vec<(Key, Record)>, String> {
        let entries = self.contents().iter();
        entries
            .map(|(key, bytes)| {
                Record::decode(key.to_string().as_bytes(), bytes).map_err(|error| error.to_string())
            })
            .collect()
    }
}
