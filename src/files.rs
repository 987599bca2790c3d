//! Reading, opening, replacing and removing files that other programs may have written, replaced or removed;
//! the holders of locks on files.
//!
//! Opening a pipe without a writer would block the reader without limit, and reading a device or a file of
//! the wrong kind could exhaust its memory. These functions accept regular files of bounded length only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use nix::fcntl::OFlag;

pub mod holder;
mod replace;

pub use replace::{PRIVATE, PUBLIC, replace};

/// Greatest length of a settings, secret or state file, in bytes.
pub const SMALL: u64 = 1 << 20;

/// Removes the file if it exists.
///
/// # Errors
/// If the file cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Reads a regular file of at most `most` bytes as UTF-8. Follows symbolic links.
///
/// # Errors
/// If the file cannot be opened or read, is not a regular file, is longer than `most`, or is not UTF-8.
pub fn read_text(path: &Path, most: u64) -> io::Result<String> {
    let bytes = read_bytes(open(path, OFlag::empty())?, most)?;
    String::from_utf8(bytes).map_err(|_| invalid("not UTF-8 text".to_owned()))
}

/// Opens a regular file for reading. Does not block.
///
/// # Errors
/// If the file cannot be opened or is not a regular file.
pub fn open(path: &Path, flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(invalid("not a regular file".to_owned())),
    }
}

/// Opens a regular file for writing, or creates an empty one with mode 0600. Neither follows a symbolic link
/// nor blocks.
///
/// # Errors
/// If the file cannot be opened or created, or is not a regular file.
pub fn open_own(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW;
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits())
        .open(path);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(invalid("not a regular file".to_owned())),
        // The open fails for a symbolic link, and for a socket or a pipe without a reader.
        Err(error) => match path.symlink_metadata() {
            Ok(meta) if !meta.is_file() => Err(invalid("not a regular file".to_owned())),
            _ => Err(error),
        },
    }
}

/// Reads the rest of an open file.
///
/// # Errors
/// If the file cannot be read, or has more than `most` bytes left.
pub fn read_bytes(file: File, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(invalid(format!("longer than {most} bytes"))),
        false => Ok(bytes),
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn read_text_accepts_only_a_regular_text_file_within_the_limit() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let error_text = |path: &Path| read_text(path, 4).expect_err("refused").to_string();
        fs::write(path("file"), "1234").expect("written");
        symlink("file", path("link")).expect("a link");
        assert_eq!(read_text(&path("link"), 4).expect("readable"), "1234");
        assert!(error_text(&path("nothing")).contains("No such file"));
        fs::write(path("file"), "12345").expect("written");
        assert_eq!(error_text(&path("link")), "longer than 4 bytes");
        fs::write(path("file"), [0xff]).expect("written");
        assert_eq!(error_text(&path("file")), "not UTF-8 text");
        mkfifo(&path("pipe"), Mode::S_IRWXU).expect("a pipe");
        for other in [path("pipe"), path("."), "/dev/zero".into(), "/dev/null".into()] {
            assert_eq!(error_text(&other), "not a regular file", "{}", other.display());
        }
    }

    #[test]
    fn open_own_creates_and_reopens_a_file_and_refuses_other_kinds() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        for _ in 0..2 {
            open_own(&path("file")).expect("opened");
        }
        let mode = fs::metadata(path("file")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        symlink("file", path("link")).expect("a link");
        mkfifo(&path("pipe"), Mode::S_IRWXU).expect("a pipe");
        let _reader = File::options().read(true).write(true).open(path("pipe")).expect("opened");
        mkfifo(&path("unread"), Mode::S_IRWXU).expect("a pipe");
        for other in [path("link"), path("pipe"), path("unread"), path("."), "/dev/null".into()] {
            let error = open_own(&other).expect_err("refused").to_string();
            assert_eq!(error, "not a regular file", "{}", other.display());
        }
        let error = open_own(&path("nothing/file")).expect_err("refused").to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn read_text_reads_a_proc_file_without_a_length() {
        assert!(read_text(Path::new("/proc/self/status"), SMALL).expect("readable").len() > 100);
    }
}
