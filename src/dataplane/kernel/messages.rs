//! Converts gossamer's device and entries to netlink messages and back.
//!
//! Only formats: the parent module decides what is sent when, and what a refusal means.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use rtnetlink::{
    LinkVxlan,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, VxlanDf},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        neighbour_table::{
            NeighbourTableAttribute, NeighbourTableMessage, NeighbourTableParameter,
        },
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteProtocol, RouteScope, RouteType, RouteVia,
        },
    },
};

use super::super::{
    desired::{Device, Hop, ROUTE_PROTOCOL, RouteTarget},
    plan::EntryOp,
};
use crate::{
    model::{Mac, Pool},
    netlink::{Request, attributes, link::Link},
};

/// Bit of `RTAX_MTU` in `RTAX_LOCK`, which lists the metrics that the kernel must not adjust.
const MTU_LOCK: u32 = 1 << 2;

/// Returns the settings that make the kernel send solicitations for neighbors on this device to
/// user space, three times, and not to the network.
pub(super) fn user_space_solicitations(table: &str, index: u32) -> RouteNetlinkMessage {
    use NeighbourTableParameter as Parameter;
    let mut message = NeighbourTableMessage::default();
    message.header.family =
        if table == "arp_cache" { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes = vec![
        NeighbourTableAttribute::Name(table.to_owned()),
        NeighbourTableAttribute::Parms(vec![
            Parameter::Ifindex(index),
            Parameter::AppProbes(3),
            Parameter::McastProbes(0),
            Parameter::UcastProbes(0),
        ]),
    ];
    RouteNetlinkMessage::SetNeighbourTable(message)
}

/// Returns the message that creates the device.
pub(super) fn device_message(device: &Device) -> LinkMessage {
    let builder = LinkVxlan::new(&device.name, device.vni)
        .port(device.port)
        .learning(false)
        .l2miss(true)
        .l3miss(true)
        .mtu(device.mtu)
        .address(device.mac.as_bytes().to_vec());
    let builder = if device.link == 0 { builder } else { builder.dev(device.link) };
    match device.local {
        IpAddr::V4(local) => builder.local(local),
        IpAddr::V6(local) => builder.local6(local),
    }
    .build()
}

/// Returns (VNI, port), local address, underlay interface, and whether the device has attributes
/// that gossamer never sets.
pub(super) fn fixed_attributes(link: &Link) -> ((u32, u16), IpAddr, u32, bool) {
    let (mut vni, mut port, mut underlay, mut foreign) = (0, 0, 0, false);
    let mut local = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let infos = link.message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let data = infos.flatten().filter_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    for info in data.flatten() {
        match info {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Link(index) => underlay = *index,
            InfoVxlan::Local(ip) => local = IpAddr::V4(*ip),
            InfoVxlan::Local6(ip) => local = IpAddr::V6(*ip),
            InfoVxlan::Learning(on) => foreign |= *on,
            InfoVxlan::CollectMetadata(on) => foreign |= *on,
            InfoVxlan::Group(ip) => foreign |= !ip.is_unspecified(),
            InfoVxlan::Group6(ip) => foreign |= !ip.is_unspecified(),
            // These attributes can be changed after creation (`ip link set type vxlan`).
            InfoVxlan::Ttl(value) | InfoVxlan::Tos(value) => foreign |= *value != 0,
            InfoVxlan::TtlInherit(value) => foreign |= *value != 0,
            InfoVxlan::TtlInheritFlag => foreign = true,
            InfoVxlan::Df(value) => foreign |= *value != VxlanDf::Unset,
            InfoVxlan::Label(value) => foreign |= *value != 0,
            _ => {}
        }
    }
    ((vni, port), local, underlay, foreign)
}

/// Returns the request for an operation on entries of the device with this index.
pub(super) fn request(op: &EntryOp, index: u32) -> Request {
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    let (message, flags) = match op {
        EntryOp::SetFdb(mac, underlay) => {
            (RouteNetlinkMessage::NewNeighbour(fdb_message(index, *mac, *underlay)), replace)
        }
        EntryOp::RemoveFdb(mac, underlay) => {
            (RouteNetlinkMessage::DelNeighbour(fdb_message(index, *mac, *underlay)), 0)
        }
        EntryOp::SetNeighbor(address, mac) => (
            RouteNetlinkMessage::NewNeighbour(neighbor_message(index, *address, Some(*mac))),
            replace,
        ),
        EntryOp::Resolve(address, mac) => {
            let mut message = neighbor_message(index, *address, Some(*mac));
            message.header.state = NeighbourState::Reachable;
            (RouteNetlinkMessage::NewNeighbour(message), replace)
        }
        EntryOp::RemoveNeighbor(address) => {
            (RouteNetlinkMessage::DelNeighbour(neighbor_message(index, *address, None)), 0)
        }
        EntryOp::AddRoute(subnet, hop) => (
            RouteNetlinkMessage::NewRoute(route_message(index, *subnet, *hop)),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
        EntryOp::ReplaceRoute(subnet, hop) => {
            (RouteNetlinkMessage::NewRoute(route_message(index, *subnet, *hop)), NLM_F_REPLACE)
        }
        EntryOp::RemoveRoute(subnet, hop) => {
            (RouteNetlinkMessage::DelRoute(route_message(index, *subnet, *hop)), 0)
        }
    };
    Request { message, flags }
}

fn fdb_message(index: u32, mac: Mac, underlay: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()),
        NeighbourAttribute::Destination(underlay.into()),
    ];
    message
}

