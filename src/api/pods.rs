//! What a container runtime's plugin asks the agent for, and what it is told.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{Attachment, Mac};

/// One interface of one container, to be connected.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    pub container: String,
    pub interface: String,
    /// On whose behalf.
    pub owner: String,
    pub netns: PathBuf,
    /// Those that it must have; any, if empty.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// The same, to be disconnected or looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentName {
    pub container: String,
    pub interface: String,
}

impl From<&Attachment> for AttachmentName {
    fn from(attachment: &Attachment) -> Self {
        let container = attachment.container().to_owned();
        Self { container, interface: attachment.interface().to_owned() }
    }
}

/// A connected interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    pub mac: Mac,
    /// The other end of its cable, on this host.
    pub link: String,
    pub link_mac: Mac,
    pub bridge: String,
    pub bridge_mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    pub addresses: Vec<AttachedAddress>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedAddress {
    /// With the length of the subnet.
    pub address: IpNet,
    pub gateway: IpAddr,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    pub container: String,
    pub interface: String,
    pub owner: String,
    pub addresses: Vec<IpAddr>,
    pub link: String,
    pub netns: String,
    /// The kernel has no such link any more: the container is gone, and nobody has said so.
    pub orphan: bool,
}

/// Why a pod was not connected or disconnected. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct PodError {
    pub kind: PodErrorKind,
    pub error: String,
}

/// What somebody who asks can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodErrorKind {
    /// Try again later.
    NotReady,
    /// Name other things: container, interface, namespace.
    Invalid,
    /// Ask for another address.
    Address,
    /// All addresses are in use.
    Exhausted,
    /// The kernel or the disk has refused it.
    Failed,
}

impl PodError {
    pub fn new(kind: PodErrorKind, error: impl ToString) -> Self {
        Self { kind, error: error.to_string() }
    }

    pub fn invalid(error: impl ToString) -> Self {
        Self::new(PodErrorKind::Invalid, error)
    }
}

impl AttachRequest {
    /// A namespace is named by its whole path.
    ///
    /// # Errors
    /// Where it is not.
    pub fn netns(&self) -> Result<&Path, PodError> {
        let path = self.netns.as_path();
        let error = || format!("network namespace {}: give its absolute path", path.display());
        path.is_absolute().then_some(path).ok_or_else(|| PodError::invalid(error()))
    }
}
