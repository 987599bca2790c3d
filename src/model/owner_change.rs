//! A change of the owner or the state of slots, as the history, the API and the doctor have it.

use serde::{Deserialize, Serialize};

use super::SlotState;

/// A change of the owner or the state of consecutive subnets, as this host has seen it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
pub struct OwnerChange {
    /// When this host learned of it, in seconds since 1970 by its own clock.
    pub at: u64,
    /// The subnet, or the first and the last one.
    pub subnets: String,
    /// The owner before, as `name (id)`. `None` if there was no record.
    pub from: Option<String>,
    /// The owner, as `name (id)`.
    pub to: String,
    /// What the owner does with the subnets.
    pub state: SlotState,
    /// The node that wrote the record, as `name (id)`.
    pub by: String,
    /// Version of the record.
    pub epoch: u64,
}
