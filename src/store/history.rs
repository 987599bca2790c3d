//! The audit log: every change of a subnet's owner that this host has seen, as lines of JSON.
//!
//! For people and scripts, never read back by the agent. It is bounded: when the file is full it becomes
//! `history.1`, in place of the one before. A line that cannot be written is said once and lost.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::files;

pub(super) const FILE: &str = "history";
pub(super) const OLDER: &str = "history.1";

/// A full file; together with the older one this holds at least 1,000 changes.
const MAX_BYTES: u64 = 256 << 10;
/// The last lines may have been written at once: those of a whole pool.
const READ_MAX: u64 = 64 << 20;

#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    failing: bool,
}

impl History {
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), failing: false }
    }

    pub fn append(&mut self, lines: &[Value]) {
        if lines.is_empty() {
            return;
        }
        let written = self.try_append(lines);
        if let (Err(error), false) = (&written, self.failing) {
            tracing::error!(%error, "the history cannot be written");
        }
        self.failing = written.is_err();
    }

    /// All lines that are kept, the oldest first.
    ///
    /// # Errors
    /// Of the file system.
    pub fn read(&self) -> io::Result<Vec<Value>> {
        let mut lines = Vec::new();
        for name in [OLDER, FILE] {
            match files::read_text(&self.directory.join(name), READ_MAX) {
                // A line that a crash cut off is no line.
                Ok(text) => lines.extend(text.lines().flat_map(serde_json::from_str)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(lines)
    }

    fn try_append(&self, lines: &[Value]) -> io::Result<()> {
        let path = self.directory.join(FILE);
        let mut file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        file.write_all(text.as_bytes())?;
        if file.metadata()?.len() > MAX_BYTES {
            fs::rename(&path, self.directory.join(OLDER))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_lines_are_kept_and_a_torn_one_is_skipped() {
        let directory = tempfile::tempdir().expect("directory");
        let mut history = History::new(directory.path());
        let line = |number: usize| json!({ "number": number, "padding": "x".repeat(1000) });
        for number in 0..1000 {
            history.append(&[line(number)]);
        }
        let mut file =
            fs::OpenOptions::new().append(true).open(directory.path().join(FILE)).expect("file");
        file.write_all(b"{\"number\": 10").expect("written");
        let lines = history.read().expect("readable");
        assert!((256..=600).contains(&lines.len()), "{} lines", lines.len());
        assert_eq!(lines.last(), Some(&line(999)));
    }
}
