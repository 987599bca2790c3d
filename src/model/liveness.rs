//! The state of a member according to gossip.

use serde::{Deserialize, Serialize};

/// The state of a member in gossip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// It answers probes.
    Alive,
    /// It did not answer a probe and has not refuted the suspicion yet.
    Suspect,
    /// It did not refute a suspicion in time.
    Down,
}

impl Liveness {
    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Down => "down",
        }
    }
}
