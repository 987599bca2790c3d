//! What the agent keeps on disk, and whether the disk accepts it.

use std::{sync::Arc, time::Duration};

use crate::{
    agent::workers::archive::Archive,
    core::Gate,
    model::{Problem, ProblemCode},
    store::{StateDir, Writer},
};

/// Time after which a disk that accepts no writes counts as failed.
pub(super) const DISK_TIMEOUT: Duration = Duration::from_secs(3);

/// What the agent keeps on disk.
pub(super) struct Storage {
    /// The state directory.
    pub(super) directory: Arc<StateDir>,
    /// The thread that writes the database.
    pub(super) writer: Writer,
    /// Outputs of the core that wait for the database.
    pub(super) gate: Gate,
    /// The thread that writes all other files.
    pub(super) archive: Archive,
    /// Why the database cannot be written.
    pub(super) failure: Option<String>,
}

impl Storage {
    /// Returns the storage with threads that have just started.
    pub(super) fn new(directory: Arc<StateDir>, writer: Writer, archive: Archive) -> Self {
        Self { directory, writer, gate: Gate::default(), archive, failure: None }
    }

    /// Returns whether the disk has not answered in time.
    fn is_silent(&self) -> bool {
        self.writer.silent_for().is_some_and(|silent| silent > DISK_TIMEOUT)
    }

    /// Returns why the disk cannot be written.
    pub(super) fn failure(&self) -> Option<String> {
        let silence = || format!("{}: check it (dmesg)", disk_silence());
        self.failure.clone().or_else(|| self.is_silent().then(silence))
    }

    /// Returns the problem that the disk cannot be written.
    pub(super) fn problem(&self) -> Option<Problem> {
        let problem = |what: String, fix: String| {
            let what = format!("state directory: {what}");
            Problem::new(ProblemCode::Disk, "state directory", what, fix)
        };
        if let Some(failure) = &self.failure {
            return Some(problem(failure.clone(), String::new()));
        }
        if self.is_silent() {
            let what = format!("{}, so pods and leases cannot change", disk_silence());
            return Some(problem(what, "check it (dmesg)".to_owned()));
        }
        let path = self.directory.path().display();
        let what = || {
            format!(
                "the file system of {path} is full: changes may not be written, and the agent cannot be \
                 restarted"
            )
        };
        self.archive.is_full().then(|| problem(what(), format!("free space (df -h {path})")))
    }
}

/// Says for how long the disk has not answered, at least.
fn disk_silence() -> String {
    format!("the disk has not answered for more than {} s", DISK_TIMEOUT.as_secs())
}
