//! Routes, policy rules and route lookups.
//!
//! A lookup is the kernel's own decision (`RTM_GETROUTE` without `NLM_F_DUMP`). It includes policy rules,
//! VRFs, more specific prefixes, reverse path filters and the interfaces' forwarding settings.

mod parse;

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
    rule::RuleMessage,
};

use ipnet::IpNet;

pub use self::parse::condition;
use self::parse::{gateway, ip, refusal, rule, unicast_route, via_ip};
use super::{Netlink, local};
use crate::model::{Condition, PacketSelector, Ports, Selector, unspecified};

/// A packet whose route is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Destination address.
    pub to: IpAddr,
    /// Source address. With `input`, it must not be an address of this host.
    pub from: Option<IpAddr>,
    /// Index of the interface through which the packet comes in. `None` for a packet of this host.
    pub input: Option<u32>,
    /// Index of the interface through which it must leave.
    pub output: Option<u32>,
    /// Protocol and ports, which policy rules may match.
    pub transport: Option<PacketSelector>,
    /// Type of service, which policy rules may match.
    pub tos: u8,
    /// Firewall mark, which policy rules may match.
    pub mark: Option<u32>,
}

impl Query {
    /// Returns a query for a packet from this host to `to`.
    pub const fn to(to: IpAddr) -> Self {
        Self { to, from: None, input: None, output: None, transport: None, tos: 0, mark: None }
    }

    /// Returns a query for a packet that comes in through `input`, to be forwarded or delivered.
    pub const fn forwarded(from: IpAddr, to: IpAddr, input: u32) -> Self {
        Self { from: Some(from), input: Some(input), ..Self::to(to) }
    }
}

/// The result of a route lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteLookup {
    /// Index of the interface through which the packet leaves; 0 if there is none.
    pub link: u32,
    /// The next hop. `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Source address for a packet without one.
    pub source: Option<IpAddr>,
    /// Number of the routing table.
    pub table: u32,
    /// MTU of the path in bytes, if a route or an ICMP message sets one. `None`: the interface's MTU applies.
    pub mtu: Option<u32>,
    /// TTL or hop limit that a route sets.
    pub hop_limit: Option<u32>,
    /// Whether the route expires, because it was learned and not configured.
    pub learned: bool,
    /// Whether it results from an ICMP redirect (`RTCF_REDIRECTED`, `RTPROT_REDIRECT`).
    pub redirected: bool,
    /// Unicast, local, unreachable, blackhole ...
    pub kind: RouteType,
    /// Whether an encapsulation changes the packet or adds a header (MPLS, `SRv6`, BPF).
    pub rewrites: bool,
}

/// The table entry that decides a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Destination address. `None` for a default route.
    pub destination: Option<IpAddr>,
    /// Prefix length of the destination.
    pub prefix_len: u8,
    /// Metric; lower is preferred.
    pub metric: u32,
    /// Number of the routing table.
    pub table: u32,
    /// The program that added it.
    pub protocol: RouteProtocol,
    /// Unicast, local ...
    pub kind: RouteType,
    /// Whether it has several next hops.
    pub is_multipath: bool,
    /// What the route requires of a packet besides its destination.
    pub condition: Condition,
}

impl Entry {
    /// Returns the destination; `None` for a default route.
    pub fn network(&self) -> Option<IpNet> {
        let network = IpNet::new(self.destination?, self.prefix_len).ok()?;
        (network.prefix_len() > 0).then_some(network)
    }
}

/// A policy rule (`ip rule`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Priority; the kernel processes rules in ascending order.
    pub priority: u32,
    /// Properties of the packets that it matches. With `inverted`, the rule applies to all other packets.
    pub selector: Selector,
    /// Whether the selection is inverted (`not`).
    pub inverted: bool,
    /// Name of the interface through which packets come in.
    pub input: Option<String>,
    /// Number of the routing table that it selects; 0 if it selects none.
    pub table: u32,
    /// Whether matching packets are dropped.
    pub refuses: bool,
    /// Value and mask of the mark that packets must have.
    pub mark: Option<(u32, u32)>,
    /// The program that added it, if it is known.
    pub protocol: Option<RouteProtocol>,
}

