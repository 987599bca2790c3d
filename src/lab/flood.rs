//! A non-member that floods a node with first packets of handshakes from forged source addresses.

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

/// Number of forged addresses, each with a socket of its own.
const SOURCES: u8 = 250;
/// Number of different first packets. They are created in advance and sent repeatedly.
const PACKETS: usize = 2_048;

/// Source addresses of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Unused addresses of the underlay's network.
    UnusedNeighbors,
    /// Addresses outside the underlay's network.
    Far,
    /// The sender's real address.
    Honest,
}

/// A flood of packets. It ends on drop.
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Starts to send `per_second` packets per second from a host.
    ///
    /// # Errors
    /// Fails if the packets cannot be created, or if the host may not forge addresses.
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
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, sent) = (stop.clone(), sent.clone());
            move || {
                let begun = Instant::now();
                let due = |count: u64| Duration::from_secs(count) / per_second;
                for (count, packet) in (0..).zip(packets.iter().cycle()) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    thread::sleep(due(count).saturating_sub(begun.elapsed()));
                    let socket = &sockets[count as usize % sockets.len()];
                    // A full send queue loses packets, which is acceptable.
                    let is_sent = socket.send_to(packet, to).is_ok();
                    sent.fetch_add(u64::from(is_sent), Ordering::Relaxed);
                }
            }
        });
        Ok(Self { stop, sent, thread: Some(thread) })
    }

    /// Returns the number of packets sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens a socket that sends from any address, also from one that the host does not have.
fn socket(from: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
