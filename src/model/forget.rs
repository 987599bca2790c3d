//! The word that a node is gone for good.

use serde::{Deserialize, Serialize};

use super::NodeId;

/// Somebody vouches that `node` is gone and never comes back under this identity. Permanent.
///
/// Of several for one node the greatest holds: a later round outranks an earlier one, and within a round the
/// order is arbitrary but the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Forget {
    pub node: NodeId,
    /// 1, and one more each time that a successor has gone before it could take over.
    pub round: u32,
    /// The operator takes the risk that somebody knows of a grant that the successor does not.
    pub forced: bool,
    /// Who issued this, collects the acknowledgements and then owns what `node` owned.
    pub successor: NodeId,
}
