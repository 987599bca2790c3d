//! What gossamer has left in a kernel, of whatever cluster, and its removal.
//!
//! Only what can be recognised without memory is listed, and only what was listed is removed.

use std::io;

use ipnet::IpNet;
use rtnetlink::packet_route::{RouteNetlinkMessage, route::RouteMessage, rule::RuleMessage};

use super::{GONE, Kernel, is_gossamers, messages::subnet_of, next_hops::given_back, users};
use crate::{
    dataplane::desired::ROUTE_PROTOCOL,
    netlink::{Request, neighbour::Neighbor},
};

/// What was found.
#[derive(Debug, Default)]
pub struct Leftovers {
    pub devices: Vec<String>,
    pub routes: Vec<(IpNet, RouteMessage)>,
    pub rules: Vec<RuleMessage>,
    /// Entries of next hops that were made to stay.
    pub neighbors: Vec<Neighbor>,
}

impl Kernel {
    /// Everything in this namespace that can be recognised as made by gossamer.
    pub fn leftovers(&mut self) -> io::Result<Leftovers> {
        let links = self.netlink.links()?.into_iter();
        let entries = self.netlink.neighbors()?.into_iter();
        let with_subnet = |route| Some((subnet_of(&route)?, route));
        Ok(Leftovers {
            devices: links.filter(is_gossamers).map(|link| link.name).collect(),
            routes: self.main_routes(Some(ROUTE_PROTOCOL), with_subnet)?,
            rules: users::found(&mut self.netlink)?,
            neighbors: entries.filter(|entry| given_back(entry).is_some()).collect(),
        })
    }

    /// Removes what [`Kernel::leftovers`] found.
    pub fn sweep(&mut self, leftovers: Leftovers) -> io::Result<()> {
        for device in &leftovers.devices {
            self.remove_device(device)?;
        }
        users::remove(&mut self.netlink, leftovers.rules)?;
        let gone =
            leftovers.routes.into_iter().map(|(_, route)| RouteNetlinkMessage::DelRoute(route));
        let gone = gone.map(|message| Request { message, flags: 0 });
        let gone = gone.chain(leftovers.neighbors.iter().filter_map(given_back)).collect();
        let refused = self.netlink.apply(gone)?;
        match refused.iter().find(|refused| !GONE.contains(&refused.errno)) {
            Some(refused) => Err(refused.to_io()),
            None => Ok(()),
        }
    }
}
