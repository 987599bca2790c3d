//! Identifiers that connect the core with the adapters that carry out its outputs.

use std::net::SocketAddr;

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
    #[error("{0}")]
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
    /// The other node refused the handshake, or this one did: they speak different versions of the protocol,
    /// for example.
    #[error("{0}")]
    Rejected(String),
    /// The TLS handshake failed on a certificate of either side: the secrets differ.
    #[error(
        "{0} uses a different secret: the token is of another cluster, or older than a rotation. Print a new \
         one there: gossamer token"
    )]
    OtherSecret(SocketAddr),
    /// The address is this node's own.
    #[error("the address is this node's own")]
    Myself,
}

/// Returns why a seed did not admit this node, as a sentence that names the seed once.
pub fn seed_failure(seed: &str, why: &str) -> String {
    if why.contains(seed) { why.to_owned() } else { format!("{seed}: {why}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_of_a_seed_names_it_once() {
        let address: SocketAddr = ([10, 99, 0, 11], 8473).into();
        let other = CallError::OtherSecret(address).to_string();
        let text = seed_failure("10.99.0.11:8473", &other);
        assert!(
            text.starts_with("10.99.0.11:8473 uses a different secret: the token is"),
            "{text}"
        );
        let text = seed_failure("host1:8473", &other);
        assert!(text.starts_with("host1:8473: 10.99.0.11:8473 uses a different"), "{text}");
        let silent = CallError::Unreachable("10.99.0.99:8473 does not answer".to_owned());
        let text = seed_failure("10.99.0.99:8473", &silent.to_string());
        assert_eq!(text, "10.99.0.99:8473 does not answer");
    }
}
