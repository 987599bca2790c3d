//! Policy rules that prevent users of this host from sending to the VXLAN port.
//!
//! Any process may send UDP to that port of another host. Such a packet has this host's address, so
//! guards of other hosts accept it as a member's tunnel packet. The kernel looks up a route with a
//! datagram's user and port, and for tunnel packets with no user, which counts as root. Two rules
//! use this difference:
//!
//! ```text
//! 72: from all iif lo uidrange 1-4294967294 ipproto udp dport 8472 lookup 847273 proto 73
//! 73: from all iif lo uidrange 1-4294967294 ipproto udp dport 8472 prohibit proto 73
//! ```
//!
//! A user may choose the interface of a datagram (`IP_PKTINFO`, `IP_UNICAST_IF`,
//! `SO_BINDTODEVICE`). If a rule then refuses an IPv4 packet, the kernel assumes that the
//! destination is on the link, and sends. Table 847273 therefore has a route of type local for each
//! interface: a user's packet returns to this host, where the guard drops and counts it. For IPv6
//! the refusal is sufficient.
//!
//! Rules apply to route lookups only. A socket that is connected to another port has cached the
//! route for that port and may use it for this one: an IPv6 socket with `sendto`, any socket with
//! delayed data (`UDP_CORK`). The guard's table therefore also drops packets of users
//! (`firewall::chains::refuse_users`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr},
};

use nix::libc::{EEXIST, ENETDOWN, ENODEV, ENOENT, ESRCH};
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        AddressFamily, IpProtocol, RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange, RuleUidRange},
    },
};

use crate::{
    dataplane::desired::ROUTE_PROTOCOL,
    netlink::{Netlink, Request, link::Link},
    sysctl,
};

/// Precedes the rules of other programs, which may lead packets to other tables.
const REFUSAL_PRIORITY: u32 = 73;
const RETURN_PRIORITY: u32 = REFUSAL_PRIORITY - 1;
/// Table with routes that return packets to this host. Other programs are unlikely to use the
/// number.
const RETURN_TABLE: u32 = 847_273;
/// Earlier kernels ignore protocol and port: the rules would refuse all packets of all users.
const MIN_RELEASE: (u32, u32) = (4, 17);
/// The route or its interface is gone.
const GONE: [i32; 3] = [ESRCH, ENODEV, ENETDOWN];

/// The rules of one overlay.
#[derive(Debug)]
pub struct UserRules {
    netlink: io::Result<Netlink>,
    /// `None` if there are no users except root, or the kernel does not support rules with ports.
    users: Option<RuleUidRange>,
    /// Families whose rules have been created before.
    created: BTreeSet<Family>,
}

/// Whether the family is IPv4; otherwise IPv6.
type Family = bool;

impl UserRules {
    /// Reads the kernel's release and the range of users. A socket that cannot be opened is an
    /// error of [`UserRules::keep`].
    pub fn open() -> Self {
        let users = match supports_ports(&sysctl::read("kernel/osrelease").unwrap_or_default()) {
            true => users_of(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default()),
            false => None,
        };
        Self { netlink: Netlink::open(), users, created: BTreeSet::new() }
    }

    /// Repairs the rules for tunnels to these peers; returns whether another program had changed
    /// one. A family without peers needs no rules, and keeps those it has.
    ///
    /// # Errors
    /// When a rule or route cannot be read or created.
    pub fn keep(&mut self, port: u16, peers: &BTreeSet<IpAddr>) -> io::Result<bool> {
        let Some(users) = self.users else { return Ok(false) };
        let netlink = match &mut self.netlink {
            Ok(netlink) => netlink,
            Err(error) => return Err(io::Error::new(error.kind(), error.to_string())),
        };
        let mut repaired = false;
        let families: BTreeSet<Family> = peers.iter().map(IpAddr::is_ipv4).collect();
        for ipv4 in families {
            let mut missing = wanted(ipv4, port, users);
            let mut wrong = Vec::new();
            for rule in own_rules(netlink, ipv4)?.into_iter().filter(|rule| is_of_port(rule, port))
            {
                match missing.iter().position(|wanted| matches(&rule, wanted)) {
                    Some(place) => _ = missing.swap_remove(place),
                    None => wrong.push(rule),
                }
            }
            let is_right = missing.is_empty() && wrong.is_empty();
            for rule in wrong {
                netlink.apply_one(RouteNetlinkMessage::DelRule(rule), 0)?;
            }
            for rule in missing {
                let new = RouteNetlinkMessage::NewRule(rule);
                match netlink.apply_one(new, NLM_F_CREATE | NLM_F_EXCL) {
                    Err(error) if error.raw_os_error() != Some(EEXIST) => return Err(error),
                    _ => {}
                }
            }
            let is_new = self.created.insert(ipv4);
            repaired |= !is_right && !is_new;
            if ipv4 {
                maintain_return_routes(netlink)?;
            }
        }
        Ok(repaired)
    }

