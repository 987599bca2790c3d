//! sled, held at arm's length.
//!
//! Measured on sled 0.34.7: `flush` returns before any fsync, so a durable write syncs the file itself;
//! its own periodic flush costs two fsyncs a second for ever, so it is off; a damaged file is a panic or
//! silent loss, never an error, so opening and reading happens under `catch_unwind` and each record
//! carries a checksum.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};

use super::holder;
use crate::{
    model::NodeId,
    wire::{Key, Record, TokenError},
};

/// Damaged databases that are kept: the first ones, which may have been whole before a series of failures
/// began, and the latest.
const MAX_QUARANTINED: u32 = 3;

/// How long closing waits for sled's own threads to let go of the file.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A tree beside that of the records, and its one key: the number of batches.
const COUNTS: &str = "counts";
const BATCHES: &str = "batches";
/// Another key there: the id of the node that has written the database.
const NODE: &str = "node";

/// An open database. Dropping it waits until the file can be opened again.
pub struct Database {
    /// Taken when it is closed.
    sled: Option<sled::Db>,
    /// The same file as sled's own, to sync it.
    file: fs::File,
    /// Batches that were written since the node's first start.
    batches: Cell<u64>,
    /// Whose it is.
    node: NodeId,
}

/// What opening found.
pub struct Opened {
    pub database: Database,
    pub records: Vec<(Key, Record)>,
    /// Where a database was put that is unreadable or another node's, and why.
    pub quarantined: Option<(PathBuf, String)>,
}

/// Why the node's memory cannot be used. None of them lost anything.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("state_dir: {}: {error}", path.display())]
    Directory { path: PathBuf, error: io::Error },
    #[error(
        "state_dir: {} is in use{}: is another gossamer running with it? \
         stop that one or choose another --state-dir", path.display(), by(*holder)
    )]
    InUse { path: PathBuf, holder: Option<u32> },
    #[error(
        "state_dir: {} holds no key: restore it, or remove the whole directory to become a new node",
        path.display()
    )]
    Key { path: PathBuf },
    #[error("state_dir: {}: {error}", path.display())]
    Token { path: PathBuf, error: TokenError },
    #[error(
        "state_dir: {}: {why}: restore it, or remove it and start with the token of another member",
        path.display()
    )]
    Secrets { path: PathBuf, why: String },
    #[error(
        "state_dir: {} is in use by something else: it is neither empty nor a state directory; \
         choose another --state-dir", path.display()
    )]
    NotOurs { path: PathBuf },
    #[error("the clock of this host is before 1970: set it (timedatectl set-time, or NTP)")]
    Clock,
    #[error("database: {0}: a newer gossamer wrote it; run that version or a later one")]
    Newer(String),
    #[error("database: {0}")]
    Database(String),
}

fn by(holder: Option<u32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" by process {pid}"))
}

impl Database {
    /// Opens the database of a node and reads all of it. One that cannot be read, or that another node has
    /// written, is moved aside, and an empty one takes its place.
    pub fn open(path: &Path, node: NodeId) -> Result<Opened, StoreError> {
        refuse_clock(SystemTime::now())?;
        match try_open(path, node) {
            Ok((database, records)) => Ok(Opened { database, records, quarantined: None }),
            Err(Failure::InUse) => Err(StoreError::InUse {
                path: path.to_owned(),
                holder: holder::of(&path.join("db")),
            }),
            Err(Failure::Newer(why)) => Err(StoreError::Newer(why)),
            Err(Failure::Io(error)) => Err(StoreError::Directory { path: path.to_owned(), error }),
            Err(Failure::Damaged(why)) => {
                let aside = quarantine(path)
                    .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
                let (database, records) =
                    try_open(path, node).map_err(|_| StoreError::Database(why.clone()))?;
                Ok(Opened { database, records, quarantined: Some((aside, why)) })
            }
        }
    }

    /// Moves a database aside that was opened and lacks what must be in it, for a post-mortem, and opens an
    /// empty one in its place.
    ///
    /// # Errors
    /// Fails if the directory cannot be renamed, or if no database can be made.
    pub fn set_aside(self, path: &Path) -> Result<(Self, PathBuf), StoreError> {
        let node = self.node;
        drop(self);
        let aside = quarantine(path)
            .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
        Ok((Self::open(path, node)?.database, aside))
    }

