//! The state directory and the small files in it.
//!
//! It belongs to one process at a time, and a directory with anything else in it is never taken for one.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg, OFlag};

use super::{
    Essentials, History, StoreError, history, holder,
    replace::{PRIVATE, replace},
};
use crate::{
    files,
    wire::{Keyring, Token},
};

const KEY: &str = "node.key";
const KEY_IN_WRITING: &str = "node.key.new";
const TOKEN: &str = "token";
const SECRETS: &str = "secrets";
const BOOT: &str = "boot";
const LOCK: &str = "lock";
const POD_CIDR: &str = "pod-cidr";
const UNDERLAY: &str = "underlay";
const DATABASE: &str = "db";
const ESSENTIALS: &str = "essentials";

/// A directory that only its owner can enter, held by this process.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<fs::File>,
}

impl StateDir {
    /// Takes the directory, making it if need be. Nothing is changed in one that is not ours.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |error| StoreError::Directory { path: path.to_owned(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
        expect_ours(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(fail)?;
        let file = path.join(LOCK);
        let lock =
            files::open_own(&file).map_err(|error| StoreError::Directory { path: file, error })?;
        let lock = take(lock, path)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The seed of the node's key in a directory that could be taken, if it has one. Changes nothing.
    ///
    /// # Errors
    /// As when it is taken.
    pub fn look(path: &Path) -> Result<Option<[u8; 32]>, StoreError> {
        expect_ours(path)?;
        let file = path.join(LOCK);
        match files::open(&file, OFlag::O_NOFOLLOW) {
            Ok(lock) => drop(take(lock, path)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::Directory { path: file, error }),
        }
        node_key(path)
    }

    /// Whether a directory is of a node that has started before, or whether there is no telling.
    pub fn is_known(path: &Path) -> bool {
        path.join(KEY).try_exists().unwrap_or(true)
    }

    pub fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    /// The seed of the node's key, if it has one.
    pub fn node_key(&self) -> Result<Option<[u8; 32]>, StoreError> {
        node_key(&self.path)
    }

    pub fn save_node_key(&self, seed: &[u8; 32]) -> Result<(), StoreError> {
        self.save(KEY, &key_to_text(seed))
    }

    /// The second copy of what makes this node.
    pub fn essentials(&self) -> Essentials {
        Essentials::new(self.path.join(ESSENTIALS))
    }

    /// How this node entered its cluster, and where it would find it again.
    pub fn token(&self) -> Result<Option<Token>, StoreError> {
        read_token(&self.path)
    }

    pub fn save_token(&self, token: &Token) -> Result<(), StoreError> {
        self.save(TOKEN, &format!("{token}\n"))
    }

    /// The secrets that this node accepts, if there ever was more than the token's.
    pub fn keyring(&self) -> Result<Option<Keyring>, StoreError> {
        let path = self.path.join(SECRETS);
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        text.parse().map(Some).map_err(|why| StoreError::Secrets { path, why })
    }

    pub fn save_keyring(&self, keyring: &Keyring) -> Result<(), StoreError> {
        self.save(SECRETS, &keyring.to_string())
    }

    /// The subnets that Kubernetes gave to this node; none, if there is no telling.
    pub fn pod_cidrs(&self) -> Result<Vec<IpNet>, StoreError> {
        let parse = |text: &str| text.split_whitespace().map(|word| word.parse().ok()).collect();
        Ok(self.learned(POD_CIDR, parse)?.unwrap_or_default())
    }

    pub fn save_pod_cidrs(&self, subnets: &[IpNet]) -> Result<(), StoreError> {
        if self.pod_cidrs()? == subnets {
            return Ok(());
        }
        let lines: String = subnets.iter().map(|subnet| format!("{subnet}\n")).collect();
        self.save(POD_CIDR, &lines)
    }

    /// The underlay address of this host and the MTU of its overlay, as they last were.
    pub fn underlay(&self) -> Result<Option<(IpAddr, u32)>, StoreError> {
        self.learned(UNDERLAY, |text| {
            let (address, mtu) = text.trim_end().split_once(' ')?;
            Some((address.parse().ok()?, mtu.parse().ok()?))
        })
    }

    pub fn save_underlay(&self, address: IpAddr, mtu: u32) -> Result<(), StoreError> {
        if self.underlay()? == Some((address, mtu)) {
            return Ok(());
        }
        self.save(UNDERLAY, &format!("{address} {mtu}\n"))
    }

    /// Whether the host has not been started again since [`Self::note_boot`]; true if that is not known, as
    /// with a file that is damaged.
    pub fn is_same_boot(&self) -> bool {
        let noted = files::read_text(&self.path.join(BOOT), files::SMALL).ok();
        let noted = noted.filter(|noted| is_boot_id(noted));
        let now = boot_id();
        noted.is_none_or(|noted| now.is_none_or(|now| now == noted))
    }

    pub fn note_boot(&self) -> Result<(), StoreError> {
        boot_id().map_or(Ok(()), |id| self.save(BOOT, &id))
    }

    /// The log of changes of ownership.
    pub fn history(&self) -> History {
        History::new(&self.path)
    }

    /// Forgets who this node was, and what it knew; how it entered its cluster stays. In this order: a new
    /// key never meets an old database.
    pub fn new_identity(&self, seed: &[u8; 32]) -> Result<(), StoreError> {
        let fail = |error| StoreError::Directory { path: self.path.clone(), error };
        match fs::remove_dir_all(self.database()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        self.save_node_key(seed)
    }

    /// Forgets everything that was ever kept here: the next start is that of a new node.
    pub fn wipe(&self) -> Result<(), StoreError> {
        let fail = |error| StoreError::Directory { path: self.path.clone(), error };
        for entry in fs::read_dir(&self.path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let path = entry.path();
            match is_ours(&entry.file_name()) {
                true if path.is_dir() => fs::remove_dir_all(&path).map_err(fail)?,
                true => fs::remove_file(&path).map_err(fail)?,
                false => {}
            }
        }
        Ok(())
    }

    /// What a file says that this node can learn again: a damaged one is as good as none.
    fn learned<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let path = self.path.join(name);
        let said = match read_if_there(&path) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => parse(&text),
            Err(StoreError::Directory { error, .. })
                if error.kind() == io::ErrorKind::InvalidData =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        if said.is_none() {
            tracing::warn!(path = %path.display(), "damaged: what it said is learned again");
        }
        Ok(said)
    }

    fn save(&self, name: &str, text: &str) -> Result<(), StoreError> {
        let path = self.path.join(name);
        replace(&path, text, PRIVATE).map_err(|error| StoreError::Directory { path, error })
    }
}

/// Nothing else is in it, or it has a key of ours.
fn expect_ours(path: &Path) -> Result<(), StoreError> {
    let names: Vec<_> = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(|error| StoreError::Directory { path: path.to_owned(), error })?;
    // The key comes first; a power cut may leave it under the name that it is written by.
    let begins = |name: &OsString| name == LOCK || name == KEY_IN_WRITING;
    let ours = names.iter().all(begins) || names.iter().any(|name| name == KEY);
    if ours { Ok(()) } else { Err(StoreError::NotOurs { path: path.to_owned() }) }
}

fn take(lock: fs::File, path: &Path) -> Result<Flock<fs::File>, StoreError> {
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::InUse {
        path: path.to_owned(),
        holder: holder::of(&path.join(LOCK)),
    })
}

