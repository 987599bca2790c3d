//! Interprets rules of nftables, as far as their form allows. This includes rules that iptables
//! makes, whose targets and matches have no expressions of their own.

use crate::netlink::{
    attributes,
    nftables::{Object, counter_packets, nfta},
};

/// Verdict codes (linux/netfilter.h, `linux/netfilter/nf_tables.h`). Negative codes lead to another
/// chain, except `RETURN`.
pub const DROP: i32 = 0;
/// `NF_ACCEPT`.
pub const ACCEPT: i32 = 1;
/// `NFT_JUMP`.
pub const JUMP: i32 = -3;
/// `NFT_GOTO`.
pub const GOTO: i32 = -4;
/// `NFT_RETURN`.
pub const RETURN: i32 = -5;

/// Expressions that let only some packets continue. What they compare is not read here.
const CONDITIONS: [&str; 7] = ["cmp", "lookup", "range", "match", "limit", "connlimit", "quota"];
/// A match of iptables that is no condition.
const COMMENT: &str = "comment";

/// The hook and policy of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Number of the hook (`NF_INET_*`).
    pub hook: u32,
    /// Whether the policy is to drop.
    pub drops: bool,
}

/// What happens to packets that match all conditions of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// They are dropped or rejected.
    Drops,
    /// They are accepted.
    Accepts,
    /// They go through another chain of the same table.
    Leads,
    /// They continue with the next rule.
    Nothing,
}

/// Returns hook and policy of a base chain; `None` for other chains.
pub fn base_of(chain: &Object) -> Option<Base> {
    let hook = number(attributes::find(
        attributes::find(&chain.attributes, nfta::CHAIN_HOOK)?,
        nfta::HOOK_HOOKNUM,
    ))?;
    let drops = number(attributes::find(&chain.attributes, nfta::CHAIN_POLICY)) == Some(0);
    Some(Base { hook, drops })
}

/// Returns the name of a hook as `nft` calls it.
pub const fn hook_name(family: u8, hook: u32) -> &'static str {
    match (family, hook) {
        (5, 1) => "egress",
        (3, 0) => "input",
        (3, 1) => "output",
        (5, _) | (_, 5) => "ingress",
        (_, 0) => "prerouting",
        (_, 1) => "input",
        (_, 2) => "forward",
        (_, 3) => "output",
        _ => "postrouting",
    }
}

/// Returns names and data of a rule's expressions.
pub fn expressions(rule: &Object) -> impl Iterator<Item = (&str, &[u8])> {
    let list = attributes::find(&rule.attributes, nfta::RULE_EXPRESSIONS).unwrap_or_default();
    attributes::read(list).filter_map(|(_, expression)| {
        let name = attributes::text(attributes::find(expression, nfta::EXPR_NAME)?);
        Some((name, attributes::find(expression, nfta::EXPR_DATA).unwrap_or_default()))
    })
}

/// Returns what happens to packets that match all conditions of a rule.
pub fn effect(rule: &Object) -> Effect {
    let mut effect = Effect::Nothing;
    for (name, data) in expressions(rule) {
        match name {
            "immediate" => {
                effect = match verdict_of(data) {
                    Some(DROP) => Effect::Drops,
                    Some(ACCEPT) => Effect::Accepts,
                    Some(RETURN) | None => effect,
                    Some(code) if code < 0 => Effect::Leads,
                    Some(_) => effect,
                }
            }
            "reject" => effect = Effect::Drops,
            "target" if matches!(text_of(data), Some("REJECT" | "DROP")) => effect = Effect::Drops,
            // A verdict map.
            "lookup" if number(attributes::find(data, nfta::LOOKUP_DREG)) == Some(0) => {
                effect = Effect::Leads
            }
            _ => {}
        }
    }
    effect
}

/// Returns the chain that a rule leads to; `None` for a verdict map.
pub fn target_of(rule: &Object) -> Option<&str> {
    expressions(rule).filter(|(name, _)| *name == "immediate").find_map(|(_, data)| {
        attributes::find(verdict_in(data)?, nfta::VERDICT_CHAIN).map(attributes::text)
    })
}

