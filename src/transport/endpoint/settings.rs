//! Configuration of quinn for few, small and long-lived connections.

use std::{sync::Arc, time::Duration};

use quinn::{ClientConfig, EndpointConfig, ServerConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

use crate::transport::Credentials;

/// Time after which an idle connection is closed; it is re-created on demand. Gossip contacts each
/// peer now and then. A handshake costs 4 KB of traffic, an idle connection only memory.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Upper limit of first packets that wait for admission. Further ones are dropped.
const MAX_INCOMING: usize = 1024;
/// Upper limits of the bytes that are buffered before admission, per handshake and in total.
const MAX_BUFFERED_PER_HANDSHAKE: u64 = 16 << 10;
const MAX_BUFFERED: u64 = 2 << 20;

/// Returns the configurations for accepting and for dialing.
pub fn roles(credentials: &Credentials) -> (ServerConfig, ClientConfig) {
    let settings = Arc::new(settings());
    let mut server = ServerConfig::with_crypto(credentials.server.clone());
    server.transport_config(settings.clone());
    server.max_incoming(MAX_INCOMING);
    server.incoming_buffer_size(MAX_BUFFERED_PER_HANDSHAKE);
    server.incoming_buffer_size_total(MAX_BUFFERED);
    let mut client = ClientConfig::new(credentials.client.clone());
    client.transport_config(settings);
    let ids = credentials.first_ids.clone();
    client.initial_dst_cid_provider(Arc::new(move || ids.choose()));
    (server, client)
}

/// Returns the configuration of the endpoint.
pub fn endpoint_settings(credentials: &Credentials) -> EndpointConfig {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &credentials.reset_key);
    let mut settings = EndpointConfig::new(Arc::new(key));
    // Connection ids of the previous process have to be recognized; otherwise their packets are
    // dropped without a reset.
    let [id_key, ..] = *credentials.reset_key.as_chunks::<8>().0 else { return settings };
    settings.cid_generator(move || {
        Box::new(HashedConnectionIdGenerator::from_key(u64::from_le_bytes(id_key)))
    });
    settings
}

/// Initial estimate of the round trip. A lost first packet is repeated after three times this time,
/// which a node waits whose seed starts a moment later. RFC 9002 suggests 333 ms, for the internet.
const INITIAL_RTT: Duration = Duration::from_millis(20);

/// Small buffers, few streams, no keep-alive, and no MTU discovery: packets of 1,200 bytes suffice.
fn settings() -> TransportConfig {
    let mut settings = TransportConfig::default();
    settings
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32).into()))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(32))
        .max_concurrent_uni_streams(VarInt::from_u32(32))
        .stream_receive_window(VarInt::from_u32(1 << 19))
        .receive_window(VarInt::from_u32(1 << 20))
        .datagram_receive_buffer_size(Some(1 << 17))
        .datagram_send_buffer_size(1 << 17)
        .mtu_discovery_config(None);
    settings
}