/// The seed of the node's key in a state directory, also in one that an agent holds.
pub fn node_key(directory: &Path) -> Result<Option<[u8; 32]>, StoreError> {
    let path = directory.join(KEY);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    key_from_text(&text).map(Some).ok_or(StoreError::Key { path })
}

/// Everything that this module or the database ever makes here.
fn is_ours(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let name = name.strip_suffix(".new").unwrap_or(name);
    let files = [KEY, TOKEN, SECRETS, LOCK, BOOT, POD_CIDR, UNDERLAY, DATABASE, ESSENTIALS];
    files.contains(&name)
        || [history::FILE, history::OLDER].contains(&name)
        || name.starts_with("db.damaged-")
}

/// Another one whenever the kernel starts (random(4)).
fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

/// 32 hexadecimal digits in five groups.
fn is_boot_id(text: &str) -> bool {
    let groups: Vec<usize> = text.trim_end().split('-').map(str::len).collect();
    let is_hex = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    groups == [8, 4, 4, 4, 12] && text.trim_end().bytes().all(is_hex)
}

/// A key with its checksum: a flipped bit must not make another node of this one.
fn key_to_text(seed: &[u8; 32]) -> String {
    format!("{} {:08x}\n", HEXLOWER.encode(seed), crc32fast::hash(seed))
}

