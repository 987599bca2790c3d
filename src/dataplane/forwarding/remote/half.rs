//! The halves of the path between two pods.

/// A half of the path to a peer's pod and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Half {
    /// From this host to the peer's pod.
    There,
    /// From the peer's pod to this host.
    Back,
}
