//! The state directory and the small files in it.
//!
//! One process at a time uses it. A directory with files of other programs is refused.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use nix::{
    fcntl::{Flock, FlockArg, OFlag},
    sys::statvfs::statvfs,
};
use serde::{Deserialize, Serialize};

use super::{Essentials, History, StoreError, history};
use crate::{
    files::{self, PRIVATE, holder, replace},
    wire::{Keyring, Token},
};

const KEY: &str = "node.key";
const KEY_TEMPORARY: &str = "node.key.new";
const TOKEN: &str = "token";
const SECRETS: &str = "secrets";
const BOOT: &str = "boot";
const LOCK: &str = "lock";
const POD_CIDR: &str = "pod-cidr";
const UNDERLAY: &str = "underlay";
const LOST_PODS: &str = "lost-pods";
const DATABASE: &str = "db";
/// Less free space than this counts as none, in bytes.
const MIN_SPACE: u64 = 256 << 10;
const ESSENTIALS: &str = "essentials";

/// A pod that lost its network when this host became a new node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LostPod {
    /// Id of the container.
    pub container: String,
    /// Path of its network namespace.
    pub netns: String,
}

/// The state directory, locked by this process. Only its owner can enter it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<fs::File>,
}

impl StateDir {
    /// Locks the directory, and creates it if it does not exist. Does not change a directory of another
    /// program.
    ///
    /// # Errors
    /// If the directory is in use, has files of other programs, or cannot be created.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |error| StoreError::Directory { path: path.to_owned(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
        require_state_dir(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(fail)?;
        let file = path.join(LOCK);
        let lock =
            files::open_own(&file).map_err(|error| StoreError::Directory { path: file, error })?;
        let lock = take(lock, path)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Returns the seed of the node's key, if there is one, after checking that the directory could be
    /// opened. Changes nothing.
    ///
    /// # Errors
    /// As for [`Self::open`], or if the key is invalid.
    pub fn peek_node_key(path: &Path) -> Result<Option<[u8; 32]>, StoreError> {
        require_state_dir(path)?;
        let file = path.join(LOCK);
        match files::open(&file, OFlag::O_NOFOLLOW) {
            Ok(lock) => drop(take(lock, path)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::Directory { path: file, error }),
        }
        node_key(path)
    }

    /// Returns whether a node has started with this directory before. True if that cannot be determined.
    pub fn is_known(path: &Path) -> bool {
        path.join(KEY).try_exists().unwrap_or(true)
    }

    /// Returns the path of the database.
    pub fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    /// Returns the seed of the node's key, if there is one.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn node_key(&self) -> Result<Option<[u8; 32]>, StoreError> {
        node_key(&self.path)
    }

