//! UDP ports that chains of others close. They are only read, to say so.
//!
//! What is closed for some senders only is not told: a rule that compares addresses or looks into sets has a
//! reason of its own.

use std::{collections::BTreeSet, io};

use super::firewall::name_of;
use crate::{
    dataplane::desired::is_device_name,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, Kind, Nftables, Object},
    },
};

/// `NF_INET_LOCAL_IN`
const INPUT: u32 = 1;
/// Verdicts; negative ones lead into another chain (`NFT_JUMP`, `NFT_GOTO`).
const DROP: i32 = 0;
const ACCEPT: i32 = 1;

/// What a rule does with all UDP packets to a port.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    Drops,
    Accepts,
    /// It leads into another chain, whose rules are of the same table.
    Leads,
    Nothing,
}

/// Base chains of input that drop what comes to one of these ports, and which.
pub fn closed_ports(nftables: &mut Nftables, ports: &[u16]) -> io::Result<BTreeSet<(String, u16)>> {
    let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
    let mut closed = BTreeSet::new();
    for chain in &chains {
        let family = match chain.family {
            1 => "inet",
            2 => "ip",
            10 => "ip6",
            _ => continue,
        };
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
        let hook = attributes::find(&chain.attributes, 4).unwrap_or_default();
        if number(attributes::find(hook, 1)) != Some(INPUT) || is_device_name(table) {
            continue;
        }
        let by_default = number(attributes::find(&chain.attributes, 5)) == Some(0);
        let filter = Attributes::new().text(1, table);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        let (own, others): (Vec<_>, Vec<_>) =
            rules.iter().partition(|rule| name_of(rule, 2) == name);
        for port in ports {
            if is_closed(&own, &others, *port, by_default) {
                closed.insert((format!("{family} {table} {name}"), *port));
            }
        }
    }
    Ok(closed)
}

/// The first rule of the chain that concerns the port decides; one that leads elsewhere may.
fn is_closed(own: &[&Object], others: &[&Object], port: u16, by_default: bool) -> bool {
    for rule in own {
        match effect(rule, port) {
            Effect::Drops => return true,
            Effect::Accepts => return false,
            Effect::Leads => {
                let effects = || others.iter().map(|rule| effect(rule, port));
                if effects().any(|effect| effect == Effect::Accepts) {
                    return false;
                }
                if effects().any(|effect| effect == Effect::Drops) {
                    return true;
                }
            }
            Effect::Nothing => {}
        }
    }
    by_default
}

fn effect(rule: &Object, port: u16) -> Effect {
    let list = attributes::find(&rule.attributes, 4).unwrap_or_default();
    let (mut about, mut narrowed, mut by_set, mut verdict) = (false, false, false, None);
    for (_, expression) in attributes::read(list) {
        let data = attributes::find(expression, 2).unwrap_or_default();
        match attributes::find(expression, 1).map(attributes::text) {
            Some("cmp") => {
                let value = attributes::find(data, 3).and_then(|data| attributes::find(data, 1));
                match value.unwrap_or_default() {
                    bytes if bytes == port.to_be_bytes() => about = true,
                    // UDP, IPv4 or IPv6.
                    [17 | 2 | 10] => {}
                    _ => narrowed = true,
                }
            }
            // What of iptables has no expression of its own; see `struct xt_udp`.
            Some("match") => match udp_match(data) {
                Some(range) if range.contains(&port) => about = true,
                _ => narrowed = true,
            },
            // What a set holds is not read: it may be ports.
            Some("lookup") => by_set = true,
            Some("range" | "ct" | "limit" | "fib" | "socket") => narrowed = true,
            Some("immediate") => verdict = verdict_of(data),
            Some("reject") => verdict = Some(DROP),
            Some("target") => {
                let name = attributes::find(data, 1).map(attributes::text);
                verdict = (name == Some("REJECT")).then_some(DROP);
            }
            _ => {}
        }
    }
    match verdict {
        // Also what lets in some senders only: those it knows are members, hopefully.
        Some(ACCEPT) if about || by_set || !narrowed => Effect::Accepts,
        Some(DROP) if about && !narrowed && !by_set => Effect::Drops,
        Some(code) if code < 0 => Effect::Leads,
        _ => Effect::Nothing,
    }
}

/// The destination ports of `struct xt_udp` (linux/netfilter/xt_tcpudp.h), in host order.
fn udp_match(data: &[u8]) -> Option<std::ops::RangeInclusive<u16>> {
    let name = attributes::find(data, 1).map(attributes::text)?;
    let info = attributes::find(data, 3)?;
    let port = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    (name == "udp").then_some(port(4)?..=port(6)?)
}

fn verdict_of(immediate: &[u8]) -> Option<i32> {
    let verdict = attributes::find(attributes::find(immediate, 2)?, 2)?;
    let code = attributes::find(verdict, 1)?;
    code.first_chunk().copied().map(i32::from_be_bytes)
}

fn number(payload: Option<&[u8]>) -> Option<u32> {
    payload?.first_chunk().copied().map(u32::from_be_bytes)
}
