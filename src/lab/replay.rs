//! A non-member that proves its addresses once, and begins handshakes with these proofs repeatedly.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{
    NetNs,
    attack::{Attack, non_member},
};
use crate::transport::{Credentials, Unfinished};

/// Number of different packets with one proof, which are sent in turn.
const PACKETS: usize = 1_024;
/// Time after which the proofs are renewed. A node accepts a proof for 15 s.
const PROOF_LIFETIME: Duration = Duration::from_secs(10);

/// A flood of replayed proofs. It ends on drop.
pub struct Replay(Attack);

impl Replay {
    /// Starts to send `per_second` packets per second, from each of the addresses in turn.
    ///
    /// # Errors
    /// Fails if the non-member's credentials cannot be created, or if an address is not the host's.
    pub fn start(
        netns: &NetNs,
        to: SocketAddr,
        from: &[IpAddr],
        per_second: u32,
    ) -> anyhow::Result<Self> {
        let non_member = non_member()?;
        let sockets: Vec<UdpSocket> = netns.run(|| {
            from.iter().map(|from| UdpSocket::bind((*from, 0))).collect::<io::Result<_>>()
        })?;
        for socket in &sockets {
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        }
        let attack = Attack::start(move |progress| {
            while !progress.is_stopped() {
                let packets = packets(&sockets, &non_member, to).unwrap_or_default();
                let begun = Instant::now();
                let due = |count: u64| Duration::from_secs(count) / per_second;
                for (count, (socket, packet)) in (0..).zip(packets.iter().cycle()) {
                    if progress.is_stopped() || begun.elapsed() > PROOF_LIFETIME {
                        break;
                    }
                    thread::sleep(due(count).saturating_sub(begun.elapsed()));
                    progress.count(socket.send(packet).is_ok());
                }
            }
        })?;
        Ok(Self(attack))
    }

    /// Returns the number of packets sent so far.
    pub fn sent(&self) -> u64 {
        self.0.successes()
    }
}

/// Returns first packets of [`PACKETS`] handshakes, with one proof of the address of each socket.
fn packets<'a>(
    sockets: &'a [UdpSocket],
    non_member: &Credentials,
    to: SocketAddr,
) -> anyhow::Result<Vec<(&'a UdpSocket, Vec<u8>)>> {
    let mut answers = Vec::new();
    let mut answer = [0; 2_048];
    for socket in sockets {
        // Discards the answers to earlier packets.
        socket.set_nonblocking(true)?;
        while socket.recv(&mut answer).is_ok() {}
        socket.set_nonblocking(false)?;
        socket.send(&Unfinished::begin(non_member, to)?.1)?;
        let length = socket.recv(&mut answer)?;
        answers.push((socket, answer[..length].to_vec()));
    }
    let mut packets = Vec::new();
    for (socket, answer) in answers.iter().cycle().take(PACKETS) {
        let (mut handshake, first) = Unfinished::begin(non_member, to)?;
        let proof = handshake.reuse(non_member, to, &first, answer);
        packets.push((*socket, proof.context("no Retry")?));
    }
    Ok(packets)
}
