//! Requests of container runtimes' plugins to the agent, and the answers.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{Attachment, Mac};

/// A request to connect one interface of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Id of the container.
    pub container: String,
    /// Name of the interface inside the container.
    pub interface: String,
    /// Name of the owner, such as `cni/gossamer`.
    pub owner: String,
    /// Absolute path of the network namespace.
    pub netns: PathBuf,
    /// Addresses that the interface must have. Empty: the agent chooses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// MAC of the interface. `None`: derived from the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Whether the interface gets default routes, for each family without one.
    #[serde(default = "default_true", skip_serializing_if = "is_true")]
    pub default_route: bool,
    /// Whether default routes that other programs add take precedence, whatever the order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub others_first: bool,
}

const fn default_true() -> bool {
    true
}

// serde requires a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_true(value: &bool) -> bool {
    *value
}

/// The name of a connected interface, for disconnecting and checking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentName {
    /// Id of the container.
    pub container: String,
    /// Name of the interface inside the container.
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
    /// MAC of the interface.
    pub mac: Mac,
    /// Name of the veth pair's end on this host.
    pub link: String,
    /// MAC of that end.
    pub link_mac: Mac,
    /// Name of the pods' bridge.
    pub bridge: String,
    /// MAC of the bridge.
    pub bridge_mac: Option<Mac>,
    /// MTU of the interface, in bytes.
    pub mtu: u32,
    /// Addresses of the interface.
    pub addresses: Vec<AttachedAddress>,
    /// Routes that were added to the namespace.
    #[serde(default)]
    pub routes: Vec<AttachedRoute>,
}

/// A route in a pod's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedRoute {
    /// The destination.
    pub to: IpNet,
    /// The gateway.
    pub via: IpAddr,
}

/// An address of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedAddress {
    /// The address with the subnet's prefix length.
    pub address: IpNet,
    /// The gateway of the subnet.
    pub gateway: IpAddr,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PodStatus {
    /// Id of the container.
    pub container: String,
    /// Name of the interface inside the container.
    pub interface: String,
    /// Name of the owner.
    pub owner: String,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
    /// Name of the veth pair's end on this host.
    pub link: String,
    /// Path of the network namespace; empty while the addresses are only reserved.
    pub netns: String,
    /// Whether the veth pair is gone, but the runtime has not released the addresses.
    pub orphan: bool,
}

/// The pods of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Pods {
    /// The pods.
    pub pods: Vec<PodStatus>,
}

/// Pods that were gone, and whose addresses are released now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Released {
    /// The pods.
    pub released: Vec<PodStatus>,
}

/// The result of disconnecting a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Whether there was such a pod.
    pub was_there: bool,
}

/// The result of checking a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// All addresses of its interface.
    pub addresses: Vec<IpAddr>,
}

/// Why a pod was not connected or disconnected. The request changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct PodError {
    /// What the client can do.
    #[serde(rename = "code")]
    pub kind: PodErrorKind,
    /// What is wrong.
    #[serde(rename = "message")]
    pub error: String,
    /// Whether to retry in a moment: the kernel is about to remove an obstacle.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
}

/// What the client can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodErrorKind {
    /// Try again later.
    NotReady,
    /// Correct the container, interface or namespace.
    Invalid,
    /// There is no such pod.
    Unknown,
    /// Request another address.
    Address,
    /// All addresses are in use.
    Exhausted,
    /// The kernel or the disk failed.
    Failed,
    /// A kind that only a later version of the agent knows.
    #[serde(other)]
    Other,
}

impl PodError {
    /// Returns an error of this kind.
    pub fn new(kind: PodErrorKind, error: impl ToString) -> Self {
        Self { kind, error: error.to_string(), again: false }
    }

    /// Returns an error of kind [`PodErrorKind::Invalid`].
    pub fn invalid(error: impl ToString) -> Self {
        Self::new(PodErrorKind::Invalid, error)
    }
}

/// Longest name of an owner, in bytes. It is stored with every pod.
const MAX_OWNER_BYTES: usize = 256;

impl AttachRequest {
    /// Returns the name of the owner.
    ///
    /// # Errors
    /// Fails if the name is too long or has control characters.
    pub fn owner(&self) -> Result<&str, PodError> {
        let fits = self.owner.len() <= MAX_OWNER_BYTES && !self.owner.contains(char::is_control);
        let error =
            || format!("owner: use at most {MAX_OWNER_BYTES} bytes without control characters");
        fits.then_some(self.owner.as_str()).ok_or_else(|| PodError::invalid(error()))
    }

    /// Returns the path of the network namespace.
    ///
    /// # Errors
    /// Fails if the path is not absolute.
    pub fn netns(&self) -> Result<&Path, PodError> {
        let path = self.netns.as_path();
        let error = || format!("network namespace {}: use an absolute path", path.display());
        path.is_absolute().then_some(path).ok_or_else(|| PodError::invalid(error()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The plugin in `/opt/cni/bin` may be older or newer than the agent.
    #[test]
    fn messages_of_other_versions_are_understood_or_rejected() {
        let read = |request: Value| serde_json::from_value::<AttachRequest>(request);
        let first = json!({
            "container": "c", "interface": "eth0", "owner": "cni/net", "netns": "/run/netns/c",
        });
        let request = read(first.clone()).expect("as the first version has asked");
        assert_eq!(serde_json::to_value(&request).expect("JSON"), {
            let mut same = first.clone();
            same["addresses"] = json!([]);
            same
        });
        // An unknown field may be a requirement, so it must be rejected.
        let mut later = first;
        later["vlan"] = json!(7);
        assert!(read(later).expect_err("not known").to_string().contains("vlan"));
        let later = json!({ "code": "on-holiday", "message": "not today", "more": 1 });
        let later: PodError = serde_json::from_value(later).expect("an error");
        assert_eq!((later.kind, later.error.as_str()), (PodErrorKind::Other, "not today"));
    }
}
