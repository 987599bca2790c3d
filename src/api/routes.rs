//! Kernel entries that this node wants and those that exist, for `gossamer routes`.

use serde::{Deserialize, Serialize};

/// One key of a kernel table.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct KernelEntry {
    /// `route`, `neighbor` or `fdb`.
    pub table: String,
    /// A subnet, an overlay address, or a MAC.
    pub key: String,
    /// Name of the member that the entry is for. `None` for an entry of no member.
    pub peer: Option<String>,
    /// The value that this node wants.
    pub wanted: Option<String>,
    /// The existing values. Some tables allow several of one key.
    pub found: Vec<String>,
    /// `same`, `missing`, `different` or `surplus`.
    pub verdict: String,
}
