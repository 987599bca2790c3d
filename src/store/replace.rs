//! Files that are replaced as a whole.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// For all users to read, as far as umask(2) lets them.
pub const PUBLIC: u32 = 0o666;
/// For its owner alone.
pub const PRIVATE: u32 = 0o600;

/// Puts `text` into a file, and makes its directory if need be. Readers see the old or the new one, never
/// half of one; after a power cut, too, for the content is on the disk before it gets its name.
///
/// `mode` is that of the new file, less what umask(2) takes.
///
/// # Errors
/// Fails if the file cannot be written; the old one is there then.
pub fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(directory) = directory {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = OsString::from(path);
    temporary.push(".new");
    // One that is left may have another mode.
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
