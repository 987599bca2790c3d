//! Files that others read at any moment.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// For everybody to read, as far as umask(2) lets them.
pub const PUBLIC: u32 = 0o666;
/// For its owner alone.
pub const PRIVATE: u32 = 0o600;

/// Puts `text` into a file, and makes its directory if need be. Readers see the old or the new one, never
/// half of one; a power cut may bring the old one back.
///
/// `mode` is that of the new file, less what umask(2) takes.
pub fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = OsString::from(path);
    temporary.push(".new");
    // One that is left may have another mode.
    let _ = fs::remove_file(&temporary);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&temporary, path)
}
