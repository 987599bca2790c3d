//! Chains of others that may keep pods' packets from passing.
//!
//! Each base chain has to let a packet pass, so none of ours can open what one of theirs closes. They are
//! only read, and reading explains: whether packets pass is tried (`dataplane::forwarding`).

mod lost;

use std::{collections::BTreeSet, fmt, io, net::IpAddr};

pub use lost::Lost;

use ipnet::IpNet;

use super::{
    firewall::name_of,
    rules::{
        Base, Effect, base_of, effect, family_name, hands_over, hook_name, is_conditional,
        target_of, translates_destination, translates_source,
    },
};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, Kind, Nftables, Object},
    },
};

/// `NF_INET_FORWARD`
const FORWARD: u32 = 2;
/// `NF_INET_POST_ROUTING`
const POSTROUTING: u32 = 4;
/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
/// Of the families `inet`, `ip` and `ip6`: what comes to this host itself, and what it sends.
const OWN_PACKETS: [u32; 2] = [1, 3];
const INET: u8 = 1;
const IP: u8 = 2;
const ARP: u8 = 3;
const NETDEV: u8 = 5;
const BRIDGE: u8 = 7;
const IP6: u8 = 10;
/// Chains that are named at once.
const NAMED: usize = 3;

/// What chains of others do with packets of pods, as far as it could be read.
#[derive(Debug, Default)]
pub struct ForeignChains {
    /// Those that may drop what is forwarded, the likeliest first.
    pub closing: Vec<Closing>,
    /// See [`direct_access_drops`].
    pub dropping: Vec<String>,
}

/// Where packets of this host itself may be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnHook {
    /// What comes to it.
    Input,
    /// What it sends.
    Output,
}

/// A chain that may drop what is forwarded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Closing {
    pub how: How,
    /// Family, table and name, as `nft` takes them.
    pub chain: String,
    /// The base chain's hook.
    pub hook: &'static str,
    /// No rule in it seems to let the overlay's networks pass.
    pub is_likely: bool,
    /// A rule hands packets to a program.
    pub hands_over: bool,
    /// What it accepts is not translated.
    pub is_nat: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// By a rule at its end that has no condition.
    LastRule,
    /// By its policy.
    Policy,
    /// By some rule, for some packets.
    Rules,
    /// By a program that packets are handed to.
    Program,
}

impl ForeignChains {
    /// Without rules that are known to take none of what was lost.
    pub fn read(
        nftables: &mut Nftables,
        networks: &[IpNet],
        lost: Option<&Lost>,
    ) -> io::Result<Self> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        Ok(Self {
            closing: closing_chains(nftables, &chains, (networks, lost), is_on_the_way)
                .unwrap_or_default(),
            dropping: direct_access_drops(nftables, &chains, networks).unwrap_or_default(),
        })
    }

    /// Chains that may drop a pod's question for the MAC of its gateway, or the answer.
    pub fn read_around_gateway(
        nftables: &mut Nftables,
        network: IpNet,
    ) -> io::Result<Vec<Closing>> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        let is_around = |family: u8, base: &Base| match (family, network) {
            (BRIDGE | NETDEV, _) | (ARP, IpNet::V4(_)) => true,
            // Neighbor discovery is of IPv6 itself.
            (INET | IP6, IpNet::V6(_)) => base.hook != FORWARD,
            _ => false,
        };
        let mut closing = closing_chains(nftables, &chains, (&[network], None), is_around)?;
        closing.truncate(NAMED);
        Ok(closing)
    }

    /// Chains that may drop packets between this host itself and addresses of a network.
    pub fn read_at(
        nftables: &mut Nftables,
        at: OwnHook,
        network: IpNet,
    ) -> io::Result<Vec<Closing>> {
        let chains = nftables.dump(Kind::GetChain, ANY, &Attributes::new())?;
        let hook = if at == OwnHook::Input { OWN_PACKETS[0] } else { OWN_PACKETS[1] };
        let is_at =
            |family: u8, base: &Base| [INET, IP, IP6].contains(&family) && base.hook == hook;
        let mut closing = closing_chains(nftables, &chains, (&[network], None), is_at)?;
        closing.truncate(NAMED);
        Ok(closing)
    }

    /// Base chains that drop whatever is forwarded unless a rule lets it pass, and have no rule that seems to
    /// let these networks pass: a guess, for where it cannot be tried.
    pub fn guess(&self) -> impl Iterator<Item = &Closing> {
        let closes =
            |chain: &&Closing| chain.is_likely && matches!(chain.how, How::LastRule | How::Policy);
        self.closing.iter().filter(closes)
    }

    /// The likeliest chains to drop packets that do not pass.
    pub fn suspects(&self) -> Vec<&Closing> {
        let guess: Vec<&Closing> = self.guess().take(NAMED).collect();
        if guess.is_empty() { self.closing.iter().take(NAMED).collect() } else { guess }
    }
}