/// Whether a rule hands matching packets to a program, which decides on them.
pub fn hands_over(rule: &Object) -> bool {
    expressions(rule)
        .any(|(name, data)| name == "queue" || name == "target" && text_of(data) == Some("NFQUEUE"))
}

/// Whether a rule gives matching packets another source address.
pub fn translates_source(rule: &Object) -> bool {
    /// `NFT_NAT_SNAT`
    const SOURCE: u32 = 0;
    expressions(rule).any(|(name, data)| match name {
        "masq" => true,
        "nat" => number(attributes::find(data, nfta::NAT_TYPE)) == Some(SOURCE),
        "target" => matches!(text_of(data), Some("MASQUERADE" | "SNAT" | "NETMAP")),
        _ => false,
    })
}

/// Whether a rule gives matching packets another destination.
pub fn translates_destination(rule: &Object) -> bool {
    /// `NFT_NAT_DNAT`
    const DESTINATION: u32 = 1;
    expressions(rule).any(|(name, data)| match name {
        "redir" | "tproxy" => true,
        "nat" => number(attributes::find(data, nfta::NAT_TYPE)) == Some(DESTINATION),
        "target" => matches!(text_of(data), Some("REDIRECT" | "DNAT" | "TPROXY")),
        _ => false,
    })
}

/// Whether a rule has a condition.
pub fn is_conditional(rule: &Object) -> bool {
    expressions(rule)
        .any(|(name, data)| CONDITIONS.contains(&name) && text_of(data) != Some(COMMENT))
}

/// Returns how many packets have matched all conditions of a rule, if it counts them.
pub fn counted(rule: &Object) -> Option<u64> {
    let mut counted = None;
    for (name, data) in expressions(rule) {
        match name {
            "counter" => counted = counter_packets(data),
            // The counter precedes a condition.
            _ if CONDITIONS.contains(&name) => counted = None,
            _ => {}
        }
    }
    counted
}

/// Returns the name of a target or match of iptables.
pub fn text_of(data: &[u8]) -> Option<&str> {
    attributes::find(data, nfta::TARGET_NAME).map(attributes::text)
}

/// Returns the verdict of an `immediate` expression.
pub fn verdict_in(immediate: &[u8]) -> Option<&[u8]> {
    attributes::find(attributes::find(immediate, nfta::IMMEDIATE_DATA)?, nfta::DATA_VERDICT)
}

/// Returns the value in the data of an expression.
pub fn value(data: Option<&[u8]>) -> Option<&[u8]> {
    attributes::find(data?, nfta::DATA_VALUE)
}

/// Returns the value that a `cmp` expression compares with.
pub fn compared_value(cmp: &[u8]) -> Option<&[u8]> {
    value(attributes::find(cmp, nfta::CMP_DATA))
}

/// Whether an expression loads the whole destination address of an IPv4 or IPv6 header.
pub fn loads_destination(name: &str, data: &[u8]) -> bool {
    const NETWORK_HEADER: u32 = 1;
    const PLACES: [[u32; 3]; 2] = [[NETWORK_HEADER, 16, 4], [NETWORK_HEADER, 24, 16]];
    let part = [nfta::PAYLOAD_BASE, nfta::PAYLOAD_OFFSET, nfta::PAYLOAD_LEN]
        .map(|kind| number(attributes::find(data, kind)));
    name == "payload" && PLACES.iter().any(|place| part == place.map(Some))
}

/// Returns the verdict code of an `immediate` expression.
pub fn verdict_of(immediate: &[u8]) -> Option<i32> {
    let code = attributes::find(verdict_in(immediate)?, nfta::VERDICT_CODE)?;
    code.first_chunk().copied().map(i32::from_be_bytes)
}

/// Decodes a number in network order.
pub fn number(payload: Option<&[u8]>) -> Option<u32> {
    payload?.first_chunk().copied().map(u32::from_be_bytes)
}
