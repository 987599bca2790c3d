//! The second copy of what makes a node: its cluster, its starts, its own record, its own slots and its pods.
//!
//! A database that is damaged is usually replaced by what other members know. A node that knows no other
//! member has this copy. It is written by the store's thread once a batch is durable and nothing else waits,
//! so it may lack the last changes before a power cut. A copy that counts more batches than the database
//! shows that the database has lost its end, which its engine does not notice.
//!
//! A text file of lines `KEY VALUE`, the value in hexadecimal digits with the checksum of its record, and a
//! last line with the number of records and of batches.

use std::{collections::BTreeMap, io, path::PathBuf};

use data_encoding::HEXLOWER;
use nix::fcntl::OFlag;

use super::replace::{PRIVATE, replace};
use crate::{
    files,
    model::NodeId,
    wire::{Key, Record},
};

/// Larger copies are not read: no node has as many pods and slots.
const MAX_BYTES: u64 = 64 << 20;

/// The file of the copy.
#[derive(Clone, Debug)]
pub struct Essentials {
    path: PathBuf,
}

impl Essentials {
    pub(super) const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// What the copy holds; nothing where there is none, or where its end is missing. A line that is damaged
    /// is left out.
    ///
    /// # Errors
    /// Fails if there is a file that cannot be read.
    pub fn read(&self) -> io::Result<Copied> {
        let read = files::open(&self.path, OFlag::empty())
            .and_then(|file| files::read_bytes(file, MAX_BYTES));
        let bytes = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Copied::default()),
            read => read?,
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<&str> = text.lines().collect();
        let last = lines.pop().unwrap_or_default();
        let Some(batches) = batches_in(last, lines.len()) else { return Ok(Copied::default()) };
        let record = |line: &&str| {
            let (key, value) = line.split_once(' ')?;
            Record::decode(key.as_bytes(), &HEXLOWER.decode(value.as_bytes()).ok()?).ok()
        };
        Ok(Copied { records: lines.iter().filter_map(record).collect(), batches })
    }

    fn write(&self, records: &BTreeMap<Key, Vec<u8>>, batches: u64) -> io::Result<()> {
        let lines =
            records.iter().map(|(key, value)| format!("{key} {}\n", HEXLOWER.encode(value)));
        let last = last_line(records.len(), batches);
        let text = format!("{}{last}\n", lines.collect::<String>());
        replace(&self.path, &text, PRIVATE)
    }
}

/// What the copy holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub records: Vec<(Key, Record)>,
    /// Batches that the database had when it was copied.
    pub batches: u64,
}

/// With a checksum: a flipped bit must not make the copy newer than the database.
fn last_line(records: usize, batches: u64) -> String {
    let counts = format!("records {records} batches {batches}");
    let checksum = crc32fast::hash(counts.as_bytes());
    format!("{counts} {checksum:08x}")
}

/// Batches by the last line, if it is that of so many records.
fn batches_in(last: &str, records: usize) -> Option<u64> {
    let batches = last.split(' ').nth(3)?.parse().ok()?;
    (last_line(records, batches) == last).then_some(batches)
}

/// What is to be in the copy, kept up with what is written to the database.
pub struct EssentialsCopy {
    file: Essentials,
    me: NodeId,
    records: BTreeMap<Key, Vec<u8>>,
    batches: u64,
    is_current: bool,
}

impl EssentialsCopy {
    /// `batches` is the database's number of them, which has the records that are saved.
    pub fn new(file: Essentials, me: NodeId, saved: &[(Key, Record)], batches: u64) -> Self {
        let mut copy = Self { file, me, records: BTreeMap::new(), batches, is_current: false };
        // The records of other members are many.
        for (key, record) in saved.iter().filter(|(key, _)| is_essential(me, *key)) {
            copy.set(*key, &record.encode());
        }
        copy
    }

    pub(super) const fn node(&self) -> NodeId {
        self.me
    }

    pub(super) const fn batches(&self) -> u64 {
        self.batches
    }