    /// Batches that were written since the node's first start. The count is written after its batch: a
    /// database whose log has lost its end counts less than its copy.
    pub const fn batches(&self) -> u64 {
        self.batches.get()
    }

    /// Goes on counting at this number, if it is higher: the database is another one, or has lost batches.
    pub fn count_on(&self, batches: u64) {
        self.batches.set(self.batches.get().max(batches));
    }

    /// Writes a batch, all or nothing, and has it on the disk before it returns. An empty value removes its
    /// record.
    pub fn write(&self, records: &BTreeMap<Key, Vec<u8>>) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        for (key, value) in records {
            match value.as_slice() {
                [] => batch.remove(key.to_string().into_bytes()),
                value => batch.insert(key.to_string().into_bytes(), value),
            }
        }
        let written = || -> Result<(), String> {
            let sled = self.sled.as_ref().ok_or("closed")?;
            sled.apply_batch(batch).map_err(|error| error.to_string())?;
            let count = self.batches.get().saturating_add(1);
            let counts = sled.open_tree(COUNTS).map_err(|error| error.to_string())?;
            counts.insert(BATCHES, &count.to_be_bytes()).map_err(|error| error.to_string())?;
            counts.insert(NODE, self.node.as_bytes()).map_err(|error| error.to_string())?;
            self.batches.set(count);
            sled.flush().map_err(|error| error.to_string())?;
            self.file.sync_data().map_err(|error| error.to_string())
        };
        written().map_err(StoreError::Database)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        drop(self.sled.take());
        let Ok(mut file) = self.file.try_clone() else { return };
        let begun = Instant::now();
        while begun.elapsed() < CLOSE_PATIENCE {
            // Its lock is on the file, so a handle of our own can tell when it is gone.
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_) => return,
                Err((again, _)) => file = again,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

enum Failure {
    InUse,
    Io(io::Error),
    Newer(String),
    Damaged(String),
}

/// sled takes the time when it is opened, and panics before 1970.
fn refuse_clock(now: SystemTime) -> Result<(), StoreError> {
    if now < SystemTime::UNIX_EPOCH { Err(StoreError::Clock) } else { Ok(()) }
}

/// Removes snapshots of the log that a power cut has left half written. sled 0.34 gives them their name when
/// they are whole, and yet reads those without it: it would take the database for damaged. The log is whole.
fn remove_unfinished_snapshots(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            tracing::info!(%name, "removed a snapshot of the database that was half written");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn try_open(path: &Path, node: NodeId) -> Result<(Database, Vec<(Key, Record)>), Failure> {
    remove_unfinished_snapshots(path).map_err(Failure::Io)?;
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let sled = sled::Config::default()
            .path(path)
            .cache_capacity(1 << 20)
            .segment_size(64 << 10)
            .mode(sled::Mode::LowSpace)
            .flush_every_ms(None)
            .open()
            .map_err(|error| match error {
                // sled locks its file and reports the other holder as a generic error.
                sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => {
                    Failure::InUse
                }
                sled::Error::Io(error) => Failure::Io(error),
                other => Failure::Damaged(other.to_string()),
            })?;
        keep_private(path).map_err(Failure::Io)?;
        let file = fs::File::open(path.join("db")).map_err(Failure::Io)?;
        let records = sled
            .iter()
            .map(|entry| {
                let (key, value) = entry.map_err(|error| Failure::Damaged(error.to_string()))?;
                Record::decode(&key, &value).map_err(|error| match error.newer {
                    true => Failure::Newer(error.to_string()),
                    false => Failure::Damaged(error.to_string()),
                })
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        let damaged = |error: sled::Error| Failure::Damaged(error.to_string());
        let counts = sled.open_tree(COUNTS).map_err(damaged)?;
        // Earlier releases did not write whose it is.
        let writer = counts.get(NODE).map_err(damaged)?;
        let writer = writer.and_then(|bytes| Some(NodeId::from_bytes((*bytes).try_into().ok()?)));
        if let Some(other) = writer.filter(|writer| *writer != node) {
            return Err(Failure::Damaged(format!(
                "node {other} has written it, and this is {node}"
            )));
        }
        let batches = counts.get(BATCHES).map_err(damaged)?;
        let batches = batches.and_then(|bytes| Some(u64::from_be_bytes((*bytes).try_into().ok()?)));
        let batches = Cell::new(batches.unwrap_or_default());
        Ok((Database { sled: Some(sled), file, batches, node }, records))
    }));
    opened.unwrap_or_else(|panic| {
        let why = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "the database engine failed".to_owned());
        Err(match os_error(&why) {
            Some(error) => Failure::Io(error),
            None => Failure::Damaged(why),
        })
    })
}

