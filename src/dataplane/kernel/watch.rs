//! Evaluates the kernel's change notifications.
//!
//! The kernel also reports gossamer's own changes, so a notification counts only if it contradicts
//! the desired state. The repair is derived from a dump, never from the notification.

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
    netlink::{link::Link, local::local_address, route::condition},
    pods::wiring::is_link_name,
};

/// Upper limit of the destinations of foreign routes that are stored until their routes are looked
/// up.
const MAX_FOREIGN: usize = 64;

/// What has to be checked again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recheck {
    /// An object of gossamer may differ from the desired state.
    pub ours: bool,
    /// A foreign interface, address, route or rule changed: the underlay may be another one now.
    pub underlay: bool,
    /// A foreign interface, address, route or rule changed: packets may be routed differently now.
    pub routing: bool,
    /// The rules for users have to be checked.
    pub rules: bool,
}

impl Recheck {
    /// Everything has to be checked.
    pub const EVERYTHING: Self = Self { ours: true, underlay: true, routing: true, rules: true };

    /// Adds what `more` contains.
    pub const fn merge(&mut self, more: Self) {
        self.ours |= more.ours;
        self.underlay |= more.underlay;
        self.routing |= more.routing;
        self.rules |= more.rules;
    }

    /// Adds what a notification implies; `device` is the index of gossamer's device.
    pub fn add(
        &mut self,
        message: &RouteNetlinkMessage,
        desired: Option<&Desired>,
        device: Option<u32>,
    ) {
        use RouteNetlinkMessage as Message;
        let is_foreign = may_affect_routing(message, device);
        self.underlay |= is_foreign;
        self.routing |= is_foreign;
        self.rules |= match message {
            Message::DelRule(rule) => users::is_ours(rule),
            Message::DelRoute(route) => users::is_return_route(route),
            // Users may send by a new interface. A bridge may lead into a tunnel once a VXLAN
            // device is its port.
            Message::NewLink(link) => {
                is_foreign || Some(link.header.index) != device && is_vxlan(link)
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
                self.ours |= !is_as_desired(entry, desired, true);
            }
            Message::DelNeighbour(entry) if Some(entry.header.ifindex) == device => {
                self.ours |= !is_as_desired(entry, desired, false);
            }
            Message::NewRoute(route) => self.add_route(route, desired, device, true),
            Message::DelRoute(route) => self.add_route(route, desired, device, false),
            _ => {}
        }
    }

    /// Adds what the appearance, change or removal of a link implies.
    fn add_link(
        &mut self,
        message: &LinkMessage,
        desired: &Desired,
        device: Option<u32>,
        present: bool,
    ) {
        let wanted = &desired.device;
        let index = message.header.index;
        // The kernel does not report the removal of IPv4 routes with their interface.
        self.ours |= desired.has_direct_by(index);
        let has_device_name = message.attributes.iter().any(|attribute| match attribute {
            LinkAttribute::IfName(name) => *name == wanted.name,
            _ => false,
        });
        if Some(index) == device || has_device_name {
            let link = Link::from(message.clone());
            let right = present
                && link.name == wanted.name
                && link.up
                && !link.is_proto_down()
                && link.mtu == wanted.mtu
                && link.alias == wanted.alias
                && link.mac == Some(wanted.mac);
            self.ours |= !right;
        }
    }

    /// Adds what a new or removed address implies.
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