    /// A batch is durable, the database's last of so many; an empty value has removed its record.
    pub(super) fn follow(&mut self, written: &BTreeMap<Key, Vec<u8>>, batches: u64) {
        self.batches = batches;
        written.iter().for_each(|(key, value)| self.set(*key, value));
    }

    fn set(&mut self, key: Key, value: &[u8]) {
        if !is_essential(self.me, key) {
            return;
        }
        let value = match key {
            Key::Slots(_) => own_slots(self.me, key, value),
            _ => value.to_vec(),
        };
        let before = match value.is_empty() {
            true => self.records.remove(&key),
            false => self.records.insert(key, value.clone()),
        };
        self.is_current &= before.unwrap_or_default() == value;
    }

    pub(super) const fn is_current(&self) -> bool {
        self.is_current
    }

    /// Brings the file up to date. What fails is tried again with the next change: the database has it all.
    pub(super) fn save(&mut self) {
        match self.file.write(&self.records, self.batches) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "the copy of the essential records was not written")
            }
        }
        self.is_current = true;
    }
}

/// Whether a record makes this node, as a whole or in part.
fn is_essential(me: NodeId, key: Key) -> bool {
    match key {
        Key::Cluster | Key::Starts | Key::Pod(_) | Key::Slots(_) => true,
        Key::Member(node) => node == me,
        Key::Forget(_) => false,
    }
}

fn own_slots(me: NodeId, key: Key, value: &[u8]) -> Vec<u8> {
    match Record::decode(key.to_string().as_bytes(), value) {
        Ok((_, Record::Slots(mut runs))) => {
            runs.retain(|run| run.record.owner == me);
            if runs.is_empty() { Vec::new() } else { Record::Slots(runs).encode() }
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::{Run, Slot, SlotRecord, SlotState};

    fn run(start: u32, owner: NodeId) -> Run {
        let record = SlotRecord { epoch: 0, owner, state: SlotState::Leased, granter: owner };
        Run { start: Slot(start), len: 1, record }
    }

    #[test]
    fn copy_has_the_own_slots_alone_and_follows_what_is_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = Essentials::new(dir.path().join("essentials"));
        let (me, other) = (NodeId::from_bytes([1; 8]), NodeId::from_bytes([2; 8]));
        let slots = Record::Slots(vec![run(1, me), run(2, other)]);
        let saved = [(Key::Starts, Record::Starts(3)), (Key::Slots(0), slots)];
        let mut copy = EssentialsCopy::new(file.clone(), me, &saved, 1);
        assert!(!copy.is_current(), "it was never written");
        copy.save();
        let own = Record::Slots(vec![run(1, me)]);
        assert_eq!(
            file.read().expect("read").records,
            [(Key::Starts, Record::Starts(3)), (Key::Slots(0), own)]
        );
        // What concerns others changes nothing.
        let slots = Record::Slots(vec![run(1, me), run(3, other)]).encode();
        copy.follow(&BTreeMap::from([(Key::Slots(0), slots)]), 2);
        assert!(copy.is_current());
        let slots = Record::Slots(vec![run(1, other)]).encode();
        copy.follow(&BTreeMap::from([(Key::Slots(0), slots)]), 2);
        assert!(!copy.is_current());
        copy.save();
        assert_eq!(file.read().expect("read").records, [(Key::Starts, Record::Starts(3))]);
    }

    #[test]
    fn copy_that_is_damaged_gives_no_wrong_record() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = Essentials::new(dir.path().join("essentials"));
        assert_eq!(file.read().expect("read"), Copied::default());
        let saved = [(Key::Starts, Record::Starts(3))];
        EssentialsCopy::new(file.clone(), NodeId::from_bytes([1; 8]), &saved, 7).save();
        let whole = fs::read(&file.path).expect("read");
        for byte in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[byte] ^= 0x11;
            fs::write(&file.path, damaged).expect("written");
            let read = file.read().expect("read");
            assert!(read.records.is_empty() || read.records == saved, "{read:?}");
            assert!(read.batches == 7 || read == Copied::default(), "{read:?}");
        }
        for length in 0..whole.len() - 1 {
            fs::write(&file.path, &whole[..length]).expect("written");
            assert_eq!(file.read().expect("read"), Copied::default());
        }
    }
}
