//! Files that others read at any moment.

use std::{ffi::OsString, fs, io, path::Path};

/// Puts `text` into a file, and makes its directory if need be. Readers see the old or the new one, never
/// half of one; a power cut may bring the old one back.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = OsString::from(path);
    temporary.push(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}
