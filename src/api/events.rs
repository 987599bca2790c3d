//! What happens at a node, as it happens, and how the last hour was: for `gossamer events` and the dashboard.

use std::time::Duration;

use serde::Serialize;
use tokio::sync::broadcast;

/// One thing that somebody who looks after the cluster wants to know.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Counts from 1 since the start of the agent.
    pub number: u64,
    /// Seconds since 1970, by this host's clock.
    pub at: f64,
    pub kind: EventKind,
    pub level: EventLevel,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// This node itself.
    Agent,
    /// Somebody came, went, fell silent or is back.
    Member,
    /// A subnet changed hands.
    Lease,
    /// Packets to a peer get through, or do not.
    Path,
    /// What another program had changed was put right.
    Repair,
    /// Something is wrong, or is not any more.
    Problem,
    Pod,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventLevel {
    Info,
    Warn,
}

/// Events up to now, and those to come.
#[derive(Debug)]
pub struct EventFeed {
    pub past: Vec<Event>,
    pub live: broadcast::Receiver<Event>,
}

/// Between two samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);

/// How things were at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds since 1970, by this host's clock.
    pub at: u64,
    /// Members that neither left nor were forgotten, this one included.
    pub members: usize,
    pub alive: usize,
    pub converged: bool,
    /// Through the overlay: the middle one and the largest of all peers that answer.
    pub round_trip_ms: Option<f64>,
    pub worst_round_trip_ms: Option<f64>,
    pub paths_ok: usize,
    pub paths_bad: usize,
    /// Repairs since the start of the agent.
    pub repairs: u64,
}
