//! Parses routes and policy rules.

use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
    rule::{RuleAction, RuleAttribute, RuleFlags, RulePortRange},
};

use super::{Refusal, Rule, UnicastRoute};
use crate::model::{Condition, Ports, Selector, unspecified};

/// Parses a policy rule.
pub(super) fn rule(message: RouteNetlinkMessage) -> Option<Rule> {
    let RouteNetlinkMessage::NewRule(message) = message else { return None };
    let refuses = matches!(
        message.header.action,
        RuleAction::Blackhole | RuleAction::Unreachable | RuleAction::Prohibit
    );
    let table = u32::from(message.header.table);
    let (mut priority, mut of_table, mut input, mut origin) = (0, table, None, None);
    let (mut mark, mut mask) = (None, u32::MAX);
    let (mut from, mut to) = (None, None);
    let (mut protocol, mut source, mut destination) = (None, None, None);
    let range = |ports: &RulePortRange| Ports { first: ports.start, last: ports.end };
    let network = |ip: &IpAddr, length: u8| IpNet::new(*ip, length).ok();
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => of_table = *number,
            RuleAttribute::Iifname(name) => input = Some(name.clone()),
            RuleAttribute::Source(ip) => from = network(ip, message.header.src_len),
            RuleAttribute::Destination(ip) => to = network(ip, message.header.dst_len),
            RuleAttribute::IpProtocol(number) => protocol = Some(u8::from(*number)),
            RuleAttribute::SourcePortRange(ports) => source = Some(range(ports)),
            RuleAttribute::DestinationPortRange(ports) => destination = Some(range(ports)),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Protocol(number) => origin = Some(*number),
            _ => {}
        }
    }
    let tos = message.header.tos;
    let selector =
        Selector { priority: Some(priority), from, to, protocol, source, destination, tos };
    Some(Rule {
        priority,
        selector,
        inverted: message.header.flags.contains(RuleFlags::Invert),
        input,
        table: of_table,
        refuses,
        mark: mark.map(|mark| (mark, mask)),
        protocol: origin,
    })
}

/// Parses a unicast route. `None` for other kinds.
pub(super) fn unicast_route(route: &RouteMessage, ipv4: bool) -> Option<UnicastRoute> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut network = unspecified(ipv4);
    let (mut metric, mut table) = (0, u32::from(route.header.table));
    let (mut gateways, mut link) = (Vec::new(), None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => network = ip(address)?,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::MultiPath(hops) => {
                let attributes = hops.iter().flat_map(|hop| &hop.attributes);
                gateways.extend(attributes.filter_map(gateway));
            }
            other => gateways.extend(gateway(other)),
        }
    }
    let to = IpNet::new(network, route.header.destination_prefix_length).ok()?;
    Some(UnicastRoute { to, gateways, link, metric, table })
}

/// Returns the gateway in an attribute.
pub(super) const fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(via) => via_ip(via),
        _ => None,
    }
}

/// Parses a route that drops packets.
pub(super) fn refusal(route: &RouteMessage, kind: &'static str, ipv4: bool) -> Option<Refusal> {
    let mut network = unspecified(ipv4);
    let mut table = u32::from(route.header.table);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => network = ip(address)?,
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let destination = IpNet::new(network, route.header.destination_prefix_length).ok()?;
    let (protocol, condition) = (route.header.protocol, condition(route));
    Some(Refusal { destination, table, kind, protocol, condition })
}

/// Returns what a route requires of a packet besides its destination.
pub fn condition(route: &RouteMessage) -> Condition {
    let length = route.header.source_prefix_length;
    let from = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Source(address) => IpNet::new(ip(address)?, length).ok(),
        _ => None,
    });
    Condition { from: from.filter(|_| length > 0), tos: route.header.tos }
}

/// Returns the address if it is one of IPv4 or IPv6.
pub(super) const fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// Returns the gateway of another family.
pub(super) const fn via_ip(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteVia::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
