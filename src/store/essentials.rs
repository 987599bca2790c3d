//! The second copy of the essential records, as [`Record::essential_part`] defines them: the node's cluster,
//! its starts, its own member record, its own slots and its pods.
//!
//! A damaged database is usually rebuilt from other members. A node that knows no other member uses this
//! copy. The store's thread writes it once a batch is durable and no other batch waits, so it may lack the
//! last changes before a power cut. If the copy counts more batches than the database, the database has lost
//! its end; sled does not detect that.
//!
//! The copy is a text file of lines `KEY VALUE`. The value is the encoded record with its checksum, in
//! hexadecimal digits. The last line has the number of records and of batches.

use std::{collections::BTreeMap, io, path::PathBuf};

use data_encoding::HEXLOWER;
use nix::fcntl::OFlag;

use crate::{
    files::{self, PRIVATE, replace},
    model::NodeId,
    wire::{Key, Record},
};

/// Maximum size of a copy that is read, in bytes. No node has as many pods and slots.
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

    /// Reads the copy. Empty if the file does not exist or lacks its last line. Skips damaged lines.
    ///
    /// # Errors
    /// If the file exists and cannot be read.
    pub fn read(&self) -> io::Result<EssentialsContent> {
        let read = files::open(&self.path, OFlag::empty())
            .and_then(|file| files::read_bytes(file, MAX_BYTES));
        let bytes = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(EssentialsContent::default());
            }
            read => read?,
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<&str> = text.lines().collect();
        let last = lines.pop().unwrap_or_default();
        let Some(batches) = batches_in(last, lines.len()) else {
            return Ok(EssentialsContent::default());
        };
        let record = |line: &&str| {
            let (key, value) = line.split_once(' ')?;
            Record::decode(key.as_bytes(), &HEXLOWER.decode(value.as_bytes()).ok()?).ok()
        };
        Ok(EssentialsContent { records: lines.iter().filter_map(record).collect(), batches })
    }

    fn write(&self, records: &BTreeMap<Key, Vec<u8>>, batches: u64) -> io::Result<()> {
        let lines =
            records.iter().map(|(key, value)| format!("{key} {}\n", HEXLOWER.encode(value)));
        let last = last_line(records.len(), batches);
        let text = format!("{}{last}\n", lines.collect::<String>());
        replace(&self.path, &text, PRIVATE)
    }
}

/// The content of the copy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct EssentialsContent {
    /// The valid records.
    pub records: Vec<(Key, Record)>,
    /// Number of the database's batches at the time of the copy.
    pub batches: u64,
}

/// Returns the last line. It has a checksum, because a flipped bit must not make the copy newer than the
/// database.
fn last_line(records: usize, batches: u64) -> String {
    let counts = format!("records {records} batches {batches}");
    let checksum = crc32fast::hash(counts.as_bytes());
    format!("{counts} {checksum:08x}")
}

/// Returns the number of batches in the last line, if the line matches the number of records.
fn batches_in(last: &str, records: usize) -> Option<u64> {
    let batches = last.split(' ').nth(3)?.parse().ok()?;
    (last_line(records, batches) == last).then_some(batches)
}

/// The content that the copy must have. Follows each batch written to the database.
pub struct EssentialsCopy {
    file: Essentials,
    me: NodeId,
    records: BTreeMap<Key, Vec<u8>>,
    /// Number of the database's batches.
    batches: u64,
    /// Whether the file has this content.
    is_current: bool,
}

impl EssentialsCopy {
    /// Creates the content from the database's records. `batches` is the database's number of batches.
    pub fn new(file: Essentials, me: NodeId, saved: &[(Key, Record)], batches: u64) -> Self {
        let mut copy = Self { file, me, records: BTreeMap::new(), batches, is_current: false };
        // Most records are those of other members. Skip them before encoding.
        for (key, record) in saved.iter().filter(|(key, _)| key.is_essential(me)) {
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

    /// Applies a durable batch. `batches` is the database's number of batches with it. An empty value removes
    /// its record.
    pub(super) fn apply_batch(&mut self, written: &BTreeMap<Key, Vec<u8>>, batches: u64) {
        self.batches = batches;
        written.iter().for_each(|(key, value)| self.set(*key, value));
    }

    fn set(&mut self, key: Key, value: &[u8]) {
        let Some(value) = Record::essential_part(self.me, key, value) else { return };
        let before = match value.is_empty() {
            true => self.records.remove(&key),
            false => self.records.insert(key, value.clone()),
        };
        self.is_current &= before.unwrap_or_default() == value;
    }

    pub(super) const fn is_current(&self) -> bool {
        self.is_current
    }

    /// Writes the file. A failure is logged and repaired with the next change, because the database has all
    /// records.
    pub(super) fn save(&mut self) {
        match self.file.write(&self.records, self.batches) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "copy of essential records not written")
            }
        }
        self.is_current = true;
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
    fn copy_has_only_own_slots_and_follows_batches() {
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
        // Changes of other members' slots do not change the copy.
        let slots = Record::Slots(vec![run(1, me), run(3, other)]).encode();
        copy.apply_batch(&BTreeMap::from([(Key::Slots(0), slots)]), 2);
        assert!(copy.is_current());
        let slots = Record::Slots(vec![run(1, other)]).encode();
        copy.apply_batch(&BTreeMap::from([(Key::Slots(0), slots)]), 2);
        assert!(!copy.is_current());
        copy.save();
        assert_eq!(file.read().expect("read").records, [(Key::Starts, Record::Starts(3))]);
    }

    #[test]
    fn damaged_copy_yields_no_wrong_record() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = Essentials::new(dir.path().join("essentials"));
        assert_eq!(file.read().expect("read"), EssentialsContent::default());
        let saved = [(Key::Starts, Record::Starts(3))];
        EssentialsCopy::new(file.clone(), NodeId::from_bytes([1; 8]), &saved, 7).save();
        let whole = fs::read(&file.path).expect("read");
        for byte in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[byte] ^= 0x11;
            fs::write(&file.path, damaged).expect("written");
            let read = file.read().expect("read");
            assert!(read.records.is_empty() || read.records == saved, "{read:?}");
            assert!(read.batches == 7 || read == EssentialsContent::default(), "{read:?}");
        }
        for length in 0..whole.len() - 1 {
            fs::write(&file.path, &whole[..length]).expect("written");
            assert_eq!(file.read().expect("read"), EssentialsContent::default());
        }
    }
}
