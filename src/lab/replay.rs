//! A stranger that proves its addresses once, and begins handshakes with these proofs over and over.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::NetNs;
use crate::{
    transport::{Credentials, NodeKey, Unfinished},
    wire::Secret,
};

/// Different packets with one proof, which are sent by turns.
const PACKETS: usize = 1_024;
/// A proof is taken for 15 s.
const RENEWED: Duration = Duration::from_secs(10);

/// Sends until it is dropped.
pub struct Replay {
    ends: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Replay {
    /// Begins to send so many packets per second from all of these addresses by turns.
    ///
    /// # Errors
    /// Fails if the stranger's credentials cannot be made, or if an address is not the host's.
    pub fn start(
        netns: &NetNs,
        to: SocketAddr,
        from: &[IpAddr],
        per_second: u32,
    ) -> anyhow::Result<Self> {
        let key = NodeKey::from_seed([66; 32])?;
        let stranger = Credentials::new(&[Secret::new(vec![66; 32])?], &key)?;
        let sockets: Vec<UdpSocket> = netns.run(|| {
            from.iter().map(|from| UdpSocket::bind((*from, 0))).collect::<io::Result<_>>()
        })?;
        for socket in &sockets {
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        }
        let (ends, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (ends, sent) = (ends.clone(), sent.clone());
            move || {
                while !ends.load(Ordering::Relaxed) {
                    let packets = packets(&sockets, &stranger, to).unwrap_or_default();
                    let begun = Instant::now();
                    let due = |count: u64| Duration::from_secs(count) / per_second;
                    for (count, (socket, packet)) in (0..).zip(packets.iter().cycle()) {
                        if ends.load(Ordering::Relaxed) || begun.elapsed() > RENEWED {
                            break;
                        }
                        thread::sleep(due(count).saturating_sub(begun.elapsed()));
                        let is_sent = socket.send(packet).is_ok();
                        sent.fetch_add(u64::from(is_sent), Ordering::Relaxed);
                    }
                }
            }
        });
        Ok(Self { ends, sent, thread: Some(thread) })
    }

    /// Packets sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// First packets of as many handshakes, with one proof of the address of each socket.
fn packets<'a>(
    sockets: &'a [UdpSocket],
    stranger: &Credentials,
    to: SocketAddr,
) -> anyhow::Result<Vec<(&'a UdpSocket, Vec<u8>)>> {
    let mut answers = Vec::new();
    let mut answer = [0; 2_048];
    for socket in sockets {
        // Answers to the packets before are of no use.
        socket.set_nonblocking(true)?;
        while socket.recv(&mut answer).is_ok() {}
        socket.set_nonblocking(false)?;
        socket.send(&Unfinished::begin(stranger, to)?.1)?;
        let length = socket.recv(&mut answer)?;
        answers.push((socket, answer[..length].to_vec()));
    }
    let mut packets = Vec::new();
    for (socket, answer) in answers.iter().cycle().take(PACKETS) {
        let (mut handshake, first) = Unfinished::begin(stranger, to)?;
        let proof = handshake.reuse(stranger, to, &first, answer);
        packets.push((*socket, proof.context("no Retry")?));
    }
    Ok(packets)
}
