//! The connections to peers, and which of them are closed.

use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use quinn::{Connection, VarInt};

use super::{Call, Transport};
use crate::model::NodeId;

/// Upper limit of open connections, which take about 10 MB. A further one replaces the least
/// recently used.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Time after which a connection that this node opened to a member that is no neighbor is closed if it is not
/// used. A call has ended by then.
pub(super) const UNUSED_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a connection that the peer opened. It closes the connection itself, unless it considers this
/// node a neighbor and probes it in longer intervals.
const INBOUND_UNUSED_TIMEOUT: Duration = Duration::from_secs(90);
/// The connection to a peer, and what waits for one.
#[derive(Default)]
pub(super) struct PeerLink {
    pub(super) connection: Option<Connection>,
    pub(super) since: Option<Instant>,
    /// The peer's address by membership when the connection was dialed, or first used.
    address: Option<SocketAddr>,
    /// Whether the peer opened the connection.
    pub(super) is_inbound: bool,
    /// When the connection was last used for sending or receiving.
    pub(super) last_used: Option<Instant>,
    pub(super) is_dialing: bool,
    /// Each with whether it takes a stream.
    pub(super) frames: VecDeque<(Vec<u8>, bool)>,
    pub(super) calls: VecDeque<(Call, Vec<u8>)>,
}

impl PeerLink {
    /// Returns the connection if it is open.
    pub(super) fn live(&self) -> Option<&Connection> {
        self.connection.as_ref().filter(|connection| connection.close_reason().is_none())
    }

    /// Stores another connection and returns the one before.
    pub(super) fn replace(&mut self, connection: Connection, inbound: bool) -> Option<Connection> {
        self.since = Some(Instant::now());
        self.is_inbound = inbound;
        // This node dialed the address by membership. The peer may have dialed from a later one.
        self.address.take_if(|_| inbound);
        self.connection.replace(connection)
    }

    /// Returns the connection if it is open. One from before the peer changed its address to `address` is
    /// closed: it leads to the old address, and would stay open until it is idle for long.
    pub(super) fn live_at(&mut self, address: SocketAddr) -> Option<&Connection> {
        self.last_used = Some(Instant::now());
        if self.address.replace(address).is_some_and(|before| before != address)
            && let Some(connection) = self.connection.take()
        {
            connection.close(VarInt::from_u32(0), b"the peer has another address");
        }
        self.live()
    }

    pub(super) fn is_unused(&self) -> bool {
        self.connection.is_none()
            && !self.is_dialing
            && self.frames.is_empty()
            && self.calls.is_empty()
    }
}

impl Transport {
    /// Closes connections that were not used for some time, except those to `neighbors`. A call on
    /// purpose, as a join or a comparison with a distant member, so leaves no connection behind.
    pub fn close_unused(&mut self, neighbors: &BTreeSet<NodeId>) {
        self.neighbors.clone_from(neighbors);
        for (peer, link) in &self.peers {
            let timeout = if link.is_inbound { INBOUND_UNUSED_TIMEOUT } else { UNUSED_TIMEOUT };
            let is_unused = link.last_used.is_none_or(|used| used.elapsed() >= timeout);
            if is_unused
                && !neighbors.contains(peer)
                && let Some(connection) = link.live()
            {
                connection.close(VarInt::from_u32(0), b"unused");
            }
        }
    }

    /// Closes the least recently used connection if there are too many: one to a neighbor only if there is no
    /// other, because a member with many identities may open connections and use each of them.
    pub(super) fn close_least_recently_used(&mut self) {
        if self.connections() > MAX_CONNECTIONS {
            let live = self.peers.iter().filter_map(|(peer, link)| {
                Some(((self.neighbors.contains(peer), link.last_used), link.live()?))
            });
            if let Some((_, connection)) = live.min_by_key(|(order, _)| *order) {
                connection.close(VarInt::from_u32(0), b"too many connections");
            }
        }
    }
}
