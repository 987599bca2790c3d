//! The answer to one round of `gossamer ping`.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::model::{NodeId, PathState};

/// What one round found.
#[derive(Clone, Debug, Serialize)]
pub struct PingReport {
    pub node: NodeId,
    pub name: String,
    /// Its agent, by QUIC.
    pub underlay: Reach<SocketAddr>,
    /// Its kernel, at the VTEP's address.
    pub overlay: Reach<IpAddr>,
    /// Its kernel, at the gateway of its pods.
    pub pods: Reach<IpAddr>,
    /// What the data path probe has found out about this member.
    pub path: Option<PathState>,
    /// What is wrong, and what helps.
    pub problem: Option<String>,
}

/// Who was asked, and how long the answer took.
#[derive(Clone, Debug, Serialize)]
pub struct Reach<A> {
    /// None, if there is nobody to ask: a member without a subnet.
    pub to: Option<A>,
    pub round_trip_ms: Option<f64>,
}

impl<A> Reach<A> {
    pub const fn unanswered(to: Option<A>) -> Self {
        Self { to, round_trip_ms: None }
    }

    /// Whether there is nothing more to wait for.
    pub const fn has_answered(&self) -> bool {
        self.to.is_none() || self.round_trip_ms.is_some()
    }
}
