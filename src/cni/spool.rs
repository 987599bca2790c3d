//! Requests of runtimes that no agent has answered, stored until the agent carries them out.
//!
//! The end of a pod must not wait for the agent. Otherwise pods could not be deleted while the agent is
//! upgraded or after it was removed. The directory is beside the control socket, usually below /run, and so
//! disappears with a reboot, as do the pods. Its size is bounded. A request that does not fit is not lost,
//! because the agent also releases the addresses of pods whose veth pair is gone.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;
use nix::{fcntl::OFlag, unistd::geteuid};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::config::INPUT_MAX;
use crate::{
    api::AttachmentName,
    files::{self, PRIVATE, replace},
};

/// Maximum number of files in the directory.
const NOTES_MAX: usize = 4096;
/// Bytes of the hash in a file's name.
const HASH_LEN: usize = 10;

/// A stored request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Note {
    /// Disconnects a pod.
    Detach(AttachmentName),
    /// Disconnects all pods of an owner that are not in `valid`.
    Collect {
        /// The owner of the pods.
        owner: String,
        /// The attachments to keep.
        valid: Vec<AttachmentName>,
    },
}

impl Note {
    /// Returns the name of its file. A later request about the same pod or owner replaces the earlier one.
    fn file_name(&self) -> String {
        let (kind, text) = match self {
            Self::Detach(AttachmentName { container, interface }) => {
                ("del", format!("{container} {interface}"))
            }
            Self::Collect { owner, .. } => ("gc", owner.clone()),
        };
        format!("{kind}-{}", HEXLOWER.encode(&Sha256::digest(text)[..HASH_LEN]))
    }
}

/// The directory of stored requests.
#[derive(Debug)]
pub struct Spool(PathBuf);

impl Spool {
    /// Returns the spool of the agent that listens at `socket`.
    pub fn beside(socket: &Path) -> Self {
        let mut path = socket.as_os_str().to_owned();
        path.push(".pending");
        Self(path.into())
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Stores a note. Does nothing if the socket's directory does not exist.
    ///
    /// # Errors
    /// If the directory is full, is not private to this user, or cannot be written.
    pub fn put(&self, note: &Note) -> io::Result<()> {
        if self.0.parent().is_some_and(|directory| !directory.exists()) {
            // No agent has listened there since the host started, so no pod is connected.
            return Ok(());
        }
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => self.expect_private()?,
        }
        let path = self.0.join(note.file_name());
        if !path.exists() && fs::read_dir(&self.0)?.take(NOTES_MAX).count() == NOTES_MAX {
            return Err(io::Error::other(format!("{} is full", self.0.display())));
        }
        replace(&path, &serde_json::to_string(note)?, PRIVATE)
    }

    /// Returns whether a note of the same kind about the same pod or owner exists.
    pub fn holds(&self, note: &Note) -> bool {
        self.0.join(note.file_name()).symlink_metadata().is_ok()
    }

    /// Removes a note that was carried out or no longer applies.
    pub fn drop(&self, note: &Note) {
        let _ = fs::remove_file(self.0.join(note.file_name()));
    }

    /// Returns all notes. Removes and logs files that are not valid notes.
    pub fn read(&self) -> Vec<Note> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(path = %self.0.display(), %error, "CNI spool unreadable");
                return Vec::new();
            }
        };
        if let Err(error) = self.expect_private() {
            tracing::warn!(%error, "CNI spool ignored");
            return Vec::new();
        }
        let mut notes = Vec::new();
        for entry in entries.flatten().take(NOTES_MAX) {
            match read(&entry.path()) {
                Ok(note) => notes.push(note),
                Err(error) => {
                    let path = entry.path();
                    tracing::warn!(path = %path.display(), %error, "invalid file removed from CNI spool");
                    let _ = fs::remove_file(path);
                }
            }
        }
        notes
    }

    /// Checks that only this user can have written the directory's content.
    fn expect_private(&self) -> io::Result<()> {
        let meta = fs::symlink_metadata(&self.0)?;
        if meta.is_dir() && meta.uid() == geteuid().as_raw() && meta.mode() & 0o077 == 0 {
            return Ok(());
        }
        let why = format!("{}: other users have access to it: remove it", self.0.display());
        Err(io::Error::other(why))
    }
}

fn read(path: &Path) -> io::Result<Note> {
    let text = files::read_bytes(files::open(path, OFlag::O_NOFOLLOW)?, INPUT_MAX)?;
    let note: Note = serde_json::from_slice(&text)?;
    match path.file_name().is_some_and(|name| *name == *note.file_name()) {
        true => Ok(note),
        false => Err(io::Error::other("its name does not match its content")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn detach(container: &str) -> Note {
        let [container, interface] = [container, "eth0"].map(str::to_owned);
        Note::Detach(AttachmentName { container, interface })
    }

    #[test]
    fn notes_are_read_back_and_one_of_a_kind_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let spool = Spool::beside(&dir.path().join("run/gossamer.sock"));
        assert_eq!(spool.read(), []);
        // No agent has ever listened there.
        spool.put(&detach("a")).expect("nothing to be noted");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
        fs::create_dir(dir.path().join("run")).expect("made");
        let collect = |valid| Note::Collect { owner: "cni/net".to_owned(), valid };
        let one = AttachmentName { container: "a".to_owned(), interface: "eth0".to_owned() };
        for note in [detach("a"), detach("a"), collect(Vec::new()), collect(vec![one.clone()])] {
            spool.put(&note).expect("noted");
        }
        let mut notes = spool.read();
        notes.sort_by_key(Note::file_name);
        assert_eq!(notes, [detach("a"), collect(vec![one])]);
        notes.iter().for_each(|note| spool.drop(note));
        assert_eq!(spool.read(), []);
    }

    #[test]
    fn invalid_notes_are_removed_and_valid_ones_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let spool = Spool::beside(&dir.path().join("gossamer.sock"));
        spool.put(&detach("a")).expect("noted");
        let path = |name: &str| spool.0.join(name);
        fs::write(path("del-0123"), "{").expect("written");
        fs::write(path("del-4567"), serde_json::to_string(&detach("b")).expect("JSON"))
            .expect("written");
        symlink("/etc/passwd", path("link")).expect("a link");
        fs::write(path("big"), vec![b' '; INPUT_MAX as usize + 1]).expect("written");
        assert_eq!(spool.read(), [detach("a")]);
        assert_eq!(fs::read_dir(&spool.0).expect("readable").count(), 1);
    }

    #[test]
    fn spool_of_other_users_is_ignored_and_full_one_takes_no_more_notes() {
        let dir = tempfile::tempdir().expect("a directory");
        let spool = Spool::beside(&dir.path().join("gossamer.sock"));
        spool.put(&detach("0")).expect("noted");
        // Without `put`, which waits for the disk.
        for number in 1..NOTES_MAX {
            let path = spool.0.join(detach(&number.to_string()).file_name());
            fs::write(path, "").expect("written");
        }
        let full = spool.put(&detach("more")).expect_err("full").to_string();
        assert!(full.contains("is full"), "{full}");
        spool.put(&detach("0")).expect("it has a place already");
        fs::set_permissions(&spool.0, fs::Permissions::from_mode(0o777)).expect("changed");
        assert_eq!(spool.read(), []);
        assert!(spool.put(&detach("0")).is_err());
    }
}
