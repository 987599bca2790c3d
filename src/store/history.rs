//! The audit log: every change of a subnet's owner that this host has seen, as lines of JSON.
//!
//! It is for people and scripts; the agent does not read it. It is bounded: a full file is renamed to
//! `history.1` and replaces the previous one. A line that cannot be written is lost, and the first failure is
//! logged.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::{files, model::OwnerChange};

pub(super) const FILE: &str = "history";
pub(super) const OLDER: &str = "history.1";

/// Size at which a file is full, in bytes. Together with the older file it holds at least 1,000 changes.
const MAX_BYTES: u64 = 256 << 10;
/// Maximum size of a file that is read, in bytes. One append may exceed [`MAX_BYTES`] by the lines of a whole
/// pool.
const MAX_READ_BYTES: u64 = 64 << 20;

/// The audit log of a state directory.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    failing: bool,
}

impl History {
    /// Returns the log in a state directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), failing: false }
    }

    /// Appends changes, each as a line. Logs the first of successive failures.
    pub fn append(&mut self, changes: &[OwnerChange]) {
        if changes.is_empty() {
            return;
        }
        let written = self.try_append(changes);
        if let (Err(error), false) = (&written, self.failing) {
            tracing::error!(%error, "history not written");
        }
        self.failing = written.is_err();
    }

    /// Returns all changes, the oldest first.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn read(&self) -> io::Result<Vec<OwnerChange>> {
        let mut changes = Vec::new();
        for name in [OLDER, FILE] {
            match files::read_text(&self.directory.join(name), MAX_READ_BYTES) {
                // Skips a line that a crash has truncated.
                Ok(text) => changes.extend(text.lines().flat_map(serde_json::from_str)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(changes)
    }

    fn try_append(&self, changes: &[OwnerChange]) -> io::Result<()> {
        let mut text = String::new();
        for change in changes {
            text.push_str(&serde_json::to_string(change)?);
            text.push('\n');
        }
        let path = self.directory.join(FILE);
        let mut file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        file.write_all(text.as_bytes())?;
        if file.metadata()?.len() > MAX_BYTES {
            fs::rename(&path, self.directory.join(OLDER))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SlotState;

    #[test]
    fn newest_lines_are_kept_and_truncated_line_is_skipped() {
        let directory = tempfile::tempdir().expect("directory");
        let mut history = History::new(directory.path());
        let change = |at: u64| OwnerChange {
            at,
            subnets: "x".repeat(1000),
            from: None,
            to: String::new(),
            state: SlotState::Leased,
            by: String::new(),
            epoch: 1,
        };
        for at in 0..1000 {
            history.append(&[change(at)]);
        }
        let mut file =
            fs::OpenOptions::new().append(true).open(directory.path().join(FILE)).expect("file");
        file.write_all(b"{\"at\": 10").expect("written");
        let lines = history.read().expect("readable");
        assert!((256..=600).contains(&lines.len()), "{} lines", lines.len());
        assert_eq!(lines.last(), Some(&change(999)));
    }
}
