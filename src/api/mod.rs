//! The control socket: HTTP with JSON on a Unix socket, for the command line and for `curl`.
//!
//! [`AgentRequest`] is what the agent can be asked, with the types of its answers. Each request is passed to
//! the agent's loop and waits for its answer; this module has no state. Only the socket's owner may use it
//! (mode 0600).

mod answers;
mod client;
mod dashboard;
mod error;
mod events;
mod matrix;
mod members;
mod metrics;
mod ping;
mod pods;
mod request;
mod routes;
#[cfg(test)]
mod schema;
mod server;
mod status;
mod verdict;

pub use answers::{
    ClusterToken, Forgotten, IdentityReset, Left, Membership, NewSecret, SecretStatus, Secrets,
};
pub use client::{
    ClientError, follow, get, get_as, listener_pid, other_version, own_version, post, post_as,
    post_json, post_json_as, post_with, typed,
};
pub use error::{ApiError, ApiErrorCode};
pub use events::{
    Event, EventFeed, EventKind, EventLevel, MemberChange, PastEvents, SAMPLE_INTERVAL, Sample,
    Samples,
};
pub use matrix::{EncodedMatrix, Matrix, MatrixPath, MatrixRow};
pub use members::{FreeRange, Member, MemberState, Reclaiming, SlotCounts};
pub use ping::{PingReport, Reach};
pub use pods::{
    AttachRequest, Attached, AttachedAddress, AttachedRoute, AttachmentName, Checked, Detached,
    PodError, PodErrorKind, PodStatus, Pods, Released,
};
pub use request::{AgentRequest, SecretStep};
pub use routes::{EntryVerdict, KernelEntry, Routes};
pub use server::{serve, serve_http};
pub use status::{
    AgentStatus, CheckState, CheckStatus, Counters, Handshakes, KernelStatus, PathStatus, Phase,
};
pub use verdict::{Verdict, VerdictState};
