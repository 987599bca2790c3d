//! What a node publishes about itself, and the identity that gossip uses for it.

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{BootId, NodeId, Vtep};

/// Version of a node's presence in gossip. It grows with each start of the agent and with each renewal.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Incarnation {
    /// Number of starts of the agent. Flushed to disk before the agent sends anything.
    pub starts: u32,
    /// Number of renewals since the start. Not persisted: the next start exceeds them.
    pub renewals: u32,
}

/// A node in one incarnation: the member that SWIM probes. Takes 10 to 18 bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The node.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
}

/// A member that did not answer a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    /// The identity that was probed.
    pub identity: Identity,
    /// SWIM's own counter of refutations under this identity.
    pub refutation: u16,
}

/// Version of a [`MemberRecord`]. Only the node itself creates new versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// [`Incarnation::starts`] of the process that wrote the record.
    pub starts: u32,
    /// Grows with each change within one process.
    pub change: u32,
}

/// What a node publishes about itself. Other nodes forward it unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The node.
    pub node: NodeId,
    /// Version of this record.
    pub version: Version,
    /// The process that wrote the record.
    pub boot: BootId,
    /// Node name.
    pub name: NodeName,
    /// Address of the QUIC endpoint.
    pub address: SocketAddr,
    /// The VXLAN endpoint.
    pub vtep: Vtep,
    /// Set once the node has left: the successor that accepted its records. The id never returns.
    pub left_to: Option<NodeId>,
}

impl MemberRecord {
    /// Whether the node has left.
    pub const fn has_left(&self) -> bool {
        self.left_to.is_some()
    }

    /// Returns by what a host is recognized that was installed again: its name and address.
    pub const fn host(&self) -> (&NodeName, SocketAddr) {
        (&self.name, self.address)
    }
}

/// Greatest length of a name, in characters.
const MAX_NAME: usize = 63;

/// A node's name for operators: 1 to 63 visible ASCII characters. It identifies nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct NodeName(String);

impl NodeName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl NodeName {
    /// Derives a name from a host name. Characters that are not allowed become hyphens. A name that is too
    /// long loses its domain, then its end. `None` for an empty one.
    pub fn of_host(host: &str) -> Option<Self> {
        let visible_or_hyphen = |c: char| if c.is_ascii_graphic() { c } else { '-' };
        let label = match host.split_once('.') {
            Some((label, _)) if host.chars().count() > MAX_NAME && !label.is_empty() => label,
            _ => host,
        };
        let name: String = label.chars().map(visible_or_hyphen).take(MAX_NAME).collect();
        (!name.is_empty()).then_some(Self(name))
    }
}

impl FromStr for NodeName {
    type Err = NodeNameError;

    fn from_str(text: &str) -> Result<Self, NodeNameError> {
        let valid =
            (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if valid { Ok(Self(text.to_owned())) } else { Err(NodeNameError(text.to_owned())) }
    }
}

impl<'de> Deserialize<'de> for NodeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A text that is not a valid node name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a node name: use 1 to 63 ASCII characters without spaces")]
pub struct NodeNameError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_exceeds_every_earlier_renewal() {
        let renewed = Incarnation { starts: 3, renewals: u32::MAX };
        assert!(Incarnation { starts: 4, renewals: 0 } > renewed);
    }

    #[test]
    fn invalid_host_name_is_converted_to_a_valid_node_name() {
        let name = |host: &str| NodeName::of_host(host).map(|name| name.to_string());
        let domain = ".compute.internal.example".repeat(3);
        assert_eq!(name("node-1.example").as_deref(), Some("node-1.example"));
        assert_eq!(name(&format!("ip-10-0-0-1{domain}")).as_deref(), Some("ip-10-0-0-1"));
        assert_eq!(name(&"a".repeat(64)), Some("a".repeat(63)));
        assert_eq!(name("zw\u{f6}lf hosts").as_deref(), Some("zw-lf-hosts"));
        assert_eq!(name(""), None);
        let long = format!(".{}", "b".repeat(80));
        assert_eq!(name(&long).map(|name| name.len()), Some(63));
    }

    #[test]
    fn node_name_of_other_than_short_visible_ascii_is_refused() {
        for good in ["a", "node-1.example", &"x".repeat(63)] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "two words", "tab\t", "\u{1b}[31m", "ümlaut", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }
}
