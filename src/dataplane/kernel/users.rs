//! A policy rule by which users of this host cannot send to the VXLAN port.
//!
//! Any process may send UDP to that port of another host, and what it sends has this host's address, so the
//! guards there take it for tunnel packets of a member. The kernel looks up a route for each datagram with
//! the user that sends it, and for the tunnel's own packets with none, which is root. So one rule parts them:
//!
//! ```text
//! 73: from all iif lo uidrange 1-4294967294 ipproto udp dport 8472 prohibit proto 73
//! ```
//!
//! The packet filter cannot tell them apart: packets that the kernel puts into the tunnel for a process of
//! this host still belong to the socket of that process, and a datagram that the kernel cuts into several
//! (`UDP_SEGMENT`) passes the filter as one.

use std::{collections::BTreeSet, fs, io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        AddressFamily, IpProtocol, RouteNetlinkMessage,
        route::RouteProtocol,
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange, RuleUidRange},
    },
};

use crate::{
    dataplane::desired::ROUTE_PROTOCOL,
    netlink::{Netlink, Request},
};

/// Before the rules of other programs, which may lead packets to other tables.
const PRIORITY: u32 = 73;
/// Older kernels pass over protocol and port: all packets of all users would be refused.
const SINCE: (u32, u32) = (4, 17);
const EEXIST: i32 = 17;

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
            let wanted = wanted(ipv4, port, users);
            let of_port: Vec<RuleMessage> =
                ours(netlink, ipv4)?.into_iter().filter(|rule| is_of_port(rule, port)).collect();
            if of_port.iter().any(|rule| is_like(rule, &wanted)) {
                self.had.insert(ipv4);
                continue;
            }
            for rule in of_port {
                netlink.apply_one(RouteNetlinkMessage::DelRule(rule), 0)?;
            }
            let new = RouteNetlinkMessage::NewRule(wanted);
            match netlink.apply_one(new, NLM_F_CREATE | NLM_F_EXCL) {
                Err(error) if error.raw_os_error() != Some(EEXIST) => return Err(error),
                _ => repaired |= !self.had.insert(ipv4),
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

/// Rules that gossamer has left on this host.
pub(super) fn found(netlink: &mut Netlink) -> io::Result<Vec<RuleMessage>> {
    let mut found = ours(netlink, true)?;
    // A kernel without IPv6 has none.
    found.extend(ours(netlink, false).unwrap_or_default());
    Ok(found)
}

pub(super) fn remove(netlink: &mut Netlink, rules: Vec<RuleMessage>) -> io::Result<()> {
    let removal = |rule| Request { message: RouteNetlinkMessage::DelRule(rule), flags: 0 };
    netlink.apply(rules.into_iter().map(removal).collect()).map(drop)
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

fn wanted(ipv4: bool, port: u16, users: RuleUidRange) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(ipv4);
    rule.header.action = RuleAction::Prohibit;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
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
