//! Agents that run on this host, for commands that remove what agents have created.

use std::{
    io::ErrorKind,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};

use super::{RETRY_INTERVAL, block_on, confirm::possible_loss_of_membership};
use crate::api::{self, ClientError, Left, Membership};

/// Time that an agent which has left, or got a signal, has to end.
pub const END_TIMEOUT: Duration = Duration::from_secs(10);

/// An agent that runs on this host.
pub struct RunningAgent {
    socket: PathBuf,
    is_member: bool,
}

impl RunningAgent {
    /// Returns the agents that answer at these sockets.
    ///
    /// # Errors
    /// Fails if an agent cannot be queried.
    pub fn find<'a>(sockets: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<Vec<Self>> {
        let mut found = Vec::new();
        for socket in sockets {
            match block_on(api::get_as::<Membership>(socket, "/v1/status"))? {
                Ok(Membership { cluster, .. }) => {
                    found.push(Self { socket: socket.clone(), is_member: cluster.is_some() });
                }
                Err(ClientError::NoAgent { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    /// Returns the path of its control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns whether it is a member of a cluster.
    pub const fn is_member(&self) -> bool {
        self.is_member
    }

    /// Says what this host loses if the agent leaves its cluster.
    pub fn costs(&self) -> String {
        match self.is_member {
            true => possible_loss_of_membership(&self.socket),
            false => format!("The agent at {} ends.", self.socket.display()),
        }
    }

    /// Lets it leave its cluster, or remove its state if it is in none, and waits until it has ended.
    ///
    /// # Errors
    /// Fails if it refuses, or still runs after some seconds.
    pub fn leave(&self) -> anyhow::Result<Left> {
        let left = self.request_leave()?.context("this host cannot leave its cluster")?;
        self.wait_until_ended("stop it")?;
        Ok(left)
    }

    /// Asks it to leave its cluster, or to remove its state if it is in none. Returns its answer; it ends
    /// after it has left.
    ///
    /// # Errors
    /// Fails if the request cannot be made.
    pub fn request_leave(&self) -> anyhow::Result<Result<Left, ClientError>> {
        Ok(block_on(api::post_as(&self.socket, "/v1/leave"))?)
    }

    /// Asks it to stop.
    ///
    /// # Errors
    /// Fails if it cannot be signalled.
    pub fn request_stop(&self) -> anyhow::Result<()> {
        let Some(pid) = api::listener_pid(&self.socket) else { return Ok(()) };
        kill(pid, Signal::SIGTERM).with_context(|| format!("agent at {}", self.socket.display()))
    }

    /// Waits until it has ended. `remedy` says what to do if it does not.
    ///
    /// # Errors
    /// Fails if it still runs after some seconds.
    pub fn wait_until_ended(&self, remedy: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !self.has_ended() {
            let socket = self.socket.display();
            ensure!(begun.elapsed() < END_TIMEOUT, "the agent at {socket} still runs: {remedy}");
            thread::sleep(RETRY_INTERVAL);
        }
        Ok(())
    }

    /// Returns whether no program listens at its socket.
    pub fn has_ended(&self) -> bool {
        let connected = UnixStream::connect(&self.socket).map_err(|error| error.kind());
        matches!(connected, Err(ErrorKind::NotFound | ErrorKind::ConnectionRefused))
    }
}
