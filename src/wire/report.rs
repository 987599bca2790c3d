//! Inquiries about a member and its answers: reports for surveys of the cluster, and steps of a secret
//! rotation.
//!
//! They are frames of their own and do not pass through the core: no decision of a node depends on them.

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, PathState, Text, bounded};

use super::{Refusal, Secret, SecretId};

/// Greatest number of secrets in a report.
const MAX_SECRETS: usize = 16;

/// An inquiry. New variants are only appended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inquiry {
    /// Requests the member's report.
    Report,
    /// Applies a step of a secret rotation and then requests the report.
    Secret(SecretOrder),
    /// Requests the packets of this round of forwarding trials that reached the member's own pod.
    Arrivals(u32),
    /// Requests any answer.
    Ping,
}

/// The answer to an [`Inquiry`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InquiryAnswer {
    /// The answer to a ping.
    Pong,
    /// The member's report.
    Report(Box<Report>),
    /// The member does not answer this node.
    Refused(Refusal),
}

/// A step of a secret rotation. All steps are idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecretOrder {
    /// Accept this secret in addition.
    Add(Secret),
    /// Authenticate with this secret.
    Use(SecretId),
    /// Stop accepting this secret.
    Drop(SecretId),
}

/// A member's report on itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the member's program.
    pub version: Text,
    /// Number of the member's problems.
    pub problems: u32,
    /// Paths to each peer with a subnet.
    #[serde(deserialize_with = "bounded::members")]
    pub paths: Vec<PathReport>,
    /// Accepted secrets; the first is in use.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_SECRETS>")]
    pub secrets: Vec<SecretId>,
    /// Why a step of a rotation was not applied.
    pub refused: Option<Text>,
    /// Packets of the requested round of trials; `None` if none was requested or the member has no pod for
    /// it.
    pub arrivals: Option<Arrivals>,
}

/// Packets of one round of forwarding trials that reached the pod of the queried agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrivals {
    /// Age of that pod, in milliseconds.
    pub pod_age_ms: u32,
    /// Bit set of the kinds of packets that arrived and were answered.
    pub came: u16,
    /// Number of packets that arrived out of those sent for counting.
    pub samples: u16,
    /// Whether the pod received too many packets recently to answer all of them.
    pub shed: bool,
}

/// The path from the reporting member to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// The peer.
    pub node: NodeId,
    /// State of the path.
    pub state: PathState,
    /// Round-trip time of the last answered request, in microseconds.
    pub round_trip_us: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::{
        super::codec::{decode, encode},
        *,
    };

    #[test]
    fn report_with_too_many_secrets_is_refused() {
        let report = |count| {
            let secrets = vec![SecretId([0; 4]); count];
            encode(&Report { secrets, ..Report::default() })
        };
        assert!(decode::<Report>("report", &report(MAX_SECRETS)).is_ok());
        let error = decode::<Report>("report", &report(MAX_SECRETS + 1)).expect_err("too many");
        assert!(error.to_string().contains("at most 16"), "{error}");
    }
}
