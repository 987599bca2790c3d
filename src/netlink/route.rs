//! Routes asked of the kernel: which way a packet would take, and the rules that send it there.
//!
//! A lookup is the kernel's own decision (`RTM_GETROUTE` without `NLM_F_DUMP`), so policy rules, VRFs,
//! more specific prefixes, reverse path filters and per-interface forwarding all take part in it.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteLwEnCapType, RouteMessage,
        RouteMetric, RouteNextHop, RouteProtocol, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange},
};

use ipnet::IpNet;

use super::Netlink;
use crate::model::{Condition, Ports, Selector, Transport};

/// A packet whose way is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    pub to: IpAddr,
    /// Source address. With `input` it must not be an address of this host.
    pub from: Option<IpAddr>,
    /// Index of the interface by which the packet comes in; none for a packet of this host's own.
    pub input: Option<u32>,
    /// Index of the interface by which it has to leave.
    pub output: Option<u32>,
    /// Its protocol and ports: rules may ask for them.
    pub transport: Option<Transport>,
    /// Its type of service: rules may ask for that.
    pub tos: u8,
    /// What a rule of the firewall may have marked it with.
    pub mark: Option<u32>,
}

impl Query {
    /// A packet of this host's own to `to`.
    pub const fn to(to: IpAddr) -> Self {
        Self { to, from: None, input: None, output: None, transport: None, tos: 0, mark: None }
    }

    /// A packet that comes in by `input`, to be forwarded or delivered.
    pub const fn forwarded(from: IpAddr, to: IpAddr, input: u32) -> Self {
        Self { from: Some(from), input: Some(input), ..Self::to(to) }
    }
}

/// The way that the kernel has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Index of the interface by which the packet leaves; 0 if it leaves by none.
    pub link: u32,
    pub gateway: Option<IpAddr>,
    /// Source address of a packet that has none yet.
    pub source: Option<IpAddr>,
    pub table: u32,
    /// MTU of the path, where a route has one or a router has told it; none: that of the interface.
    pub mtu: Option<u32>,
    /// It was learned, and not configured: the kernel forgets it after a while.
    pub learned: bool,
    /// An ICMP redirect has led it there (`RTCF_REDIRECTED`, `RTPROT_REDIRECT`).
    pub redirected: bool,
    /// Unicast, local, unreachable, blackhole ...
    pub kind: RouteType,
    /// Something is put before the packet, or a program changes it (MPLS, SRv6, BPF).
    pub rewrites: bool,
}

/// The entry of a table that has decided a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub destination: Option<IpAddr>,
    pub prefix_len: u8,
    pub metric: u32,
    pub table: u32,
    pub protocol: RouteProtocol,
    /// Unicast, local ...
    pub kind: RouteType,
    /// It has several next hops.
    pub is_multipath: bool,
    pub condition: Condition,
}

/// A policy rule (`ip rule`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub priority: u32,
    /// What else it selects packets by; with `inverted` it concerns all other packets.
    pub selector: Selector,
    pub inverted: bool,
    /// Name of the interface by which packets come in.
    pub input: Option<String>,
    /// Where the lookup goes on; 0 if the rule leads to no table of its own.
    pub table: u32,
    /// Packets that match are dropped.
    pub refuses: bool,
    /// It concerns packets with this mark alone: value and mask.
    pub mark: Option<(u32, u32)>,
    /// Which program has made it, as far as it says.
    pub protocol: Option<RouteProtocol>,
}

impl Rule {
    /// Whether it concerns every packet.
    pub fn takes_all(&self) -> bool {
        let Selector { from, to, tos, .. } = self.selector;
        let transport = self.selector.transport();
        let is_any = |network: Option<IpNet>| network.is_none_or(|to| to.prefix_len() == 0);
        let is_selective = self.inverted || self.input.is_some() || self.mark.is_some();
        is_any(from) && is_any(to) && transport.is_none() && tos == 0 && !is_selective
    }
}

/// A route that leads nowhere, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub destination: IpNet,
    pub table: u32,
    /// As `ip route` calls it.
    pub kind: &'static str,
    pub protocol: RouteProtocol,
    pub condition: Condition,
}

/// Where a route leads from, whatever becomes of packets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub network: IpNet,
    pub condition: Condition,
    /// The program that has made it.
    pub protocol: RouteProtocol,
}

/// Of a route that ends the lookup in its table.
pub const THROW: &str = "throw";

/// `RTCF_REDIRECTED` of linux/in_route.h.
const REDIRECTED: u32 = 0x0004_0000;
/// `RT_TABLE_LOCAL`: addresses of this host.
const LOCAL: u32 = 255;

