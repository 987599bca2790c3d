//! The database of the node's records: sled 0.34, with workarounds.
//!
//! Observed with sled 0.34.7:
//!
//! - `flush` returns before any fsync. A durable write therefore syncs the file itself.
//! - sled's periodic flush costs two fsyncs a second, also on an idle node. It is disabled.
//! - A damaged file causes a panic or silent loss, never an error. Opening and reading therefore run under
//!   `catch_unwind`, and each record has a checksum.

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

use crate::{
    files::holder,
    model::NodeId,
    wire::{Key, Record, TokenError},
};

/// Maximum number of damaged databases that are kept: the first ones, which may have been intact before a
/// series of failures, and the latest.
const MAX_QUARANTINED: u32 = 3;

/// Maximum size in bytes of sled's configuration, which has three lines. sled reads the whole file before it
/// checks anything.
const MAX_CONFIGURATION_BYTES: u64 = 4 << 10;

/// Maximum size in bytes of the other files that sled reads as a whole: snapshots of its log, and large
/// values.
const MAX_LOADED_BYTES: u64 = 64 << 20;

/// Maximum time that closing waits until sled's threads release the file.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Tree for what is not a record.
const COUNTS: &str = "counts";
/// Key in [`COUNTS`]: number of batches (u64, big endian).
const BATCHES: &str = "batches";
/// Key in [`COUNTS`]: id of the node that writes the database.
const NODE: &str = "node";

/// An open database. Dropping it waits until the file can be opened again.
pub struct Database {
    /// `None` once closed.
    sled: Option<sled::Db>,
    /// A second handle on sled's file, to sync it.
    file: fs::File,
    /// Number of batches written since the node's first start.
    batches: Cell<u64>,
    /// The node that the database belongs to.
    node: NodeId,
}

/// The result of opening a database.
pub struct LoadedDatabase {
    /// The open database.
    pub database: Database,
    /// Its records.
    pub records: Vec<(Key, Record)>,
    /// If the existing database was unusable or another node's: where it was moved, and why.
    pub quarantined: Option<(PathBuf, String)>,
}

/// Why the state directory cannot be used. None of these errors loses data.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory cannot be read or written.
    #[error("state_dir: {}: {error}", path.display())]
    Directory {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
    /// Another process uses the directory.
    #[error(
        "state_dir: {} is in use{}: is another gossamer running with it? \
         stop that one or choose another --state-dir", path.display(), holder_text(*holder)
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process that holds it, if it is known.
        holder: Option<u32>,
    },
    /// The file of the node's key has no valid key.
    #[error(
        "state_dir: {} holds no key: restore it, or remove the whole directory to become a new node",
        path.display()
    )]
    Key {
        /// The file of the key.
        path: PathBuf,
    },
    /// The file of the token has no valid token.
    #[error("state_dir: {}: {error}", path.display())]
    Token {
        /// The file of the token.
        path: PathBuf,
        /// What is wrong with it.
        error: TokenError,
    },
    /// The file of the secrets is damaged.
    #[error(
        "state_dir: {}: {why}: restore it, or remove it and start with the token of another member",
        path.display()
    )]
    Secrets {
        /// The file of the secrets.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The directory has a node's database and no key.
    #[error(
        "state_dir: {}: node.key is missing: restore the directory from a backup, or remove it to join as a \
         new node", path.display()
    )]
    NoKey {
        /// The directory.
        path: PathBuf,
    },
    /// The directory has files of other programs and no key.
    #[error(
        "state_dir: {} is in use by something else: it is neither empty nor a state directory; \
         choose another --state-dir", path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// The database is another node's.
    #[error(
        "state_dir: {} was written by node {writer}, but the key is that of node {node}: restore the key and \
         the database of one node, or move the database away to continue as node {node}", path.display()
    )]
    OtherNode {
        /// The database.
        path: PathBuf,
        /// The node that wrote it.
        writer: NodeId,
        /// The node of the key.
        node: NodeId,
    },
    /// The host's clock is before 1970.
    #[error("the clock of this host is before 1970: set it (timedatectl set-time, or NTP)")]
    Clock,
    /// A newer version has written a record.
    #[error("database: {0}: a newer gossamer wrote it; run that version or a later one")]
    Newer(String),
    /// The database engine failed.
    #[error("database: {0}")]
    Database(String),
}

/// Returns the part of the message about the process that holds the directory.
fn holder_text(holder: Option<u32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" by process {pid}"))
}

impl Database {
    /// Opens the database of a node and reads all records. Moves it aside and creates an empty one if it
    /// cannot be read.
    ///
    /// # Errors
    /// If the clock is before 1970, the database is in use, was written by another node or by a newer
    /// version, or the file system fails.
    pub fn open(path: &Path, node: NodeId) -> Result<LoadedDatabase, StoreError> {
        check_clock(SystemTime::now())?;
        match try_open(path, node) {
            Ok((database, records)) => Ok(LoadedDatabase { database, records, quarantined: None }),
            Err(Failure::InUse) => Err(StoreError::InUse {
                path: path.to_owned(),
                holder: holder::of(&path.join("db")),
            }),
            Err(Failure::OtherNode(writer)) => {
                Err(StoreError::OtherNode { path: path.to_owned(), writer, node })
            }
            Err(Failure::Newer(why)) => Err(StoreError::Newer(why)),
            Err(Failure::Io(error)) => Err(StoreError::Directory { path: path.to_owned(), error }),
            Err(Failure::Damaged(why)) => Self::replace(path, node, why),
        }
    }

