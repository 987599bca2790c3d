//! A host's disk: what is on it for sure, what a power cut would lose, and what has not been written yet.
//!
//! Batches are written in order. One with a number is flushed, and everything before it with it. A killed
//! process loses what it had not handed to the system; a power cut also loses what was not flushed.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    core::WriteSeq,
    wire::{Key, Record},
};

/// Encoded records by key, as the database holds them.
pub type Contents = BTreeMap<Key, Vec<u8>>;

#[derive(Clone, Debug, Default)]
pub struct Disk {
    flushed: Contents,
    /// Written, lost by a power cut.
    written: VecDeque<Contents>,
    /// Asked for by the process, lost with it.
    queued: VecDeque<(Contents, Option<WriteSeq>)>,
}

impl Disk {
    pub fn queue(&mut self, records: Vec<(Key, Vec<u8>)>, seq: Option<WriteSeq>) {
        self.queued.push_back((records.into_iter().collect(), seq));
    }

    pub fn is_idle(&self) -> bool {
        self.queued.is_empty()
    }

    /// Writes the next batch; if that flushed, says up to which number, and what is new on the disk.
    pub fn write_next(&mut self) -> Option<(WriteSeq, Contents)> {
        let (records, seq) = self.queued.pop_front()?;
        self.written.push_back(records);
        let seq = seq?;
        let news: Contents = self.written.drain(..).flatten().collect();
        self.flushed.extend(news.clone());
        Some((seq, news))
    }

    pub fn kill_process(&mut self) {
        self.queued.clear();
    }

    /// Only the first `kept` of the batches that were written and not flushed survive.
    pub fn cut_power(&mut self, kept: usize) {
        self.queued.clear();
        self.written.truncate(kept);
    }

    pub fn unflushed(&self) -> usize {
        self.written.len()
    }

    /// What a process that starts now finds.
    pub fn contents(&self) -> Contents {
        let mut contents = self.flushed.clone();
        contents.extend(self.written.iter().flatten().map(|(key, bytes)| (*key, bytes.clone())));
        contents
    }

    /// A record that no power cut takes away.
    pub fn flushed(&self, key: Key) -> Option<Record> {
        let bytes = self.flushed.get(&key)?;
        Record::decode(key.to_string().as_bytes(), bytes).ok().map(|(_, record)| record)
    }

    /// # Errors
    /// The first record that cannot be read, which only the product's own encoding can bring about.
    pub fn records(&self) -> Result<Vec<(Key, Record)>, String> {
        let contents = self.contents();
        let entries = contents.iter();
        entries
            .map(|(key, bytes)| {
                Record::decode(key.to_string().as_bytes(), bytes).map_err(|error| error.to_string())
            })
            .collect()
    }
}
