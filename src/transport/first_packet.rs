//! First packets of handshakes, for tests with floods of them.

use std::{net::SocketAddr, ops::Range, sync::Arc, time::Instant};

use anyhow::Context as _;
use quinn_proto::{
    ClientConfig, Connection, ConnectionId, ConnectionIdGenerator as _, DatagramEvent, Endpoint,
    EndpointConfig, HashedConnectionIdGenerator, crypto::ServerConfig as _,
};

use super::credentials::{Credentials, SERVER_NAME};

/// Returns first packets of separate handshakes, as a host with these credentials sends them.
///
/// # Errors
/// When QUIC refuses the address.
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
    /// Begins a handshake, and returns it with its first packet.
    ///
    /// # Errors
    /// When QUIC refuses the address.
    pub fn begin(credentials: &Credentials, to: SocketAddr) -> anyhow::Result<(Self, Vec<u8>)> {
        let client = ClientConfig::new(credentials.client.clone());
        let mut endpoint = Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
        let now = Instant::now();
        let (_, connection) = endpoint.connect(now, client, to, SERVER_NAME)?;
        let mut unfinished = Self { endpoint, connection };
        let packet = unfinished.next(now).context("a connection that begins sends nothing")?;
        Ok((unfinished, packet))
    }

    /// Returns the packet that proves this endpoint's address, if `answer` is a Retry.
    pub fn prove(&mut self, from: SocketAddr, answer: &[u8]) -> Option<Vec<u8>> {
        // Form and type of a Retry (RFC 9000, 17.2.5). Other packets are not processed: the
        // handshake would continue or end.
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

    /// Returns the packet that reuses the proof from `answer`, a Retry for another handshake of the
    /// same socket. `first` is this handshake's first packet.
    pub fn reuse(
        &mut self,
        credentials: &Credentials,
        from: SocketAddr,
        first: &[u8],
        answer: &[u8],
    ) -> Option<Vec<u8>> {
        let (own, _) = Ids::of(first)?;
        let (_, rest) = Ids::of(answer)?;
        let token = &rest[..rest.len().checked_sub(RETRY_TAG)?];
        let id = HashedConnectionIdGenerator::new().generate_cid();
        let mut retry = answer[..VERSION.end].to_vec();
        for id in [own.source, &id] {
            retry.push(u8::try_from(id.len()).ok()?);
            retry.extend_from_slice(id);
        }
        retry.extend_from_slice(token);
        let version = u32::from_be_bytes(answer[VERSION].try_into().ok()?);
        let destination = ConnectionId::new(own.destination);
        retry.extend_from_slice(&credentials.server.retry_tag(version, &destination, &retry));
        self.prove(from, &retry)
    }

    /// Returns the next packet of the connection.
    fn next(&mut self, now: Instant) -> Option<Vec<u8>> {
        let mut packet = Vec::new();
        let _ = self.connection.poll_transmit(now, 1, &mut packet)?;
        Some(packet)
    }
}

/// Position of the version in long headers (RFC 9000, 17.2).
const VERSION: Range<usize> = 1..5;
/// Bytes of the integrity tag at the end of a Retry (RFC 9001, 5.8).
const RETRY_TAG: usize = 16;

/// The connection ids in a long header.
struct Ids<'a> {
    destination: &'a [u8],
    source: &'a [u8],
}

impl<'a> Ids<'a> {
    /// Parses the ids; also returns the following bytes.
    fn of(packet: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let next = |bytes: &'a [u8]| {
            let (length, rest) = bytes.split_first()?;
            rest.split_at_checked(usize::from(*length))
        };
        let (destination, rest) = next(packet.get(VERSION.end..)?)?;
        let (source, rest) = next(rest)?;
        Some((Self { destination, source }, rest))
    }
}
