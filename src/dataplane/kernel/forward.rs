//! Chains of others that may keep pods' packets from passing.
//!
//! Each base chain has to let a packet pass, so none of ours can open what one of theirs closes. They are
//! only read, to say so.

use std::{io, net::IpAddr};

use ipnet::IpNet;

use super::firewall::name_of;
use crate::netlink::{
    attributes::{self, Attributes},
    nftables::{ANY, Kind, Nftables, Object},
};

/// `NF_INET_FORWARD`
const FORWARD: u32 = 2;
/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
const ACCEPT: u32 = 1;
const DROP: u32 = 0;

/// What chains of others do with packets of pods, as far as it could be read.
#[derive(Debug, Default)]
pub struct ForeignChains {
    /// See [`closed_forward_chains`].
    pub closed: Vec<String>,
    /// See [`direct_access_drops`].
    pub dropping: Vec<String>,
}

impl ForeignChains {
    pub fn read(nftables: &mut Nftables, networks: &[IpNet]) -> io::Result<Self> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        Ok(Self {
            closed: closed_forward_chains(nftables, &chains, networks).unwrap_or_default(),
            dropping: direct_access_drops(nftables, &chains, networks).unwrap_or_default(),
        })
    }
}

/// Base chains that drop what is forwarded unless a rule lets it pass, and have no rule that seems to let one
/// of these networks pass: `ip filter FORWARD`, for one, where Docker runs.
fn closed_forward_chains(
    nftables: &mut Nftables,
    chains: &[Object],
    networks: &[IpNet],
) -> io::Result<Vec<String>> {
    let mut closed = Vec::new();
    for chain in chains {
        let (family, has_ipv4, has_ipv6) = match chain.family {
            1 => ("inet", true, true),
            2 => ("ip", true, false),
            10 => ("ip6", false, true),
            _ => continue,
        };
        let concerned = |net: &&IpNet| if net.addr().is_ipv4() { has_ipv4 } else { has_ipv6 };
        let mut ours = networks.iter().filter(concerned).peekable();
        if !is_closed(chain) || ours.peek().is_none() {
            continue;
        }
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
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
    let hook = attributes::find(&chain.attributes, 4).unwrap_or_default();
    let drops = be32(attributes::find(&chain.attributes, 5)) == Some(0);
    be32(attributes::find(hook, 1)) == Some(FORWARD) && drops
}

/// Base chains before routing in which packets to single addresses of these networks are dropped. Docker
/// from version 28 on lets nobody but its own bridge speak to a container's address: `ip raw PREROUTING`.
fn direct_access_drops(
    nftables: &mut Nftables,
    chains: &[Object],
    networks: &[IpNet],
) -> io::Result<Vec<String>> {
    let mut dropping = Vec::new();
    for chain in chains {
        let Some(family) = [(2, "ip"), (10, "ip6")].into_iter().find(|(f, _)| *f == chain.family)
        else {
            continue;
        };
        let hook = attributes::find(&chain.attributes, 4).unwrap_or_default();
        if be32(attributes::find(hook, 1)) != Some(PREROUTING) {
            continue;
        }
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
        let filter = Attributes::new().text(1, table).text(2, name);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        if rules.iter().any(|rule| drops_one_of(rule, networks)) {
            dropping.push(format!("{} {table} {name}", family.1));
        }
    }
    Ok(dropping)
}

fn drops_one_of(rule: &Object, networks: &[IpNet]) -> bool {
    let list = attributes::find(&rule.attributes, 4).unwrap_or_default();
    let (mut named, mut drops) = (false, false);
    for (_, expression) in attributes::read(list) {
        let data = attributes::find(expression, 2).unwrap_or_default();
        match attributes::find(expression, 1).map(attributes::text) {
            Some("cmp") => {
                let value = attributes::find(data, 3).and_then(|data| attributes::find(data, 1));
                let address = value.and_then(address_of);
                named |= address.is_some_and(|ip| networks.iter().any(|net| net.contains(&ip)));
            }
            Some("immediate") => drops |= verdict(data) == Some(&DROP.to_be_bytes()[..]),
            _ => {}
        }
    }
    named && drops
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn verdict(immediate: &[u8]) -> Option<&[u8]> {
    let verdict = attributes::find(attributes::find(immediate, 2)?, 2)?;
    attributes::find(verdict, 1)
}

fn be32(payload: Option<&[u8]>) -> Option<u32> {
    payload?.first_chunk().copied().map(u32::from_be_bytes)
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
                accepts |= verdict(data) == Some(&ACCEPT.to_be_bytes()[..]);
            }
            _ => {}
        }
    }
    accepts && (named || by_set)
}
