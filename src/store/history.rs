//! The audit log: every change of a subnet's owner that this host has seen, as lines of JSON.
//!
//! It is for people and scripts; the agent does not read it. It is bounded: a full file is renamed to
//! `history.1` and replaces the previous one. Of very many changes only the number is written, so that a
//! member that lies cannot replace both files at once. A line that cannot be written is lost, and the first
//! failure is logged.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{files, model::OwnerChange};

pub(super) const FILE: &str = "history";
pub(super) const OLDER: &str = "history.1";

/// Size at which a file is full, in bytes. Together with the older file it holds at least 1,000 changes.
const MAX_BYTES: u64 = 256 << 10;
/// Limit of bytes that one append adds: a member sends its changes of a whole pool at once.
const MAX_APPEND_BYTES: u64 = MAX_BYTES / 4;
/// Time in which a used up budget of [`MAX_BYTES`] is restored. So a member that floods the log needs more
/// than an hour to replace both files.
const REFILL_TIME: Duration = Duration::from_secs(6 * 3600);
/// Room for the line that counts the changes left out.
const COUNT_LINE_BYTES: u64 = 256;
/// Maximum size of a file that is read, in bytes. An earlier version appended the lines of a whole pool at
/// once.
const MAX_READ_BYTES: u64 = 64 << 20;

/// The audit log of a state directory.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    failing: bool,
    budget: Budget,
}

/// The bytes that may be added at present.
#[derive(Debug)]
struct Budget {
    bytes: u64,
    filled: Instant,
    /// Changes that were not written, and that no line counts yet.
    left_out: u64,
}

impl History {
    /// Returns the log in a state directory.
    pub fn new(directory: &Path) -> Self {
        let budget = Budget { bytes: MAX_BYTES, filled: Instant::now(), left_out: 0 };
        Self { directory: directory.to_owned(), failing: false, budget }
    }

    /// Appends changes, each as a line; a last line counts those beyond the limits. Logs the first of
    /// successive failures.
    pub fn append(&mut self, changes: &[OwnerChange]) {
        self.append_at(Instant::now(), changes);
    }

    fn append_at(&mut self, now: Instant, changes: &[OwnerChange]) {
        if changes.is_empty() {
            return;
        }
        let written = self.budget.lines(now, changes).and_then(|text| self.try_append(&text));
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

    fn try_append(&self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
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

impl Budget {
    /// Returns the lines of as many changes as may be added, and of the number of the others.
    fn lines(&mut self, now: Instant, changes: &[OwnerChange]) -> io::Result<String> {
        self.refill(now);
        let limit = self.bytes.min(MAX_APPEND_BYTES).saturating_sub(COUNT_LINE_BYTES);
        let mut text = String::new();
        let mut rest = changes;
        while let [change, others @ ..] = rest {
            let line = serde_json::to_string(change)?;
            if (text.len() + line.len()) as u64 >= limit {
                break;
            }
            text.push_str(&line);
            text.push('\n');
            rest = others;
        }
        self.left_out += rest.len() as u64;
        if let (Some(last), 1..) = (changes.last(), self.left_out)
            && self.bytes >= COUNT_LINE_BYTES
        {
            let subnets = format!("{} further changes, too many to list", self.left_out);
            let none = || "?".to_owned();
            let count = OwnerChange {
                subnets,
                from: None,
                to: none(),
                by: none(),
                epoch: 0,
                ..last.clone()
            };
            text.push_str(&serde_json::to_string(&count)?);
            text.push('\n');
            self.left_out = 0;
        }
        self.bytes = self.bytes.saturating_sub(text.len() as u64);
        Ok(text)
    }

    fn refill(&mut self, now: Instant) {
        let span = now.saturating_duration_since(self.filled).min(REFILL_TIME);
        let bytes = u128::from(MAX_BYTES) * span.as_millis() / REFILL_TIME.as_millis();
        let bytes = u64::try_from(bytes).unwrap_or(MAX_BYTES);
        // Otherwise many small spans would add nothing.
        if bytes > 0 {
            self.bytes = (self.bytes + bytes).min(MAX_BYTES);
            self.filled = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SlotState;

    fn change(at: u64, width: usize) -> OwnerChange {
        OwnerChange {
            at,
            subnets: "x".repeat(width),
            from: None,
            to: String::new(),
            state: SlotState::Leased,
            by: String::new(),
            epoch: 1,
        }
    }

    #[test]
    fn newest_lines_are_kept_and_truncated_line_is_skipped() {
        let directory = tempfile::tempdir().expect("directory");
        let mut history = History::new(directory.path());
        let mut now = Instant::now();
        for at in 0..1000 {
            now += REFILL_TIME / 100;
            history.append_at(now, &[change(at, 1_000)]);
        }
        let mut file =
            fs::OpenOptions::new().append(true).open(directory.path().join(FILE)).expect("file");
        file.write_all(b"{\"at\": 10").expect("written");
        let lines = history.read().expect("readable");
        assert!((256..=600).contains(&lines.len()), "{} lines", lines.len());
        assert_eq!(lines.last(), Some(&change(999, 1_000)));
    }

    /// Regression: two messages with changes of a whole pool replaced both files.
    #[test]
    fn changes_of_whole_pools_leave_earlier_lines_and_are_counted() {
        let directory = tempfile::tempdir().expect("directory");
        let mut history = History::new(directory.path());
        let now = Instant::now();
        history.append_at(now, &[change(1, 20)]);
        let pool: Vec<OwnerChange> = (0..16_384).map(|_| change(2, 20)).collect();
        history.append_at(now, &pool);
        let lines = history.read().expect("readable");
        let listed = lines.iter().filter(|line| **line == change(2, 20)).count();
        assert!((500..=700).contains(&listed), "{listed} lines of one append");
        let rest = format!("{} further changes, too many to list", pool.len() - listed);
        assert_eq!(lines.last().map(|line| line.subnets.clone()), Some(rest));
        for second in 0..60 {
            history.append_at(now + Duration::from_secs(second), &pool);
        }
        let lines = history.read().expect("readable");
        assert_eq!(lines.first(), Some(&change(1, 20)), "the earlier line is kept");

        // Later changes are written, and the number of those before, if no line has counted them.
        let later = now + REFILL_TIME / 6;
        history.append_at(later, &[change(3, 20)]);
        let lines = history.read().expect("readable");
        assert!(lines.contains(&change(3, 20)));
        let written = |line: &OwnerChange| match line.subnets.split_once(" further") {
            Some((count, _)) => count.parse().expect("a number"),
            None => 1_usize,
        };
        assert_eq!(lines.iter().map(written).sum::<usize>(), 61 * pool.len() + 2);
    }
}
