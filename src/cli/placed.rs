//! This program in the plugin directories of container runtimes: installs and removes it.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::unix::fs::symlink,
    path::Path,
};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::OFlag;

use crate::files;

/// The plugin's name in configurations.
pub(super) const PLUGIN_NAME: &str = "gossamer";

/// Result of removing a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    Removed,
    Absent,
    /// The file was kept because no installation created it. The text says what it is.
    Kept(&'static str),
}

/// Bytes in the text of every version of this program: the prefix of its environment variables.
const PROGRAM_MARK: &[u8] = b"GOSSAMER_";

/// Returns what occupies the plugin's path and must not be replaced, as the rest of a sentence. `None` if
/// that is this program, another version of it, or nothing.
pub(super) fn foreign_file(program: &Path, plugin: &Path) -> io::Result<Option<&'static str>> {
    let meta = match fs::symlink_metadata(plugin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta?,
    };
    Ok(match meta.file_type() {
        kind if kind.is_symlink() => {
            let is_ours =
                leads_to(program, plugin)? || is_version_of_this_program(plugin).unwrap_or(false);
            (!is_ours).then_some("a link to something else")
        }
        kind if kind.is_file() => {
            (!is_version_of_this_program(plugin)?).then_some("another program")
        }
        _ => Some("not a file"),
    })
}

fn is_version_of_this_program(program: &Path) -> io::Result<bool> {
    let mut text = BufReader::new(files::open(program, OFlag::empty())?);
    let (mut part, last) = (Vec::new(), PROGRAM_MARK[PROGRAM_MARK.len() - 1]);
    while text.read_until(last, &mut part)? > 0 {
        if part.ends_with(PROGRAM_MARK) {
            return Ok(true);
        }
        part.clear();
    }
    Ok(false)
}

/// Returns the text of an error, with the remedy if this user may not write to the system.
pub(super) fn with_remedy(error: &anyhow::Error) -> String {
    let is_refused = error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    });
    let remedy = if is_refused { ": run it as root" } else { "" };
    format!("{error:#}{remedy}")
}

/// Installs the program unless another file has its path. `force` replaces that file.
pub(super) fn place_program(
    program: &Path,
    plugin: &Path,
    copy: bool,
    force: bool,
) -> anyhow::Result<()> {
    let shown = plugin.display();
    match foreign_file(program, plugin).with_context(|| shown.to_string())? {
        Some(what) if plugin.is_dir() && !plugin.is_symlink() => {
            bail!("{shown} is {what}: remove it")
        }
        Some(what) if !force => bail!("{shown} is {what} and was kept: --force replaces it"),
        _ => place(program, plugin, copy).with_context(|| shown.to_string()),
    }
}

/// Checks that a path is a directory, or does not exist yet.
///
/// # Errors
/// Fails if the path is anything else; the message has the option that selects another one.
pub(super) fn expect_directory(path: &Path, option: &str) -> anyhow::Result<()> {
    let is_other = match fs::metadata(path) {
        Ok(meta) => !meta.is_dir(),
        Err(error) => error.kind() == io::ErrorKind::NotADirectory,
    };
    let shown = path.display();
    ensure!(!is_other, "{shown} is not a directory: remove it, or use another one ({option})");
    Ok(())
}

/// Replaces the plugin atomically: readers see the old or the new program.
pub(super) fn place(program: &Path, plugin: &Path, copy: bool) -> io::Result<()> {
    if let Some(directory) = plugin.parent() {
        fs::create_dir_all(directory)?;
    }
    let temporary = plugin.with_extension("new");
    let _ = fs::remove_file(&temporary);
    if copy {
        fs::copy(program, &temporary)?;
    } else {
        symlink(program, &temporary)?;
    }
    fs::rename(&temporary, plugin)
}

/// Removes what [`place`] installed; with `force` also any other file.
pub(super) fn remove_program(program: &Path, plugin: &Path, force: bool) -> io::Result<Removal> {
    let meta = match fs::symlink_metadata(plugin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removal::Absent),
        meta => meta?,
    };
    let foreign_file = match meta.file_type() {
        kind if kind.is_symlink() => {
            (!leads_to(program, plugin)?).then_some("a link to something else")
        }
        kind if kind.is_file() && plugin == program => Some("this program itself"),
        kind if kind.is_file() => (!has_same_content(program, plugin)?)
            .then_some("another program, or another version of this one"),
        _ => return Ok(Removal::Kept("not a file")),
    };
    match foreign_file.filter(|_| !force) {
        Some(why) => Ok(Removal::Kept(why)),
        None => fs::remove_file(plugin).map(|()| Removal::Removed),
    }
}

