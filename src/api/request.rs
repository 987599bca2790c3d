//! Requests to the agent's loop: what its operators and container runtimes can ask for.

use std::{net::IpAddr, os::fd::OwnedFd, sync::Arc};

use tokio::sync::oneshot::Sender;

use super::{
    AgentStatus, ApiError, AttachRequest, Attached, AttachmentName, EncodedMatrix, Event,
    EventFeed, Forgotten, KernelEntry, MatrixRow, PingReport, PodError, PodStatus, Sample, Secrets,
};
use crate::{
    model::OwnerChange,
    wire::{Secret, SecretId},
};

/// A request to the agent's loop. Each variant has a channel `reply` for the answer; `node` is a name or id.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum AgentRequest {
    /// The status now.
    Status { reply: Sender<Arc<AgentStatus>> },
    /// Checks whether the loop answers.
    Alive { reply: Sender<()> },
    /// The status once the node has converged with this many members, or after this many seconds.
    Wait { seconds: u64, members: usize, reply: Sender<Arc<AgentStatus>> },
    /// The cluster's token; `None` while the node is joining.
    Token { reply: Sender<Option<String>> },
    /// Leaves the cluster. The answer is the successor's id, or why the node cannot leave.
    Leave { reply: Sender<Result<Option<String>, ApiError>> },
    /// Forgets a member.
    Forget { node: String, force: bool, reply: Sender<Result<Forgotten, ApiError>> },
    /// Makes this host a new node of its cluster.
    ResetIdentity { reply: Sender<Result<(), ApiError>> },
    /// Pings a member once on each of its paths.
    Ping { node: String, reply: Sender<Result<PingReport, ApiError>> },
    /// The history of ownership, oldest change first.
    History { reply: Sender<Result<Vec<OwnerChange>, ApiError>> },
    /// Connects a pod.
    Attach {
        request: AttachRequest,
        /// The network namespace, if the client has opened it.
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    },
    /// Disconnects a pod. The answer tells whether there was one.
    Detach {
        request: AttachmentName,
        /// The network namespace, if the client has opened it.
        netns: Option<OwnedFd>,
        reply: Sender<Result<bool, PodError>>,
    },
    /// Checks that the kernel still has a pod as it was connected. The answer has all addresses of its
    /// interface.
    Check {
        request: AttachmentName,
        /// The network namespace, if the client has opened it.
        netns: Option<OwnedFd>,
        reply: Sender<Result<Vec<IpAddr>, PodError>>,
    },
    /// The pods of this node.
    Pods { reply: Sender<Vec<PodStatus>> },
    /// Releases the addresses of pods that are gone. The answer has those pods.
    Release { reply: Sender<Result<Vec<PodStatus>, PodError>> },
    /// Past events, and a subscription to new ones.
    Events { reply: Sender<Result<EventFeed, ApiError>> },
    /// Past events.
    PastEvents { reply: Sender<Vec<Event>> },
    /// The samples of the last hour.
    Samples { reply: Sender<Vec<Sample>> },
    /// The path matrix.
    Matrix { reply: Sender<EncodedMatrix> },
    /// The kernel's entries, and those that this node wants.
    Routes { reply: Sender<Result<Vec<KernelEntry>, ApiError>> },
    /// Lists or changes the cluster's secrets. The answer has the members that use, accept and lack each.
    Secret { step: SecretStep, force: bool, reply: Sender<Result<Secrets, ApiError>> },
    /// A member's own report.
    Peer { node: String, reply: Sender<Result<Option<MatrixRow>, ApiError>> },
}

impl AgentRequest {
    /// Returns whether it only reads, so that any user may send it by the `http` listener.
    pub const fn is_of_reader(&self) -> bool {
        matches!(
            self,
            Self::Status { .. }
                | Self::Alive { .. }
                | Self::Wait { .. }
                | Self::Pods { .. }
                | Self::PastEvents { .. }
                | Self::Events { .. }
                | Self::Samples { .. }
                | Self::Matrix { .. }
                | Self::Routes { .. }
                | Self::Peer { .. }
        )
    }
}

/// A step of replacing the cluster's secret.
#[derive(Clone, Debug)]
pub enum SecretStep {
    /// Changes nothing.
    List,
    /// Adds this secret. `None`: sends the existing ones to members that lack them.
    Add(Option<Secret>),
    /// Makes all members use this secret.
    Use(SecretId),
    /// Makes all members stop accepting this secret.
    Drop(SecretId),
}
