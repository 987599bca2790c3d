//! A non-member that proves its address, starts handshakes, and never finishes them.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::Context as _;

use super::{
    NetNs,
    attack::{Attack, non_member},
};
use crate::transport::{Credentials, Unfinished};

/// Longest wait for the answer to a first packet.
const TIMEOUT: Duration = Duration::from_millis(50);

/// Starts handshakes, one after another, until it is dropped.
pub struct StalledHandshakes(Attack);

impl StalledHandshakes {
    /// Starts handshakes with `to`, from each of the addresses in turn.
    ///
    /// # Errors
    /// Fails if the non-member's credentials cannot be created.
    pub fn start(netns: &NetNs, to: SocketAddr, from: Vec<IpAddr>) -> anyhow::Result<Self> {
        let non_member = non_member()?;
        let attack = netns.run(|| {
            Attack::start(move |progress| {
                for address in from.iter().cycle() {
                    if progress.is_stopped() {
                        break;
                    }
                    let socket = UdpSocket::bind((*address, 0));
                    progress
                        .count(socket.is_ok_and(|socket| begin(&socket, &non_member, to).is_ok()));
                }
            })
        })?;
        Ok(Self(attack))
    }

    /// Returns the number of handshakes started so far.
    pub fn begun(&self) -> u64 {
        self.0.successes()
    }
}

fn begin(socket: &UdpSocket, non_member: &Credentials, to: SocketAddr) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(TIMEOUT))?;
    let (mut handshake, first) = Unfinished::begin(non_member, to)?;
    socket.send_to(&first, to)?;
    let mut answer = [0; 2_048];
    let (length, _) = socket.recv_from(&mut answer)?;
    let proof = handshake.prove(to, &answer[..length]);
    socket.send_to(&proof.context("no Retry")?, to)?;
    Ok(())
}
