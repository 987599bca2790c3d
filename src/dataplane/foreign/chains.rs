//! Foreign chains that may drop packets: forwarded ones, those of this host itself, and resolution at pods.
//!
//! A packet has to pass every base chain, so gossamer's rules cannot accept what another program's
//! rules drop. Foreign chains are only read, to explain a loss; trials show whether packets pass
//! (`dataplane::forwarding`).

mod lost;

use std::{collections::BTreeSet, fmt, io, net::IpAddr};

pub use lost::LostPackets;

use ipnet::IpNet;

use super::rules::{
    Base, Effect, base_of, compared_value, effect, expressions, hands_over, hook_name,
    is_conditional, loads_destination, target_of,
};
use crate::{
    dataplane::{
        desired::is_own_table,
        remedies::{accept_from, accept_from_and_to, accept_to, accept_within},
    },
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            ANY, ARP, BRIDGE, INET, IP, IP6, Kind, NETDEV, Nftables, Object, family_name, name_of,
            nfta,
        },
    },
};

/// `NF_INET_FORWARD`
const FORWARD: u32 = 2;
/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
/// Hooks of the families `inet`, `ip` and `ip6` for packets to this host itself, and for packets
/// that it sends.
const OWN_PACKETS: [u32; 2] = [1, 3];
/// Upper limit of the chains in one message.
pub(super) const MAX_CHAINS_NAMED: usize = 3;

/// What foreign chains do with packets of pods, as far as their rules could be read.
#[derive(Debug, Default)]
pub struct ForeignChains {
    /// Chains that may drop forwarded packets, the most probable ones first.
    pub dropping: Vec<DroppingChain>,
    /// Chains that drop packets to single addresses; see [`direct_access_drops`].
    pub direct_access: Vec<String>,
}

/// The hook at which packets of this host itself may be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnHook {
    /// For packets to this host.
    Input,
    /// For packets from this host.
    Output,
}

/// A chain that may drop forwarded packets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DroppingChain {
    /// In which way it drops them.
    pub kind: DropKind,
    /// Family, table and name, as `nft` takes them.
    pub chain: String,
    /// The base chain's hook.
    pub hook: &'static str,
    /// Whether no rule in it seems to accept packets of the overlay's networks.
    pub is_likely: bool,
    /// Whether a rule hands packets to a program.
    pub hands_over: bool,
    /// Whether it translates addresses; packets that its rules accept are not translated.
    pub is_nat: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
/// How a chain drops packets.
pub enum DropKind {
    /// An unconditional rule at its end.
    LastRule,
    /// Its policy.
    Policy,
    /// Some rule, for some packets.
    Rules,
    /// A program that receives the packets.
    Program,
}