/// Returns whether [`remove_program`] would remove this file.
pub(super) fn is_removable(plugin: &Path) -> bool {
    let Ok(program) = std::env::current_exe() else { return false };
    match fs::symlink_metadata(plugin) {
        Ok(meta) if meta.file_type().is_symlink() => leads_to(&program, plugin).unwrap_or(false),
        Ok(meta) if meta.is_file() => {
            plugin != program && has_same_content(&program, plugin).unwrap_or(false)
        }
        _ => false,
    }
}

/// A link with the plugin's name counts even if it dangles: the program may have been moved or removed.
fn leads_to(program: &Path, link: &Path) -> io::Result<bool> {
    let target = fs::read_link(link)?;
    let is_named = target.file_name().is_some_and(|name| name == PLUGIN_NAME);
    Ok(is_named || fs::canonicalize(link).is_ok_and(|path| path == program))
}

fn has_same_content(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (BufReader::new(one), BufReader::new(other));
    loop {
        let (left, right) = (one.fill_buf()?, other.fill_buf()?);
        let length = left.len().min(right.len());
        if length == 0 {
            return Ok(left.len() == right.len());
        }
        if left[..length] != right[..length] {
            return Ok(false);
        }
        one.consume(length);
        other.consume(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_program_foreign_file_needs_force_but_other_version_does_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let (program, plugin) = (path("program"), path("gossamer"));
        fs::write(&program, "the program").expect("written");
        let place = |force| {
            place_program(&program, &plugin, true, force).map_err(|error| error.to_string())
        };
        assert_eq!(place(false), Ok(()));
        for text in ["GOSSAMER", "another, a_b GOSSAMER"] {
            fs::write(&plugin, text).expect("written");
            let why = place(false).expect_err("another program");
            assert!(why.contains("another program") && why.contains("--force"), "{why}");
            assert_eq!(fs::read_to_string(&plugin).expect("read"), text);
            assert_eq!(place(true), Ok(()));
        }
        fs::write(&plugin, "earlier_version \0GOSSAMER_SOCKET\0").expect("written");
        assert_eq!(place(false), Ok(()));
        fs::remove_file(&plugin).expect("removed");
        symlink("/bin/sh", &plugin).expect("a link");
        assert!(place(false).expect_err("a link").contains("a link to something else"));
        fs::remove_file(&plugin).expect("removed");
        fs::create_dir(&plugin).expect("made");
        for force in [false, true] {
            assert!(place(force).expect_err("a directory").contains("remove it"));
        }
    }

    #[test]
    fn remove_program_foreign_file_is_kept_without_force() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let (program, plugin) = (path("program"), path("gossamer"));
        fs::write(&program, "the program").expect("written");
        let take = |force| remove_program(&program, &plugin, force).expect("looked at");
        assert_eq!(take(false), Removal::Absent);
        for copy in [false, true] {
            place(&program, &plugin, copy).expect("put");
            assert_eq!(take(false), Removal::Removed);
            assert!(plugin.symlink_metadata().is_err() && program.exists());
        }
        // A dangling link, as after the removal of the program's package.
        symlink("/nowhere/gossamer", &plugin).expect("a link");
        assert_eq!(take(false), Removal::Removed);
        symlink("/bin/sh", &plugin).expect("a link");
        assert!(matches!(take(false), Removal::Kept(why) if why.contains("link")));
        fs::remove_file(&plugin).expect("removed");
        for text in ["not program", "another"] {
            fs::write(&plugin, text).expect("written");
            assert!(matches!(take(false), Removal::Kept(why) if why.contains("another")));
        }
        assert_eq!(take(true), Removal::Removed);
        fs::create_dir(&plugin).expect("made");
        assert_eq!(take(true), Removal::Kept("not a file"));
        assert_eq!(
            remove_program(&program, &program, false).expect("looked at"),
            Removal::Kept("this program itself")
        );
    }
}