impl Closing {
    /// The command that lets packets between this host itself and a network pass.
    pub fn fix_at(&self, at: OwnHook, network: IpNet) -> String {
        let (side, name, field) = match at {
            OwnHook::Input => ("-s", "INPUT", "saddr"),
            OwnHook::Output => ("-d", "OUTPUT", "daddr"),
        };
        let program = if network.addr().is_ipv4() { "iptables" } else { "ip6tables" };
        match self.chain.split(' ').collect::<Vec<_>>()[..] {
            ["ip" | "ip6", "filter", chain] if chain == name => {
                format!("{program} -I {name} {side} {network} -j ACCEPT")
            }
            _ => format!(
                "nft insert rule {} {} {field} {network} accept",
                self.chain,
                protocol(network)
            ),
        }
    }

    /// The command that lets a network pass.
    pub fn fix(&self, network: IpNet) -> String {
        let words: Vec<&str> = self.chain.split(' ').collect();
        let iptables = |program: &str| {
            format!(
                "{program} -I FORWARD -s {network} -j ACCEPT; {program} -I FORWARD -d {network} -j ACCEPT"
            )
        };
        match words[..] {
            ["ip", "filter", "FORWARD"] => iptables("iptables"),
            ["ip6", "filter", "FORWARD"] => iptables("ip6tables"),
            [_, "firewalld", _] => format!(
                "firewall-cmd --permanent --zone=trusted --add-source={network}; firewall-cmd --reload; or \
                 nft insert rule {0} {1} saddr {network} accept, and the same with daddr",
                self.chain,
                protocol(network)
            ),
            ["netdev" | "bridge" | "arp", table, _] => {
                format!("see nft list table {} {table}", words[0])
            }
            // Other packets of pods have to be translated.
            _ if self.is_nat => format!(
                "nft insert rule {} {1} saddr {network} {1} daddr {network} accept",
                self.chain,
                protocol(network)
            ),
            _ => format!(
                "nft insert rule {0} {1} saddr {network} accept; nft insert rule {0} {1} daddr {network} \
                 accept",
                self.chain,
                protocol(network)
            ),
        }
    }
}

const fn protocol(network: IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

impl fmt::Display for Closing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.how {
            How::LastRule => "ends in a rule that drops or rejects",
            How::Policy => "has the policy drop",
            How::Rules => "has rules that drop or reject",
            How::Program => "",
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

/// Chains of others through which what is forwarded goes, and which may drop it.
fn closing_chains(
    nftables: &mut Nftables,
    chains: &[Object],
    (networks, lost): (&[IpNet], Option<&Lost>),
    is_concerned: impl Fn(u8, &Base) -> bool,
) -> io::Result<Vec<Closing>> {
    let mut closing = Vec::new();
    for chain in chains {
        let Some(base) = base_of(chain).filter(|base| is_concerned(chain.family, base)) else {
            continue;
        };
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
        let concerned = |net: &&IpNet| match chain.family {
            IP => net.addr().is_ipv4(),
            IP6 => net.addr().is_ipv6(),
            _ => true,
        };
        let ours: Vec<IpNet> = networks.iter().filter(concerned).copied().collect();
        if is_own_table(table) || ours.is_empty() {
            continue;
        }
        let rules =
            nftables.dump(Kind::GetRule, chain.family, &Attributes::new().text(1, table))?;
        let own: Vec<&Object> = rules.iter().filter(|rule| name_of(rule, 2) == name).collect();
        let is_nat = is_nat(chain);
        let may_take = |rule: &Object| !lost.is_some_and(|lost| lost.misses(chain.family, rule));
        let reached = reached(&rules, name, !is_nat, may_take);
        let has = |what: fn(&Object) -> bool| {
            rules
                .iter()
                .any(|rule| what(rule) && may_take(rule) && reached.contains(name_of(rule, 2)))
        };
        let hands_over = has(hands_over);
        let drops = || has(|rule| effect(rule) == Effect::Drops);
        let how = ends_closed(&own, base)
            .or_else(|| drops().then_some(How::Rules))
            .or_else(|| hands_over.then_some(How::Program));
        let Some(how) = how else { continue };
        let accepts = |network: &IpNet| rules.iter().any(|rule| may_accept(rule, *network));
        closing.push(Closing {
            how,
            chain: format!("{} {table} {name}", family_name(chain.family)),
            hook: hook_name(chain.family, base.hook),
            is_likely: base.hook == FORWARD && !ours.iter().all(accepts),
            hands_over,
            is_nat,
        });
    }
    closing.sort_by_key(|closing| (!closing.is_likely, closing.how));
    Ok(closing)
}

/// Chains that packets come to from one of a table. A map of verdicts may lead to any other; those of chains
/// that translate are taken to lead to others of that kind, which drop nothing.
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
            name_of(rule, 2) == chain && effect(rule) == Effect::Leads && may_take(rule)
        };
        let leading = rules.iter().filter(leads);
        for rule in leading {
            match target_of(rule) {
                Some(target) if reached.insert(target) => open.push(target),
                None if follows_maps => return rules.iter().map(|rule| name_of(rule, 2)).collect(),
                _ => {}
            }
        }
    }
    reached
}

/// Whether a base chain translates addresses: only the first packet of a connection comes to it.
fn is_nat(chain: &Object) -> bool {
    attributes::find(&chain.attributes, 7).map(attributes::text) == Some("nat")
}

