//! Unix sockets that only their owner may use. They replace a socket that an earlier process left.

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

use crate::files::{self, holder};

/// Most connections that wait to be accepted.
const BACKLOG: i32 = 4_096;

/// Why a socket cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens on it.
    #[error("socket: an agent is already listening on {}: stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// The path has another type.
    #[error("socket: {} exists and is not a socket: remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// This user may not create it.
    #[error(
        "socket: {}: permission denied: run it as root (sudo gossamer agent), or try gossamer demo",
        .0.display()
    )]
    NotPermitted(PathBuf),
    /// The kernel refused.
    #[error("socket: {}: {error}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
}

/// The file of a listening socket. It is removed on drop.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode of the file. `None` if they could not be read.
    file: Option<(u64, u64)>,
}

impl Socket {
    /// Listens on a socket that only this user may connect to (mode 0600).
    ///
    /// # Errors
    /// Fails if another process listens there, if the path is not a socket, or if the kernel refuses.
    pub fn listen(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let fail = |error: io::Error| match error.kind() {
            io::ErrorKind::PermissionDenied => SocketError::NotPermitted(path.to_owned()),
            _ => SocketError::Io { path: path.to_owned(), error },
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(fail)?;
        }
        remove_stale(path)?;
        let listener = listen_for_owner(path).map_err(fail)?;
        Ok((Self { path: path.to_owned(), file: device_and_inode(path) }, listener))
    }

    /// Returns whether the file is still the one that was created: another program may have removed or
    /// replaced it.
    pub fn still_exists(&self) -> bool {
        self.file.is_some() && device_and_inode(&self.path) == self.file
    }
}

/// Creates the socket. It accepts no connection until it has mode 0600, because secrets can be read over
/// it. (A umask would apply to all threads.)
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
        if self.still_exists() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn device_and_inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Removes a socket that no process listens on, or whose process is ending: a killed agent may hold it
/// open for long without answering.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SocketError::Io { path, error }),
        Ok(meta) if !meta.file_type().is_socket() => Err(SocketError::NotASocket(path)),
        Ok(_) if UnixStream::connect(&path).is_ok_and(|peer| !is_ending_process(&peer)) => {
            Err(SocketError::InUse(path))
        }
        // The process that ends may remove it first.
        Ok(_) => files::remove(&path).map_err(|error| SocketError::Io { path, error }),
    }
}

/// Returns whether the listening process is ending. `false` for a process of another PID namespace.
fn is_ending_process(peer: &UnixStream) -> bool {
    let listener = getsockopt(peer, PeerCredentials).ok();
    let pid = listener.and_then(|credentials| u32::try_from(credentials.pid()).ok());
    pid.is_some_and(|pid| pid != 0 && holder::is_ending(pid))
}
