//! Kernel entries that this node wants and those that exist, for `gossamer routes`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::NodeId;

/// The kernel entries.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Routes {
    /// The entries.
    pub entries: Vec<KernelEntry>,
}

/// One key of a kernel table.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct KernelEntry {
    /// `route`, `neighbor` or `fdb`.
    pub table: String,
    /// A subnet, an overlay address, or a MAC.
    pub key: String,
    /// Id of the member that the entry is for. `None` for an entry of no member.
    pub node: Option<NodeId>,
    /// Name of the member that the entry is for. `None` for an entry of no member.
    pub peer: Option<String>,
    /// The value that this node wants.
    pub wanted: Option<String>,
    /// The existing values. Some tables allow several of one key.
    pub found: Vec<String>,
    /// The result of the comparison.
    pub verdict: EntryVerdict,
}

/// How the existing values of an entry compare with the wanted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum EntryVerdict {
    /// They are equal.
    Same,
    /// The entry does not exist.
    Missing,
    /// The entry has another value.
    Different,
    /// The entry exists, and is not wanted.
    Surplus,
}

impl fmt::Display for EntryVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same",
            Self::Missing => "missing",
            Self::Different => "different",
            Self::Surplus => "surplus",
        })
    }
}
