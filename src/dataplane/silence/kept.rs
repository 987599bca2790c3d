//! Address translations that connections of tunnel packets keep.

use std::net::IpAddr;

use crate::dataplane::remedies::forget_connections;

/// A translation of tunnel packets that connections keep although no rule of this host does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    /// Packets to the peer have it, otherwise those from it.
    pub outgoing: bool,
    /// The source address changes, otherwise the destination.
    pub is_source: bool,
    /// The address afterwards.
    pub address: IpAddr,
}

impl Kept {
    /// Returns what is wrong, and the advice.
    pub(super) fn texts(self, peers: &str, port: u16) -> (String, String) {
        let Self { outgoing, is_source, address } = self;
        let packets = if outgoing { "to" } else { "of" };
        let end = if is_source { "source" } else { "destination" };
        (
            format!(
                "flows of tunnel packets {packets} {peers} are lost on this host: their connections \
                 keep an address translation, to the {end} {address}. No rule that does so was found, \
                 so it is probably gone"
            ),
            format!("{} (conntrack -L shows them)", forget_connections(port)),
        )
    }
}
