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
    use std::{fs, os::unix::fs::symlink};

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
    fn a_file_of_the_kernel_which_has_no_length_is_read() {
        assert!(read_text(Path::new("/proc/self/status"), SMALL).expect("readable").len() > 100);
    }
}