    /// Adds what a new or removed route implies.
    fn add_route(
        &mut self,
        route: &RouteMessage,
        desired: &Desired,
        device: Option<u32>,
        present: bool,
    ) {
        let own = local_address(route).filter(|ip| desired.device.addresses.contains(ip));
        self.ours |= own.is_some() && !present;
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

fn is_vxlan(link: &LinkMessage) -> bool {
    let infos = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    infos.flatten().any(|info| *info == LinkInfo::Kind(InfoKind::Vxlan))
}

/// Whether a change may alter the routing of the underlay's or the pods' packets. Gossamer's own
/// device does not, nor do ports of bridges, which come and go with pods. The first notifications
/// about a veth pair precede its attachment to the bridge, and it gets a multicast route when it is
/// up.
fn may_affect_routing(message: &RouteNetlinkMessage, device: Option<u32>) -> bool {
    use RouteNetlinkMessage as Message;
    match message {
        Message::NewLink(link) | Message::DelLink(link) => {
            let is_of_bridge = link.header.interface_family == AddressFamily::Bridge;
            let is_port = link.attributes.iter().any(
                |attribute| matches!(attribute, LinkAttribute::Controller(index) if *index != 0),
            );
            let is_veth = link.attributes.iter().any(
                |attribute| matches!(attribute, LinkAttribute::IfName(name) if is_link_name(name)),
            );
            Some(link.header.index) != device && !is_of_bridge && !is_port && !is_veth
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

/// Changed routes of other programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ForeignRoutes {
    /// Addresses of the overlay to which routes were added, in any table.
    pub to: BTreeSet<IpAddr>,
    /// Whether a route was added or removed that selects packets by more than their destination.
    pub has_conditional: bool,
}

impl ForeignRoutes {
    /// Adds what a notification implies.
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

/// Returns the entry that the kernel requests for the device with this index; `None` if the message
/// is no request.
pub fn miss(message: &RouteNetlinkMessage, device: u32) -> Option<Miss> {
    let RouteNetlinkMessage::GetNeighbour(asked) = message else { return None };
    // A request for an FDB entry has no address, and not the bridge family.
    match (destination(asked), lladdr(asked)) {
        _ if asked.header.ifindex != device => None,
        (Some(address), _) => Some(Miss::Address(address)),
        (None, Some(mac)) => Some(Miss::Tunnel(mac)),
        (None, None) => None,
    }
}

/// Whether the addition or removal of this entry agrees with the desired state.
fn is_as_desired(entry: &NeighbourMessage, desired: &Desired, present: bool) -> bool {
    let tables = &desired.tables;
    // Failed and temporary entries come and go without gossamer.
    let permanent = entry.header.state == NeighbourState::Permanent;
    let (to, mac) = (destination(entry), lladdr(entry));
    if entry.header.family == AddressFamily::Bridge {
        let (Some(to), Some(mac)) = (to, mac) else { return true };
        let wanted = tables.fdb.get(&mac) == Some(&to);
        return wanted == present;
    }
    let Some(ip) = to else { return true };
    match tables.neighbors.get(&ip) {
        Some(wanted) => present && permanent && mac == Some(*wanted),
        None => !(present && permanent),
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteAttribute;

    use super::*;

    #[test]
    fn veth_pairs_do_not_affect_routing_and_other_interfaces_may() {
        let affects = |name: &str, controller: Option<u32>| {
            let mut link = LinkMessage::default();
            link.header.index = 9;
            link.attributes.push(LinkAttribute::IfName(name.to_owned()));
            link.attributes.extend(controller.map(LinkAttribute::Controller));
            may_affect_routing(&RouteNetlinkMessage::NewLink(link), Some(7))
        };
        assert!(affects("eth1", None) && affects("gsm0", None) && affects("eth1", Some(0)));
        assert!(!affects("veth1", Some(3)), "a port of a bridge");
        assert!(!affects("gsm43ba27666d", None), "a veth pair that is not attached yet");
        let route = |to: IpAddr, len| {
            let mut route = RouteMessage::default();
            route.header.destination_prefix_length = len;
            route.header.address_family =
                if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            route.attributes.push(RouteAttribute::Destination(match to {
                IpAddr::V4(ip) => ip.into(),
                IpAddr::V6(ip) => ip.into(),
            }));
            may_affect_routing(&RouteNetlinkMessage::NewRoute(route), Some(7))
        };
        assert!(route([10, 0, 0, 0].into(), 8));
        assert!(route([0xfd00, 0, 0, 0, 0, 0, 0, 0].into(), 8));
        assert!(
            !route([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
            "the multicast route of an interface that is up"
        );
    }
}
