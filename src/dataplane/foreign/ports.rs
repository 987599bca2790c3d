//! UDP ports that foreign chains close. Chains are only read, to report them.
//!
//! A rule that drops packets of some senders or interfaces only may be intended. It is named with that
//! extent.

use std::{collections::BTreeSet, io};

use super::rules::{self, base_of, compared_value, expressions, number, text_of};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, Kind, Nftables, Object, family_name, name_of, nfta},
    },
};

/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
/// `NF_INET_LOCAL_IN`
const INPUT: u32 = 1;
/// `NF_INET_LOCAL_OUT`
const OUTPUT: u32 = 3;
/// Upper limit of nested chains in which a limit is searched.
const MAX_JUMPS: u8 = 2;
/// `NFT_META_IIF` to `NFT_META_OIFNAME`: index or name of an interface.
const META_INTERFACE: std::ops::RangeInclusive<u32> = 4..=7;
/// `LOOPBACK_IFINDEX`
const LOOPBACK_INDEX: u32 = 1;
/// `NFT_CMP_NEQ`
const NOT_EQUAL: u32 = 1;
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
    /// Drops some of them: the rule names the port, and has further conditions.
    DropsSome,
    /// Drops those above a rate.
    Limits,
    /// Accepts those up to a rate, or returns with them from the chain.
    PassesUpToRate,
    /// Accepts them.
    Accepts,
    /// Returns with them from the chain.
    Returns,
    /// Leads to another chain of the same table.
    Leads {
        /// Whether all of them are led there.
        all: bool,
    },
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
    /// Which of the packets to the port are dropped.
    pub extent: Extent,
}

/// Which packets to a port a chain drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// All of them.
    All {
        /// Whether a rule names the port; otherwise it is dropped like the remaining packets.
        by_port: bool,
    },
    /// Those that meet further conditions of a rule, such as an interface or a source.
    Some,
    /// Those above a rate.
    AboveRate,
}

