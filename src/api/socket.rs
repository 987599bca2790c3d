//! Unix sockets for one owner, where an earlier process may have left its own.

use std::{
    fs::{self, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use socket2::{Domain, SockAddr, Type};
use tokio::net::UnixListener;

use crate::store::holder;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4_096;

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
pub struct Socket {
    path: PathBuf,
    /// Device and inode; none if they could not be read.
    file: Option<(u64, u64)>,
}

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
        let listener = listen_for_owner(path).map_err(fail)?;
        Ok((Self { path: path.to_owned(), file: file_at(path) }, listener))
    }

    /// Whether the file is still the one that was made: others may have removed or replaced it.
    pub fn is_there(&self) -> bool {
        self.file.is_some() && file_at(&self.path) == self.file
    }
}

/// For its owner alone from the first moment on: secrets can be read over it. Before it listens it takes no
/// connection. (The file mode creation mask would be that of all threads.)
fn listen_for_owner(path: &Path) -> io::Result<UnixListener> {
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// A socket that nobody listens on is left from an agent that was killed. One that is being killed may have
/// it open for long, and answers no more.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SocketError::Io { path, error }),
        Ok(meta) if !meta.file_type().is_socket() => Err(SocketError::NotASocket(path)),
        Ok(_) if UnixStream::connect(&path).is_ok_and(|peer| !is_left(&peer)) => {
            Err(SocketError::InUse(path))
        }
        Ok(_) => fs::remove_file(&path).map_err(|error| SocketError::Io { path, error }),
    }
}

/// Whether the process that listens is on its way out. One of another PID namespace is not known.
fn is_left(peer: &UnixStream) -> bool {
    let listener = getsockopt(peer, PeerCredentials).ok();
    let pid = listener.and_then(|credentials| u32::try_from(credentials.pid()).ok());
    pid.is_some_and(|pid| pid != 0 && holder::is_ending(pid))
}
