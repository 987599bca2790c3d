//! Routes of other programs that were there before this agent, or before it had heard of a peer.

use std::{io, time::Instant};

use rtnetlink::packet_route::route::RouteProtocol;

use super::{Auditor, SHARE};
use crate::{
    dataplane::desired::{Desired, ROUTE_PROTOCOL},
    netlink::Netlink,
};

/// Routes of which the ways are asked for at once.
const MAX_ROUTES: usize = 256;

impl Auditor {
    /// Reads which routes of other programs there are, where there are peers that were not there before: of
    /// those made later the kernel tells.
    pub(super) fn read_routes(
        &mut self,
        begun: Instant,
        netlink: &mut Netlink,
        desired: &Desired,
    ) -> io::Result<()> {
        let has_all = desired.tables.routes.keys().all(|subnet| self.read_for.contains(subnet));
        if has_all || begun < self.read_at {
            return Ok(());
        }
        for network in desired.pool.networks().iter() {
            let found = match netlink.destinations(network.addr().is_ipv4()) {
                // A kernel without IPv6.
                Err(_) if network.addr().is_ipv6() => continue,
                found => found?,
            };
            let inside = found.iter().filter(|(to, protocol)| {
                let is_ours = *protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
                !is_ours && network.contains(to)
            });
            self.audit.suspect(inside.map(|(to, _)| to.network()).take(MAX_ROUTES));
        }
        self.read_for = desired.tables.routes.keys().copied().collect();
        self.read_at = begun + begun.elapsed() * SHARE;
        Ok(())
    }
}