/// Returns the input base chains that drop packets to one of these ports, and the output base chains that
/// limit their rate.
///
/// # Errors
/// When chains or rules cannot be listed.
pub fn closed_ports(nftables: &mut Nftables, ports: &[u16]) -> io::Result<BTreeSet<ClosedPort>> {
    let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
    let mut closed = BTreeSet::new();
    for chain in chains.iter().filter(|chain| [1, 2, 10].contains(&chain.family)) {
        let (table, name) = (name_of(chain, nfta::CHAIN_TABLE), name_of(chain, nfta::CHAIN_NAME));
        let Some(base) = base_of(chain).filter(|base| [INPUT, OUTPUT].contains(&base.hook)) else {
            continue;
        };
        if is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(nfta::RULE_TABLE, table);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        let (own, others): (Vec<_>, Vec<_>) =
            rules.iter().partition(|rule| name_of(rule, nfta::RULE_CHAIN) == name);
        for port in ports {
            let dropped = how_closed(&own, &others, *port, base.drops);
            let dropped = dropped.filter(|_| base.hook == INPUT);
            let is_limited = || limits(&own, &others, *port, base.drops, MAX_JUMPS) == Some(true);
            let extent = match dropped {
                Some(Extent::All { .. }) => dropped,
                _ if is_limited() => Some(Extent::AboveRate),
                _ => dropped,
            };
            if let Some(extent) = extent {
                let chain = format!("{} {table} {name}", family_name(chain.family));
                closed.insert(ClosedPort { chain, port: *port, extent });
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
        let table = name_of(&chain, nfta::CHAIN_TABLE);
        if !is_base || !families.contains(&chain.family) || is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(nfta::RULE_TABLE, table);
        for rule in nftables.dump(Kind::GetRule, chain.family, &filter)? {
            if rules::translates_destination(&rule) && may_concern(&rule, port) {
                found.insert(format!(
                    "{} {table} {}",
                    family_name(chain.family),
                    name_of(&rule, nfta::RULE_CHAIN)
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
            "meta" => (is_protocol, is_port) = (is(nfta::META_KEY, META_L4PROTO), false),
            "payload" => {
                (is_protocol, is_port) = (
                    false,
                    is(nfta::PAYLOAD_BASE, TRANSPORT) && is(nfta::PAYLOAD_OFFSET, DESTINATION),
                )
            }
            "cmp" => {
                let value = compared_value(data).unwrap_or_default();
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

/// Returns which packets to the port the chain drops. The first rule that decides on all of them decides.
/// If a rule leads to another chain, all rules of the table's other chains count: one that accepts the
/// port, or else one that drops it by name.
fn how_closed(own: &[&Object], others: &[&Object], port: u16, by_default: bool) -> Option<Extent> {
    let mut some = None;
    for rule in own {
        match effect(rule, port) {
            Effect::Drops { by_port } => return Some(Extent::All { by_port }),
            Effect::Accepts | Effect::PassesUpToRate => return some,
            Effect::Leads { .. } => {
                let effects = || others.iter().map(|rule| effect(rule, port));
                let accepts = |rule: &&Object| match effect(rule, port) {
                    Effect::Accepts => true,
                    Effect::PassesUpToRate => rules::effect(rule) == rules::Effect::Accepts,
                    _ => false,
                };
                if others.iter().any(accepts) {
                    return some;
                }
                // Rules there that drop everything may belong to a chain that other packets are led
                // to.
                if effects().any(|effect| effect == Effect::Drops { by_port: true }) {
                    return Some(Extent::All { by_port: true });
                }
                if effects().any(|effect| effect == Effect::DropsSome) {
                    some = Some(Extent::Some);
                }
            }
            Effect::DropsSome => some = Some(Extent::Some),
            Effect::Limits | Effect::Returns | Effect::Nothing => {}
        }
    }
    if by_default { Some(Extent::All { by_port: false }) } else { some }
}

/// Returns whether a chain drops packets above a rate before any rule accepts them; `None` if it
/// neither drops nor accepts them. `by_default` is whether packets that reach its end are dropped.
fn limits(
    chain: &[&Object],
    others: &[&Object],
    port: u16,
    by_default: bool,
    depth: u8,
) -> Option<bool> {
    let mut is_rated = false;
    for rule in chain {
        match effect(rule, port) {
            Effect::Limits => return Some(true),
            Effect::PassesUpToRate => is_rated = true,
            Effect::Accepts => return Some(false),
            Effect::Drops { .. } => return Some(is_rated),
            Effect::Returns => break,
            Effect::Leads { all: true } if depth > 0 => {
                let target = rules::target_of(rule);
                let is_in_target = |rule: &&Object| Some(name_of(rule, nfta::RULE_CHAIN)) == target;
                let target: Vec<&Object> = others.iter().copied().filter(is_in_target).collect();
                let decided = limits(&target, others, port, false, depth - 1);
                if decided.is_some() {
                    return decided;
                }
            }
            Effect::Leads { .. } | Effect::DropsSome | Effect::Nothing => {}
        }
    }
    (by_default && is_rated).then_some(true)
}

/// Returns what a rule does with UDP packets to a port.
fn effect(rule: &Object, port: u16) -> Effect {
    let (mut names_port, mut narrowed, mut by_set, mut limited) = (false, false, false, false);
    let (mut is_interface, mut returns) = (false, false);
    for (name, data) in expressions(rule) {
        let compares_interface = std::mem::take(&mut is_interface);
        match name {
            "meta" => {
                let key = number(attributes::find(data, nfta::META_KEY));
                is_interface = key.is_some_and(|key| META_INTERFACE.contains(&key));
            }
            "immediate" => returns |= rules::verdict_of(data) == Some(rules::RETURN),
            // Tunnel packets do not use the loopback interface.
            "cmp" if compares_interface => narrowed |= !excludes_loopback(data),
            "cmp" => {
                match compared_value(data).unwrap_or_default() {
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
    let takes_all = !narrowed && !by_set;
    match rules::effect(rule) {
        _ if returns && takes_all && !limited => Effect::Returns,
        _ if returns && takes_all => Effect::PassesUpToRate,
        rules::Effect::Accepts if takes_all && limited => Effect::PassesUpToRate,
        // Also if it accepts some senders only: these may be the members.
        rules::Effect::Accepts if names_port || by_set || !narrowed && !limited => Effect::Accepts,
        rules::Effect::Drops if limited && takes_all => Effect::Limits,
        rules::Effect::Drops if takes_all => Effect::Drops { by_port: names_port },
        rules::Effect::Drops if names_port && !limited => Effect::DropsSome,
        rules::Effect::Leads => Effect::Leads { all: takes_all && !limited },
        _ => Effect::Nothing,
    }
}

/// Whether a comparison of an interface's index or name matches every interface but `lo`.
fn excludes_loopback(cmp: &[u8]) -> bool {
    let value = compared_value(cmp).unwrap_or_default();
    let is_loopback = value.split(|byte| *byte == 0).next() == Some(b"lo")
        || value == LOOPBACK_INDEX.to_ne_bytes();
    is_loopback && number(attributes::find(cmp, nfta::CMP_OP)) == Some(NOT_EQUAL)
}

/// Returns whether `struct xt_multiport_v1` (`linux/netfilter/xt_multiport.h`) matches all packets to
/// a port; `None` if the match is another one.
fn multiport(data: &[u8], port: u16) -> Option<bool> {
    const MAX_PORTS: usize = 15;
    const SOURCE_PORTS: u8 = 0;
    let info =
        attributes::find(data, nfta::MATCH_INFO).filter(|_| text_of(data) == Some("multiport"))?;
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
    let info = attributes::find(data, nfta::MATCH_INFO)?;
    let port = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    (text_of(data) == Some("udp")).then_some(port(4)?..=port(6)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 8472;

    type Expression = (&'static str, Attributes);

    fn cmp(operator: u32, value: &[u8]) -> Expression {
        let value = Attributes::new().put(1, value);
        ("cmp", Attributes::new().be32(1, 1).be32(2, operator).nest(3, &value))
    }

    fn out() -> Expression {
        ("meta", Attributes::new().be32(1, 1).be32(2, 7))
    }

    fn limit() -> Expression {
        ("limit", Attributes::new())
    }

    fn verdict(code: i32, chain: Option<&str>) -> Expression {
        let verdict = Attributes::new().put(1, &code.to_be_bytes());
        let verdict = chain.map_or(verdict.clone(), |chain| verdict.text(2, chain));
        ("immediate", Attributes::new().nest(2, &Attributes::new().nest(2, &verdict)))
    }

    fn rule(chain: &str, expressions: Vec<Expression>) -> Object {
        let list = expressions.into_iter().fold(Attributes::new(), |list, (name, data)| {
            list.nest(1, &Attributes::new().text(1, name).nest(2, &data))
        });
        let attributes = Attributes::new().text(2, chain).nest(4, &list);
        Object { family: 2, attributes: attributes.as_bytes().to_vec() }
    }

    fn is_limited(rules: &[Object], by_default: bool) -> bool {
        let (own, others): (Vec<_>, Vec<_>) =
            rules.iter().partition(|rule| name_of(rule, 2) == "OUTPUT");
        limits(&own, &others, PORT, by_default, MAX_JUMPS) == Some(true)
    }

    /// UDPFLOOD of csf.
    #[test]
    fn limit_that_returns_before_a_drop_is_found_in_the_chain_that_a_rule_leads_to() {
        let jump = |operator| {
            let to = verdict(rules::JUMP, Some("UDPFLOOD"));
            rule("OUTPUT", vec![out(), cmp(operator, b"lo\0"), cmp(0, &[UDP]), to])
        };
        let local = rule("UDPFLOOD", vec![out(), cmp(0, b"lo\0"), verdict(rules::RETURN, None)]);
        let rated = rule("UDPFLOOD", vec![limit(), verdict(rules::RETURN, None)]);
        let reject = || rule("UDPFLOOD", vec![("reject", Attributes::new())]);
        let whole = rule("UDPFLOOD", vec![verdict(rules::RETURN, None)]);
        assert!(is_limited(&[jump(1), local, rated.clone(), reject()], false));
        assert!(!is_limited(&[jump(0), rated.clone(), reject()], false), "only packets by lo");
        assert!(!is_limited(&[jump(1), reject()], false), "all are dropped");
        assert!(!is_limited(&[jump(1), rated.clone()], false), "none are dropped");
        assert!(!is_limited(&[jump(1), rated, whole, reject()], false));
    }

    #[test]
    fn drop_of_the_port_with_a_further_condition_closes_it_for_some_packets() {
        let named = || cmp(0, &PORT.to_be_bytes());
        let by_interface = || vec![out(), cmp(0, b"eth0\0"), named()];
        let with = |mut conditions: Vec<Expression>, decision| {
            conditions.push(verdict(decision, None));
            rule("INPUT", conditions)
        };
        let extent = |rules: &[Object], by_default| {
            how_closed(&rules.iter().collect::<Vec<_>>(), &[], PORT, by_default)
        };
        let dropped = with(by_interface(), rules::DROP);
        let accepted = with(vec![named()], rules::ACCEPT);
        let all = with(vec![named()], rules::DROP);
        let other_port = with(vec![out(), cmp(0, b"eth0\0"), cmp(0, &[0, 80])], rules::DROP);
        assert_eq!(extent(std::slice::from_ref(&dropped), false), Some(Extent::Some));
        assert_eq!(extent(&[dropped.clone(), accepted.clone()], true), Some(Extent::Some));
        let closed = Some(Extent::All { by_port: true });
        assert_eq!(extent(&[dropped.clone(), all], false), closed);
        assert_eq!(extent(&[accepted, dropped], false), None);
        assert_eq!(extent(&[other_port], false), None);
    }

    #[test]
    fn acceptance_up_to_a_rate_before_a_closed_end_is_a_limit_and_no_closed_port() {
        let named = cmp(0, &PORT.to_be_bytes());
        let accept = rule("OUTPUT", vec![named, limit(), verdict(rules::ACCEPT, None)]);
        let rules = [accept];
        assert!(is_limited(&rules, true) && !is_limited(&rules, false));
        let own: Vec<&Object> = rules.iter().collect();
        assert_eq!(how_closed(&own, &[], PORT, true), None);
    }
}
