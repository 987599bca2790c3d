//! Whether a change that the kernel tells about is any of our business.
//!
//! Our own changes are heard like everybody's, so an event counts only if it contradicts what should be
//! there. What is to be done about it is found out by a dump, never from the event.

use std::{collections::BTreeSet, net::IpAddr};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    neighbour::{NeighbourMessage, NeighbourState},
    route::{RouteHeader, RouteMessage, RouteProtocol},
};

use super::{
    messages::{destination, lladdr, our_route, subnet_of},
    users,
};
use crate::{
    dataplane::{
        demand::Miss,
        desired::{Desired, ROUTE_PROTOCOL},
    },
    netlink::{link::Link, route::condition},
    pods::wiring::is_link_name,
};

/// Routes of others that are remembered until their ways are asked for.
const MAX_FOREIGN: usize = 64;

/// What has to be looked at again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Something on our account is not as it should be.
    pub ours: bool,
    /// An interface, address, route or rule of others: the underlay may be another one now.
    pub underlay: bool,
    /// An interface, address, route or rule of others: packets may take another way now.
    pub routing: bool,
    /// A policy rule of ours was removed.
    pub rules: bool,
}

impl Touched {
    pub const EVERYTHING: Self = Self { ours: true, underlay: true, routing: true, rules: true };

    pub const fn merge(&mut self, more: Self) {
        self.ours |= more.ours;
        self.underlay |= more.underlay;
        self.routing |= more.routing;
        self.rules |= more.rules;
    }

    /// Adds what `message` says, for the device with index `device`.
    pub fn add(
        &mut self,
        message: &RouteNetlinkMessage,
        desired: Option<&Desired>,
        device: Option<u32>,
    ) {
        use RouteNetlinkMessage as Message;
        let is_of_others = may_lead_elsewhere(message, device);
        self.underlay |= is_of_others;
        self.routing |= is_of_others;
        self.rules |= match message {
            Message::DelRule(rule) => users::is_ours(rule),
            Message::DelRoute(route) => users::brings_back(route),
            // Users may send by it. A bridge may lead into a tunnel as soon as it has this port.
            Message::NewLink(link) => {
                is_of_others || Some(link.header.index) != device && is_vxlan(link)
            }
            _ => false,
        };
        let Some(desired) = desired else { return };
        match message {
            Message::NewLink(link) => self.add_link(link, desired, device, true),
            Message::DelLink(link) => self.add_link(link, desired, device, false),
            Message::NewAddress(address) => self.add_address(address, desired, device, true),
            Message::DelAddress(address) => self.add_address(address, desired, device, false),
            Message::NewNeighbour(entry) if Some(entry.header.ifindex) == device => {
                self.ours |= !is_right(entry, desired, true);
            }
            Message::DelNeighbour(entry) if Some(entry.header.ifindex) == device => {
                self.ours |= !is_right(entry, desired, false);
            }
            Message::NewRoute(route) => self.add_route(route, desired, device, true),
            Message::DelRoute(route) => self.add_route(route, desired, device, false),
            _ => {}
        }
    }

    fn add_link(
        &mut self,
        message: &LinkMessage,
        desired: &Desired,
        device: Option<u32>,
        present: bool,
    ) {
        let wanted = &desired.device;
        let index = message.header.index;
        // The kernel says nothing about the IPv4 routes that go with an interface.
        self.ours |= desired.has_direct_by(index);
        let has_its_name = message.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::IfName(name) => *name == wanted.name,
            _ => false,
        });
        if Some(index) == device || has_its_name {
            let link = Link::from(message.clone());
            let right = present
                && link.name == wanted.name
                && link.up
                && link.mtu == wanted.mtu
                && link.alias == wanted.alias
                && link.mac == Some(wanted.mac);
            self.ours |= !right;
        }
    }

    fn add_address(
        &mut self,
        message: &AddressMessage,
        desired: &Desired,
        device: Option<u32>,
        present: bool,
    ) {
        if Some(message.header.index) == device {
            let ours = message.attributes.iter().any(|attribute| {
                matches!(attribute, AddressAttribute::Local(ip) | AddressAttribute::Address(ip)
                    if desired.device.addresses.contains(ip))
            });
            self.ours |= ours != present;
        }
    }

    fn add_route(
        &mut self,
        route: &RouteMessage,
        desired: &Desired,
        device: Option<u32>,
        present: bool,
    ) {
        if route.header.table != RouteHeader::RT_TABLE_MAIN {
            return;
        }
        if route.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) {
            return;
        }
        if let Some((subnet, hop)) = our_route(route, device) {
            let wanted = desired.tables.routes.get(&subnet) == Some(&hop);
            self.ours |= wanted != present;
        }
    }
}

/// Whether packets may take another way because of a change: those of the underlay, and those of pods. What
/// concerns our own device, and ports of bridges, which come and go with pods, does not lead them elsewhere.
/// A cable is no port yet when the kernel first tells of it, and gets a route of multicast when it is up.
fn is_vxlan(link: &LinkMessage) -> bool {
    let infos = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    infos.flatten().any(|info| *info == LinkInfo::Kind(InfoKind::Vxlan))
}