    /// Notes that the rules were removed by other means.
    pub fn forget(&mut self) {
        self.created.clear();
    }

    /// Removes the rules of all overlays on this host; the other agents re-create theirs.
    ///
    /// # Errors
    /// When the kernel refuses a removal.
    pub fn remove(&mut self) -> io::Result<()> {
        self.created.clear();
        let Ok(netlink) = &mut self.netlink else { return Ok(()) };
        let found = all_rules(netlink)?;
        remove(netlink, found)
    }
}

/// Gives each interface that can send a route that returns packets. Ports of bridges and bonds need
/// none, because they receive no answers to ARP. Missing routes are re-created without a report,
/// because the kernel itself removes the routes of an interface that goes down.
fn maintain_return_routes(netlink: &mut Netlink) -> io::Result<()> {
    let mut found: BTreeMap<u32, RouteMessage> = return_routes(netlink)?
        .into_iter()
        .map(|route| (interface(&route).unwrap_or_default(), route))
        .collect();
    let links = netlink.links()?;
    let mut changes = Vec::new();
    for link in links.iter().filter(|link| may_send(link, &links)) {
        if found.remove(&link.index).is_none() {
            let message = RouteNetlinkMessage::NewRoute(return_route(link.index));
            changes.push(Request { message, flags: NLM_F_CREATE | NLM_F_EXCL });
        }
    }
    let removal = |route| Request { message: RouteNetlinkMessage::DelRoute(route), flags: 0 };
    changes.extend(found.into_values().map(removal));
    let refused = netlink.apply(changes)?;
    // An interface may have appeared or disappeared meanwhile; the next pass handles it.
    let is_expected = |errno| errno == EEXIST || GONE.contains(&errno);
    let failure = refused.iter().find(|refused| !is_expected(refused.errno));
    failure.map_or(Ok(()), |refused| Err(refused.to_io()))
}

/// Whether packets may leave by an interface directly.
fn may_send(link: &Link, links: &[Link]) -> bool {
    let controller = links.iter().find(|other| Some(other.index) == link.controller());
    let is_port = controller.is_some_and(|controller| controller.kind != "vrf");
    link.up && !link.loopback && !is_port
}

/// Returns the route that returns packets which would leave by an interface.
fn return_route(interface: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.kind = RouteType::Local;
    route.header.scope = RouteScope::Host;
    route.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    route.attributes = vec![
        RouteAttribute::Table(RETURN_TABLE),
        RouteAttribute::Oif(interface),
        // Without a preferred source, a packet would get its destination as source and pass the
        // guard.
        RouteAttribute::PrefSource(RouteAddress::Inet(Ipv4Addr::LOCALHOST)),
        // Allows one route per interface.
        RouteAttribute::Priority(interface),
    ];
    route
}

/// Returns the routes of the table, whichever program made them.
fn return_routes(netlink: &mut Netlink) -> io::Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    filter.attributes.push(RouteAttribute::Table(RETURN_TABLE));
    let found = match netlink.dump(&RouteNetlinkMessage::GetRoute(filter)) {
        Err(error) if error.raw_os_error() == Some(ENOENT) => return Ok(Vec::new()),
        found => found?,
    };
    let routes = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    Ok(routes.filter(is_return_route).collect())
}

/// Whether a route is in the table for returned packets.
pub fn is_return_route(route: &RouteMessage) -> bool {
    route.attributes.contains(&RouteAttribute::Table(RETURN_TABLE))
}

fn interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Returns the rules that gossamer has left on this host.
pub(super) fn all_rules(netlink: &mut Netlink) -> io::Result<Vec<RuleMessage>> {
    let mut found = own_rules(netlink, true)?;
    // A kernel without IPv6 has no such rules.
    found.extend(own_rules(netlink, false).unwrap_or_default());
    Ok(found)
}