fn neighbor_message(index: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    let lladdr = mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
    message.attributes.extend(lladdr);
    message
}

fn route_message(index: u32, subnet: IpNet, hop: Hop) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(subnet.addr());
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.header.destination_prefix_length = subnet.prefix_len();
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        RouteAttribute::Destination(subnet.addr().into()),
        RouteAttribute::Priority(hop.metric),
    ];
    let (gateway, link) = match hop.way {
        RouteTarget::Overlay(vtep) => (vtep, index),
        RouteTarget::Direct { gateway, link } => (gateway, link),
        RouteTarget::Device => {
            message.header.scope = RouteScope::Link;
            message.attributes.push(RouteAttribute::Oif(index));
            return message;
        }
        RouteTarget::Unreachable => {
            message.header.kind = RouteType::Unreachable;
            return message;
        }
    };
    message.header.flags = RouteFlags::Onlink;
    message.attributes.push(RouteAttribute::Oif(link));
    if let Some(mtu) = hop.mtu {
        // IPv6 forwards with the device's MTU, unless the route's MTU is locked. With IPv4, a lock
        // would end path MTU discovery.
        let lock = subnet.addr().is_ipv6().then_some(RouteMetric::Lock(MTU_LOCK));
        let metrics = lock.into_iter().chain([RouteMetric::Mtu(mtu)]).collect();
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message.attributes.push(match (subnet, gateway) {
        (IpNet::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
        (_, gateway) => RouteAttribute::Gateway(gateway.into()),
    });
    message
}

const fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Returns destination and next hop of a route with gossamer's protocol number, and `None` for
/// other routes. The route may lead to `device`, to another interface, or be `unreachable`.
pub(super) fn our_route(route: &RouteMessage, device: Option<u32>) -> Option<(IpNet, Hop)> {
    let header = &route.header;
    if header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL) {
        return None;
    }
    let way = match header.kind {
        RouteType::Unreachable => RouteTarget::Unreachable,
        RouteType::Unicast => {
            let link = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })?;
            match route.attributes.iter().find_map(gateway_of) {
                Some(vtep) if Some(link) == device => RouteTarget::Overlay(vtep),
                None if Some(link) == device => RouteTarget::Device,
                gateway => {
                    let gateway = gateway.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                    RouteTarget::Direct { gateway, link }
                }
            }
        }
        _ => return None,
    };
    Some((subnet_of(route)?, Hop { mtu: mtu_of(route), ..Hop::new(way, metric_of(route)) }))
}

/// Returns whether a route of gossamer's belongs to the overlay of a pool. Another overlay on this host may
/// use a part of the pool's networks. `devices` are the indices of all overlay devices.
pub(super) fn is_of_overlay(
    subnet: &IpNet,
    way: Option<RouteTarget>,
    pool: Option<&Pool>,
    devices: &[u32],
) -> bool {
    match way {
        Some(RouteTarget::Overlay(_) | RouteTarget::Device) => true,
        Some(RouteTarget::Direct { link, .. }) if devices.contains(&link) => false,
        _ => {
            pool.is_some_and(|pool| pool.networks().iter().any(|network| network.contains(subnet)))
        }
    }
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some((*ip).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(ip))
        | RouteAttribute::Via(RouteVia::Inet6(ip)) => Some((*ip).into()),
        _ => None,
    }
}

/// Returns the metric of a route.
pub(super) fn metric_of(route: &RouteMessage) -> u32 {
    let priority = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    priority.unwrap_or(0)
}

fn mtu_of(route: &RouteMessage) -> Option<u32> {
    let metrics = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => Some(metrics),
        _ => None,
    });
    metrics?.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// Returns the destination of a route; `None` for a default route.
pub(super) fn subnet_of(route: &RouteMessage) -> Option<IpNet> {
    let network = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::from(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::from(*ip)),
        _ => None,
    })?;
    IpNet::new(network, route.header.destination_prefix_length).ok()
}

/// Returns `NDA_DST`: the address of a neighbor, or the VTEP's underlay address of an FDB entry.
pub(super) fn destination(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        // The packet crate does not parse the addresses of FDB entries.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            attributes::address(bytes)
        }
        _ => None,
    })
}

/// Returns the MAC of an entry.
pub(super) fn lladdr(entry: &NeighbourMessage) -> Option<Mac> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => {
            bytes.as_slice().try_into().ok().map(Mac::from_bytes)
        }
        _ => None,
    })
}