/// Returns the priority of the rule that leads all packets to the table of this host's addresses; the largest
/// one if there is none. `rules` are in the kernel's order.
pub fn local_priority(rules: &[Rule]) -> u32 {
    let local = rules.iter().find(|rule| rule.table == LOCAL && rule.takes_all());
    local.map_or(u32::MAX, |rule| rule.priority)
}

impl Rule {
    /// Returns whether it matches every packet.
    pub fn takes_all(&self) -> bool {
        let Selector { from, to, tos, .. } = self.selector;
        let transport = self.selector.transport();
        let is_any = |network: Option<IpNet>| network.is_none_or(|to| to.prefix_len() == 0);
        let is_selective = self.inverted || self.input.is_some() || self.mark.is_some();
        is_any(from) && is_any(to) && transport.is_none() && tos == 0 && !is_selective
    }

    /// Returns whether it matches the packet of a lookup, as far as that is known. `input` is the name of the
    /// interface by which the packet comes in; `None` for packets of this host.
    pub fn takes(&self, query: &Query, input: Option<&str>) -> bool {
        let Selector { from, to, protocol, source, destination, tos, .. } = self.selector;
        // The kernel compares a source address that is not chosen yet as the unspecified one.
        let source_ip = query.from.unwrap_or_else(|| unspecified(query.to.is_ipv4()));
        let contains =
            |network: Option<IpNet>, ip: IpAddr| network.is_none_or(|of| of.contains(&ip));
        let of = query.transport;
        let is_in = |ports: Option<Ports>, port: Option<u16>| {
            ports.is_none_or(|of| port.is_some_and(|port| of.first <= port && port <= of.last))
        };
        let is_selected = contains(from, source_ip)
            && contains(to, query.to)
            && protocol.is_none_or(|number| of.is_some_and(|of| of.protocol == number))
            && is_in(source, of.and_then(|of| of.source))
            && is_in(destination, of.and_then(|of| of.destination))
            && (tos == 0 || tos == query.tos)
            && self.mark.is_none_or(|(mark, mask)| query.mark.unwrap_or(0) & mask == mark)
            && self.input.as_deref().is_none_or(|name| name == input.unwrap_or("lo"));
        is_selected != self.inverted
    }
}

/// A route that drops packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The destination.
    pub destination: IpNet,
    /// Number of the routing table.
    pub table: u32,
    /// The kind, as in `ip route`.
    pub kind: &'static str,
    /// The program that added it.
    pub protocol: RouteProtocol,
    /// What it requires of a packet besides its destination.
    pub condition: Condition,
}

/// A destination for which a route exists, of any kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The destination.
    pub network: IpNet,
    /// What else the route requires of a packet.
    pub condition: Condition,
    /// The program that added it.
    pub protocol: RouteProtocol,
}

/// The kind of a route that ends the lookup in its table.
pub const THROW: &str = "throw";

/// `RTCF_REDIRECTED` (`linux/in_route.h`).
const REDIRECTED: u32 = 0x0004_0000;
/// The addresses of this host.
const LOCAL: u32 = local::TABLE as u32;

/// Number of the main table, which the kernel uses if no policy rule selects another one.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// A unicast route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnicastRoute {
    /// The destination.
    pub to: IpNet,
    /// The gateways: none if the destination is on the link, several for a multipath route.
    pub gateways: Vec<IpAddr>,
    /// Index of the interface. `None` for a multipath route.
    pub link: Option<u32>,
    /// Metric; lower is preferred.
    pub metric: u32,
    /// Number of the routing table.
    pub table: u32,
}

/// Returns a filter for routes of a family.
fn of_family(ipv4: bool) -> RouteMessage {
    let mut filter = RouteMessage::default();
    filter.header.address_family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    filter
}

