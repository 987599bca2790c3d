//! What this node wants in the kernel, and what is there: for `gossamer routes`.

use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct KernelEntry {
    /// `route`, `neighbour` or `fdb`.
    pub table: &'static str,
    /// A subnet, an overlay address, or a MAC.
    pub key: String,
    /// Name of the member that it leads to; none, if it is nobody's.
    pub peer: Option<String>,
    pub wanted: Option<String>,
    /// The kernel allows several of one key.
    pub found: Vec<String>,
    /// `same`, `missing`, `different` or `surplus`.
    pub verdict: &'static str,
}
