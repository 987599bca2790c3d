//! A non-member that floods a node with first packets of handshakes, under forged source addresses.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::Host;
use crate::{
    transport::{Credentials, NodeKey, first_packets},
    wire::Secret,
};

/// Each forged address has a socket.
const SOURCES: u8 = 250;
/// Different first packets that are made beforehand, and sent over and over.
const PACKETS: usize = 2_048;

/// From where the packets seem to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Addresses of the underlay's own network that no host has.
    UnusedNeighbors,
    /// Addresses far away.
    Far,
    /// The address of the host that sends.
    Honest,
}

/// Sends until it is dropped.
pub struct Flood {
    ends: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Begins to send so many packets per second from a host.
    ///
    /// # Errors
    /// Fails if the packets cannot be made, or if the host may not forge addresses.
    pub fn start(
        host: &Host,
        to: SocketAddrV4,
        source: Source,
        per_second: u32,
    ) -> anyhow::Result<Self> {
        let key = NodeKey::from_seed([66; 32])?;
        let non_member = Credentials::new(&[Secret::new(vec![66; 32])?], &key)?;
        let packets = first_packets(&non_member, to.into(), PACKETS)?;
        let from = |number: u8| match source {
            Source::UnusedNeighbors => Ipv4Addr::new(10, 99, 200, number),
            Source::Far => Ipv4Addr::new(198, 18, 0, number),
            Source::Honest => host.ip,
        };
        let sockets: Vec<UdpSocket> =
            host.netns.run(|| (1..=SOURCES).map(|n| socket(from(n))).collect::<io::Result<_>>())?;
        let (ends, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (ends, sent) = (ends.clone(), sent.clone());
            move || {
                let begun = Instant::now();
                let due = |count: u64| Duration::from_secs(count) / per_second;
                for (count, packet) in (0..).zip(packets.iter().cycle()) {
                    if ends.load(Ordering::Relaxed) {
                        break;
                    }
                    thread::sleep(due(count).saturating_sub(begun.elapsed()));
                    let socket = &sockets[count as usize % sockets.len()];
                    // A full queue loses some, as networks do.
                    let is_sent = socket.send_to(packet, to).is_ok();
                    sent.fetch_add(u64::from(is_sent), Ordering::Relaxed);
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

impl Drop for Flood {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket of any address, its own or not.
fn socket(from: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
