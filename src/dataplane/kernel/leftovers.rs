//! Lists and removes what gossamer has left in a kernel, for any cluster.
//!
//! Only objects that are recognizable without stored state are listed, and only listed ones are
//! removed.

use std::io;

use ipnet::IpNet;
use rtnetlink::packet_route::{RouteNetlinkMessage, route::RouteMessage, rule::RuleMessage};

use super::{
    GONE, Kernel, is_overlay_device, messages::subnet_of, next_hops::restoring_request, users,
};
use crate::{
    dataplane::desired::ROUTE_PROTOCOL,
    netlink::{Request, neighbour::Neighbor},
};

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
}

impl Kernel {
    /// Returns everything in this network namespace that is recognizable as made by gossamer.
    ///
    /// # Errors
    /// When a table of the kernel cannot be read.
    pub fn leftovers(&mut self) -> io::Result<Leftovers> {
        let links = self.netlink.links()?.into_iter();
        let entries = self.netlink.neighbors()?.into_iter();
        let with_subnet = |route| Some((subnet_of(&route)?, route));
        Ok(Leftovers {
            devices: links.filter(is_overlay_device).map(|link| link.name).collect(),
            routes: self.main_routes(Some(ROUTE_PROTOCOL), with_subnet)?,
            rules: users::all_rules(&mut self.netlink)?,
            neighbors: entries.filter(|entry| restoring_request(entry).is_some()).collect(),
        })
    }

    /// Removes what [`Kernel::leftovers`] found.
    ///
    /// # Errors
    /// When the kernel refuses to remove an object that exists.
    pub fn sweep(&mut self, leftovers: Leftovers) -> io::Result<()> {
        for device in &leftovers.devices {
            self.remove_device(device)?;
        }
        users::remove(&mut self.netlink, leftovers.rules)?;
        let gone =
            leftovers.routes.into_iter().map(|(_, route)| RouteNetlinkMessage::DelRoute(route));
        let gone = gone.map(|message| Request { message, flags: 0 });
        let gone = gone.chain(leftovers.neighbors.iter().filter_map(restoring_request)).collect();
        let refused = self.netlink.apply(gone)?;
        match refused.iter().find(|refused| !GONE.contains(&refused.errno)) {
            Some(refused) => Err(refused.to_io()),
            None => Ok(()),
        }
    }
}