impl ForeignChains {
    /// Reads chains and rules. Rules that certainly match none of the `lost` packets are ignored.
    ///
    /// # Errors
    /// When the chains cannot be listed.
    pub fn read(
        nftables: &mut Nftables,
        networks: &[IpNet],
        lost: Option<&LostPackets>,
    ) -> io::Result<Self> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        Ok(Self {
            dropping: dropping_chains(nftables, &chains, (networks, lost), is_on_the_way)
                .unwrap_or_default(),
            direct_access: direct_access_drops(nftables, &chains, networks).unwrap_or_default(),
        })
    }

    /// Returns the chains that may drop a pod's resolution request for its gateway, or the answer.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn read_around_gateway(
        nftables: &mut Nftables,
        network: IpNet,
    ) -> io::Result<Vec<DroppingChain>> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        let sees_resolution = |family: u8, base: &Base| match (family, network) {
            (BRIDGE | NETDEV, _) | (ARP, IpNet::V4(_)) => true,
            // Neighbor discovery consists of IPv6 packets.
            (INET | IP6, IpNet::V6(_)) => base.hook != FORWARD,
            _ => false,
        };
        let mut dropping = dropping_chains(nftables, &chains, (&[network], None), sees_resolution)?;
        dropping.truncate(MAX_CHAINS_NAMED);
        Ok(dropping)
    }

    /// Returns the chains that may drop packets between this host itself and addresses of a
    /// network.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn read_at(
        nftables: &mut Nftables,
        at: OwnHook,
        network: IpNet,
    ) -> io::Result<Vec<DroppingChain>> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        let hook = if at == OwnHook::Input { OWN_PACKETS[0] } else { OWN_PACKETS[1] };
        let is_at =
            |family: u8, base: &Base| [INET, IP, IP6].contains(&family) && base.hook == hook;
        let mut dropping = dropping_chains(nftables, &chains, (&[network], None), is_at)?;
        dropping.truncate(MAX_CHAINS_NAMED);
        Ok(dropping)
    }

    /// Returns the base chains that drop all forwarded packets except those that a rule accepts,
    /// and have no rule that seems to accept these networks. A guess, for hosts on which a trial is
    /// impossible.
    pub fn guess(&self) -> impl Iterator<Item = &DroppingChain> {
        let closes = |chain: &&DroppingChain| {
            chain.is_likely && matches!(chain.kind, DropKind::LastRule | DropKind::Policy)
        };
        self.dropping.iter().filter(closes)
    }

    /// Returns the chains that most probably drop packets that do not pass.
    pub fn suspects(&self) -> Vec<&DroppingChain> {
        let guess: Vec<&DroppingChain> = self.guess().take(MAX_CHAINS_NAMED).collect();
        if guess.is_empty() { self.dropping.iter().take(MAX_CHAINS_NAMED).collect() } else { guess }
    }
}

impl DroppingChain {
    /// Returns the command that accepts packets between this host itself and a network.
    pub fn fix_at(&self, at: OwnHook, network: IpNet) -> String {
        match at {
            OwnHook::Input => accept_from(&self.chain, network),
            OwnHook::Output => accept_to(&self.chain, network),
        }
    }

    /// Returns the command that accepts packets of a network.
    pub fn fix(&self, network: IpNet) -> String {
        match self.chain.split(' ').collect::<Vec<_>>()[..] {
            [_, "firewalld", _] => format!(
                "firewall-cmd --permanent --zone=trusted --add-source={network}; firewall-cmd --reload; or \
                 {}, and the same with daddr",
                accept_from(&self.chain, network)
            ),
            // There, packets of pods are still inside tunnel packets, or no packets of IP.
            ["netdev" | "arp", ..] => self.listing(),
            // Packets of pods to other networks still have to be translated.
            _ if self.is_nat => accept_within(&self.chain, network),
            _ => accept_from_and_to(&self.chain, network),
        }
    }

    /// Returns the command that accepts what pods of a network need to resolve their gateway. On a bridge,
    /// that may be ARP, which no rule about the network accepts.
    pub fn resolution_fix(&self, network: IpNet) -> String {
        if self.chain.starts_with("bridge ") { self.listing() } else { self.fix(network) }
    }

    /// Returns the command that shows the chain's table.
    fn listing(&self) -> String {
        let table = self.chain.rsplit_once(' ').map_or(self.chain.as_str(), |(table, _)| table);
        format!("see nft list table {table}")
    }
}

impl fmt::Display for DroppingChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.kind {
            DropKind::LastRule => "ends in a rule that drops or rejects",
            DropKind::Policy => "has the policy drop",
            DropKind::Rules => "has rules that drop or reject",
            DropKind::Program => "",
        };
        let handed = "hands packets to a program (NFQUEUE), without which they do not pass";
        let how = match (how, self.hands_over) {
            (how, false) => how.to_owned(),
            ("", true) => handed.to_owned(),
            (how, true) => format!("{how}, and {handed}"),
        };
        write!(f, "chain {} (hook {}) {how}", self.chain, self.hook)
    }
}

