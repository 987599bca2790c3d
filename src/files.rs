//! Text files that others have written, or may have put something else in the place of.
//!
//! A pipe without a writer would hold the reader up for ever, and a device or a file that was filled by
//! mistake would fill its memory.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use nix::fcntl::OFlag;

/// Longest file of settings, of a secret or of a state that is read, in bytes.
pub const SMALL: u64 = 1 << 20;

/// Reads a regular file of at most `most` bytes. Links are followed.
///
/// # Errors
/// What the file system says; that it is no regular file; that it is longer; that it is no text.
pub fn read_text(path: &Path, most: u64) -> io::Result<String> {
    let bytes = read_bytes(open(path, OFlag::empty())?, most)?;
    String::from_utf8(bytes).map_err(|_| invalid("it is no UTF-8 text".to_owned()))
}

/// Opens a regular file to be read, and waits for nothing.
///
/// # Errors
/// What the file system says, and that it is no regular file.
pub fn open(path: &Path, flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(invalid("it is no regular file".to_owned())),
    }
}

/// Opens a regular file to be written, or makes an empty one that only its owner can read. It follows no link
/// and waits for nothing.
///
/// # Errors
/// What the file system says, and that it is no regular file.
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
        Ok(_) => Err(invalid("it is no regular file".to_owned())),
        // A link, or a pipe or a socket that nobody reads.
        Err(error) => match path.symlink_metadata() {
            Ok(meta) if !meta.is_file() => Err(invalid("it is no regular file".to_owned())),
            _ => Err(error),
        },
    }
}

/// Reads what is left of an open file.
///
/// # Errors
/// What the file system says, and that it is longer than `most` bytes.
pub fn read_bytes(file: File, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(invalid(format!("it is longer than {most} bytes"))),
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
    fn a_regular_file_within_its_bound_is_read_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let said = |path: &Path| read_text(path, 4).expect_err("refused").to_string();
        fs::write(path("file"), "1234").expect("written");
        symlink("file", path("link")).expect("a link");
        assert_eq!(read_text(&path("link"), 4).expect("readable"), "1234");
        assert!(said(&path("nothing")).contains("No such file"));
        fs::write(path("file"), "12345").expect("written");
        assert_eq!(said(&path("link")), "it is longer than 4 bytes");
        fs::write(path("file"), [0xff]).expect("written");
        assert_eq!(said(&path("file")), "it is no UTF-8 text");
        mkfifo(&path("pipe"), Mode::S_IRWXU).expect("a pipe");
        for other in [path("pipe"), path("."), "/dev/zero".into(), "/dev/null".into()] {
            assert_eq!(said(&other), "it is no regular file", "{}", other.display());
        }
    }

    #[test]
    fn own_file_is_made_and_opened_again_and_nothing_else_is_opened() {
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
            let said = open_own(&other).expect_err("refused").to_string();
            assert_eq!(said, "it is no regular file", "{}", other.display());
        }
        let said = open_own(&path("nothing/file")).expect_err("refused").to_string();
        assert!(said.contains("No such file"), "{said}");
    }

    #[test]
    fn a_file_of_the_kernel_which_has_no_length_is_read() {
        assert!(read_text(Path::new("/proc/self/status"), SMALL).expect("readable").len() > 100);
    }
}
