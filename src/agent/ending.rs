//! Why an agent did not start, and why one ended.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use crate::{
    config::ConfigError,
    core::StartError,
    dataplane::kernel::KernelError,
    http,
    model::{ClusterId, NodeId},
    store::StoreError,
    transport::{BindError, CredentialError},
    underlay,
    wire::TokenError,
};

/// The reason why an agent did not start: one sentence with the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory or the database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No interface can carry tunnels.
    #[error(transparent)]
    Underlay(#[from] underlay::UnderlayError),
    /// A kernel request failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The gossip port cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The core refused the configuration or the records.
    #[error(transparent)]
    Node(#[from] StartError),
    /// The TLS credentials cannot be made.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// The token or secret is invalid.
    #[error(transparent)]
    Secret(#[from] TokenError),
    /// The node is to join a cluster without a token.
    #[error("join: a token is needed: pass --token-file with the output of `gossamer token`")]
    NoToken,
    /// A cluster is to be created with the token of an existing one.
    #[error(
        "init: the token is of cluster {0}, which exists: enter it with --join, \
         or use a token made by `gossamer token --new`"
    )]
    TokenOfACluster(ClusterId),
    /// The database of a member is lost, and no seed is known.
    #[error(
        "state_dir: this host is in cluster {0}, but its database is lost and no other member is known: \
         name one with --join, or remove the state directory to join as a new node with another subnet"
    )]
    LostDatabase(ClusterId),
    /// The listening address does not receive packets to the underlay address.
    #[error(
        "listen: {listen} does not receive what is sent to the underlay address {underlay}: \
         leave it out, or set --advertise or --iface"
    )]
    Listen {
        /// The configured address.
        listen: SocketAddr,
        /// The address of the underlay.
        underlay: IpAddr,
    },
    /// The podCIDR of this node cannot be determined.
    #[error("pod_cidr: {0}")]
    PodCidr(String),
    /// The HTTP server cannot listen.
    #[error("http: {address}: {error}: choose another address, or leave it out")]
    Http {
        /// The configured address.
        address: SocketAddr,
        /// The reason.
        error: io::Error,
    },
    /// The control socket cannot be opened.
    #[error(transparent)]
    Socket(#[from] http::SocketError),
    /// The system's random number generator failed.
    #[error("the system's random number generator failed: {0}")]
    Random(#[from] getrandom::Error),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Why an agent ended that had started.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// Stopped by a signal: all state stays, including the kernel's.
    Stopped,
    /// The node left its cluster, and nothing of it is left on this host.
    Left {
        /// The member that took over its slots, if it had any.
        successor: Option<NodeId>,
    },
    /// The node is no longer a member under this identity, and has to join as a new node.
    Restart,
    /// The node was assigned another subnet, and has to start again with it.
    Reassigned,
    /// The agent cannot continue; the sentence says why.
    Failed(String),
    /// A thread of this program failed: all state stays, including the kernel's.
    Broken(String),
}

/// The beginning and the end of an agent.
pub(super) struct Lifetime {
    /// Whether this process created the state, so that a refusal may remove it.
    pub(super) fresh: bool,
    /// Set when the kernel refuses the device of a new node: the reason, and when the agent ends.
    pub(super) giving_up: Option<(String, Instant)>,
    /// How the agent ends; set once it is to end.
    pub(super) ending: Option<Ending>,
}

impl Lifetime {
    /// Returns the lifetime of an agent that has just started.
    pub(super) const fn new(fresh: bool) -> Self {
        Self { fresh, giving_up: None, ending: None }
    }
}
