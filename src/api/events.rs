//! Events of a node and samples of the last hour, for `gossamer events` and the dashboard.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::MemberState;
use crate::model::NodeId;

/// A change that an operator may want to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Event {
    /// Sequence number, from 1 since the start of the agent.
    pub number: u64,
    /// Seconds since 1970, by this host's clock.
    pub at: f64,
    /// What changed.
    pub kind: EventKind,
    /// Whether the change needs attention.
    pub level: EventLevel,
    /// Description for people.
    pub text: String,
    /// The member whose state changed; `null` for other events.
    #[serde(default)]
    pub member: Option<MemberChange>,
}

/// The new state of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MemberChange {
    /// Its identity.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its state from now on.
    pub state: MemberState,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// This node.
    Agent,
    /// A member joined, left, went down or came back.
    Member,
    /// A subnet has another owner.
    Lease,
    /// The state of the path to a peer.
    Path,
    /// A repair of what another program changed in the kernel.
    Repair,
    /// A problem that began or ended.
    Problem,
    /// A pod of this node.
    Pod,
}

impl EventKind {
    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Member => "member",
            Self::Lease => "lease",
            Self::Path => "path",
            Self::Repair => "repair",
            Self::Problem => "problem",
            Self::Pod => "pod",
        }
    }
}

/// The stored events.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PastEvents {
    /// The events, oldest first.
    pub events: Vec<Event>,
}

/// Samples of the last hour.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Samples {
    /// Seconds between two samples.
    pub interval_seconds: u64,
    /// The samples, oldest first.
    pub samples: Vec<Sample>,
}

/// Severity of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum EventLevel {
    /// Normal operation.
    Info,
    /// May need attention.
    Warn,
}

/// Past events and a subscription to new ones.
#[derive(Debug)]
pub struct EventFeed {
    /// The events that are kept, oldest first.
    pub past: Vec<Event>,
    /// New events.
    pub live: broadcast::Receiver<Event>,
}

/// Time between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);

/// The state of node and cluster at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Sample {
    /// Seconds since 1970, by this host's clock.
    pub at: u64,
    /// Members that have neither left nor been forgotten, including this one.
    pub members: usize,
    /// Members that gossip considers alive.
    pub alive: usize,
    /// Whether this node has converged.
    pub converged: bool,
    /// Median and maximum round trip through the overlay, over all peers that answer.
    pub round_trip_ms: Option<f64>,
    /// The maximum.
    pub worst_round_trip_ms: Option<f64>,
    /// Peers whose path is `ok`.
    pub paths_ok: usize,
    /// Peers whose path has another state, except `unknown`.
    pub paths_bad: usize,
    /// Repairs since the start of the agent.
    pub repairs: u64,
}
