//! UDP ports that foreign chains close. Chains are only read, to report them.
//!
//! Ports that are closed for some senders only are not reported: a rule that compares addresses or
//! looks up a set is taken to be intended.

use std::{collections::BTreeSet, io};

use super::{
    firewall::name_of,
    rules::{self, base_of, expressions, family_name, number, text_of},
};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, Kind, Nftables, Object},
    },
};

/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
/// `NF_INET_LOCAL_IN`
const INPUT: u32 = 1;
/// `NFT_META_L4PROTO`
const META_L4PROTO: u32 = 16;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`, and the offset of the destination port in it.
const TRANSPORT: u32 = 2;
const DESTINATION: u32 = 2;
const UDP: u8 = 17;

/// What a rule does with UDP packets to a port.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    /// Drops all of them.
    Drops {
        /// Whether the rule names the port.
        by_port: bool,
    },
    /// Drops those above a rate.
    Limits,
    /// Accepts them.
    Accepts,
    /// Leads to another chain of the same table.
    Leads,
    /// Does not decide.
    Nothing,
}

/// A chain that drops packets to a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClosedPort {
    /// Family, table and name, as `nft` takes them.
    pub chain: String,
    /// The UDP port.
    pub port: u16,
    /// Whether a rule names the port; otherwise it is dropped like the remaining packets.
    pub by_port: bool,
    /// Whether only packets above a rate are dropped.
    pub limited: bool,
}

/// Returns the input base chains that drop packets to one of these ports.
///
/// # Errors
/// When chains or rules cannot be listed.
pub fn closed_ports(nftables: &mut Nftables, ports: &[u16]) -> io::Result<BTreeSet<ClosedPort>> {
    let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
    let mut closed = BTreeSet::new();
    for chain in chains.iter().filter(|chain| [1, 2, 10].contains(&chain.family)) {
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
        let Some(base) = base_of(chain).filter(|base| base.hook == INPUT) else { continue };
        if is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(1, table);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        let (own, others): (Vec<_>, Vec<_>) =
            rules.iter().partition(|rule| name_of(rule, 2) == name);
        for port in ports {
            if let Some(by_port) = how_closed(&own, &others, *port, base.drops) {
                let chain = format!("{} {table} {name}", family_name(chain.family));
                closed.insert(ClosedPort { chain, port: *port, by_port, limited: false });
            } else if is_limited(&own, *port) {
                let chain = format!("{} {table} {name}", family_name(chain.family));
                closed.insert(ClosedPort { chain, port: *port, by_port: false, limited: true });
            }
        }
    }
    Ok(closed)
}

/// Returns chains with rules that give UDP packets to a port another destination before routing.
///
/// # Errors
/// When chains or rules cannot be listed.
pub fn redirected_port(
    nftables: &mut Nftables,
    ipv4: bool,
    port: u16,
) -> io::Result<BTreeSet<String>> {
    let families = [1, if ipv4 { 2 } else { 10 }];
    let mut found = BTreeSet::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let is_base = base_of(&chain).is_some_and(|base| base.hook == PREROUTING);
        let table = name_of(&chain, 1);
        if !is_base || !families.contains(&chain.family) || is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(1, table);
        for rule in nftables.dump(Kind::GetRule, chain.family, &filter)? {
            if rules::translates_destination(&rule) && may_concern(&rule, port) {
                found.insert(format!(
                    "{} {table} {}",
                    family_name(chain.family),
                    name_of(&rule, 2)
                ));
            }
        }
    }
    Ok(found)
}

/// Whether a rule is for UDP to a port, or compares neither protocol nor port.
fn may_concern(rule: &Object, port: u16) -> bool {
    let (mut is_protocol, mut is_port) = (false, false);
    for (name, data) in expressions(rule) {
        let is = |attribute, value| number(attributes::find(data, attribute)) == Some(value);
        match name {
            "meta" => (is_protocol, is_port) = (is(2, META_L4PROTO), false),
            "payload" => (is_protocol, is_port) = (false, is(2, TRANSPORT) && is(3, DESTINATION)),
            "cmp" => {
                let value = attributes::find(data, 3).and_then(|data| attributes::find(data, 1));
                let value = value.unwrap_or_default();
                let is_other_port = is_port && value.len() == 2 && value != port.to_be_bytes();
                if is_protocol && value != [UDP] || is_other_port {
                    return false;
                }
                (is_protocol, is_port) = (false, false);
            }
            "match" => {
                let is_other = udp_match(data).is_some_and(|ports| !ports.contains(&port));
                let is_tcp = text_of(data) == Some("tcp");
                if is_other || is_tcp || multiport(data, port) == Some(false) {
                    return false;
                }
            }
            _ => {}
        }
    }
    true
}

/// Returns the command that accepts UDP to this port in a chain of [`closed_ports`].
pub fn open_port(chain: &str, port: u16) -> String {
    match chain.split(' ').collect::<Vec<_>>()[..] {
        ["ip", "filter", "INPUT"] => format!("iptables -I INPUT -p udp --dport {port} -j ACCEPT"),
        ["ip6", "filter", "INPUT"] => format!("ip6tables -I INPUT -p udp --dport {port} -j ACCEPT"),
        _ => format!("nft insert rule {chain} udp dport {port} accept"),
    }
}

/// Returns whether the chain drops packets to the port: `Some(true)` if by a rule that names the
/// port. The first rule that concerns the port decides. If a rule leads to another chain, all rules
/// of the table's other chains count: one that accepts the port, or else one that drops it by name.
fn how_closed(own: &[&Object], others: &[&Object], port: u16, by_default: bool) -> Option<bool> {
    for rule in own {
        match effect(rule, port) {
            Effect::Drops { by_port } => return Some(by_port),
            Effect::Accepts => return None,
            Effect::Leads => {
                let effects = || others.iter().map(|rule| effect(rule, port));
                if effects().any(|effect| effect == Effect::Accepts) {
                    return None;
                }
                // Rules there that drop everything may belong to a chain that other packets are led
                // to.
                if effects().any(|effect| effect == Effect::Drops { by_port: true }) {
                    return Some(true);
                }
            }
            Effect::Limits | Effect::Nothing => {}
        }
    }
    by_default.then_some(false)
}

/// Whether a rule drops packets above a rate before any rule accepts them.
fn is_limited(own: &[&Object], port: u16) -> bool {
    let mut effects = own.iter().map(|rule| effect(rule, port));
    let decisive = effects.find(|effect| matches!(effect, Effect::Limits | Effect::Accepts));
    decisive == Some(Effect::Limits)
}

/// Returns what a rule does with UDP packets to a port.
fn effect(rule: &Object, port: u16) -> Effect {
    let (mut names_port, mut narrowed, mut by_set, mut limited) = (false, false, false, false);
    for (name, data) in expressions(rule) {
        match name {
            "cmp" => {
                let value = attributes::find(data, 3).and_then(|data| attributes::find(data, 1));
                match value.unwrap_or_default() {
                    bytes if bytes == port.to_be_bytes() => names_port = true,
                    // UDP, IPv4 or IPv6.
                    [17 | 2 | 10] => {}
                    _ => narrowed = true,
                }
            }
            // Matches of iptables without an nftables expression; see `struct xt_udp`. Any other
            // match, such as `state` or `conntrack`, may match only some packets.
            "match" => match udp_match(data) {
                Some(range) if range.contains(&port) => names_port = true,
                _ if multiport(data, port) == Some(true) => names_port = true,
                _ if text_of(data) == Some("comment") => {}
                _ if matches!(text_of(data), Some("limit" | "hashlimit")) => limited = true,
                _ => narrowed = true,
            },
            // The set's elements are not read; they may be ports.
            "lookup" => by_set = true,
            "limit" => limited = true,
            "range" | "ct" | "fib" | "socket" => narrowed = true,
            _ => {}
        }
    }
    match rules::effect(rule) {
        // Also if it accepts some senders only: these may be the members.
        rules::Effect::Accepts if names_port || by_set || !narrowed && !limited => Effect::Accepts,
        rules::Effect::Drops if limited && !narrowed && !by_set => Effect::Limits,
        rules::Effect::Drops if !narrowed && !by_set => Effect::Drops { by_port: names_port },
        rules::Effect::Leads => Effect::Leads,
        _ => Effect::Nothing,
    }
}

/// Returns whether `struct xt_multiport_v1` (`linux/netfilter/xt_multiport.h`) matches all packets to
/// a port; `None` if the match is another one.
fn multiport(data: &[u8], port: u16) -> Option<bool> {
    const MAX_PORTS: usize = 15;
    const SOURCE_PORTS: u8 = 0;
    let info = attributes::find(data, 3).filter(|_| text_of(data) == Some("multiport"))?;
    let [kind, count] = *info.first_chunk()?;
    let ports = info.get(2..)?.chunks_exact(2).map(|port| u16::from_ne_bytes([port[0], port[1]]));
    let ports: Vec<u16> = ports.take(usize::from(count).min(MAX_PORTS)).collect();
    let is_set = |at: usize| info.get(at).is_some_and(|flag| *flag != 0);
    let begins_range = |index: usize| is_set(2 + 2 * MAX_PORTS + index);
    let is_inverted = is_set(2 + 3 * MAX_PORTS);
    let holds = ports.iter().enumerate().any(|(index, first)| match ports.get(index + 1) {
        Some(last) if begins_range(index) => (*first..=*last).contains(&port),
        _ => *first == port,
    });
    Some(kind != SOURCE_PORTS && holds && !is_inverted)
}

/// Returns the destination ports of `struct xt_udp` (`linux/netfilter/xt_tcpudp.h`), in host order.
fn udp_match(data: &[u8]) -> Option<std::ops::RangeInclusive<u16>> {
    let info = attributes::find(data, 3)?;
    let port = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    (text_of(data) == Some("udp")).then_some(port(4)?..=port(6)?)
}
