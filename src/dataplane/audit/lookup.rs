//! Route lookups and their results.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::Selector;

/// The direction of the packets that are looked up. The order is that of precedence in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// From pods of this host to pods of a peer.
    Out,
    /// From pods of a peer to pods of this host.
    In,
    /// From this host itself to a peer's VTEP.
    Own,
    /// From pods of a peer to this host's underlay address. They arrive outside the tunnel.
    PodsToHost,
    /// From a peer's underlay address to pods of this host: packets that the peer's host itself
    /// sends.
    HostsToPods,
    /// To pods of this host from anywhere; covers this node's whole own subnet.
    Home,
}

impl Kind {
    /// Whether these packets have to leave by the interface that pods are behind.
    pub(super) const fn is_to_pods_here(self) -> bool {
        matches!(self, Self::In | Self::Home)
    }
}

/// One route lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The direction of the packet.
    pub kind: Kind,
    /// The peer's subnet; for [`Kind::Home`] this node's own subnet.
    pub subject: IpNet,
    /// Source address; `None` lets the kernel choose.
    pub from: Option<IpAddr>,
    /// Destination address.
    pub to: IpAddr,
    /// Index of the interface that the packet arrives by; `None` if this host sends it.
    pub input: Option<u32>,
    /// The correct result.
    pub expected: Expected,
    /// The policy rule's or route's selector that the packet was built to match.
    pub selector: Option<Selector>,
}

/// The correct result of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The packet leaves by an interface.
    Way {
        /// Index of the interface.
        link: u32,
        /// The gateway; `None` if any is correct.
        gateway: Option<IpAddr>,
    },
    /// The lookup fails: the sender receives an error.
    Nowhere,
    /// Any result except rejection by a reverse path filter.
    Unfiltered,
}

/// The kernel's result of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupResult {
    /// The packet leaves by an interface.
    Way {
        /// Index of the interface.
        link: u32,
        /// The gateway.
        gateway: Option<IpAddr>,
        /// The table whose route decided.
        table: u32,
    },
    /// The lookup failed with this errno.
    Refused(i32),
}

/// Errno of the reverse path filter. Kernels since 6.14 return `EINVAL` instead, which has many
/// other causes.
pub const EXDEV: i32 = 18;
pub(super) const EINVAL: i32 = 22;

impl Lookup {
    /// Returns the address of the packet that belongs to the peer.
    pub(super) fn remote(&self) -> IpAddr {
        match self.kind {
            Kind::Out | Kind::Own | Kind::Home => self.to,
            Kind::In | Kind::PodsToHost | Kind::HostsToPods => self.from.unwrap_or(self.to),
        }
    }

    /// Returns whether the result is the correct one.
    pub fn agrees(&self, result: LookupResult) -> bool {
        match (self.expected, result) {
            (Expected::Unfiltered, result) => {
                !matches!(result, LookupResult::Refused(EXDEV | EINVAL))
            }
            (Expected::Nowhere, LookupResult::Refused(_)) => true,
            (
                Expected::Way { link, gateway },
                LookupResult::Way { link: found, gateway: via, .. },
            ) => link == found && (gateway.is_none() || gateway == via),
            _ => false,
        }
    }
}
