//! This program in the directories where container runtimes look for plugins: put there, and taken away.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::unix::fs::symlink,
    path::Path,
};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::OFlag;

use crate::files;

/// As runtimes call the plugin.
pub(super) const PLUGIN_NAME: &str = "gossamer";

/// What has become of a file that was to be taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Removed,
    Absent,
    /// It is not what an installation has put there; why not.
    Stays(&'static str),
}

/// In the text of every version of this program: how the names of its variables begin.
const MARK: &[u8] = b"GOSSAMER_";

/// What is in the place of the program and is not to be replaced, as the rest of a sentence; none, if that is
/// this program, another version of it, or nothing.
pub(super) fn foreign(program: &Path, plugin: &Path) -> io::Result<Option<&'static str>> {
    let meta = match fs::symlink_metadata(plugin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta?,
    };
    Ok(match meta.file_type() {
        kind if kind.is_symlink() => {
            let is_ours = leads_to(program, plugin)? || is_version_of_this(plugin).unwrap_or(false);
            (!is_ours).then_some("a link to something else")
        }
        kind if kind.is_file() => (!is_version_of_this(plugin)?).then_some("another program"),
        _ => Some("no file"),
    })
}

fn is_version_of_this(program: &Path) -> io::Result<bool> {
    let mut text = BufReader::new(files::open(program, OFlag::empty())?);
    let (mut part, last) = (Vec::new(), MARK[MARK.len() - 1]);
    while text.read_until(last, &mut part)? > 0 {
        if part.ends_with(MARK) {
            return Ok(true);
        }
        part.clear();
    }
    Ok(false)
}

/// Puts the program there, unless something else is in its place: that takes `force`.
pub(super) fn put_here(
    program: &Path,
    plugin: &Path,
    copy: bool,
    force: bool,
) -> anyhow::Result<()> {
    let shown = plugin.display();
    match foreign(program, plugin).with_context(|| shown.to_string())? {
        Some(what) if plugin.is_dir() && !plugin.is_symlink() => {
            bail!("{shown} is {what}: remove it")
        }
        Some(what) if !force => bail!("{shown} is {what} and stays: --force replaces it"),
        _ => put(program, plugin, copy).with_context(|| shown.to_string()),
    }
}

/// # Errors
/// For what is there and is no directory, with the option that names another.
pub(super) fn expect_directory(path: &Path, option: &str) -> anyhow::Result<()> {
    let is_other = match fs::metadata(path) {
        Ok(meta) => !meta.is_dir(),
        Err(error) => error.kind() == io::ErrorKind::NotADirectory,
    };
    let shown = path.display();
    ensure!(
        !is_other,
        "{shown} is no directory: remove what is there, or name another one ({option})"
    );
    Ok(())
}

/// Readers see the old or the new program, never none.
pub(super) fn put(program: &Path, plugin: &Path, copy: bool) -> io::Result<()> {
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

/// Takes away what [`put`] has put there, or with `force` whatever file it is.
pub(super) fn take_away(program: &Path, plugin: &Path, force: bool) -> io::Result<Taken> {
    let meta = match fs::symlink_metadata(plugin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Taken::Absent),
        meta => meta?,
    };
    let foreign = match meta.file_type() {
        kind if kind.is_symlink() => {
            (!leads_to(program, plugin)?).then_some("a link to something else")
        }
        kind if kind.is_file() && plugin == program => Some("this program itself"),
        kind if kind.is_file() => (!is_same_text(program, plugin)?)
            .then_some("another program, or another version of this one"),
        _ => return Ok(Taken::Stays("no file")),
    };
    match foreign.filter(|_| !force) {
        Some(why) => Ok(Taken::Stays(why)),
        None => fs::remove_file(plugin).map(|()| Taken::Removed),
    }
}

/// The program may have been moved since, or removed.
fn leads_to(program: &Path, link: &Path) -> io::Result<bool> {
    let target = fs::read_link(link)?;
    let is_named = target.file_name().is_some_and(|name| name == PLUGIN_NAME);
    Ok(is_named || fs::canonicalize(link).is_ok_and(|path| path == program))
}

fn is_same_text(one: &Path, other: &Path) -> io::Result<bool> {
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
    fn other_programs_are_replaced_by_force_alone_and_other_versions_without() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let (program, plugin) = (path("program"), path("gossamer"));
        fs::write(&program, "the program").expect("written");
        let put =
            |force| put_here(&program, &plugin, true, force).map_err(|error| error.to_string());
        assert_eq!(put(false), Ok(()));
        for text in ["GOSSAMER", "another, a_b GOSSAMER"] {
            fs::write(&plugin, text).expect("written");
            let why = put(false).expect_err("another program");
            assert!(why.contains("another program") && why.contains("--force"), "{why}");
            assert_eq!(fs::read_to_string(&plugin).expect("read"), text);
            assert_eq!(put(true), Ok(()));
        }
        fs::write(&plugin, "earlier_version \0GOSSAMER_SOCKET\0").expect("written");
        assert_eq!(put(false), Ok(()));
        fs::remove_file(&plugin).expect("removed");
        symlink("/bin/sh", &plugin).expect("a link");
        assert!(put(false).expect_err("a link").contains("a link to something else"));
        fs::remove_file(&plugin).expect("removed");
        fs::create_dir(&plugin).expect("made");
        for force in [false, true] {
            assert!(put(force).expect_err("a directory").contains("remove it"));
        }
    }

    #[test]
    fn only_what_was_put_there_is_taken_away() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let (program, plugin) = (path("program"), path("gossamer"));
        fs::write(&program, "the program").expect("written");
        let take = |force| take_away(&program, &plugin, force).expect("looked at");
        assert_eq!(take(false), Taken::Absent);
        for copy in [false, true] {
            put(&program, &plugin, copy).expect("put");
            assert_eq!(take(false), Taken::Removed);
            assert!(plugin.symlink_metadata().is_err() && program.exists());
        }
        // The program that it leads to was removed by its package.
        symlink("/nowhere/gossamer", &plugin).expect("a link");
        assert_eq!(take(false), Taken::Removed);
        symlink("/bin/sh", &plugin).expect("a link");
        assert!(matches!(take(false), Taken::Stays(why) if why.contains("link")));
        fs::remove_file(&plugin).expect("removed");
        for text in ["not program", "another"] {
            fs::write(&plugin, text).expect("written");
            assert!(matches!(take(false), Taken::Stays(why) if why.contains("another")));
        }
        assert_eq!(take(true), Taken::Removed);
        fs::create_dir(&plugin).expect("made");
        assert_eq!(take(true), Taken::Stays("no file"));
        assert_eq!(
            take_away(&program, &program, false).expect("looked at"),
            Taken::Stays("this program itself")
        );
    }
}
