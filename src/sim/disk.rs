//! A host's disk: what is on it for sure, and what has not been flushed yet.
//!
//! Batches are written in order, and each is flushed. A killed process loses what it had not handed to the
//! system; of a power cut nobody knows whether the batches under way have arrived.

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
    /// Asked for by the process, lost with it.
    queued: VecDeque<(Contents, WriteSeq)>,
}

impl Disk {
    pub fn queue(&mut self, records: Vec<(Key, Vec<u8>)>, seq: WriteSeq) {
        self.queued.push_back((records.into_iter().collect(), seq));
    }

    pub fn is_idle(&self) -> bool {
        self.queued.is_empty()
    }

    /// Writes the next batch; says up to which number, and what is new on the disk.
    pub fn write_next(&mut self) -> Option<(WriteSeq, Contents)> {
        let (news, seq) = self.queued.pop_front()?;
        self.flushed.extend(news.clone());
        Some((seq, news))
    }

    pub fn kill_process(&mut self) {
        self.queued.clear();
    }

    /// The first `kept` of the batches under way have arrived: these.
    pub fn cut_power(&mut self, kept: usize) -> Contents {
        let news: Contents = self.queued.drain(..kept).flat_map(|(contents, _)| contents).collect();
        self.flushed.extend(news.clone());
        self.queued.clear();
        news
    }

    pub fn under_way(&self) -> usize {
        self.queued.len()
    }

    /// What a process that starts now finds.
    pub fn contents(&self) -> &Contents {
        &self.flushed
    }

    /// A record that no power cut takes away.
    pub fn flushed(&self, key: Key) -> Option<Record> {
        let bytes = self.flushed.get(&key)?;
        Record::decode(key.to_string().as_bytes(), bytes).ok().map(|(_, record)| record)
    }

    /// # Errors
    /// The first record that cannot be read, which only the product's own encoding can bring about.
    pub fn records(&self) -> Result<Vec<(Key, Record)>, String> {
        let entries = self.contents().iter();
        entries
            .map(|(key, bytes)| {
                Record::decode(key.to_string().as_bytes(), bytes).map_err(|error| error.to_string())
            })
            .collect()
    }
}
