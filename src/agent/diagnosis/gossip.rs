//! Whether gossip passes between this host and the other members.

use super::isolation::Isolation;
use crate::agent::host::receive_buffer::ReceiveDrops;

/// Whether gossip passes between this host and the other members.
#[derive(Default)]
pub(in crate::agent) struct GossipState {
    /// Whether other members answer.
    pub(in crate::agent) isolation: Isolation,
    /// Gossip packets that this host received and lost.
    pub(in crate::agent) receive_drops: ReceiveDrops,
}
