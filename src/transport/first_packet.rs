//! First packets of handshakes, for tests of what a flood of them does.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use quinn_proto::{ClientConfig, Endpoint, EndpointConfig};

use super::credentials::{Credentials, SERVER_NAME};

/// Makes first packets as a host with these credentials sends them to an address, each of a handshake of its
/// own.
///
/// # Errors
/// Fails if QUIC refuses the address.
pub fn first_packets(
    credentials: &Credentials,
    to: SocketAddr,
    count: usize,
) -> anyhow::Result<Vec<Vec<u8>>> {
    let client = ClientConfig::new(credentials.client.clone());
    let mut endpoint = Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
    let mut packets = Vec::with_capacity(count);
    for _ in 0..count {
        let now = Instant::now();
        let (_, mut connection) = endpoint.connect(now, client.clone(), to, SERVER_NAME)?;
        let mut packet = Vec::new();
        let transmit = connection.poll_transmit(now, 1, &mut packet);
        anyhow::ensure!(transmit.is_some(), "a connection that begins sends nothing");
        packets.push(packet);
    }
    Ok(packets)
}
