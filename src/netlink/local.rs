//! Routes of the table `local`, by which the kernel recognizes packets for its own addresses.
//!
//! The kernel adds one for each address. Another program may remove it and leave the address: the kernel then
//! forwards packets for the address, or drops them.

use std::{collections::BTreeSet, io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

use super::{Netlink, Request, link::Address};

/// `RT_TABLE_LOCAL` (`linux/rtnetlink.h`).
pub const TABLE: u8 = 255;

impl Netlink {
    /// Returns the addresses of this interface whose route in the table `local` is missing. It must
    /// be up and in no VRF. Addresses that duplicate detection still checks have no route yet.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn unreceived(&mut self, link: u32, addresses: &[Address]) -> io::Result<BTreeSet<IpAddr>> {
        let of_link = addresses.iter().filter(|address| address.link == link && !address.tentative);
        let mut missing: BTreeSet<IpAddr> = of_link.map(|address| address.ip).collect();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let is_ipv4 = family == AddressFamily::Inet;
            if !missing.iter().any(|ip| ip.is_ipv4() == is_ipv4) {
                continue;
            }
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            filter.header.table = TABLE;
            filter.header.kind = RouteType::Local;
            // Kernels may list IPv6 routes of own addresses at the loopback interface.
            filter.attributes.extend(is_ipv4.then_some(RouteAttribute::Oif(link)));
            let wanted = RouteNetlinkMessage::GetRoute(filter);
            let received = self.dump_some(&wanted, |message| match message {
                RouteNetlinkMessage::NewRoute(route) => local_address(&route),
                _ => None,
            })?;
            // A kernel without several IPv6 tables has no such table.
            if received.is_empty() && !is_ipv4 {
                missing.retain(IpAddr::is_ipv4);
            }
            received.iter().for_each(|ip| _ = missing.remove(ip));
        }
        Ok(missing)
    }
}

/// Returns the address whose packets a route of the table `local` delivers.
pub fn local_address(route: &RouteMessage) -> Option<IpAddr> {
    let header = &route.header;
    if header.table != TABLE || header.kind != RouteType::Local {
        return None;
    }
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })
}

/// Returns a request to add the route of an interface's address, as the kernel does.
pub fn local_route(link: u32, ip: IpAddr) -> Request {
    let mut route = RouteMessage::default();
    let (family, length) = match ip {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    route.header.address_family = family;
    route.header.destination_prefix_length = length;
    route.header.table = TABLE;
    route.header.protocol = RouteProtocol::Kernel;
    route.header.kind = RouteType::Local;
    route.header.scope = if ip.is_ipv4() { RouteScope::Host } else { RouteScope::Universe };
    route.attributes = vec![RouteAttribute::Destination(ip.into()), RouteAttribute::Oif(link)];
    if ip.is_ipv4() {
        route.attributes.push(RouteAttribute::PrefSource(ip.into()));
    }
    Request { message: RouteNetlinkMessage::NewRoute(route), flags: NLM_F_CREATE | NLM_F_REPLACE }
}