/// Chains of others that translate the source of what leaves this host; where rules without a condition do
/// so, only theirs.
pub fn translating_chains(nftables: &mut Nftables, ipv4: bool) -> io::Result<Vec<String>> {
    chains_with(nftables, ipv4, POSTROUTING, translates_source)
}

/// The same of those that send what comes in to another address.
pub fn redirecting_chains(nftables: &mut Nftables, ipv4: bool) -> io::Result<Vec<String>> {
    chains_with(nftables, ipv4, PREROUTING, translates_destination)
}

fn chains_with(
    nftables: &mut Nftables,
    ipv4: bool,
    hook: u32,
    is_it: impl Fn(&Object) -> bool,
) -> io::Result<Vec<String>> {
    let families = [INET, if ipv4 { IP } else { IP6 }];
    let mut found = BTreeSet::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let is_base = base_of(&chain).is_some_and(|base| base.hook == hook);
        let table = name_of(&chain, 1);
        if !is_base || !families.contains(&chain.family) || is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(1, table);
        for rule in nftables.dump(Kind::GetRule, chain.family, &filter)? {
            if is_it(&rule) {
                let name = format!("{} {table} {}", family_name(chain.family), name_of(&rule, 2));
                found.insert((is_conditional(&rule), name));
            }
        }
    }
    let first = found.first().is_some_and(|(is_conditional, _)| *is_conditional);
    let likeliest = found.into_iter().filter(|(is_conditional, _)| *is_conditional == first);
    Ok(likeliest.map(|(_, name)| name).take(NAMED).collect())
}

/// Packets that are forwarded pass all hooks but those of this host's own.
fn is_on_the_way(family: u8, base: &Base) -> bool {
    match family {
        INET | IP | IP6 => !OWN_PACKETS.contains(&base.hook),
        BRIDGE | NETDEV => true,
        _ => false,
    }
}

/// Unconditional rules decide in their order; those of chains that it leads to are taken as conditional.
fn ends_closed(own: &[&Object], base: Base) -> Option<How> {
    let ends = |rule: &&&Object| {
        !is_conditional(rule) && matches!(effect(rule), Effect::Drops | Effect::Accepts)
    };
    match own.iter().find(ends).map(|rule| effect(rule)) {
        Some(Effect::Drops) => Some(How::LastRule),
        None if base.drops => Some(How::Policy),
        _ => None,
    }
}

/// Base chains before routing in which packets to single addresses of these networks are dropped. Docker
/// from version 28 on lets nobody but its own bridge speak to a container's address: `ip raw PREROUTING`.
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
        let (table, name) = (name_of(chain, 1), name_of(chain, 3));
        let filter = Attributes::new().text(1, table).text(2, name);
        let rules = nftables.dump(Kind::GetRule, chain.family, &filter)?;
        if rules.iter().any(|rule| drops_one_of(rule, networks)) {
            dropping.push(format!("{} {table} {name}", family_name(chain.family)));
        }
    }
    Ok(dropping)
}

fn drops_one_of(rule: &Object, networks: &[IpNet]) -> bool {
    let list = attributes::find(&rule.attributes, 4).unwrap_or_default();
    let named = attributes::read(list).any(|(_, expression)| {
        let address = compared(expression).and_then(attributes::address);
        address.is_some_and(|ip: IpAddr| networks.iter().any(|net| net.contains(&ip)))
    });
    named && effect(rule) == Effect::Drops
}

/// Whether a rule accepts packets of the network by name, or such as a set or nothing but their interface
/// tells: what those hold is not read.
fn may_accept(rule: &Object, network: IpNet) -> bool {
    let octets = attributes::octets(network.network());
    let whole = &octets[..usize::from(network.prefix_len() / 8)];
    let list = attributes::find(&rule.attributes, 4).unwrap_or_default();
    let named = attributes::read(list).any(|(_, expression)| {
        let is_set = attributes::find(expression, 1).map(attributes::text) == Some("lookup");
        is_set || compared(expression).is_some_and(|bytes| bytes.starts_with(whole))
    });
    named && effect(rule) == Effect::Accepts
}

/// What a comparison compares with.
fn compared(expression: &[u8]) -> Option<&[u8]> {
    let is_comparison = attributes::find(expression, 1).map(attributes::text) == Some("cmp");
    let data = attributes::find(expression, 2).filter(|_| is_comparison)?;
    attributes::find(attributes::find(data, 3)?, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_about_a_chain_that_translates_leaves_out_packets_between_pods_alone() {
        let network = "10.42.0.0/16".parse().expect("a network");
        let fix = |is_nat| {
            let closing = Closing {
                how: How::Rules,
                chain: "inet wan post".to_owned(),
                hook: "postrouting",
                is_likely: false,
                hands_over: false,
                is_nat,
            };
            closing.fix(network)
        };
        let both =
            "nft insert rule inet wan post ip saddr 10.42.0.0/16 ip daddr 10.42.0.0/16 accept";
        assert_eq!(fix(true), both);
        assert!(fix(false).contains("post ip saddr 10.42.0.0/16 accept; "), "{}", fix(false));
    }
}