/// Number of the table in which a packet's way is looked up where no rule says otherwise.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// A route by which packets leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub to: IpNet,
    /// None, if what it leads to is on its link; several, if it has several next hops.
    pub gateways: Vec<IpAddr>,
    /// Of the interface; none, if it has several next hops.
    pub link: Option<u32>,
    pub metric: u32,
    pub table: u32,
}

/// Asks for routes of a family.
fn of_family(ipv4: bool) -> RouteMessage {
    let mut filter = RouteMessage::default();
    filter.header.address_family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    filter
}

impl Netlink {
    /// The routes of a family by which packets leave, in all tables.
    pub fn routes(&mut self, ipv4: bool) -> io::Result<Vec<Listed>> {
        let wanted = RouteNetlinkMessage::GetRoute(of_family(ipv4));
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewRoute(route) => listed(&route, ipv4),
            _ => None,
        })
    }

    /// Destinations of all routes of a family. Those of this host's own addresses are left out.
    pub fn destinations(&mut self, ipv4: bool) -> io::Result<Vec<Destination>> {
        let wanted = RouteNetlinkMessage::GetRoute(of_family(ipv4));
        self.dump_some(&wanted, |message| {
            let RouteNetlinkMessage::NewRoute(route) = message else { return None };
            let protocol = route.header.protocol;
            let is_own =
                u32::from(route.header.table) == LOCAL && protocol == RouteProtocol::Kernel;
            let to = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Destination(address) => ip(address),
                _ => None,
            });
            let is_default = route.header.destination_prefix_length == 0;
            let to = to.or_else(|| is_default.then(|| any(ipv4)));
            let to = to.filter(|to| !is_own && to.is_ipv4() == ipv4)?;
            let network = IpNet::new(to, route.header.destination_prefix_length).ok()?;
            Some(Destination { network, condition: condition(&route), protocol })
        })
    }

    /// Asks the kernel for the way of a packet.
    ///
    /// # Errors
    /// The kernel's answer to the packet itself, as `ip route get` shows it: `EHOSTUNREACH` and `ENETUNREACH`
    /// where no route leads there or the input interface does not forward, `EXDEV` where the reverse path
    /// filter drops it, `EINVAL` for a source address that no packet can have.
    pub fn route(&mut self, query: &Query) -> io::Result<Found> {
        let message = self.lookup(query, RouteFlags::empty())?;
        let mut found = Found {
            link: 0,
            gateway: None,
            source: None,
            table: u32::from(message.header.table),
            mtu: None,
            learned: false,
            redirected: message.header.flags.bits() & REDIRECTED != 0
                || message.header.protocol == RouteProtocol::IcmpRedirect,
            kind: message.header.kind,
            rewrites: false,
        };
        for attribute in &message.attributes {
            match attribute {
                // Tunnels alone read what these say, and no device of ours is such a one.
                RouteAttribute::EncapType(
                    RouteLwEnCapType::None | RouteLwEnCapType::Ip | RouteLwEnCapType::Ip6,
                ) => {}
                RouteAttribute::EncapType(_) => found.rewrites = true,
                RouteAttribute::Oif(index) => found.link = *index,
                RouteAttribute::Gateway(address) => found.gateway = ip(address),
                RouteAttribute::Via(via) => found.gateway = via_ip(via),
                RouteAttribute::PrefSource(address) => found.source = ip(address),
                RouteAttribute::Table(table) => found.table = *table,
                RouteAttribute::CacheInfo(info) => found.learned = info.expires != 0,
                RouteAttribute::Metrics(metrics) => {
                    found.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// The entry by which the kernel decides on a packet. Kernels since 4.17 tell.
    ///
    /// # Errors
    /// As for [`Netlink::route`].
    pub fn route_entry(&mut self, query: &Query) -> io::Result<Entry> {
        let message = self.lookup(query, RouteFlags::FibMatch)?;
        let mut entry = Entry {
            destination: None,
            prefix_len: message.header.destination_prefix_length,
            metric: 0,
            table: u32::from(message.header.table),
            protocol: message.header.protocol,
            kind: message.header.kind,
            is_multipath: false,
            condition: condition(&message),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::MultiPath(_) => entry.is_multipath = true,
                RouteAttribute::Destination(address) => entry.destination = ip(address),
                RouteAttribute::Priority(metric) => entry.metric = *metric,
                RouteAttribute::Table(table) => entry.table = *table,
                _ => {}
            }
        }
        Ok(entry)
    }

    /// The next hops of the entry by which the kernel decides on a packet, where it has several: interface
    /// and gateway.
    ///
    /// # Errors
    /// As for [`Netlink::route`].
    pub fn entry_hops(&mut self, query: &Query) -> io::Result<Vec<(u32, Option<IpAddr>)>> {
        let message = self.lookup(query, RouteFlags::FibMatch)?;
        let hops = message.attributes.iter().filter_map(|attribute| match attribute {
            RouteAttribute::MultiPath(hops) => Some(hops),
            _ => None,
        });
        let hop =
            |hop: &RouteNextHop| (hop.interface_index, hop.attributes.iter().find_map(gateway));
        Ok(hops.flatten().map(hop).collect())
    }

    /// The policy rules of a family, in the order in which the kernel follows them.
    pub fn rules(&mut self, ipv4: bool) -> io::Result<Vec<Rule>> {
        let mut filter = RuleMessage::default();
        filter.header.family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let found = self.dump(&RouteNetlinkMessage::GetRule(filter))?;
        let mut rules: Vec<Rule> = found.into_iter().filter_map(rule).collect();
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// Routes of a family by which packets are dropped: in all tables, and of all programs.
    pub fn refusals(&mut self, ipv4: bool) -> io::Result<Vec<Refusal>> {
        let mut refusals = Vec::new();
        for (kind, name) in [
            (RouteType::Unreachable, "unreachable"),
            (RouteType::BlackHole, "blackhole"),
            (RouteType::Prohibit, "prohibit"),
            (RouteType::Throw, THROW),
        ] {
            let mut filter = of_family(ipv4);
            filter.header.kind = kind;
            let wanted = RouteNetlinkMessage::GetRoute(filter);
            refusals.extend(self.dump_some(&wanted, |message| match message {
                RouteNetlinkMessage::NewRoute(route) if route.header.kind == kind => {
                    refusal(&route, name, ipv4)
                }
                _ => None,
            })?);
        }
        Ok(refusals)
    }

    /// Forgets what routers have told of the path to an IPv6 host.
    pub fn forget_path(&mut self, host: Ipv6Addr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet6;
        message.header.destination_prefix_length = 128;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.flags = RouteFlags::Cloned;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(host)));
        self.apply_one(RouteNetlinkMessage::DelRoute(message), 0)
    }

    fn lookup(&mut self, query: &Query, flags: RouteFlags) -> io::Result<RouteMessage> {
        let mut message = RouteMessage::default();
        let (family, length) = match query.to {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.address_family = family;
        message.header.destination_prefix_length = length;
        // IPv6 tells the table unasked, and refuses to be asked.
        let table = if query.to.is_ipv4() { RouteFlags::LookupTable } else { RouteFlags::empty() };
        message.header.flags = flags | table;
        message.attributes.push(RouteAttribute::Destination(query.to.into()));
        if let Some(from) = query.from {
            message.header.source_prefix_length = length;
            message.attributes.push(RouteAttribute::Source(from.into()));
        }
        message.attributes.extend(query.input.map(RouteAttribute::Iif));
        message.attributes.extend(query.output.map(RouteAttribute::Oif));
        message.attributes.extend(query.mark.map(RouteAttribute::Mark));
        message.header.tos = query.tos;
        if let Some(Transport { protocol, source, destination }) = query.transport {
            // Kernels since 4.17 take them, older ones ignore them.
            message.attributes.push(RouteAttribute::IpProto(protocol));
            message.attributes.extend(source.map(RouteAttribute::Sport));
            message.attributes.extend(destination.map(RouteAttribute::Dport));
        }
        match self.get(RouteNetlinkMessage::GetRoute(message))? {
            RouteNetlinkMessage::NewRoute(found) => Ok(found),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no route in the answer")),
        }
    }
}

fn rule(message: RouteNetlinkMessage) -> Option<Rule> {
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

fn listed(route: &RouteMessage, ipv4: bool) -> Option<Listed> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut network = any(ipv4);
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
    Some(Listed { to, gateways, link, metric, table })
}

const fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(via) => via_ip(via),
        _ => None,
    }
}

fn refusal(route: &RouteMessage, kind: &'static str, ipv4: bool) -> Option<Refusal> {
    let mut network = any(ipv4);
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

/// What a route selects packets by beside their destination.
pub fn condition(route: &RouteMessage) -> Condition {
    let length = route.header.source_prefix_length;
    let from = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Source(address) => IpNet::new(ip(address)?, length).ok(),
        _ => None,
    });
    Condition { from: from.filter(|_| length > 0), tos: route.header.tos }
}

fn any(ipv4: bool) -> IpAddr {
    if ipv4 { [0; 4].into() } else { [0; 16].into() }
}

const fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

const fn via_ip(via: &rtnetlink::packet_route::route::RouteVia) -> Option<IpAddr> {
    use rtnetlink::packet_route::route::RouteVia;
    match via {
        RouteVia::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteVia::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