fn key_from_text(text: &str) -> Option<[u8; 32]> {
    let (seed, checksum) = text.trim_end().split_once(' ')?;
    let seed: [u8; 32] = HEXLOWER.decode(seed.as_bytes()).ok()?.try_into().ok()?;
    let checksum = u32::from_str_radix(checksum, 16).ok()?;
    (checksum == crc32fast::hash(&seed)).then_some(seed)
}

/// The token in a state directory, whoever holds that.
pub fn read_token(state_dir: &Path) -> Result<Option<Token>, StoreError> {
    let path = state_dir.join(TOKEN);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    text.parse().map(Some).map_err(|error| StoreError::Token { path, error })
}

/// What in it is no UTF-8 is for the parser of that file to refuse: it knows what is to be done then.
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
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_somebody_elses_is_refused_and_untouched() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("db")).expect("their database");
        fs::write(dir.path().join("token"), "theirs").expect("their token");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let error = StateDir::open(dir.path()).expect_err("not ours").to_string();
        assert!(error.contains("something else"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 2);
        let mode = fs::metadata(dir.path()).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn directory_that_a_power_cut_left_without_its_first_key_is_taken() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join(LOCK), "").expect("a lock");
        // Its name is on the disk, its content is not.
        fs::write(dir.path().join(KEY_IN_WRITING), "").expect("half of a file");
        let state = StateDir::open(dir.path()).expect("it is ours");
        assert_eq!(state.node_key().expect("readable"), None);
        state.save_node_key(&[7; 32]).expect("written");
        drop(state);
        assert!(!dir.path().join(KEY_IN_WRITING).exists());
        assert_eq!(StateDir::look(dir.path()).expect("ours"), Some([7; 32]));
    }

    #[test]
    fn key_with_any_flipped_bit_is_refused() {
        let text = key_to_text(&[7; 32]);
        assert_eq!(key_from_text(&text), Some([7; 32]));
        for byte in 0..text.trim_end().len() {
            for bit in 0..8 {
                let mut bytes = text.clone().into_bytes();
                bytes[byte] ^= 1 << bit;
                let read = String::from_utf8(bytes).ok().and_then(|text| key_from_text(&text));
                // Digits of the checksum may be in either case.
                assert!(read.is_none_or(|seed| seed == [7; 32]), "bit {bit} of byte {byte}");
            }
        }
    }

    #[test]
    fn pipe_in_the_place_of_the_lock_is_refused_at_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        nix::unistd::mkfifo(&dir.path().join(LOCK), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let refused = [
            StateDir::open(dir.path()).expect_err("refused").to_string(),
            StateDir::look(dir.path()).expect_err("refused").to_string(),
        ];
        for error in refused {
            assert!(error.contains("lock") && error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn damaged_note_of_the_boot_says_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = StateDir::open(dir.path()).expect("opens");
        state.note_boot().expect("noted");
        assert!(state.is_same_boot());
        let file = dir.path().join(BOOT);
        for damaged in [&b"\xff\xfe"[..], b"", b"5c0a", b"0a7d2f1e-9c1b-4c37-9f0d-b0b86d1fzzzz\n"] {
            fs::write(&file, damaged).expect("written");
            assert!(state.is_same_boot(), "{damaged:?}");
        }
        fs::write(&file, "0a7d2f1e-9c1b-4c37-9f0d-b0b86d1f0000\n").expect("written");
        assert!(!state.is_same_boot());
    }

    #[test]
    fn damaged_files_of_what_can_be_learned_again_are_as_good_as_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = StateDir::open(dir.path()).expect("opens");
        let (address, subnet) = ([192, 0, 2, 7].into(), "10.42.7.0/24".parse().expect("a subnet"));
        let long = vec![b'7'; files::SMALL as usize + 1];
        for damaged in [&b"\xff\xfe\n"[..], b"", b"192.0.2.7", b"10.42.7.0/", &long] {
            fs::write(dir.path().join(UNDERLAY), damaged).expect("written");
            assert_eq!(state.underlay().expect("as without"), None);
            state.save_underlay(address, 1450).expect("written again");
            assert_eq!(state.underlay().expect("read"), Some((address, 1450)));
            fs::write(dir.path().join(POD_CIDR), damaged).expect("written");
            assert_eq!(state.pod_cidrs().expect("as without"), []);
            state.save_pod_cidrs(&[subnet]).expect("written again");
            assert_eq!(state.pod_cidrs().expect("read"), [subnet]);
        }
    }

    #[test]
    fn damaged_file_of_what_cannot_be_learned_says_what_to_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = StateDir::open(dir.path()).expect("opens");
        for name in [KEY, TOKEN, SECRETS] {
            fs::write(dir.path().join(name), b"\xff\xfe\n").expect("written");
        }
        let said = [
            state.node_key().expect_err("refused").to_string(),
            state.token().expect_err("refused").to_string(),
            state.keyring().expect_err("refused").to_string(),
        ];
        for (said, name) in said.iter().zip([KEY, TOKEN, SECRETS]) {
            assert!(said.contains(name) && !said.contains("UTF-8"), "{said}");
        }
        assert!(said[0].contains("restore it") && said[2].contains("restore it"), "{said:?}");
    }

    #[test]
    fn directory_that_is_only_looked_at_stays_as_it_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        assert_eq!(StateDir::look(dir.path()).expect("looked at"), None);
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
        let mode = fs::metadata(dir.path()).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let state = StateDir::open(dir.path()).expect("opens");
        state.save_node_key(&[7; 32]).expect("saved");
        let error = StateDir::look(dir.path()).expect_err("held").to_string();
        assert!(error.contains("another gossamer"), "{error}");
        drop(state);
        assert_eq!(StateDir::look(dir.path()).expect("looked at"), Some([7; 32]));
        let other = tempfile::tempdir().expect("tempdir");
        fs::write(other.path().join("token"), "theirs").expect("their token");
        assert!(StateDir::look(other.path()).is_err());
    }

    #[test]
    fn one_process_at_a_time_and_a_wipe_leaves_nothing_of_ours() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = StateDir::open(dir.path()).expect("opens");
        let error = StateDir::open(dir.path()).expect_err("held").to_string();
        let own = format!("in use by process {}: is another gossamer", std::process::id());
        assert!(error.contains(&own), "{error}");
        state.save_node_key(&[7; 32]).expect("saved");
        let secret = crate::wire::Secret::new(vec![7; 32]).expect("long enough");
        state.save_keyring(&Keyring::new(secret)).expect("saved");
        state.save_underlay([192, 0, 2, 1].into(), 1450).expect("saved");
        assert_eq!(state.underlay().expect("read"), Some(([192, 0, 2, 1].into(), 1450)));
        assert_eq!(state.node_key().expect("read"), Some([7; 32]));
        fs::create_dir(dir.path().join("db.damaged-1")).expect("made");
        fs::write(dir.path().join("notes"), "not ours").expect("written");
        state.wipe().expect("wiped");
        let left: Vec<_> = fs::read_dir(dir.path())
            .expect("readable")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(left, ["notes"]);
    }
}
