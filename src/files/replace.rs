//! Atomic replacement of files.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Mode of a file that all users may read and write, before umask(2) applies.
pub const PUBLIC: u32 = 0o666;
/// Mode of a file for its owner alone.
pub const PRIVATE: u32 = 0o600;

/// Writes `text` to a file atomically, and creates its directory if it does not exist. Readers see the old or
/// the new content. So do readers after a power cut, because the content is synced before the file gets its
/// name.
///
/// `mode` is the mode of the new file, before umask(2) applies.
///
/// # Errors
/// If the file cannot be written. The old file is unchanged then, unless only the last sync failed.
pub fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(directory) = directory {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = OsString::from(path);
    temporary.push(".new");
    // A temporary file from an earlier failure may have another mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}
