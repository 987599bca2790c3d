//! Unix sockets for one owner, where an earlier process may have left its own.

use std::{
    fs, io,
    os::unix::{fs::FileTypeExt as _, net::UnixStream},
    path::{Path, PathBuf},
};

use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("socket: an agent is already listening on {}: stop it or choose another", .0.display())]
    InUse(PathBuf),
    #[error("socket: {} is there and is no socket: remove it or choose another", .0.display())]
    NotASocket(PathBuf),
    #[error("socket: {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// A listening socket's file; it goes when this is dropped.
#[derive(Debug)]
pub struct Socket(PathBuf);

impl Socket {
    /// Listens, for this user alone (mode 0600).
    ///
    /// # Errors
    /// Where somebody else does, or something else is there.
    pub fn listen(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let fail = |error| SocketError::Io { path: path.to_owned(), error };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(fail)?;
        }
        remove_stale(path)?;
        // For its owner alone from the first moment on: secrets can be read over it.
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        Ok((Self(path.to_owned()), listener.map_err(fail)?))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A socket that nobody listens on is left from an agent that was killed.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SocketError::Io { path, error }),
        Ok(meta) if !meta.file_type().is_socket() => Err(SocketError::NotASocket(path)),
        Ok(_) if UnixStream::connect(&path).is_ok() => Err(SocketError::InUse(path)),
        Ok(_) => fs::remove_file(&path).map_err(|error| SocketError::Io { path, error }),
    }
}
