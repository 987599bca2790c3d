//! The result of one round of `gossamer ping`.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, PathState, Problem};

/// The results of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PingReport {
    /// Id of the member.
    pub node: NodeId,
    /// Name of the member.
    pub name: String,
    /// The member's agent, over QUIC.
    pub underlay: Reach<SocketAddr>,
    /// The member's kernel, at the VTEP's address.
    pub overlay: Reach<IpAddr>,
    /// The member's kernel, at the gateway of its pods.
    pub pods: Reach<IpAddr>,
    /// Path state according to the data path probe.
    pub path: Option<PathState>,
    /// What is wrong, and a remedy.
    pub problem: Option<Problem>,
}

/// The address of a request and the time to the answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Reach<A> {
    /// `None` if there is no address, as for a member without a subnet.
    pub to: Option<A>,
    /// `None` without an answer.
    pub round_trip_ms: Option<f64>,
}

impl<A> Reach<A> {
    /// Returns a request that has not been answered.
    pub const fn unanswered(to: Option<A>) -> Self {
        Self { to, round_trip_ms: None }
    }

    /// Returns whether there is nothing more to wait for.
    pub const fn has_answered(&self) -> bool {
        self.to.is_none() || self.round_trip_ms.is_some()
    }
}
