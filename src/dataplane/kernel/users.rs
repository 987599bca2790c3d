//! Policy rules by which users of this host cannot send to the VXLAN port.
//!
//! Any process may send UDP to that port of another host, and what it sends has this host's address, so the
//! guards there take it for tunnel packets of a member. The kernel looks up a route with the user and the
//! port of a datagram, and for the tunnel's own packets with no user, which is root. So rules part them:
//!
//! ```text
//! 72: from all iif lo uidrange 1-4294967294 ipproto udp dport 8472 lookup 847273 proto 73
//! 73: from all iif lo uidrange 1-4294967294 ipproto udp dport 8472 prohibit proto 73
//! ```
//!
//! Any user may name the interface by which a datagram leaves (`IP_PKTINFO`, `IP_UNICAST_IF`,
//! `SO_BINDTODEVICE`). When a rule refuses that, the kernel takes an IPv4 destination to be on the link, and
//! sends. So table 847273 has a route of type local for each interface: what a user sends comes back to this
//! host, where the guard drops and counts it. IPv6 needs no such table: there the refusal holds.
//!
//! Rules hold for lookups alone. A socket that is connected to another port has got a route by that one, and
//! may send to this one by the same: an IPv6 socket by `sendto`, any by what it has held back (`UDP_CORK`).
//! So the guard's table drops what users send, too (`firewall::chains::refuse_users`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr},
};

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
};

/// Before the rules of other programs, which may lead packets to other tables.
const PRIORITY: u32 = 73;
const BEFORE: u32 = PRIORITY - 1;
/// Its routes bring packets back to this host. The number is one that hardly another program uses.
const TABLE: u32 = 847_273;
/// Older kernels pass over protocol and port: all packets of all users would be refused.
const SINCE: (u32, u32) = (4, 17);
const EEXIST: i32 = 17;
/// What the kernel says of a table that has never had a route, and of a route or an interface that is gone.
const ENOENT: i32 = 2;
const GONE: [i32; 3] = [3, 19, 100];

/// The rules of one overlay.
#[derive(Debug)]
pub struct UsersRule {
    netlink: io::Result<Netlink>,
    /// None where there are no users but root, or the kernel cannot tell ports.
    users: Option<RuleUidRange>,
    /// Families for which it was right when last looked at.
    had: BTreeSet<Family>,
}

/// IPv4, or not.
type Family = bool;

impl UsersRule {
    pub fn open() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let users = match tells_ports(&read("/proc/sys/kernel/osrelease")) {
            true => users_of(&read("/proc/self/uid_map")),
            false => None,
        };
        Self { netlink: Netlink::open(), users, had: BTreeSet::new() }
    }

    /// Makes the rules what they should be for tunnels to these peers; whether another program had changed
    /// one. A family without peers needs none, and keeps what it has.
    ///
    /// # Errors
    /// Why a rule is not there.
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
            for rule in ours(netlink, ipv4)?.into_iter().filter(|rule| is_of_port(rule, port)) {
                match missing.iter().position(|wanted| is_like(&rule, wanted)) {
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
            let is_new = self.had.insert(ipv4);
            repaired |= !is_right && !is_new;
            if ipv4 {
                keep_routes(netlink)?;
            }
        }
        Ok(repaired)
    }

    /// Removes those of every overlay on this host: others put theirs back.
    pub fn remove(&mut self) -> io::Result<()> {
        self.had.clear();
        let Ok(netlink) = &mut self.netlink else { return Ok(()) };
        let found = found(netlink)?;
        remove(netlink, found)
    }
}

/// Gives each interface by which this host may send a route that brings packets back. Ports of bridges and
/// bonds need none: no answer to ARP reaches them. What another program removes is put back in silence, for
/// the kernel removes the routes of an interface that goes down.
fn keep_routes(netlink: &mut Netlink) -> io::Result<()> {
    let mut found: BTreeMap<u32, RouteMessage> = routes(netlink)?
        .into_iter()
        .map(|route| (interface(&route).unwrap_or_default(), route))
        .collect();
    let links = netlink.links()?;
    let mut changes = Vec::new();
    for link in links.iter().filter(|link| may_send(link, &links)) {
        if found.remove(&link.index).is_none() {
            let message = RouteNetlinkMessage::NewRoute(route_back(link.index));
            changes.push(Request { message, flags: NLM_F_CREATE | NLM_F_EXCL });
        }
    }
    let removal = |route| Request { message: RouteNetlinkMessage::DelRoute(route), flags: 0 };
    changes.extend(found.into_values().map(removal));
    let refused = netlink.apply(changes)?;
    // An interface may have come or gone meanwhile: the next pass sees it.
    let passes = |errno| errno == EEXIST || GONE.contains(&errno);
    let failure = refused.iter().find(|refused| !passes(refused.errno));
    failure.map_or(Ok(()), |refused| Err(refused.to_io()))
}

fn may_send(link: &Link, links: &[Link]) -> bool {
    let controller = links.iter().find(|other| Some(other.index) == link.controller());
    let is_port = controller.is_some_and(|controller| controller.kind != "vrf");
    link.up && !link.loopback && !is_port
}