fn may_lead_elsewhere(message: &RouteNetlinkMessage, device: Option<u32>) -> bool {
    use RouteNetlinkMessage as Message;
    match message {
        Message::NewLink(link) | Message::DelLink(link) => {
            let is_of_bridge = link.header.interface_family == AddressFamily::Bridge;
            let is_port = link.attributes.iter().any(
                |attribute| matches!(attribute, LinkAttribute::Controller(index) if *index != 0),
            );
            let is_cable = link.attributes.iter().any(
                |attribute| matches!(attribute, LinkAttribute::IfName(name) if is_link_name(name)),
            );
            Some(link.header.index) != device && !is_of_bridge && !is_port && !is_cable
        }
        Message::NewAddress(address) | Message::DelAddress(address) => {
            Some(address.header.index) != device
        }
        Message::NewRoute(route) | Message::DelRoute(route) => {
            let is_multicast =
                subnet_of(route).is_some_and(|subnet| subnet.network().is_multicast());
            route.header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) && !is_multicast
        }
        Message::NewRule(rule) | Message::DelRule(rule) => !users::is_ours(rule),
        _ => false,
    }
}

/// Other programs' routes that have changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ForeignRoutes {
    /// Addresses of the overlay to which there are new ones, of whatever table.
    pub to: BTreeSet<IpAddr>,
    /// Among those that came or went are some that select packets by more than their destination.
    pub has_conditional: bool,
}

impl ForeignRoutes {
    /// Adds what `message` says.
    pub(super) fn add(&mut self, message: &RouteNetlinkMessage, desired: Option<&Desired>) {
        let (route, is_new) = match message {
            RouteNetlinkMessage::NewRoute(route) => (route, true),
            RouteNetlinkMessage::DelRoute(route) => (route, false),
            _ => return,
        };
        if route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) {
            return;
        }
        self.has_conditional |= !condition(route).is_none();
        let is_inside = |ip: &IpAddr| {
            desired.is_some_and(|all| all.pool.networks().iter().any(|net| net.contains(ip)))
        };
        let first = subnet_of(route).map(|subnet| subnet.network());
        if is_new && self.to.len() < MAX_FOREIGN {
            self.to.extend(first.filter(is_inside));
        }
    }
}

/// What the kernel asks for, if it is about the device with this index.
pub fn miss(message: &RouteNetlinkMessage, device: u32) -> Option<Miss> {
    let RouteNetlinkMessage::GetNeighbour(asked) = message else { return None };
    // A miss in the FDB comes without an address, and not as one of a bridge.
    match (destination(asked), lladdr(asked)) {
        _ if asked.header.ifindex != device => None,
        (Some(address), _) => Some(Miss::Address(address)),
        (None, Some(mac)) => Some(Miss::Tunnel(mac)),
        (None, None) => None,
    }
}

/// Whether the appearance of this entry, or its end, leaves the tables as they should be.
fn is_right(entry: &NeighbourMessage, desired: &Desired, present: bool) -> bool {
    let tables = &desired.tables;
    // Dead and temporary entries of others come and go by themselves.
    let permanent = entry.header.state == NeighbourState::Permanent;
    let (to, mac) = (destination(entry), lladdr(entry));
    if entry.header.family == AddressFamily::Bridge {
        let (Some(to), Some(mac)) = (to, mac) else { return true };
        let wanted = tables.fdb.get(&mac) == Some(&to);
        return wanted == present;
    }
    let Some(ip) = to else { return true };
    match tables.neighbours.get(&ip) {
        Some(wanted) => present && permanent && mac == Some(*wanted),
        None => !(present && permanent),
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteAttribute;

    use super::*;

    #[test]
    fn cables_of_pods_lead_nothing_elsewhere_and_other_interfaces_may() {
        let told = |name: &str, controller: Option<u32>| {
            let mut link = LinkMessage::default();
            link.header.index = 9;
            link.attributes.push(LinkAttribute::IfName(name.to_owned()));
            link.attributes.extend(controller.map(LinkAttribute::Controller));
            may_lead_elsewhere(&RouteNetlinkMessage::NewLink(link), Some(7))
        };
        assert!(told("eth1", None) && told("gsm0", None) && told("eth1", Some(0)));
        assert!(!told("veth1", Some(3)), "a port of a bridge");
        assert!(!told("gsm43ba27666d", None), "a cable that is not plugged in yet");
        let route = |to: IpAddr, len| {
            let mut route = RouteMessage::default();
            route.header.destination_prefix_length = len;
            route.header.address_family =
                if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            route.attributes.push(RouteAttribute::Destination(match to {
                IpAddr::V4(ip) => ip.into(),
                IpAddr::V6(ip) => ip.into(),
            }));
            may_lead_elsewhere(&RouteNetlinkMessage::NewRoute(route), Some(7))
        };
        assert!(route([10, 0, 0, 0].into(), 8));
        assert!(route([0xfd00, 0, 0, 0, 0, 0, 0, 0].into(), 8));
        assert!(!route([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8), "of an interface that is up");
    }
}
