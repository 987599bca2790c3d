//! Routes of other programs that existed before the agent started or learned of a peer.

use std::{collections::BTreeSet, io, time::Instant};

use rtnetlink::packet_route::route::RouteProtocol;

use super::{Auditor, TIME_SHARE};
use crate::{
    dataplane::desired::{Desired, ROUTE_PROTOCOL},
    netlink::{Netlink, route::Destination},
};

/// Maximum number of routes whose destinations are audited.
const MAX_ROUTES: usize = 256;

impl Auditor {
    /// Reads the routes of other programs if there are new peers. The kernel reports routes that are
    /// made later.
    ///
    /// # Errors
    /// Fails if the routes cannot be read.
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
        let mut conditional = BTreeSet::new();
        for network in desired.pool.networks().iter() {
            let found = match netlink.destinations(network.addr().is_ipv4()) {
                // The kernel lacks IPv6.
                Err(_) if network.addr().is_ipv6() => continue,
                found => found?,
            };
            let of_others =
                found.iter().filter(|route| route.protocol != RouteProtocol::Other(ROUTE_PROTOCOL));
            let inside = of_others.clone().filter(|route| network.contains(&route.network));
            self.audit.suspect(inside.map(|route| route.network.network()).take(MAX_ROUTES));
            let meeting = of_others.filter(|Destination { network: to, condition, .. }| {
                !condition.is_none() && (network.contains(to) || to.contains(&network))
            });
            let selectors = meeting.map(|route| route.condition.of_route_to(route.network));
            conditional.extend(selectors.take(MAX_ROUTES));
        }
        self.conditional = conditional;
        self.read_for = desired.tables.routes.keys().copied().collect();
        self.read_at = begun + begun.elapsed() * TIME_SHARE;
        Ok(())
    }
}