fn route_back(interface: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.kind = RouteType::Local;
    route.header.scope = RouteScope::Host;
    route.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    route.attributes = vec![
        RouteAttribute::Table(TABLE),
        RouteAttribute::Oif(interface),
        // Without a source of its own a packet would get its destination for that, and pass the guard.
        RouteAttribute::PrefSource(RouteAddress::Inet(Ipv4Addr::LOCALHOST)),
        // So that there can be one for each interface.
        RouteAttribute::Priority(interface),
    ];
    route
}

/// Those of the table, whoever made them: no other program has a use for it.
fn routes(netlink: &mut Netlink) -> io::Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    filter.attributes.push(RouteAttribute::Table(TABLE));
    let found = match netlink.dump(&RouteNetlinkMessage::GetRoute(filter)) {
        Err(error) if error.raw_os_error() == Some(ENOENT) => return Ok(Vec::new()),
        found => found?,
    };
    let routes = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    Ok(routes.filter(brings_back).collect())
}

/// Whether a route is one of that table.
pub fn brings_back(route: &RouteMessage) -> bool {
    route.attributes.contains(&RouteAttribute::Table(TABLE))
}

fn interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Rules that gossamer has left on this host.
pub(super) fn found(netlink: &mut Netlink) -> io::Result<Vec<RuleMessage>> {
    let mut found = ours(netlink, true)?;
    // A kernel without IPv6 has none.
    found.extend(ours(netlink, false).unwrap_or_default());
    Ok(found)
}

/// Removes these rules, and the routes to which they lead.
pub(super) fn remove(netlink: &mut Netlink, rules: Vec<RuleMessage>) -> io::Result<()> {
    let removal = |message| Request { message, flags: 0 };
    let rules = rules.into_iter().map(RouteNetlinkMessage::DelRule);
    netlink.apply(rules.map(removal).collect())?;
    let routes = routes(netlink)?.into_iter().map(RouteNetlinkMessage::DelRoute);
    netlink.apply(routes.map(removal).collect()).map(drop)
}

/// Whether a rule is one of ours.
pub fn is_ours(rule: &RuleMessage) -> bool {
    let protocol = RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
    rule.attributes.contains(&protocol)
}

fn ours(netlink: &mut Netlink, ipv4: bool) -> io::Result<Vec<RuleMessage>> {
    let mut filter = RuleMessage::default();
    filter.header.family = family(ipv4);
    let found = netlink.dump(&RouteNetlinkMessage::GetRule(filter))?;
    let rules = found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRule(rule) => Some(rule),
        _ => None,
    });
    Ok(rules.filter(is_ours).collect())
}

fn wanted(ipv4: bool, port: u16, users: RuleUidRange) -> Vec<RuleMessage> {
    let mut back = selecting(BEFORE, ipv4, port, users);
    back.header.action = RuleAction::ToTable;
    back.attributes.push(RuleAttribute::Table(TABLE));
    let mut refusing = selecting(PRIORITY, ipv4, port, users);
    refusing.header.action = RuleAction::Prohibit;
    if ipv4 { vec![back, refusing] } else { vec![refusing] }
}

/// A rule about what users send to the port.
fn selecting(priority: u32, ipv4: bool, port: u16, users: RuleUidRange) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(ipv4);
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
        // What this host sends itself.
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

/// Of another overlay on this host are those for other ports.
fn is_of_port(rule: &RuleMessage, port: u16) -> bool {
    rule.attributes.contains(&destination(port))
}

fn is_like(rule: &RuleMessage, wanted: &RuleMessage) -> bool {
    rule.header.action == wanted.header.action
        && (rule.header.dst_len, rule.header.src_len) == (0, 0)
        && wanted.attributes.iter().all(|attribute| rule.attributes.contains(attribute))
}

const fn family(ipv4: bool) -> AddressFamily {
    if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Whether a kernel of this release knows rules by protocol and port.
fn tells_ports(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= SINCE)
}

/// Users but root, by the lines of `/proc/self/uid_map`: first id inside, first id outside, count. The
/// kernel takes a range only where it knows both ends.
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
    fn users_are_those_of_the_largest_range_without_root() {
        let range = |start, end| Some(RuleUidRange { start, end });
        let whole = "         0          0 4294967295\n";
        assert_eq!(users_of(whole), range(1, 4_294_967_294));
        assert_eq!(users_of("0 1000 1\n1 100000 65536\n"), range(1, 65_536));
        for none in ["0 1000 1\n", "", "x y z\n", "5 5 0\n", "7 0 4294967295\n"] {
            assert_eq!(users_of(none), None, "{none}");
        }
    }

    #[test]
    fn kernels_that_pass_over_ports_get_no_rule() {
        for new in ["4.17.0", "5.10.0-28-amd64", "6.18.44-fc-v657\n", "10.0"] {
            assert!(tells_ports(new), "{new}");
        }
        for old in ["4.16.18", "3.10.0-1160.el7", "", "x.y", "4"] {
            assert!(!tells_ports(old), "{old}");
        }
    }
}
