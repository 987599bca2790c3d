//! First packets of handshakes, for tests of what a flood of them does.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use anyhow::Context as _;
use quinn_proto::{ClientConfig, Connection, DatagramEvent, Endpoint, EndpointConfig};

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

/// A handshake that is begun and never finished.
pub struct Unfinished {
    endpoint: Endpoint,
    connection: Connection,
}

impl Unfinished {
    /// Begins one with an address, and returns its first packet.
    ///
    /// # Errors
    /// Fails if QUIC refuses the address.
    pub fn begin(credentials: &Credentials, to: SocketAddr) -> anyhow::Result<(Self, Vec<u8>)> {
        let client = ClientConfig::new(credentials.client.clone());
        let mut endpoint = Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
        let now = Instant::now();
        let (_, connection) = endpoint.connect(now, client, to, SERVER_NAME)?;
        let mut unfinished = Self { endpoint, connection };
        let packet = unfinished.next(now).context("a connection that begins sends nothing")?;
        Ok((unfinished, packet))
    }

    /// The packet that proves the own address, if `answer` asks for that.
    pub fn prove(&mut self, from: SocketAddr, answer: &[u8]) -> Option<Vec<u8>> {
        // The form and the type of a Retry (RFC 9000, 17.2.5). What else comes is not answered: the handshake
        // would go on, or end.
        if answer.first().is_none_or(|first| first & 0xf0 != 0xf0) {
            return None;
        }
        let now = Instant::now();
        let mut refusal = Vec::new();
        let event = self.endpoint.handle(now, from, None, None, answer.into(), &mut refusal);
        let Some(DatagramEvent::ConnectionEvent(_, event)) = event else { return None };
        self.connection.handle_event(event);
        self.next(now)
    }

    fn next(&mut self, now: Instant) -> Option<Vec<u8>> {
        let mut packet = Vec::new();
        let _ = self.connection.poll_transmit(now, 1, &mut packet)?;
        Some(packet)
    }
}
