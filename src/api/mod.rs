//! The control socket: HTTP with JSON on a unix socket, for `gossamer status` and for `curl`.
//!
//! Requests become questions to the agent's loop and wait for its answer; nothing here knows or changes
//! state. The socket is for its owner only (mode 0600).

mod client;
mod connections;
mod dashboard;
mod descriptor;
mod events;
mod matrix;
mod metrics;
mod paced;
mod ping;
mod pods;
mod routes;
mod server;
mod socket;
mod status;

pub use client::{
    ClientError, block_on, follow, get, other_version, own_version, post, post_json, post_with,
};
pub use connections::{
    Closing, Excess, serve as serve_connections, serve_until as serve_connections_until,
};
pub use events::{Event, EventFeed, EventKind, EventLevel, SAMPLE_INTERVAL, Sample};
pub use matrix::{Matrix, MatrixPath, MatrixRow};
pub use ping::{PingReport, Reach};
pub use pods::{
    AttachRequest, Attached, AttachedAddress, AttachedRoute, AttachmentName, PodError,
    PodErrorKind, PodStatus,
};
pub use routes::KernelEntry;
pub use server::{Question, SecretStep, observe, put, serve};
pub use socket::{Socket, SocketError};
pub use status::{AgentStatus, CheckState, CheckStatus, KernelStatus, MemberState, PathStatus};
