//! The control socket: HTTP with JSON on a Unix socket, for the command line and for `curl`.
//!
//! Each request is passed to the agent's loop and waits for its answer; this module has no state. Only
//! the socket's owner may use it (mode 0600).

mod client;
mod connections;
mod dashboard;
mod descriptor;
mod error;
mod events;
mod matrix;
mod members;
mod metrics;
mod paced;
mod ping;
mod pods;
mod question;
mod routes;
#[cfg(test)]
mod schema;
mod server;
mod socket;
mod status;
mod verdict;

pub use client::{
    ClientError, block_on, follow, get, get_as, other_version, own_version, post, post_json,
    post_with, typed,
};
pub use connections::{
    Closing, Excess, serve as serve_connections, serve_until as serve_connections_until,
};
pub use error::{ApiError, ApiErrorCode};
pub use events::{Event, EventFeed, EventKind, EventLevel, PastEvents, SAMPLE_INTERVAL, Sample};
pub use matrix::{Matrix, MatrixPath, MatrixRow};
pub use members::{FreeRange, Member, MemberState, Reclaiming, SlotCounts};
pub use ping::{PingReport, Reach};
pub use pods::{
    AttachRequest, Attached, AttachedAddress, AttachedRoute, AttachmentName, PodError,
    PodErrorKind, PodStatus,
};
pub use question::{Question, SecretStep};
pub use routes::KernelEntry;
pub use server::{serve, serve_http, submit};
pub use socket::{Socket, SocketError};
pub use status::{
    AgentStatus, CheckState, CheckStatus, Counters, Handshakes, KernelStatus, PathStatus, Phase,
};
pub use verdict::{Verdict, VerdictState};