/// sled makes its files as umask(2) lets it.
fn keep_private(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// The system's error in the message of a panic, as `Debug` shows it: sled unwraps some of them. The database
/// is as good as before when files or space are short.
fn os_error(panic: &str) -> Option<io::Error> {
    let (_, rest) = panic.split_once("Os { code: ")?;
    let digits = rest.split_once(',')?.0;
    digits.parse().ok().map(io::Error::from_raw_os_error)
}

fn quarantine(path: &Path) -> io::Result<PathBuf> {
    let aside = |n: u32| path.with_extension(format!("damaged-{n}"));
    let free = (1..MAX_QUARANTINED).find(|n| !aside(*n).exists()).unwrap_or(MAX_QUARANTINED);
    let aside = aside(free);
    if aside.exists() {
        fs::remove_dir_all(&aside)?;
    }
    fs::rename(path, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId::from_bytes([1; 8]);

    fn starts(opened: &Opened) -> Option<&Record> {
        opened.records.iter().find(|(key, _)| *key == Key::Starts).map(|(_, record)| record)
    }

    fn write(database: &Database, value: u32) {
        let record = Record::Starts(value).encode();
        database.write(&BTreeMap::from([(Key::Starts, record)])).expect("written");
    }

    #[test]
    fn what_was_written_is_there_after_opening_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        write(&Database::open(&path, ME).expect("opens").database, 7);
        let opened = Database::open(&path, ME).expect("opens again");
        assert_eq!(starts(&opened), Some(&Record::Starts(7)));
        assert!(opened.quarantined.is_none());
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(
            (mode(&path), mode(&path.join("db")), mode(&path.join("conf"))),
            (0o700, 0o600, 0o600)
        );
    }

    #[test]
    fn snapshot_that_a_power_cut_left_half_written_is_no_damage() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        write(&Database::open(&path, ME).expect("opens").database, 7);
        for torn in [&b""[..], b"half of one", &[0; 4096]] {
            fs::write(path.join("snap.00000000000FFFFF.generating"), torn).expect("written");
            let opened = Database::open(&path, ME).expect("opens again");
            assert!(opened.quarantined.is_none(), "{:?}", opened.quarantined);
            assert_eq!(starts(&opened), Some(&Record::Starts(7)));
        }
    }

    #[test]
    fn failure_of_the_system_inside_the_engine_is_no_damage() {
        let panic = r#"called `Result::unwrap()` on an `Err` value: Io(Os { code: 24, kind: Uncategorized,"#;
        let error = os_error(panic).expect("an error of the system");
        assert_eq!(error.raw_os_error(), Some(24));
        assert!(os_error("index out of bounds: the len is 3 but the index is 7").is_none());
    }

    #[test]
    fn clock_before_1970_is_named_before_the_engine_meets_it() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        let error = refuse_clock(before).expect_err("refused").to_string();
        assert!(error.contains("set it"), "{error}");
        assert!(refuse_clock(SystemTime::UNIX_EPOCH).is_ok());
    }

    #[test]
    fn first_quarantined_databases_are_kept_and_so_is_the_latest() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        for number in 1..=5 {
            fs::create_dir(&path).expect("made");
            fs::write(path.join("number"), number.to_string()).expect("written");
            quarantine(&path).expect("moved");
        }
        let kept = [1, 2, 3].map(|n| {
            fs::read_to_string(dir.path().join(format!("db.damaged-{n}/number"))).expect("kept")
        });
        assert_eq!(kept, ["1", "2", "5"]);
    }

    #[test]
    fn batches_are_counted_over_starts_and_by_a_database_in_the_place_of_another() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        let database = Database::open(&path, ME).expect("opens").database;
        assert_eq!(database.batches(), 0);
        write(&database, 7);
        write(&database, 8);
        drop(database);
        let database = Database::open(&path, ME).expect("opens again").database;
        assert_eq!(database.batches(), 2);
        database.count_on(1);
        assert_eq!(database.batches(), 2);
        database.count_on(9);
        write(&database, 9);
        drop(database);
        assert_eq!(Database::open(&path, ME).expect("opens again").database.batches(), 10);
    }

    #[test]
    fn database_of_another_node_is_moved_aside_and_one_that_names_none_is_taken() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        write(&Database::open(&path, NodeId::from_bytes([2; 8])).expect("opens").database, 7);
        let opened = Database::open(&path, ME).expect("opens an empty one");
        let (_, why) = opened.quarantined.as_ref().expect("moved aside");
        assert!(why.contains("0202020202020202") && why.contains("0101010101010101"), "{why}");
        assert!(opened.records.is_empty());
        write(&opened.database, 8);
        let counts =
            opened.database.sled.as_ref().expect("open").open_tree(COUNTS).expect("a tree");
        counts.remove(NODE).expect("removed");
        drop((opened, counts));
        let opened = Database::open(&path, ME).expect("opens again");
        assert_eq!(starts(&opened), Some(&Record::Starts(8)));
    }

    #[test]
    fn an_empty_value_removes_a_record() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        let database = Database::open(&path, ME).expect("opens").database;
        write(&database, 7);
        database.write(&BTreeMap::from([(Key::Starts, Vec::new())])).expect("written");
        drop(database);
        assert!(Database::open(&path, ME).expect("opens again").records.is_empty());
    }

    #[test]
    fn a_second_process_is_told_who_is_in_the_way() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        let _held = Database::open(&path, ME).expect("opens");
        let error = Database::open(&path, ME).err().expect("locked").to_string();
        assert!(error.contains("another gossamer"), "{error}");
    }

    #[test]
    fn what_a_newer_version_wrote_is_left_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("db");
        let database = Database::open(&path, ME).expect("opens").database;
        let sled = database.sled.as_ref().expect("open");
        sled.insert("pods/10.42.7.2", Record::Starts(1).encode()).expect("written");
        sled.flush().expect("flushed");
        drop(database);
        for _ in 0..2 {
            let error = Database::open(&path, ME).err().expect("refused").to_string();
            assert!(error.contains("pods/10.42.7.2") && error.contains("newer"), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1, "nothing moved aside");
    }

    #[test]
    fn any_damage_ends_in_a_usable_database_and_never_in_a_wrong_record() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut quarantined = 0;
        for round in 0..24_usize {
            let path = dir.path().join(format!("db-{round}"));
            let database = Database::open(&path, ME).expect("opens").database;
            for value in 0..50 {
                write(&database, value);
                let filler =
                    |bucket| (Key::Slots(bucket), Record::Starts(value).encode().repeat(20));
                database.write(&(0..32).map(filler).collect()).expect("written");
            }
            let intact = |bucket| (Key::Slots(bucket), Record::Slots(Vec::new()).encode());
            database.write(&(0..32).map(intact).collect()).expect("written");
            drop(database);
            let file = path.join("db");
            let mut bytes = fs::read(&file).expect("read");
            let at = bytes.len() * round / 24;
            match round % 3 {
                0 => bytes[at] ^= 0x55,
                1 => bytes.truncate(at),
                _ => bytes[at..].fill(0xff),
            }
            fs::write(&file, bytes).expect("damage");
            let opened = Database::open(&path, ME).expect("a usable database");
            quarantined += usize::from(opened.quarantined.is_some());
            if let Some(record) = starts(&opened) {
                assert!(matches!(record, Record::Starts(0..50)), "{record:?}");
            }
            write(&opened.database, 99);
        }
        assert!(quarantined > 0, "some damage must have been noticed");
    }
}
