//! QUIC between nodes: one UDP socket for both roles, mutual TLS from the cluster's secret.
//!
//! Frames travel as datagrams (or, if too large, on a one-way stream); a question and its answer share a
//! two-way stream. Everything is bounded: queues drop their oldest frames, streams are few, every call
//! ends in time. Frames are not looked into here, and who a peer is comes from its certificate alone.

mod connection;
mod credentials;
mod endpoint;
mod first_id;
mod first_packet;
mod intake;

pub use connection::Event;
pub use credentials::{CredentialError, Credentials, NodeKey};
pub use endpoint::{BindError, Flood, Handshakes, ReceiveBuffer, Transport};
pub use first_packet::{Unfinished, first_packets};
