//! The statement that a node is gone permanently.

use serde::{Deserialize, Serialize};

use super::NodeId;

/// States that `node` is gone and never returns under this id. Permanent.
///
/// Of several forgets of one node, the greatest one holds: a later round supersedes an earlier one. Within a
/// round the order is arbitrary but equal on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Forget {
    /// The forgotten node.
    pub node: NodeId,
    /// Starts at 1 and grows by one whenever the successor itself is gone before it has reclaimed the slots.
    pub round: u32,
    /// Whether the operator accepts the risk that a member knows a grant that the successor does not know.
    pub forced: bool,
    /// The node that issued this forget. It collects the acknowledgements and then reclaims the slots of
    /// `node`.
    pub successor: NodeId,
}
