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
    /// That of its interface; one that follows from its address, without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Whether it gets default routes, for each family in which it has none.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub default_route: bool,
    /// Whether default routes that others give it precede its own, whichever comes first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub others_first: bool,
}

const fn yes() -> bool {
    true
}

// serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_yes(value: &bool) -> bool {
    *value
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
    /// The other end of its veth pair, on this host.
    pub link: String,
    pub link_mac: Mac,
    pub bridge: String,
    pub bridge_mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    pub addresses: Vec<AttachedAddress>,
    /// Those that its namespace was given.
    #[serde(default)]
    pub routes: Vec<AttachedRoute>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedRoute {
    pub to: IpNet,
    pub via: IpAddr,
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
    /// The kernel has no such link any more: the container is gone, and its runtime has not said so.
    pub orphan: bool,
}

/// Why a pod was not connected or disconnected. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct PodError {
    pub kind: PodErrorKind,
    pub error: String,
    /// The kernel is about to remove what stands in the way: ask again in a moment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
}

/// What somebody who asks can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodErrorKind {
    /// Try again later.
    NotReady,
    /// Name other things: container, interface, namespace.
    Invalid,
    /// There is no such pod.
    Unknown,
    /// Ask for another address.
    Address,
    /// All addresses are in use.
    Exhausted,
    /// The kernel or the disk has refused it.
    Failed,
    /// What a later version of the agent says.
    #[serde(other)]
    Other,
}

impl PodError {
    pub fn new(kind: PodErrorKind, error: impl ToString) -> Self {
        Self { kind, error: error.to_string(), again: false }
    }

    pub fn invalid(error: impl ToString) -> Self {
        Self::new(PodErrorKind::Invalid, error)
    }
}

/// Longest name of an owner, in bytes: it is kept with every pod.
const OWNER_MAX: usize = 256;

impl AttachRequest {
    /// On whose behalf a pod is connected.
    ///
    /// # Errors
    /// For one that cannot be kept.
    pub fn owner(&self) -> Result<&str, PodError> {
        let fits = self.owner.len() <= OWNER_MAX && !self.owner.contains(char::is_control);
        let error = || format!("owner: it has at most {OWNER_MAX} bytes and no control characters");
        fits.then_some(self.owner.as_str()).ok_or_else(|| PodError::invalid(error()))
    }

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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The plugin in `/opt/cni/bin` is replaced before the agent is, or after it.
    #[test]
    fn plugin_and_agent_of_other_versions_understand_each_other() {
        let read = |request: Value| serde_json::from_value::<AttachRequest>(request);
        let first = json!({
            "container": "c", "interface": "eth0", "owner": "cni/net", "netns": "/run/netns/c",
        });
        let asked = read(first.clone()).expect("as the first version has asked");
        assert_eq!(serde_json::to_value(&asked).expect("JSON"), {
            let mut same = first.clone();
            same["addresses"] = json!([]);
            same
        });
        // What is asked for and not known must not be left undone.
        let mut later = first;
        later["vlan"] = json!(7);
        assert!(read(later).expect_err("not known").to_string().contains("vlan"));
        let later = json!({ "kind": "on-holiday", "error": "not today", "more": 1 });
        let later: PodError = serde_json::from_value(later).expect("an error");
        assert_eq!((later.kind, later.error.as_str()), (PodErrorKind::Other, "not today"));
    }
}
