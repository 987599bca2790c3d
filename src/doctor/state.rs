//! Checks of this host's stored data: settings, state directory, database, token, and the clock.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    sys::statvfs::statvfs,
    unistd::{AccessFlags, access},
};

use super::{Examination, Finding, NEEDS_ROOT};
use crate::{
    config::Config,
    random::random,
    store::{
        Database, History, LoadedDatabase, StoreError, node_key, read_token, require_state_dir,
    },
    transport::NodeKey,
    wire::{Record, Token},
};

/// With less free space than this, in bytes, a database of some thousand records may not be writable.
const MIN_FREE_BYTES: u64 = 16 << 20;
/// A clock before this time (2025-01-01, since the Unix epoch) is wrong on any host.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);
/// A change of ownership recorded more than this many seconds in the future was made by another clock.
const CLOCK_TOLERANCE_SECS: u64 = 300;

/// Runs the check `configuration`.
pub fn configuration(examination: &Examination, findings: &mut Vec<Finding>) {
    findings.push(match &examination.config {
        Ok(_) => Finding::ok("configuration", "all settings are consistent"),
        Err(error) => {
            let sentence = Finding::sentence("configuration", &error.to_string());
            sentence.refused_if(error.is_refused)
        }
    });
}

/// Runs the checks `clock`, `state` and `token`.
pub fn examine(examination: &Examination, findings: &mut Vec<Finding>) {
    let config = match &examination.config {
        Ok(config) => config,
        Err(error) => {
            let seen = if error.is_refused { NEEDS_ROOT } else { "the settings are invalid" };
            return findings.extend(["clock", "state", "token"].map(|c| Finding::skipped(c, seen)));
        }
    };
    findings.push(clock(&config.state_dir));
    let before = findings.len();
    directory(&config.state_dir, findings);
    if let Err(error @ (StoreError::NotOurs { .. } | StoreError::NoKey { .. })) =
        require_state_dir(&config.state_dir)
    {
        findings.push(Finding::sentence("state", &error.to_string()));
    }
    if examination.agent.is_none() && findings.len() == before {
        findings.extend(database(&config.state_dir));
    }
    if findings.len() == before && !examination.has_report("state") {
        let (path, shown) = (&config.state_dir, config.state_dir.display());
        let all = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
        findings.push(match (path.exists(), access(path, all)) {
            (false, _) => Finding::ok("state", format!("{shown} does not exist yet")),
            (true, Ok(())) => Finding::ok("state", format!("{shown} can be read and written")),
            (true, Err(error)) => {
                Finding::skipped("state", format!("{shown}: {error}")).refused_by(&error.into())
            }
        });
    }
    findings.push(token(examination, config));
}

fn clock(state_dir: &Path) -> Finding {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let text = |at: Duration| humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + at);
    let why = "no lease depends on it, but other programs' certificates, logs and events do";
    let fix =
        "set it (timedatectl set-ntp true, or date -s), and give the host a battery-backed clock";
    if now < EARLIEST {
        let seen = format!("this host's clock says {}", text(now));
        return Finding::notice("clock", seen, why, fix);
    }
    let changes = History::new(state_dir).read().unwrap_or_default();
    let last = changes.iter().map(|change| change.at).max().unwrap_or(0);
    if last > now.as_secs() + CLOCK_TOLERANCE_SECS {
        let seen = format!(
            "it is {}, but this host recorded a change of subnets at {}",
            text(now),
            text(Duration::from_secs(last))
        );
        return Finding::notice("clock", seen, why, fix);
    }
    Finding::ok("clock", text(now).to_string())
}

fn directory(path: &Path, findings: &mut Vec<Finding>) {
    let Ok(meta) = fs::metadata(path) else { return };
    let shown = path.display();
    // The agent makes a new directory private before it writes a secret.
    let has_secret = ["token", "node.key"].iter().any(|file| path.join(file).exists());
    if meta.permissions().mode() & 0o077 != 0 && has_secret {
        findings.push(Finding::problem(
            "state",
            format!(
                "{shown} is open to other users (mode {:o})",
                meta.permissions().mode() & 0o777
            ),
            "the secret and this node's key are in it",
            format!("chmod 700 {shown}, then rotate the secret (gossamer secret add)"),
        ));
    }
    let token = path.join("token");
    let exposed = fs::metadata(&token).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0);
    if exposed {
        findings.push(Finding::problem(
            "state",
            format!("{} can be read by other users", token.display()),
            "the secret admits any host to the cluster",
            format!("chmod 600 {}, then rotate the secret (gossamer secret add)", token.display()),
        ));
    }
    if let Ok(space) = statvfs(path) {
        let free = space.blocks_available() * space.fragment_size();
        if free < MIN_FREE_BYTES {
            findings.push(Finding::problem(
                "state",
                format!("{} KiB free on the file system of {shown}", free >> 10),
                "an agent that starts waits for space, and a running one may fail to write changes",
                format!("free some space (df -h {shown})"),
            ));
        }
        if space.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
            findings.push(Finding::problem(
                "state",
                format!("{shown} is on a file system that is mounted read-only"),
                "the agent cannot keep its subnet, and does not start",
                format!("mount -o remount,rw it (findmnt -T {shown}), or set state_dir"),
            ));
        }
    }
}