/// Returns the foreign chains at hooks for which `is_concerned` holds that may drop packets.
fn dropping_chains(
    nftables: &mut Nftables,
    chains: &[Object],
    (networks, lost): (&[IpNet], Option<&LostPackets>),
    is_concerned: impl Fn(u8, &Base) -> bool,
) -> io::Result<Vec<DroppingChain>> {
    let mut dropping = Vec::new();
    for chain in chains {
        let Some(base) = base_of(chain).filter(|base| is_concerned(chain.family, base)) else {
            continue;
        };
        let (table, name) = (name_of(chain, nfta::CHAIN_TABLE), name_of(chain, nfta::CHAIN_NAME));
        let concerned = |net: &&IpNet| match chain.family {
            IP => net.addr().is_ipv4(),
            IP6 => net.addr().is_ipv6(),
            _ => true,
        };
        let concerned_networks: Vec<IpNet> = networks.iter().filter(concerned).copied().collect();
        if is_own_table(table) || concerned_networks.is_empty() {
            continue;
        }
        let rules = nftables.dump(
            Kind::GetRule,
            chain.family,
            &Attributes::new().text(nfta::RULE_TABLE, table),
        )?;
        let own: Vec<&Object> =
            rules.iter().filter(|rule| name_of(rule, nfta::RULE_CHAIN) == name).collect();
        let is_nat = is_nat(chain);
        let may_take = |rule: &Object| !lost.is_some_and(|lost| lost.misses(chain.family, rule));
        let reached = reached(&rules, name, !is_nat, may_take);
        let has = |what: fn(&Object) -> bool| {
            rules.iter().any(|rule| {
                what(rule) && may_take(rule) && reached.contains(name_of(rule, nfta::RULE_CHAIN))
            })
        };
        let hands_over = has(hands_over);
        let drops = || has(|rule| effect(rule) == Effect::Drops);
        let kind = ends_closed(&own, base)
            .or_else(|| drops().then_some(DropKind::Rules))
            .or_else(|| hands_over.then_some(DropKind::Program));
        let Some(kind) = kind else { continue };
        let accepts = |network: &IpNet| rules.iter().any(|rule| may_accept(rule, *network));
        dropping.push(DroppingChain {
            kind,
            chain: format!("{} {table} {name}", family_name(chain.family)),
            hook: hook_name(chain.family, base.hook),
            is_likely: base.hook == FORWARD && !concerned_networks.iter().all(accepts),
            hands_over,
            is_nat,
        });
    }
    dropping.sort_by_key(|chain| (!chain.is_likely, chain.kind));
    Ok(dropping)
}

/// Returns the chains of a table to which packets get from the chain `from`. A verdict map may lead
/// to any chain. Maps of translating chains are taken to lead to translating chains, which drop
/// nothing.
fn reached<'a>(
    rules: &'a [Object],
    from: &'a str,
    follows_maps: bool,
    may_take: impl Fn(&Object) -> bool,
) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::from([from]);
    let mut open = vec![from];
    while let Some(chain) = open.pop() {
        let leads = |rule: &&Object| {
            name_of(rule, nfta::RULE_CHAIN) == chain
                && effect(rule) == Effect::Leads
                && may_take(rule)
        };
        let leading = rules.iter().filter(leads);
        for rule in leading {
            match target_of(rule) {
                Some(target) if reached.insert(target) => open.push(target),
                None if follows_maps => {
                    return rules.iter().map(|rule| name_of(rule, nfta::RULE_CHAIN)).collect();
                }
                _ => {}
            }
        }
    }
    reached
}

/// Whether a base chain translates addresses. Only the first packet of a connection passes it.
fn is_nat(chain: &Object) -> bool {
    name_of(chain, nfta::CHAIN_TYPE) == "nat"
}

/// Whether forwarded packets pass the hook: all except those for the host's own packets.
fn is_on_the_way(family: u8, base: &Base) -> bool {
    match family {
        INET | IP | IP6 => !OWN_PACKETS.contains(&base.hook),
        BRIDGE | NETDEV => true,
        _ => false,
    }
}