impl Netlink {
    /// Returns the unicast routes of a family, of all tables.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn routes(&mut self, ipv4: bool) -> io::Result<Vec<UnicastRoute>> {
        let wanted = RouteNetlinkMessage::GetRoute(of_family(ipv4));
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewRoute(route) => unicast_route(&route, ipv4),
            _ => None,
        })
    }

    /// Returns the destinations of all routes of a family, of any kind, without the routes of this host's own
    /// addresses.
    ///
    /// # Errors
    /// If the kernel does not answer.
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
            let to = to.or_else(|| is_default.then(|| unspecified(ipv4)));
            let to = to.filter(|to| !is_own && to.is_ipv4() == ipv4)?;
            let network = IpNet::new(to, route.header.destination_prefix_length).ok()?;
            Some(Destination { network, condition: condition(&route), protocol })
        })
    }

    /// Looks up the route of a packet.
    ///
    /// # Errors
    /// The kernel's result for the packet, as in `ip route get`: `EHOSTUNREACH` and `ENETUNREACH` if there is
    /// no route or the input interface does not forward, `EXDEV` if the reverse path filter drops the packet,
    /// `EINVAL` for an impossible source address.
    pub fn route(&mut self, query: &Query) -> io::Result<RouteLookup> {
        let message = self.lookup(query, RouteFlags::empty())?;
        let mut found = RouteLookup {
            link: 0,
            gateway: None,
            source: None,
            table: u32::from(message.header.table),
            mtu: None,
            hop_limit: None,
            learned: false,
            redirected: message.header.flags.bits() & REDIRECTED != 0
                || message.header.protocol == RouteProtocol::IcmpRedirect,
            kind: message.header.kind,
            rewrites: false,
        };
        for attribute in &message.attributes {
            match attribute {
                // Only tunnel devices in metadata mode use these; gossamer's is not.
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
                    found.hop_limit = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Hoplimit(limit) => Some(*limit),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Returns the table entry that decides the route of a packet. Requires Linux 4.17.
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

    /// Returns interface and gateway of each next hop of the entry that decides a lookup, if it has several.
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

    /// Returns the policy rules of a family, in the kernel's order.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn rules(&mut self, ipv4: bool) -> io::Result<Vec<Rule>> {
        let mut filter = RuleMessage::default();
        filter.header.family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let found = self.dump(&RouteNetlinkMessage::GetRule(filter))?;
        let mut rules: Vec<Rule> = found.into_iter().filter_map(rule).collect();
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// Returns the routes of a family that drop packets, of all tables and programs.
    ///
    /// # Errors
    /// If the kernel does not answer.
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

    /// Removes what ICMP messages have changed about the path to an IPv6 host (MTU, redirect).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_path(&mut self, host: Ipv6Addr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet6;
        message.header.destination_prefix_length = 128;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.flags = RouteFlags::Cloned;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(host)));
        self.apply_one(RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// Sends a lookup.
    fn lookup(&mut self, query: &Query, flags: RouteFlags) -> io::Result<RouteMessage> {
        let mut message = RouteMessage::default();
        let (family, length) = match query.to {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.address_family = family;
        message.header.destination_prefix_length = length;
        // IPv6 always reports the table, and refuses the flag.
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
        if let Some(PacketSelector { protocol, source, destination }) = query.transport {
            // Kernels before 4.17 ignore these.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Rules of sing-box.
    #[test]
    fn rule_takes_packets_by_destination_port_and_interface() {
        let rule = |selector: Selector, input: Option<&str>, inverted| Rule {
            priority: 9_000,
            selector,
            inverted,
            input: input.map(str::to_owned),
            table: 2_022,
            refuses: false,
            mark: None,
            protocol: None,
        };
        let net = |text: &str| Some(text.parse::<IpNet>().expect("a network"));
        let to = Selector { to: net("172.19.0.0/30"), ..Selector::default() };
        let port = Ports { first: 53, last: 53 };
        let port = Selector { destination: Some(port), ..Selector::default() };
        let unspecified = Selector { from: net("0.0.0.0/32"), ..Selector::default() };
        let query = Query::to([10, 42, 2, 2].into());
        let dns = Query { transport: Some(PacketSelector::udp_to(53)), ..query };
        for (rule, takes) in [
            (rule(Selector::default(), None, false), [true; 3]),
            (rule(to, None, false), [false; 3]),
            (rule(port, None, true), [true, false, true]),
            (rule(Selector::default(), Some("lo"), true), [false, false, true]),
            (rule(unspecified, Some("lo"), false), [true, true, false]),
        ] {
            let found = [rule.takes(&query, None), rule.takes(&dns, None)];
            let arriving = rule.takes(&query, Some("gsm0"));
            assert_eq!([found[0], found[1], arriving], takes, "{rule:?}");
        }
    }
}
