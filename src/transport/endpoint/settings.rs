//! How quinn is set up: for few, small and long-lived connections among members that know each other.

use std::{sync::Arc, time::Duration};

use quinn::{ClientConfig, EndpointConfig, ServerConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

use crate::transport::Credentials;

/// Connections not used for this long are dropped and made again when needed. Gossip meets a peer now and
/// then for as long as it is a member; a handshake is 4 KB, a connection that waits costs memory only.
const IDLE: Duration = Duration::from_secs(600);
/// First packets of handshakes that wait for admission. What comes beyond is not answered.
const MAX_INCOMING: usize = 1024;
/// What may come behind them before they are admitted.
const MAX_BEHIND_ONE: u64 = 16 << 10;
const MAX_BEHIND_ALL: u64 = 2 << 20;

/// What this node is like when it is dialled, and when it dials.
pub fn roles(credentials: &Credentials) -> (ServerConfig, ClientConfig) {
    let settings = Arc::new(settings());
    let mut server = ServerConfig::with_crypto(credentials.server.clone());
    server.transport_config(settings.clone());
    server.max_incoming(MAX_INCOMING);
    server.incoming_buffer_size(MAX_BEHIND_ONE);
    server.incoming_buffer_size_total(MAX_BEHIND_ALL);
    let mut client = ClientConfig::new(credentials.client.clone());
    client.transport_config(settings);
    let ids = credentials.first_ids.clone();
    client.initial_dst_cid_provider(Arc::new(move || ids.choose()));
    (server, client)
}

pub fn endpoint_settings(credentials: &Credentials) -> EndpointConfig {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &credentials.reset_key);
    let mut settings = EndpointConfig::new(Arc::new(key));
    // Connection ids of the process before must be recognised, or they are ignored in silence.
    let [id_key, ..] = *credentials.reset_key.as_chunks::<8>().0 else { return settings };
    settings.cid_generator(move || {
        Box::new(HashedConnectionIdGenerator::from_key(u64::from_le_bytes(id_key)))
    });
    settings
}

/// First guess of the round trip. A handshake begins again after three times as long, which is what a
/// node waits for whose seed starts a moment after it; RFC 9002 suggests 333 ms, for the whole internet.
const FIRST_RTT: Duration = Duration::from_millis(20);

/// Small buffers, few streams, no keep-alive, and no search for larger packets: 1,200 bytes do.
fn settings() -> TransportConfig {
    let mut settings = TransportConfig::default();
    settings
        .max_idle_timeout(Some(VarInt::from_u32(IDLE.as_millis() as u32).into()))
        .initial_rtt(FIRST_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(32))
        .max_concurrent_uni_streams(VarInt::from_u32(32))
        .stream_receive_window(VarInt::from_u32(1 << 19))
        .receive_window(VarInt::from_u32(1 << 20))
        .datagram_receive_buffer_size(Some(1 << 17))
        .datagram_send_buffer_size(1 << 17)
        .mtu_discovery_config(None);
    settings
}