/// Opens a copy of the database, so that the original stays as it is.
fn database(state_dir: &Path) -> Option<Finding> {
    let original = state_dir.join("db");
    if !original.exists() {
        return None;
    }
    // Without a key the database belongs to no node; the directory's check reports that.
    let key = NodeKey::from_seed(node_key(state_dir).ok()??).ok()?;
    let token = read_token(state_dir).ok().flatten();
    let was_member = token.as_ref().and_then(Token::known_cluster).is_some();
    let opened = DatabaseCopy::of(&original).and_then(|copy| {
        let opened = Database::open(&copy.database(), key.id()).map_err(io::Error::other);
        opened.map(|LoadedDatabase { quarantined, records, .. }| {
            let knows = records.iter().any(|(_, record)| matches!(record, Record::Cluster(_)));
            quarantined.map(|(_, why)| format!("cannot be read: {why}")).or_else(|| {
                (!knows && was_member).then(|| "contains no cluster any more".to_owned())
            })
        })
    });
    match opened {
        Ok(None) => None,
        Ok(Some(why)) => Some(Finding::problem(
            "state",
            format!("the database {} {why}", original.display()),
            "at its next start the agent requests all records from the members",
            "nothing, if another member is reachable; or restore a backup of the whole state directory",
        )),
        Err(error) => Some(
            Finding::problem(
                "state",
                format!("the database {}: {error}", original.display()),
                "the agent does not start without it",
                "restore the state directory, or remove it to become a new node",
            )
            .refused_by(&error),
        ),
    }
}

/// A copy of the database in a directory with an unpredictable name that other users cannot enter.
/// Removed when dropped.
struct DatabaseCopy(PathBuf);

impl DatabaseCopy {
    fn of(original: &Path) -> io::Result<Self> {
        let name = u64::from_ne_bytes(random().map_err(io::Error::other)?);
        let directory = std::env::temp_dir().join(format!("gossamer-doctor-{name:016x}"));
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let copy = Self(directory);
        copy_all(original, &copy.database())?;
        Ok(copy)
    }

    fn database(&self) -> PathBuf {
        self.0.join("db")
    }
}

impl Drop for DatabaseCopy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_all(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn token(examination: &Examination, config: &Config) -> Finding {
    let saved: Result<Option<Token>, _> = read_token(&config.state_dir);
    let saved = match saved {
        Ok(saved) => saved,
        Err(error) => {
            let is_refused = matches!(&error, StoreError::Directory { error, .. }
                if error.kind() == io::ErrorKind::PermissionDenied);
            return Finding::problem(
                "token",
                error.to_string(),
                "without it a lost database cannot be restored from the members",
                "write it again on another member (gossamer token), and pass it with --token-file",
            )
            .refused_if(is_refused);
        }
    };
    let in_cluster = examination.status().and_then(|status| status.cluster);
    let given = config.token.as_ref().and_then(Token::known_cluster);
    let known = saved.as_ref().and_then(Token::known_cluster);
    match (given, in_cluster.or(known)) {
        (Some(given), Some(ours)) if given != ours => Finding::problem(
            "token",
            format!("the token is of cluster {given}, this host is in {ours}"),
            "clusters never merge: the agent stays in its own",
            "leave the token out, or run gossamer leave first (without an agent: gossamer cleanup)",
        ),
        (_, Some(ours)) => Finding::ok("token", format!("of cluster {ours}")),
        _ if config.token.is_some() || saved.is_some() => Finding::ok("token", "present"),
        _ if examination.status().is_some() => Finding::ok("token", "the agent has one"),
        _ if config.create.is_some() => Finding::ok("token", "this host creates one (init)"),
        _ if !examination.is_set_up() => Finding::skipped("token", "none yet"),
        _ => Finding::problem(
            "token",
            "no token",
            "a host needs a token to join a cluster; with --init it creates one",
            "on a member: gossamer token; here: the command that it prints (gossamer join TOKEN)",
        ),
    }
}
