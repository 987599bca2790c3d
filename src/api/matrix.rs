//! The path matrix: the paths of each member, as that member reports them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    model::{NodeId, PathState},
    wire::PathReport,
};

/// The paths between all members.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Matrix {
    /// One row per member, sorted by name.
    pub rows: Vec<MatrixRow>,
    /// Number of members that were not queried because there are too many.
    pub omitted: usize,
}

impl Matrix {
    /// Returns the matrix as JSON, encoded once for all clients.
    pub fn encode(&self) -> EncodedMatrix {
        EncodedMatrix(serde_json::to_vec(self).unwrap_or_default().into())
    }
}

/// A [`Matrix`] as JSON.
#[derive(Clone, Debug)]
pub struct EncodedMatrix(pub(super) Bytes);

/// The report of one member. The optional fields are `None` if it did not answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MatrixRow {
    /// Id of the member.
    pub node: NodeId,
    /// Name of the member.
    pub name: String,
    /// Version of its agent.
    pub version: Option<String>,
    /// Number of its problems.
    pub problems: Option<u32>,
    /// Its paths to other members.
    pub paths: Option<Vec<MatrixPath>>,
}

/// A path from one member to another.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MatrixPath {
    /// The member at the other end.
    pub node: NodeId,
    /// State of the path.
    pub state: PathState,
    /// Last round trip through the overlay.
    pub round_trip_ms: Option<f64>,
}

impl From<&PathReport> for MatrixPath {
    fn from(report: &PathReport) -> Self {
        let round_trip_ms = report.round_trip_us.map(|us| f64::from(us) / 1000.0);
        Self { node: report.node, state: report.state, round_trip_ms }
    }
}
