//! Agents that run on this host, for commands that remove what agents have created.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::{RETRY_INTERVAL, block_on, confirm::loss_of_membership};
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
            true => loss_of_membership(&self.socket),
            false => format!("The agent at {} ends.", self.socket.display()),
        }
    }

    /// Lets it leave its cluster, or remove its state if it is in none, and waits until it has ended.
    ///
    /// # Errors
    /// Fails if it refuses, or still runs after some seconds.
    pub fn leave(&self) -> anyhow::Result<Left> {
        let answer: Result<Left, _> = block_on(api::post_as(&self.socket, "/v1/leave"))?;
        let left = answer.context("this host cannot leave its cluster")?;
        let begun = Instant::now();
        while !self.has_ended() {
            let socket = self.socket.display();
            ensure!(begun.elapsed() < END_TIMEOUT, "the agent at {socket} still runs: stop it");
            thread::sleep(RETRY_INTERVAL);
        }
        Ok(left)
    }

    fn has_ended(&self) -> bool {
        let answer = block_on(api::get(&self.socket, "/v1/status"));
        matches!(answer, Ok(Err(ClientError::NoAgent { .. })))
    }
}
