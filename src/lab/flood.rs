//! A non-member that floods a node with first packets of handshakes from forged source addresses.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Host,
    attack::{Attack, non_member},
};
use crate::transport::first_packets;

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
pub struct Flood(Attack);

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
        let packets = first_packets(&non_member()?, to.into(), PACKETS)?;
        let from = |number: u8| match source {
            Source::UnusedNeighbors => Ipv4Addr::new(10, 99, 200, number),
            Source::Far => Ipv4Addr::new(198, 18, 0, number),
            Source::Honest => host.ip,
        };
        let sockets: Vec<UdpSocket> =
            host.netns.run(|| (1..=SOURCES).map(|n| socket(from(n))).collect::<io::Result<_>>())?;
        let attack = Attack::start(move |progress| {
            let begun = Instant::now();
            let due = |count: u64| Duration::from_secs(count) / per_second;
            for (count, packet) in (0..).zip(packets.iter().cycle()) {
                if progress.is_stopped() {
                    break;
                }
                thread::sleep(due(count).saturating_sub(begun.elapsed()));
                let socket = &sockets[count as usize % sockets.len()];
                // A full send queue loses packets, which is acceptable.
                progress.count(socket.send_to(packet, to).is_ok());
            }
        })?;
        Ok(Self(attack))
    }

    /// Returns the number of packets sent so far.
    pub fn sent(&self) -> u64 {
        self.0.successes()
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