    /// Moves an unusable database aside and opens an empty one in its place. `why` is the reason.
    ///
    /// # Errors
    /// If the directory cannot be renamed, or if no database can be created.
    pub fn replace(path: &Path, node: NodeId, why: String) -> Result<LoadedDatabase, StoreError> {
        let aside = quarantine(path)
            .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
        let (database, records) =
            try_open(path, node).map_err(|_| StoreError::Database(why.clone()))?;
        Ok(LoadedDatabase { database, records, quarantined: Some((aside, why)) })
    }

    /// Moves an open database aside, for a post-mortem, and opens an empty one in its place. For a database
    /// that lacks required records.
    ///
    /// # Errors
    /// If the directory cannot be renamed, or if no database can be created.
    pub fn set_aside(self, path: &Path) -> Result<(Self, PathBuf), StoreError> {
        let node = self.node;
        drop(self);
        let aside = quarantine(path)
            .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
        Ok((Self::open(path, node)?.database, aside))
    }

    /// Returns the number of batches written since the node's first start. The count is written after its
    /// batch, so a database whose log lost its end has a lower count than its copy.
    pub const fn batches(&self) -> u64 {
        self.batches.get()
    }

    /// Raises the count to `batches`, if it is lower: for a database that replaces another one or has lost
    /// batches.
    pub fn raise_batches(&self, batches: u64) {
        self.batches.set(self.batches.get().max(batches));
    }

    /// Writes a batch atomically and durably: it is synced when this returns. An empty value removes its
    /// record.
    ///
    /// # Errors
    /// If sled or the sync fails.
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
        while begun.elapsed() < CLOSE_TIMEOUT {
            // sled's lock is on the file, so this handle can detect its release.
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
    OtherNode(NodeId),
    Damaged(String),
}

/// Checks the clock. sled reads it while opening and panics before 1970.
fn check_clock(now: SystemTime) -> Result<(), StoreError> {
    if now < SystemTime::UNIX_EPOCH { Err(StoreError::Clock) } else { Ok(()) }
}

/// Removes unfinished snapshots of the log, which a power cut leaves. sled 0.34 renames a snapshot when it is
/// complete, but also reads unfinished ones and then reports damage. The log itself is complete.
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
            tracing::info!(%name, "unfinished database snapshot removed");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Checks that sled's files are regular, and small where sled reads them as a whole. Otherwise sled waits for
/// the writer of a FIFO, or uses all memory for a large sparse file.
fn check_files(path: &Path) -> Result<(), Failure> {
    for directory in [path.to_owned(), path.join("blobs")] {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(Failure::Damaged(format!("{} is no directory", directory.display())));
            }
            entries => entries.map_err(Failure::Io)?,
        };
        for entry in entries {
            let file = entry.map_err(Failure::Io)?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let limit = match name.as_ref() {
                "conf" => MAX_CONFIGURATION_BYTES,
                "db" => u64::MAX,
                name if name.starts_with("snap.") || directory != path => MAX_LOADED_BYTES,
                _ => continue,
            };
            let found = match fs::metadata(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found.map_err(Failure::Io)?,
            };
            let why = match found.len() {
                _ if !found.is_file() => "is no regular file".to_owned(),
                bytes if bytes > limit => {
                    format!("has {bytes} bytes, more than {limit}")
                }
                _ => continue,
            };
            return Err(Failure::Damaged(format!("{} {why}", file.display())));
        }
    }
    Ok(())
}

fn try_open(path: &Path, node: NodeId) -> Result<(Database, Vec<(Key, Record)>), Failure> {
    remove_unfinished_snapshots(path).map_err(Failure::Io)?;
    check_files(path)?;
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let sled = sled::Config::default()
            .path(path)
            .cache_capacity(1 << 20)
            .segment_size(64 << 10)
            .mode(sled::Mode::LowSpace)
            .flush_every_ms(None)
            .open()
            .map_err(|error| match error {
                // sled reports a locked file as a generic error.
                sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => {
                    Failure::InUse
                }
                sled::Error::Io(error) => Failure::Io(error),
                other => Failure::Damaged(other.to_string()),
            })?;
        restrict_to_owner(path).map_err(Failure::Io)?;
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
        // Earlier releases did not store the node.
        let writer = counts.get(NODE).map_err(damaged)?;
        let writer = writer.and_then(|bytes| Some(NodeId::from_bytes((*bytes).try_into().ok()?)));
        if let Some(other) = writer.filter(|writer| *writer != node) {
            return Err(Failure::OtherNode(other));
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

/// Restricts sled's files to their owner. sled creates them with the modes that umask(2) permits.
fn restrict_to_owner(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// Returns the system's error in the message of a panic, in its `Debug` format. sled unwraps some errors of
/// the system. The database is intact after such an error, for example if files or disk space run out.
fn os_error(panic: &str) -> Option<io::Error> {
    let (_, rest) = panic.split_once("Os { code: ")?;
    let digits = rest.split_once(',')?.0;
    digits.parse().ok().map(io::Error::from_raw_os_error)
}

/// Moves a database aside. Returns its new path.
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
mod tests;