    /// Stores the seed of the node's key.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_node_key(&self, seed: &[u8; 32]) -> Result<(), StoreError> {
        self.save(KEY, &key_to_text(seed))
    }

    /// Returns the second copy of the essential records.
    pub fn essentials(&self) -> Essentials {
        Essentials::new(self.path.join(ESSENTIALS))
    }

    /// Returns the token with which the node joined, and which lists seeds.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn token(&self) -> Result<Option<Token>, StoreError> {
        read_token(&self.path)
    }

    /// Stores the token.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_token(&self, token: &Token) -> Result<(), StoreError> {
        self.save(TOKEN, &format!("{token}\n"))
    }

    /// Returns the secrets that this node accepts. `None` if it never had another one than the token's.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn keyring(&self) -> Result<Option<Keyring>, StoreError> {
        read_keyring(&self.path)
    }

    /// Stores the secrets that this node accepts.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_keyring(&self, keyring: &Keyring) -> Result<(), StoreError> {
        self.save(SECRETS, &keyring.to_string())
    }

    /// Returns the subnets that Kubernetes assigned to this node; empty if they are not known.
    ///
    /// # Errors
    /// If the file cannot be read. A damaged file counts as absent.
    pub fn pod_cidrs(&self) -> Result<Vec<IpNet>, StoreError> {
        let parse = |text: &str| text.split_whitespace().map(|word| word.parse().ok()).collect();
        Ok(self.read_rebuildable(POD_CIDR, parse)?.unwrap_or_default())
    }

    /// Stores the subnets that Kubernetes assigned to this node.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn save_pod_cidrs(&self, subnets: &[IpNet]) -> Result<(), StoreError> {
        if self.pod_cidrs()? == subnets {
            return Ok(());
        }
        let lines: String = subnets.iter().map(|subnet| format!("{subnet}\n")).collect();
        self.save(POD_CIDR, &lines)
    }

    /// Returns the last known underlay address of this host and MTU of its overlay, in bytes.
    ///
    /// # Errors
    /// If the file cannot be read. A damaged file counts as absent.
    pub fn underlay(&self) -> Result<Option<(IpAddr, u32)>, StoreError> {
        self.read_rebuildable(UNDERLAY, |text| {
            let (address, mtu) = text.trim_end().split_once(' ')?;
            Some((address.parse().ok()?, mtu.parse().ok()?))
        })
    }

    /// Stores the underlay address and the MTU of the overlay.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn save_underlay(&self, address: IpAddr, mtu: u32) -> Result<(), StoreError> {
        if self.underlay()? == Some((address, mtu)) {
            return Ok(());
        }
        self.save(UNDERLAY, &format!("{address} {mtu}\n"))
    }

    /// Returns the pods that lost their network when this host became a new node.
    ///
    /// # Errors
    /// If the file cannot be read. A damaged file counts as absent.
    pub fn lost_pods(&self) -> Result<Vec<LostPod>, StoreError> {
        let parse = |text: &str| serde_json::from_str(text).ok();
        Ok(self.read_rebuildable(LOST_PODS, parse)?.unwrap_or_default())
    }

    /// Stores the pods that lose their network.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn save_lost_pods(&self, pods: &[LostPod]) -> Result<(), StoreError> {
        if self.lost_pods()? == pods {
            return Ok(());
        }
        self.save(LOST_PODS, &format!("{}\n", serde_json::json!(pods)))
    }

    /// Returns whether the host has not rebooted since [`Self::note_boot`]. True if that is unknown, for
    /// example if the file is damaged.
    pub fn is_same_boot(&self) -> bool {
        let noted = files::read_text(&self.path.join(BOOT), files::SMALL).ok();
        let noted = noted.filter(|noted| is_boot_id(noted));
        let now = boot_id();
        noted.is_none_or(|noted| now.is_none_or(|now| now == noted))
    }

    /// Stores the id of the host's current boot.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn note_boot(&self) -> Result<(), StoreError> {
        boot_id().map_or(Ok(()), |id| self.save(BOOT, &id))
    }

    /// Returns the log of ownership changes.
    pub fn history(&self) -> History {
        History::new(&self.path)
    }

    /// Removes the database and stores a new key, but keeps the token. The order ensures that a new key never
    /// comes with an old database.
    ///
    /// # Errors
    /// If the database cannot be removed or the key cannot be written.
    pub fn new_identity(&self, seed: &[u8; 32]) -> Result<(), StoreError> {
        let fail = |error| StoreError::Directory { path: self.path.clone(), error };
        match fs::remove_dir_all(self.database()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        // A copied directory has the address of another host.
        files::remove(&self.path.join(UNDERLAY)).map_err(fail)?;
        self.save_node_key(seed)
    }

    /// Returns whether the file system has too little free space for the database of a start.
    ///
    /// # Errors
    /// If the file system does not answer.
    pub fn is_full(&self) -> io::Result<bool> {
        let space = statvfs(&self.path)?;
        // A file system that does not count its blocks has none.
        let free = space.blocks_free() * space.fragment_size();
        Ok(space.blocks() > 0 && free < MIN_SPACE)
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes all of gossamer's files except the directory itself. The next start is that of a new node.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn wipe(&self) -> Result<(), StoreError> {
        let fail = |error| StoreError::Directory { path: self.path.clone(), error };
        for entry in fs::read_dir(&self.path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = entry.path();
            match is_own_file(&entry.file_name()) {
                true if path.is_dir() => fs::remove_dir_all(&path).map_err(fail)?,
                true => fs::remove_file(&path).map_err(fail)?,
                false => {}
            }
        }
        Ok(())
    }

    /// Returns the parsed content of a file that the node can rebuild. A damaged file counts as absent.
    fn read_rebuildable<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let path = self.path.join(name);
        let content = match read_if_there(&path) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => parse(&text),
            Err(StoreError::Directory { error, .. })
                if error.kind() == io::ErrorKind::InvalidData =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        if content.is_none() {
            tracing::warn!(path = %path.display(), "damaged file ignored; its content will be rebuilt");
        }
        Ok(content)
    }

    fn save(&self, name: &str, text: &str) -> Result<(), StoreError> {
        let path = self.path.join(name);
        replace(&path, text, PRIVATE).map_err(|error| StoreError::Directory { path, error })
    }
}

