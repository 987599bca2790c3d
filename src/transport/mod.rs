//! QUIC between nodes: one UDP socket for both roles, with mutual TLS based on the cluster's
//! secret.
//!
//! Frames are sent as datagrams, or on a one-way stream if they are too large. A request and its
//! response share a two-way stream. All resources are bounded: queues drop their oldest frames, the
//! number of streams is limited, and each call has a timeout. This module does not read frames, and
//! identifies a peer by its certificate alone.

mod connection;
mod credentials;
mod endpoint;
mod first_id;
mod first_packet;
mod intake;
mod replies;

pub use connection::{Call, Event, Received};
pub use credentials::{CredentialError, Credentials, NodeKey};
pub use endpoint::{BindError, Flood, Handshakes, ReceiveBuffer, Transport, check_name};
pub use first_packet::{Unfinished, first_packets};
