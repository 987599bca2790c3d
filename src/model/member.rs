//! What a node says about itself, and the identity under which gossip knows it.

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{BootId, NodeId, Vtep};

/// Grows on each start of the agent (persisted, flushed before anything is said) and on each renewal
/// within one run of it (not persisted: the next start is higher anyway).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Incarnation {
    pub starts: u32,
    pub renewals: u32,
}

/// A node in one of its incarnations: the member that SWIM probes. 10 to 18 bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub node: NodeId,
    pub incarnation: Incarnation,
}

/// A member that did not answer, in the incarnation that was probed. The last number is SWIM's own: it counts
/// refutations of one identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    pub identity: Identity,
    pub refutation: u16,
}

/// Version of a [`MemberRecord`]; only the node itself makes new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// [`Incarnation::starts`] of the process that wrote it.
    pub starts: u32,
    /// Grows with each change within one process.
    pub change: u32,
}

/// What a node publishes about itself. Copies travel from node to node unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    pub node: NodeId,
    pub version: Version,
    pub boot: BootId,
    pub name: NodeName,
    /// Where peers reach its QUIC endpoint.
    pub address: SocketAddr,
    pub vtep: Vtep,
    /// It left for good, and its id never comes back: this member has been told all that it knew.
    pub left_to: Option<NodeId>,
}

impl MemberRecord {
    pub const fn has_left(&self) -> bool {
        self.left_to.is_some()
    }
}

const MAX_NAME: usize = 63;

/// A host name as an attribute: for people, never identity. 1 to 63 visible ASCII characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct NodeName(String);

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl NodeName {
    /// The name that a host has by itself, made fit for tables: what they cannot show becomes a hyphen, and
    /// of a name that is too long the domain is left out, then the end. None of an empty one.
    pub fn of_host(host: &str) -> Option<Self> {
        let shown = |c: char| if c.is_ascii_graphic() { c } else { '-' };
        let label = match host.split_once('.') {
            Some((label, _)) if host.chars().count() > MAX_NAME && !label.is_empty() => label,
            _ => host,
        };
        let name: String = label.chars().map(shown).take(MAX_NAME).collect();
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

/// A name that cannot be shown in a table or put on a command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not usable: write 1 to 63 ASCII characters without spaces")]
pub struct NodeNameError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_outranks_every_renewal_before_it() {
        let renewed = Incarnation { starts: 3, renewals: u32::MAX };
        assert!(Incarnation { starts: 4, renewals: 0 } > renewed);
    }

    #[test]
    fn host_name_that_tables_cannot_show_is_made_fit() {
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
    fn names_are_short_visible_ascii() {
        for good in ["a", "node-1.example", &"x".repeat(63)] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "two words", "tab\t", "\u{1b}[31m", "ümlaut", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }
}
