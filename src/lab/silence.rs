//! A non-member that proves its address, starts handshakes, and never finishes them.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;

use super::NetNs;
use crate::{
    transport::{Credentials, NodeKey, Unfinished},
    wire::Secret,
};

/// Longest wait for the answer to a first packet.
const TIMEOUT: Duration = Duration::from_millis(50);

/// Starts handshakes, one after another, until it is dropped.
pub struct StalledHandshakes {
    stop: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl StalledHandshakes {
    /// Starts handshakes with `to`, from each of the addresses in turn.
    ///
    /// # Errors
    /// Fails if the non-member's credentials cannot be created.
    pub fn start(netns: &NetNs, to: SocketAddr, from: Vec<IpAddr>) -> anyhow::Result<Self> {
        let key = NodeKey::from_seed([66; 32])?;
        let non_member = Credentials::new(&[Secret::new(vec![66; 32])?], &key)?;
        let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let work = {
            let (stop, begun) = (stop.clone(), begun.clone());
            move || {
                for address in from.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let socket = UdpSocket::bind((*address, 0));
                    let is_begun =
                        socket.is_ok_and(|socket| begin(&socket, &non_member, to).is_ok());
                    begun.fetch_add(u64::from(is_begun), Ordering::Relaxed);
                }
            }
        };
        // The thread stays in the network namespace in which it is started.
        let thread = netns.run(|| thread::Builder::new().spawn(work))?;
        Ok(Self { stop, begun, thread: Some(thread) })
    }

    /// Returns the number of handshakes started so far.
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }
}

impl Drop for StalledHandshakes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
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
