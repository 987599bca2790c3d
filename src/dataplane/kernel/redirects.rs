//! Rules of others that give packets between pods another destination, for single ports too: as of a
//! transparent proxy. They are only read, to say so.
//!
//! Whether packets of all ports pass is tried; one port alone would have to be guessed. So rules are followed
//! from the base chains before routing, and a rule counts only if nothing on the way to it leaves packets
//! between pods out, as far as its form tells. What cannot be read leaves them out.

use std::{collections::BTreeSet, io, net::IpAddr};

use ipnet::IpNet;

use super::{
    firewall::name_of,
    rules::{
        self, Effect, base_of, expressions, family_name, number, text_of, translates_destination,
    },
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
/// `NFT_META_*`
const META_IIF: u32 = 4;
const META_IIFNAME: u32 = 6;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// `NFT_CT_STATE`
const CT_STATE: u32 = 0;
/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR` and `RTN_LOCAL`
const FIB_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
const LOCAL: u8 = 2;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// `NFT_CMP_EQ` and `NFT_CMP_NEQ`
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
/// Matches of iptables that leave out no addresses and no interfaces.
const ANYWHERE: [&str; 8] =
    ["tcp", "udp", "multiport", "comment", "conntrack", "state", "limit", "statistic"];
/// Chains led to one after another.
const DEPTH: usize = 8;
/// Rules looked at, of one base chain.
const RULES: usize = 20_000;
/// Rules that are named at once.
const NAMED: usize = 3;

/// A rule that gives packets between pods another destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Redirect {
    /// Family, table and name of the base chain, where packets can be exempted.
    pub base: String,
    /// The same of the chain that has the rule.
    pub chain: String,
    /// The only destination port that it is about.
    pub port: Option<u16>,
}

/// Packets between pods: of a network of the overlay, which come in by these interfaces.
pub struct Overlay<'a> {
    pub network: IpNet,
    /// Index and name.
    pub inputs: &'a [(u32, String)],
}

/// The rules that concern packets between pods, of which none before lets them pass.
pub fn redirects(nftables: &mut Nftables, overlay: &Overlay<'_>) -> io::Result<BTreeSet<Redirect>> {
    let families = [1, if overlay.network.addr().is_ipv4() { 2 } else { 10 }];
    let mut found = BTreeSet::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let is_base = base_of(&chain).is_some_and(|base| base.hook == PREROUTING);
        let table = name_of(&chain, 1);
        if !is_base || !families.contains(&chain.family) || is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(1, table);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        let prefix = format!("{} {table}", family_name(chain.family));
        let name = name_of(&chain, 3);
        let mut walk = Walk { rules: &rules, overlay, left: RULES, prefix, base: name, found };
        walk.chain(name, DEPTH);
        found = walk.found;
    }
    Ok(found.into_iter().take(NAMED).collect())
}

struct Walk<'a> {
    rules: &'a [Object],
    overlay: &'a Overlay<'a>,
    left: usize,
    /// Family and table.
    prefix: String,
    base: &'a str,
    found: BTreeSet<Redirect>,
}

impl Walk<'_> {
    /// Says whether packets between pods that come into the chain may come to its end.
    fn chain(&mut self, name: &str, depth: usize) -> bool {
        let rules = self.rules;
        for rule in rules.iter().filter(|rule| name_of(rule, 2) == name) {
            if self.left == 0 {
                return false;
            }
            self.left -= 1;
            let Some(port) = self.overlay.is_concerned(rule) else { continue };
            if translates_destination(rule) {
                let Self { prefix, base, .. } = &*self;
                let (base, chain) = (format!("{prefix} {base}"), format!("{prefix} {name}"));
                self.found.insert(Redirect { base, chain, port: port.only() });
                continue;
            }
            if let Some(target) = led_to(rule).filter(|_| depth > 0) {
                self.chain(target, depth - 1);
            }
            // What it leaves to the rules after it, for its ports alone, is of no interest.
            if port == Ports::All && decides(rule) {
                return false;
            }
        }
        true
    }
}

/// Whether no rule after this one sees the packets.
fn decides(rule: &Object) -> bool {
    let leaves = expressions(rule).any(|(name, data)| {
        let verdict = rules::verdict_of(data).filter(|_| name == "immediate");
        matches!(verdict, Some(rules::RETURN | rules::GOTO))
    });
    leaves || matches!(rules::effect(rule), Effect::Accepts | Effect::Drops)
}

/// The chain into which a rule leads.
fn led_to(rule: &Object) -> Option<&str> {
    expressions(rule).find_map(|(name, data)| {
        let verdict =
            attributes::find(attributes::find(data, 2)?, 2).filter(|_| name == "immediate");
        attributes::find(verdict?, 2).map(attributes::text)
    })
}

/// The destination ports that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ports {
    All,
    One(u16),
    Some,
}

impl Ports {
    const fn only(self) -> Option<u16> {
        match self {
            Self::One(port) => Some(port),
            Self::All | Self::Some => None,
        }
    }
}

/// What a comparison is about.
enum Loaded {
    Nothing,
    InputIndex,
    InputName,
    Address(Option<Vec<u8>>),
    DestinationType,
    Family,
    Protocol,
    DestinationPort,
    /// Ports of sources, and what leaves no addresses out.
    Other,
    Unknown,
}

impl Overlay<'_> {
    /// The ports for which a rule concerns packets between pods; none, if it leaves those out.
    fn is_concerned(&self, rule: &Object) -> Option<Ports> {
        let mut loaded = Loaded::Nothing;
        let mut ports = Ports::All;
        for (name, data) in expressions(rule) {
            let get = |attribute| number(attributes::find(data, attribute));
            match name {
                "meta" => {
                    loaded = match get(2) {
                        Some(META_IIF) => Loaded::InputIndex,
                        Some(META_IIFNAME) => Loaded::InputName,
                        Some(META_L4PROTO) => Loaded::Protocol,
                        Some(META_NFPROTO) => Loaded::Family,
                        _ => Loaded::Unknown,
                    };
                }
                "payload" => loaded = self.payload(get(2)?, get(3)?),
                "fib" if get(2) == Some(FIB_TYPE) && get(3) == Some(FIB_DESTINATION) => {
                    loaded = Loaded::DestinationType;
                }
                "ct" if get(2) == Some(CT_STATE) => loaded = Loaded::Other,
                "bitwise" => {
                    if let Loaded::Address(mask) = &mut loaded {
                        *mask = value(attributes::find(data, 4)).map(<[u8]>::to_vec);
                    }
                }
                "cmp" => {
                    let value = value(attributes::find(data, 3))?;
                    let is_equal = match get(2)? {
                        EQUAL => true,
                        NOT_EQUAL => false,
                        _ => return None,
                    };
                    match &loaded {
                        Loaded::DestinationPort if is_equal => {
                            ports = value
                                .first_chunk()
                                .map_or(Ports::Some, |port| Ports::One(u16::from_be_bytes(*port)));
                        }
                        Loaded::DestinationPort => ports = Ports::Some,
                        Loaded::Protocol if ports == Ports::All => ports = Ports::Some,
                        Loaded::Protocol | Loaded::Other => {}
                        loaded => self.agrees(loaded, value, is_equal)?,
                    }
                }
                "lookup" | "range" => match loaded {
                    Loaded::DestinationPort => ports = Ports::Some,
                    Loaded::Other | Loaded::Protocol if name == "range" || get(3) != Some(0) => {}
                    _ => return None,
                },
                "match" => {
                    let name = text_of(data)?;
                    let info = attributes::find(data, 3).unwrap_or_default();
                    match name {
                        "addrtype" if may_be_of_others(info)? => {}
                        "tcp" | "udp" => ports = port_of(info),
                        "comment" => {}
                        _ if ANYWHERE.contains(&name) => ports = Ports::Some,
                        _ => return None,
                    }
                }
                "limit" | "quota" => ports = Ports::Some,
                "immediate" | "counter" | "log" | "redir" | "nat" | "tproxy" | "target"
                | "reject" | "notrack" => {}
                _ => return None,
            }
        }
        Some(ports)
    }

    fn payload(&self, base: u32, offset: u32) -> Loaded {
        let (source, destination, protocol) =
            if self.network.addr().is_ipv4() { (12, 16, 9) } else { (8, 24, 6) };
        match (base, offset) {
            (NETWORK, at) if at == source || at == destination => Loaded::Address(None),
            (NETWORK, at) if at == protocol => Loaded::Protocol,
            (TRANSPORT, 2) => Loaded::DestinationPort,
            (TRANSPORT, _) => Loaded::Other,
            _ => Loaded::Unknown,
        }
    }

    /// Whether a comparison lets packets between pods pass, by whatever one of them has.
    fn agrees(&self, loaded: &Loaded, value: &[u8], is_equal: bool) -> Option<()> {
        let is_it = match loaded {
            Loaded::InputIndex => {
                let index = u32::from_ne_bytes(*value.first_chunk()?);
                self.inputs.iter().any(|(known, _)| (*known == index) == is_equal)
            }
            Loaded::InputName => {
                let end = value.iter().position(|byte| *byte == 0);
                let name = std::str::from_utf8(&value[..end.unwrap_or(value.len())]).ok()?;
                let is_named = |known: &str| {
                    if end.is_some() { known == name } else { known.starts_with(name) }
                };
                self.inputs.iter().any(|(_, known)| is_named(known) == is_equal)
            }
            Loaded::Address(mask) => {
                let network = network_of(value, mask.as_deref(), self.network.addr())?;
                let contains = network.contains(&self.network);
                if is_equal { contains || self.network.contains(&network) } else { !contains }
            }
            Loaded::DestinationType => (*value.first()? == LOCAL) != is_equal,
            Loaded::Family => {
                let own = if self.network.addr().is_ipv4() { IPV4 } else { IPV6 };
                (*value.first()? == own) == is_equal
            }
            _ => false,
        };
        is_it.then_some(())
    }
}

/// What a comparison or a mask holds.
fn value(data: Option<&[u8]>) -> Option<&[u8]> {
    attributes::find(data?, 1)
}

/// The network that is compared with: its first bytes, or all of them under a mask.
fn network_of(value: &[u8], mask: Option<&[u8]>, like: IpAddr) -> Option<IpNet> {
    let bits = mask
        .map_or(value.len() * 8, |mask| mask.iter().map(|byte| byte.leading_ones() as usize).sum());
    let byte = |at: usize| value.get(at).copied().unwrap_or(0);
    let address = match like {
        IpAddr::V4(_) => IpAddr::from(std::array::from_fn::<u8, 4, _>(byte)),
        IpAddr::V6(_) => IpAddr::from(std::array::from_fn::<u8, 16, _>(byte)),
    };
    IpNet::new(address, u8::try_from(bits).ok()?).ok()
}

/// Whether `struct xt_addrtype_info_v1` (linux/netfilter/xt_addrtype.h) matches destinations that are no
/// addresses of this host.
fn may_be_of_others(info: &[u8]) -> Option<bool> {
    const INVERTS_DESTINATION: u32 = 2;
    let types = u16::from_ne_bytes(*info.get(2..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*info.get(4..)?.first_chunk()?);
    let names_local = types & 1 << LOCAL != 0;
    Some(types == 0 || names_local == (flags & INVERTS_DESTINATION != 0))
}

/// Destination ports of `struct xt_tcp` and `struct xt_udp` (linux/netfilter/xt_tcpudp.h).
fn port_of(info: &[u8]) -> Ports {
    let port = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    match (port(4), port(6)) {
        (Some(first), Some(last)) if first == last => Ports::One(first),
        _ => Ports::Some,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_is_read_from_its_first_bytes_or_under_a_mask() {
        let like = IpAddr::from([10, 42, 0, 0]);
        let read = |value: &[u8], mask: Option<&[u8]>| {
            network_of(value, mask, like).map(|network| network.to_string())
        };
        assert_eq!(read(&[10, 42], None).as_deref(), Some("10.42.0.0/16"));
        let mask = Some(&[255, 240, 0, 0][..]);
        assert_eq!(read(&[172, 16, 0, 0], mask).as_deref(), Some("172.16.0.0/12"));
        assert_eq!(read(&[10, 43, 0, 1], None).as_deref(), Some("10.43.0.1/32"));
        assert_eq!(read(&[0; 40], None), None);
    }

    #[test]
    fn address_type_leaves_pods_out_where_it_names_this_hosts_own_addresses() {
        let info = |types: u16, flags: u32| {
            [&[0, 0][..], &types.to_ne_bytes(), &flags.to_ne_bytes()].concat()
        };
        assert_eq!(may_be_of_others(&info(4, 0)), Some(false));
        assert_eq!(may_be_of_others(&info(4, 2)), Some(true));
        assert_eq!(may_be_of_others(&info(0, 0)), Some(true));
        assert_eq!(may_be_of_others(&[0; 3]), None);
    }
}
