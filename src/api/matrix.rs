//! Who reaches whom: what each member says of its ways to the others.

use serde::Serialize;

use crate::{
    model::{NodeId, PathState},
    wire::PathReport,
};

#[derive(Clone, Debug, Serialize)]
pub struct Matrix {
    /// By name.
    pub rows: Vec<MatrixRow>,
    /// Members that were not asked, because there are too many.
    pub omitted: usize,
}

/// What one member said; nothing, if it did not answer.
#[derive(Clone, Debug, Serialize)]
pub struct MatrixRow {
    pub node: NodeId,
    pub name: String,
    /// Of its program.
    pub version: Option<String>,
    /// How many things are wrong there.
    pub problems: Option<u32>,
    pub paths: Option<Vec<MatrixPath>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct MatrixPath {
    pub node: NodeId,
    pub state: PathState,
    pub round_trip_ms: Option<f64>,
}

impl From<&PathReport> for MatrixPath {
    fn from(report: &PathReport) -> Self {
        let round_trip_ms = report.round_trip_us.map(|us| f64::from(us) / 1000.0);
        Self { node: report.node, state: report.state, round_trip_ms }
    }
}
