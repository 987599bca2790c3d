//! The control socket: HTTP with JSON on a unix socket, for `gossamer status` and for `curl`.
//!
//! Requests become questions to the agent's loop and wait for its answer; nothing here knows or changes
//! state. The socket is for its owner only (mode 0600).

mod client;
mod metrics;
mod ping;
mod pods;
mod server;
mod socket;
mod status;

pub use client::{ClientError, block_on, get, post, post_json};
pub use ping::{PingReport, Reach};
pub use pods::{
    AttachRequest, Attached, AttachedAddress, AttachmentName, PodError, PodErrorKind, PodStatus,
};
pub use server::{Question, observe, put, serve};
pub use socket::{Socket, SocketError};
pub use status::{AgentStatus, KernelStatus, PathStatus};
