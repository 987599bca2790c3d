//! Chains of others that may keep pods' packets from passing.
//!
//! Each base chain has to let a packet pass, so none of ours can open what one of theirs closes. They are
//! only read, to say so.

use std::io;

use ipnet::IpNet;

use super::firewall::name_of;
use crate::netlink::{
    attributes::{self, Attributes},
    nftables::{ANY, Kind, Nftables, Object},
};

/// `NF_INET_FORWARD`
const FORWARD: u32 = 2;
const ACCEPT: u32 = 1;

/// Base chains that drop what is forwarded unless a rule lets it pass, and have no rule that seems to let one
/// of these networks pass: `ip filter FORWARD`, for one, where Docker runs.
pub fn closed_forward_chains(
    nftables: &mut Nftables,
    networks: &[IpNet],
) -> io::Result<Vec<String>> {
    let mut closed = Vec::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let (family, has_ipv4, has_ipv6) = match chain.family {
            1 => ("inet", true, true),
            2 => ("ip", true, false),
            10 => ("ip6", false, true),
            _ => continue,
        };
        let concerned = |net: &&IpNet| if net.addr().is_ipv4() { has_ipv4 } else { has_ipv6 };
        let mut ours = networks.iter().filter(concerned).peekable();
        if !is_closed(&chain) || ours.peek().is_none() {
            continue;
        }
        let (table, name) = (name_of(&chain, 1), name_of(&chain, 3));
        // Docker's chain for what its users add, and the chain itself.
        let mut rules = Vec::new();
        for chain_name in [name, "DOCKER-USER"] {
            let filter = Attributes::new().text(1, table).text(2, chain_name);
            rules.extend(nftables.dump(Kind::GetRule, chain.family, &filter)?);
        }
        if !ours.all(|network| rules.iter().any(|rule| may_accept(rule, *network))) {
            closed.push(format!("{family} {table} {name}"));
        }
    }
    Ok(closed)
}

fn is_closed(chain: &Object) -> bool {
    let be32 = |payload: Option<&[u8]>| payload?.first_chunk().copied().map(u32::from_be_bytes);
    let hook = attributes::find(&chain.attributes, 4).unwrap_or_default();
    let drops = be32(attributes::find(&chain.attributes, 5)) == Some(0);
    be32(attributes::find(hook, 1)) == Some(FORWARD) && drops
}

/// Whether a rule accepts packets of the network by name, or such as a set or nothing but their interface
/// tells: what those hold is not read.
fn may_accept(rule: &Object, network: IpNet) -> bool {
    let octets = attributes::octets(network.network());
    let whole = &octets[..usize::from(network.prefix_len() / 8)];
    let list = attributes::find(&rule.attributes, 4).unwrap_or_default();
    let (mut named, mut accepts, mut by_set) = (false, false, false);
    for (_, expression) in attributes::read(list) {
        let data = attributes::find(expression, 2).unwrap_or_default();
        let value = |kind| attributes::find(attributes::find(data, kind)?, 1);
        match attributes::find(expression, 1).map(attributes::text) {
            Some("cmp") => named |= value(3).is_some_and(|bytes| bytes.starts_with(whole)),
            Some("lookup") => by_set = true,
            Some("immediate") => {
                let verdict = attributes::find(data, 2).and_then(|data| attributes::find(data, 2));
                let code = verdict.and_then(|verdict| attributes::find(verdict, 1));
                accepts |= code == Some(&ACCEPT.to_be_bytes()[..]);
            }
            _ => {}
        }
    }
    accepts && (named || by_set)
}
