//! Lists and removes what gossamer has left in a kernel: of one overlay, or of any.
//!
//! Only objects that are recognizable without stored state are listed, and only listed ones are
//! removed. The pods' bridges are not part of it.

use std::io;

use ipnet::IpNet;
use rtnetlink::packet_route::{RouteNetlinkMessage, route::RouteMessage, rule::RuleMessage};

use super::{
    FirewallTable, GONE, Kernel, is_overlay_device,
    messages::{is_of_overlay, our_route, subnet_of},
    next_hops::restoring_request,
    pod_tables::PodTables,
    users,
};
use crate::{
    dataplane::desired::{ROUTE_PROTOCOL, is_own_table, pods_table_name},
    model::Pool,
    netlink::{Request, link::Link, neighbour::Neighbor},
};

/// Which objects to list.
#[derive(Clone, Copy, Debug)]
pub enum Extent<'a> {
    /// Those of every overlay.
    Everything,
    /// Those of one overlay, and what the agents of this host share: the policy rules and the protection
    /// of neighbor entries. Other agents re-create both.
    Overlay {
        /// The name of the VXLAN device.
        device: &'a str,
        /// The cluster's pool.
        pool: &'a Pool,
        /// Whether to list the nftables tables for pods, too.
        with_pods: bool,
    },
}

/// Objects of gossamer in a kernel.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Names of VXLAN devices.
    pub devices: Vec<String>,
    /// Destinations and routes in the main table.
    pub routes: Vec<(IpNet, RouteMessage)>,
    /// Policy rules.
    pub rules: Vec<RuleMessage>,
    /// Neighbor entries of next hops that gossamer protects.
    pub neighbors: Vec<Neighbor>,
    /// nftables tables of family `inet`.
    pub tables: Vec<String>,
    /// nftables tables of family `bridge`.
    pub bridge_tables: Vec<String>,
}

impl Kernel {
    /// Returns everything in this network namespace that is recognizable as made by gossamer. A kernel
    /// without nftables has no tables.
    ///
    /// # Errors
    /// When a table of the kernel cannot be read.
    pub fn leftovers(&mut self, extent: Extent<'_>) -> io::Result<Leftovers> {
        let links = self.netlink.links()?;
        let entries = self.netlink.neighbors()?.into_iter();
        let with_subnet = |route| Some((subnet_of(&route)?, route));
        let mut routes = self.main_routes(Some(ROUTE_PROTOCOL), with_subnet)?;
        let devices: Vec<Link> = links.into_iter().filter(is_overlay_device).collect();
        if let Extent::Overlay { device, pool, .. } = extent {
            let index = devices.iter().find(|link| link.name == device).map(|link| link.index);
            let indices: Vec<u32> = devices.iter().map(|link| link.index).collect();
            routes.retain(|(subnet, route)| {
                let way = our_route(route, index).map(|(_, hop)| hop.way);
                is_of_overlay(subnet, way, Some(pool), &indices)
            });
        }
        let devices = devices.into_iter().map(|link| link.name);
        let tables = FirewallTable::open()
            .and_then(|mut firewall| firewall.tables(|table| extent.has_table(table)));
        let bridge_tables = PodTables::open().tables(|table| extent.has_bridge_table(table));
        Ok(Leftovers {
            devices: devices.filter(|device| extent.has_device(device)).collect(),
            routes,
            rules: users::all_rules(&mut self.netlink)?,
            neighbors: entries.filter(|entry| restoring_request(entry).is_some()).collect(),
            tables: tables.unwrap_or_default(),
            bridge_tables: bridge_tables.unwrap_or_default(),
        })
    }

    /// Removes what [`Kernel::leftovers`] found. A refusal does not prevent the other removals.
    ///
    /// # Errors
    /// When the kernel refuses to remove an object that exists.
    pub fn sweep(&mut self, leftovers: Leftovers) -> io::Result<()> {
        let Leftovers { devices, routes, rules, neighbors, tables, bridge_tables } = leftovers;
        let mut results: Vec<io::Result<()>> =
            devices.iter().map(|device| self.remove_device(device)).collect();
        results.push(users::remove(&mut self.netlink, rules));
        let gone = routes.into_iter().map(|(_, route)| RouteNetlinkMessage::DelRoute(route));
        let gone = gone.map(|message| Request { message, flags: 0 });
        let gone = gone.chain(neighbors.iter().filter_map(restoring_request)).collect();
        results.push(self.netlink.apply(gone).and_then(|refused| {
            let refused = refused.iter().find(|refused| !GONE.contains(&refused.errno));
            refused.map_or(Ok(()), |refused| Err(refused.to_io()))
        }));
        if !tables.is_empty() {
            match FirewallTable::open() {
                Ok(mut firewall) => {
                    results.extend(tables.iter().map(|table| firewall.remove(table)));
                }
                Err(error) => results.push(Err(error)),
            }
        }
        let mut pod_tables = PodTables::open();
        results.extend(bridge_tables.iter().map(|table| pod_tables.remove(table)));
        results.into_iter().collect()
    }
}

impl Extent<'_> {
    fn has_device(&self, name: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::Overlay { device, .. } => name == *device,
        }
    }

    fn has_table(&self, name: &str) -> bool {
        match self {
            Self::Everything => is_own_table(name),
            Self::Overlay { device, with_pods, .. } => {
                name == *device || *with_pods && name == pods_table_name(device)
            }
        }
    }

    fn has_bridge_table(&self, name: &str) -> bool {
        match self {
            Self::Everything => is_own_table(name),
            Self::Overlay { device, with_pods, .. } => *with_pods && name == *device,
        }
    }
}
