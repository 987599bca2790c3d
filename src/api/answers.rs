//! Answers to requests about the cluster's membership and secret: `token`, `leave`, `forget`,
//! `reset-identity`, `secret`.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{ClusterId, NodeId};

/// The token of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ClusterToken {
    /// The token.
    pub token: String,
}

/// The end of this node's membership.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Left {
    /// Always true.
    pub left: bool,
    /// Name of the member that took over the node's subnets. `None` if there is no other member, or if the
    /// node was in no cluster.
    pub successor: Option<String>,
}

/// A member that was forgotten.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Forgotten {
    /// Its id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Name that commands accept.
    pub label: String,
    /// Number of its slots that are not reclaimed yet.
    pub slots: u32,
    /// Names of members that have not acknowledged; `None` except on the successor.
    pub waits_for: Option<Vec<String>>,
}

/// The end of this node's identity.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct IdentityReset {
    /// Always true.
    pub reset: bool,
}

/// The secrets of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Secrets {
    /// The secrets that some member accepts.
    pub secrets: Vec<SecretStatus>,
    /// Names of members that did not answer.
    pub silent: Vec<String>,
    /// Members that refused the step, each with its reason.
    pub refused: Vec<String>,
}

/// The members that use, accept and lack a secret, by name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SecretStatus {
    /// Name of the secret.
    pub secret: String,
    /// Members that use it.
    pub used_by: Vec<String>,
    /// Members that accept it.
    pub accepted_by: Vec<String>,
    /// Members that do not accept it.
    pub lacked_by: Vec<String>,
}

/// A request to add a secret.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewSecret {
    /// A token with the new secret. `None`: the existing secrets go to members that lack them.
    pub token: Option<String>,
}

/// The part of the status that an agent of any version answers. Commands that an operator needs while agent
/// and program differ read only this part.
#[derive(Clone, Debug, Deserialize)]
pub struct Membership {
    /// Version of the agent.
    pub version: String,
    /// Name of the node.
    pub name: String,
    /// Id of its cluster.
    pub cluster: Option<ClusterId>,
    /// Its subnet.
    pub subnet: Option<IpNet>,
    /// Its IPv6 subnet in a dual-stack overlay.
    pub subnet6: Option<IpNet>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::AgentStatus,
        core::NodeStatus,
        model::{Problem, ProblemCode},
    };

    #[test]
    fn membership_is_read_from_a_status() {
        let waits = Problem::new(ProblemCode::MemberDown, "n1", "waits", "");
        let node = NodeStatus::waiting(NodeId::UNKNOWN, "n1".parse().expect("a name"), waits);
        let status = AgentStatus {
            subnet: Some("10.42.1.0/24".parse().expect("a network")),
            cluster: Some("00112233445566ff".parse().expect("an id")),
            ..AgentStatus::of(node)
        };
        let json = serde_json::to_value(&status).expect("JSON");
        let read: Membership = serde_json::from_value(json).expect("the same fields");
        assert_eq!((read.version, read.name), (status.version, status.name));
        assert_eq!((read.cluster, read.subnet), (status.cluster, status.subnet));
    }
}