/// Checks that the directory is a state directory: empty except for files of a first start, or with a node's
/// key.
///
/// # Errors
/// If the directory cannot be read, or another program uses it.
pub fn require_state_dir(path: &Path) -> Result<(), StoreError> {
    let names: Vec<_> = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
    // The key is the first file. After a power cut it may still have its temporary name.
    let begins = |name: &OsString| name == LOCK || name == KEY_TEMPORARY;
    let has = |file: &str| names.iter().any(|name| name == file);
    let path = path.to_owned();
    match names.iter().all(begins) || has(KEY) {
        true => Ok(()),
        false if has(DATABASE) && has(LOCK) => Err(StoreError::NoKey { path }),
        false => Err(StoreError::NotOurs { path }),
    }
}

/// Locks the directory.
fn take(lock: fs::File, path: &Path) -> Result<Flock<fs::File>, StoreError> {
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::InUse {
        path: path.to_owned(),
        holder: holder::of(&path.join(LOCK)),
    })
}

/// Returns the seed of the node's key in a state directory, also while an agent uses it.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn node_key(directory: &Path) -> Result<Option<[u8; 32]>, StoreError> {
    let path = directory.join(KEY);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    key_from_text(&text).map(Some).ok_or(StoreError::Key { path })
}

/// Returns whether gossamer creates files or directories of this name in the state directory.
fn is_own_file(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let name = name.strip_suffix(".new").unwrap_or(name);
    let files =
        [KEY, TOKEN, SECRETS, LOCK, BOOT, POD_CIDR, UNDERLAY, LOST_PODS, DATABASE, ESSENTIALS];
    files.contains(&name)
        || [history::FILE, history::OLDER].contains(&name)
        || name.starts_with("db.damaged-")
}

/// Returns the id of the host's current boot (random(4)).
fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

/// Returns whether a text is a boot id: 32 hexadecimal digits in five groups.
fn is_boot_id(text: &str) -> bool {
    let groups: Vec<usize> = text.trim_end().split('-').map(str::len).collect();
    let is_hex = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    groups == [8, 4, 4, 4, 12] && text.trim_end().bytes().all(is_hex)
}

/// Encodes a key with its checksum, because a flipped bit would turn the node into another one.
fn key_to_text(seed: &[u8; 32]) -> String {
    format!("{} {:08x}\n", HEXLOWER.encode(seed), crc32fast::hash(seed))
}

fn key_from_text(text: &str) -> Option<[u8; 32]> {
    let (seed, checksum) = text.trim_end().split_once(' ')?;
    let seed: [u8; 32] = HEXLOWER.decode(seed.as_bytes()).ok()?.try_into().ok()?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (checksum == crc32fast::hash(&seed)).then_some(seed)
}

/// Returns the token in a state directory, also while an agent uses it.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_token(state_dir: &Path) -> Result<Option<Token>, StoreError> {
    let path = state_dir.join(TOKEN);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    text.parse().map(Some).map_err(|error| StoreError::Token { path, error })
}

/// Returns the secrets in a state directory, also while an agent uses it.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_keyring(state_dir: &Path) -> Result<Option<Keyring>, StoreError> {
    let path = state_dir.join(SECRETS);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    text.parse().map(Some).map_err(|why| StoreError::Secrets { path, why })
}

/// Reads a file; `None` if it does not exist. Replaces invalid UTF-8, so that the file's parser refuses it
/// with its own advice.
fn read_if_there(path: &Path) -> Result<Option<String>, StoreError> {
    let read = files::open(path, OFlag::empty())
        .and_then(|file| files::read_bytes(file, files::SMALL))
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match read {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::Directory { path: path.to_owned(), error }),
    }
}

#[cfg(test)]
mod tests;
