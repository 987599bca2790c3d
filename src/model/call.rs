//! Identifiers that connect the core with the adapters that carry out its outputs.

/// The number of a durable write, counted per process. An output that depends on a write names it in `after`.
pub type WriteSeq = u64;

/// Identifies a request of the core; each one ends exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// Identifies an inquiry of this agent to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InquiryId(pub u64);

/// Identifies a peer's request, as numbered by the transport that returns the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplyId(pub u64);

/// The reason for which a call brought no answer. The call has changed nothing on this node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No connection, no answer in time, or an answer that cannot be used.
    #[error("no answer: {0}")]
    Unreachable(String),
    /// The name of the host has no address.
    #[error("the name {name} does not resolve ({why}): check DNS or /etc/hosts")]
    Unresolved {
        /// The name.
        name: String,
        /// What the resolver says.
        why: String,
    },
    /// This host has no route to the address.
    #[error(
        "this host has no route to {address} ({why}): it needs an address and a route of that family, as all \
         members of a cluster use one family"
    )]
    NoRoute {
        /// The address, or the name with addresses of another family.
        address: String,
        /// What the kernel says.
        why: String,
    },
    /// The TLS handshake failed on a certificate of either side: the secrets differ.
    #[error("the handshake was refused: {0}")]
    Rejected(String),
    /// The address is this node's own.
    #[error("the address is this node's own")]
    Myself,
}