/// Returns how a base chain drops what no condition decides: by its first unconditional rule, or by
/// its policy. Rules in chains that it leads to count as conditional.
fn ends_closed(own: &[&Object], base: Base) -> Option<DropKind> {
    let ends = |rule: &&&Object| {
        !is_conditional(rule) && matches!(effect(rule), Effect::Drops | Effect::Accepts)
    };
    match own.iter().find(ends).map(|rule| effect(rule)) {
        Some(Effect::Drops) => Some(DropKind::LastRule),
        None if base.drops => Some(DropKind::Policy),
        _ => None,
    }
}

/// Returns base chains before routing that drop packets to single addresses of these networks.
/// Since version 28, Docker allows only its own bridge to send to a container's address: `ip raw
/// PREROUTING`.
fn direct_access_drops(
    nftables: &mut Nftables,
    chains: &[Object],
    networks: &[IpNet],
) -> io::Result<Vec<String>> {
    let mut dropping = Vec::new();
    for chain in chains.iter().filter(|chain| [IP, IP6].contains(&chain.family)) {
        if base_of(chain).is_none_or(|base| base.hook != PREROUTING) {
            continue;
        }
        let (table, name) = (name_of(chain, nfta::CHAIN_TABLE), name_of(chain, nfta::CHAIN_NAME));
        let filter = Attributes::new().text(nfta::RULE_TABLE, table).text(nfta::RULE_CHAIN, name);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        if rules.iter().any(|rule| drops_one_of(rule, networks)) {
            dropping.push(format!("{} {table} {name}", family_name(chain.family)));
        }
    }
    Ok(dropping)
}

/// Whether a rule drops packets to a single address in one of the networks.
fn drops_one_of(rule: &Object, networks: &[IpNet]) -> bool {
    let mut is_destination = false;
    let named = expressions(rule).any(|(name, data)| {
        let address = compared(name, data).and_then(attributes::address).filter(|_| is_destination);
        // A network is compared after a bitwise operation, or as fewer bytes.
        is_destination = loads_destination(name, data);
        address.is_some_and(|ip: IpAddr| networks.iter().any(|net| net.contains(&ip)))
    });
    named && effect(rule) == Effect::Drops
}

/// Whether a rule accepts packets of the network: because it contains the network, or looks up a
/// set, whose elements are not read.
fn may_accept(rule: &Object, network: IpNet) -> bool {
    let octets = attributes::octets(network.network());
    let whole = &octets[..usize::from(network.prefix_len() / 8)];
    let named = expressions(rule).any(|(name, data)| {
        name == "lookup" || compared(name, data).is_some_and(|bytes| bytes.starts_with(whole))
    });
    named && effect(rule) == Effect::Accepts
}

/// Returns the value that a comparison compares with.
fn compared<'a>(name: &str, data: &'a [u8]) -> Option<&'a [u8]> {
    compared_value(data).filter(|_| name == "cmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fix_of_a_chain_depends_on_its_kind() {
        let network = "10.42.0.0/16".parse().expect("a network");
        let of = |chain: &str, is_nat| DroppingChain {
            kind: DropKind::Rules,
            chain: chain.to_owned(),
            hook: "postrouting",
            is_likely: false,
            hands_over: false,
            is_nat,
        };
        let fix = |chain: &str, is_nat| of(chain, is_nat).fix(network);
        let within =
            "nft insert rule inet wan post ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept";
        assert_eq!(fix("inet wan post", true), within);
        let both = fix("inet wan post", false);
        assert!(both.contains("post ip saddr 10.42.0.0/16 accept; "), "{both}");
        assert!(fix("bridge filter FORWARD", false).starts_with("ebtables -I FORWARD "));
        assert_eq!(fix("netdev ddos in", false), "see nft list table netdev ddos");
        let at_gateway = of("bridge filter FORWARD", false).resolution_fix(network);
        assert_eq!(at_gateway, "see nft list table bridge filter");
        assert!(fix("inet firewalld filter_FORWARD", false).starts_with("firewall-cmd "));
    }
}