/// Removes these rules, and the routes that they lead to.
pub(super) fn remove(netlink: &mut Netlink, rules: Vec<RuleMessage>) -> io::Result<()> {
    let removal = |message| Request { message, flags: 0 };
    let rules = rules.into_iter().map(RouteNetlinkMessage::DelRule);
    netlink.apply(rules.map(removal).collect())?;
    let routes = return_routes(netlink)?.into_iter().map(RouteNetlinkMessage::DelRoute);
    netlink.apply(routes.map(removal).collect()).map(drop)
}

/// Whether a rule has gossamer's protocol number.
pub fn is_ours(rule: &RuleMessage) -> bool {
    let protocol = RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
    rule.attributes.contains(&protocol)
}

/// Returns gossamer's rules of a family.
fn own_rules(netlink: &mut Netlink, ipv4: bool) -> io::Result<Vec<RuleMessage>> {
    let mut filter = RuleMessage::default();
    filter.header.family = family(ipv4);
    let found = netlink.dump(&RouteNetlinkMessage::GetRule(filter))?;
    let rules = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRule(rule) => Some(rule),
        _ => None,
    });
    Ok(rules.filter(is_ours).collect())
}

/// Returns the rules for a family and port.
fn wanted(ipv4: bool, port: u16, users: RuleUidRange) -> Vec<RuleMessage> {
    let mut back = rule_for_users(RETURN_PRIORITY, ipv4, port, users);
    back.header.action = RuleAction::ToTable;
    back.attributes.push(RuleAttribute::Table(RETURN_TABLE));
    let mut refusing = rule_for_users(REFUSAL_PRIORITY, ipv4, port, users);
    refusing.header.action = RuleAction::Prohibit;
    if ipv4 { vec![back, refusing] } else { vec![refusing] }
}

/// A rule that selects packets of users to the port.
fn rule_for_users(priority: u32, ipv4: bool, port: u16, users: RuleUidRange) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(ipv4);
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
        // Packets that this host itself sends.
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::UidRange(users),
        RuleAttribute::IpProtocol(IpProtocol::Udp),
        destination(port),
    ];
    rule
}

const fn destination(port: u16) -> RuleAttribute {
    RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port })
}

/// Rules for other ports belong to other overlays on this host.
fn is_of_port(rule: &RuleMessage, port: u16) -> bool {
    rule.attributes.contains(&destination(port))
}

/// Whether a rule has at least the wanted attributes, and no prefixes.
fn matches(rule: &RuleMessage, wanted: &RuleMessage) -> bool {
    rule.header.action == wanted.header.action
        && (rule.header.dst_len, rule.header.src_len) == (0, 0)
        && wanted.attributes.iter().all(|attribute| rule.attributes.contains(attribute))
}

const fn family(ipv4: bool) -> AddressFamily {
    if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Whether a kernel of this release supports rules with protocol and port.
fn supports_ports(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= MIN_RELEASE)
}

/// Returns the users except root, from the lines of `/proc/self/uid_map`: first id inside, first id
/// outside, count. The kernel accepts a range only if both ends are mapped.
fn users_of(map: &str) -> Option<RuleUidRange> {
    let ranges = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
        let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let end = first.checked_add(count.checked_sub(1)?)?;
        Some(RuleUidRange { start: first.max(1), end })
    });
    ranges.filter(|users| users.start <= users.end).max_by_key(|users| users.end - users.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_the_largest_range_without_root() {
        let range = |start, end| Some(RuleUidRange { start, end });
        let whole = "         0          0 4294967295\n";
        assert_eq!(users_of(whole), range(1, 4_294_967_294));
        assert_eq!(users_of("0 1000 1\n1 100000 65536\n"), range(1, 65_536));
        for none in ["0 1000 1\n", "", "x y z\n", "5 5 0\n", "7 0 4294967295\n"] {
            assert_eq!(users_of(none), None, "{none}");
        }
    }

    #[test]
    fn kernel_without_port_rules_gets_no_rule() {
        for new in ["4.17.0", "5.10.0-28-amd64", "6.18.44-fc-v657\n", "10.0"] {
            assert!(supports_ports(new), "{new}");
        }
        for old in ["4.16.18", "3.10.0-1160.el7", "", "x.y", "4"] {
            assert!(!supports_ports(old), "{old}");
        }
    }
}
