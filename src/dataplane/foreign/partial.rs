//! Foreign rules that affect only some packets of pods: single ports or addresses, large packets, a
//! random share. They are only read, to report them.
//!
//! Trials show whether packets pass at all; they cannot cover every port and address. Rules are
//! therefore followed from the base chains. A rule counts only if, as far as its form shows,
//! everything on the way to it lets packets between pods pass. A rule that cannot be read does not
//! count.

mod effects;
mod lines;
mod matches;
mod reader;
mod reading;
mod registers;
mod selection;
mod sets;
mod walk;

use std::{collections::BTreeMap, io};

pub use self::{
    lines::LegacyTable,
    selection::{Interfaces, Traffic},
};
use self::{
    reading::Marks,
    selection::Side,
    sets::Library,
    walk::{Rules, Walk},
};
use super::rules::{base_of, number};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{
            ANY, BRIDGE, INET, IP, IP6, Kind, NETDEV, Nftables, Object, family_name, name_of, nfta,
        },
    },
};

/// `NF_INET_*`; the numbers for bridges are the same.
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
/// `NF_INET_INGRESS`, and `NF_NETDEV_EGRESS`.
const INET_INGRESS: u32 = 5;
const NETDEV_EGRESS: u32 = 1;
/// Upper limit of the rules that are read for one kind of packets.
const MAX_RULES: usize = 100_000;
/// Upper limit of the passes until all marks of connections are known.
const MAX_PASSES: usize = 3;
/// Upper limit of the findings of one kind.
const MAX_FINDINGS_PER_KIND: usize = 3;
/// Tables of iptables in the order in which packets pass them (`NF_IP_PRI_*`).
const LEGACY_TABLES: [(&str, i32); 5] =
    [("raw", -300), ("mangle", -150), ("nat", -100), ("filter", 0), ("security", 50)];
/// Priority of source translation, after the filters.
const SOURCE_NAT: i32 = 100;
const LEGACY_HOOKS: [(&str, u32); 5] = [
    ("PREROUTING", PREROUTING),
    ("INPUT", INPUT),
    ("FORWARD", FORWARD),
    ("OUTPUT", OUTPUT),
    ("POSTROUTING", POSTROUTING),
];

/// What a rule does with the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Act {
    /// Gives them another destination; their only destination port, if there is one.
    Redirects(Option<u16>),
    /// Drops them.
    Drops,
    /// Rejects them.
    Rejects,
    /// Hands them to a program that is not running.
    Queues,
    /// Sets a mark, which may change their route.
    Marks(u32),
    /// Gives them another source.
    Translates,
    /// Sets a number of hops (TTL, hop limit) with which they do not arrive.
    Shortens(u8),
}

/// Rules of one chain that do the same with some packets of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    /// What they do.
    pub act: Act,
    /// The base chain, where packets can be exempted: family, table and name. For iptables-legacy,
    /// the program replaces the family.
    pub base: String,
    /// The chain with the rules, in the words of a message.
    pub chain: String,
    /// Identifies the first rule; `None` for the chain's policy.
    pub rule: Option<String>,
    /// What the first rule matches.
    pub what: String,
    /// How many packets the first rule has dropped, if it drops those above a rate and counts them.
    pub counted: Option<u64>,
    /// Number of further rules.
    pub more: usize,
    /// Whether packets pass the chain before routing.
    pub is_early: bool,
}

/// Act, base chain and chain: such rules are reported together.
type Key = (Act, String, String);

/// The hook and interfaces of a base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// One of `NF_INET_*`. Hooks where packets enter an interface count as before routing.
    hook: u32,
    /// The interfaces whose packets it sees; `None` for all.
    at: Option<(Side, Vec<String>)>,
}

impl Place {
    const fn is_early(&self) -> bool {
        self.hook == PREROUTING
    }
}

/// A base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Base {
    /// Order in which packets pass: by hook and interface, then by priority.
    order: (u32, i32),
    place: Place,
    /// Index of its table.
    table: usize,
    family: u8,
    /// Family and table, or program and table.
    prefix: String,
    name: String,
    /// Whether its policy drops packets.
    drops: bool,
    program: Option<&'static str>,
}

impl Base {
    fn label(&self, chain: &str) -> String {
        format!("{} {chain}", self.prefix)
    }

    /// Returns the chain's name in the words of a message.
    fn shown(&self, chain: &str) -> String {
        match (self.program, self.prefix.split_once(' ')) {
            (Some(program), Some((_, table))) => format!("{chain} of {program}'s table {table}"),
            _ => self.label(chain),
        }
    }
}

/// A table of another program, with its rules.
#[derive(Debug)]
enum Table {
    Nft(u8, String, Vec<Object>),
    Legacy(LegacyTable),
}

/// The rules of all other programs.
#[derive(Debug)]
pub struct ForeignRules {
    tables: Vec<Table>,
    bases: Vec<Base>,
    library: Library,
}

impl ForeignRules {
    /// Reads all tables; `legacy` are those of iptables-legacy.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn read(nftables: &mut Nftables, legacy: Vec<LegacyTable>) -> io::Result<Self> {
        let mut tables: Vec<Table> = Vec::new();
        let mut known: BTreeMap<(u8, String), usize> = BTreeMap::new();
        let mut bases = Vec::new();
        for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
            let (family, table) = (chain.family, name_of(&chain, nfta::CHAIN_TABLE));
            let Some(place) = place_of(&chain).filter(|_| !is_own_table(table)) else { continue };
            let key = (family, table.to_owned());
            let index = match known.get(&key) {
                Some(index) => *index,
                None => {
                    let filter = Attributes::new().text(nfta::RULE_TABLE, table);
                    let rules = nftables.dump(Kind::GetRule, family, &filter)?;
                    tables.push(Table::Nft(family, table.to_owned(), rules));
                    known.insert(key, tables.len() - 1);
                    tables.len() - 1
                }
            };
            bases.push(Base {
                order: (stage(&place), priority(&chain)),
                place,
                table: index,
                family,
                prefix: format!("{} {table}", family_name(family)),
                name: name_of(&chain, nfta::CHAIN_NAME).to_owned(),
                drops: base_of(&chain).is_some_and(|base| base.drops),
                program: None,
            });
        }
        for table in legacy {
            let program = table.program;
            let of_table = |(chain, hook): &(&str, u32)| {
                let place = Place { hook: *hook, at: None };
                let (_, priority) = LEGACY_TABLES.iter().find(|(name, _)| *name == table.name)?;
                let is_source = table.name == "nat" && *hook == POSTROUTING;
                Some(Base {
                    order: (stage(&place), if is_source { SOURCE_NAT } else { *priority }),
                    place,
                    table: tables.len(),
                    family: if program.starts_with("ip6") { IP6 } else { IP },
                    prefix: format!("{program} {}", table.name),
                    name: (*chain).to_owned(),
                    drops: table.dropping.contains(*chain),
                    program: Some(program),
                })
            };
            let exists = |(chain, _): &&(&str, u32)| table.chains.contains_key(*chain);
            bases.extend(LEGACY_HOOKS.iter().filter(exists).filter_map(of_table));
            tables.push(Table::Legacy(table));
        }
        bases.sort_by_key(|base| base.order);
        Ok(Self { tables, bases, library: Library::default() })
    }

    /// Returns the rules that affect some of these packets, unless an earlier rule accepts those.
    pub fn partial(&mut self, nftables: &mut Nftables, traffic: &Traffic<'_>) -> Vec<Partial> {
        let Self { tables, bases, library } = self;
        let own_family = if traffic.is_ipv4() { IP } else { IP6 };
        let by_chain: Vec<Rules<'_>> = tables.iter().map(Table::by_chain).collect();
        let mut marks = Marks::default();
        let mut found = BTreeMap::new();
        for _ in 0..MAX_PASSES {
            found.clear();
            let mut left = MAX_RULES;
            // Marks of packets belong to this pass, marks of connections exist from the first
            // packet on.
            let known = marks.connections.clone();
            marks.packets.clear();
            for base in bases.iter() {
                let is_of_family = [INET, own_family, NETDEV].contains(&base.family)
                    || base.family == BRIDGE && traffic.tunnel.is_none();
                let ways = base.place.ways(traffic);
                if !is_of_family || ways == 0 {
                    continue;
                }
                let (family, table) = match &tables[base.table] {
                    Table::Nft(family, table, _) => (*family, table.as_str()),
                    Table::Legacy(_) => (0, ""),
                };
                let mut sets = |name: &_| library.get(nftables, (family, table), name);
                let mut walk = Walk {
                    rules: &by_chain[base.table],
                    traffic,
                    sets: &mut sets,
                    marks: &mut marks,
                    base,
                    left: &mut left,
                    passes_established: 0,
                    accepts_new: 0,
                    accepts_new_at_any_rate: 0,
                    rated: Vec::new(),
                    found: &mut found,
                };
                walk.base_chain(ways);
            }
            if marks.connections == known {
                break;
            }
        }
        limit_per_kind(found)
    }
}

impl Table {
    fn by_chain(&self) -> Rules<'_> {
        match self {
            Self::Legacy(table) => Rules::Legacy(&table.chains),
            Self::Nft(_, _, rules) => by_chain(rules),
        }
    }
}

impl Place {
    /// Returns the ways of packets that this place sees, as bits.
    fn ways(&self, traffic: &Traffic<'_>) -> u8 {
        let sees_traffic = match (traffic.tunnel, traffic.is_own()) {
            _ if traffic.is_forwarded() => [PREROUTING, FORWARD, POSTROUTING].contains(&self.hook),
            (None, _) => false,
            (Some(_), false) => [PREROUTING, INPUT].contains(&self.hook),
            (Some(_), true) => [OUTPUT, POSTROUTING].contains(&self.hook),
        };
        match &self.at {
            _ if !sees_traffic => 0,
            None => traffic.all_ways(),
            Some((side, names)) => {
                let direct = traffic.ways_by(*side, |(_, name)| names.contains(name));
                // A packet that enters at a pod's port leaves by way 0, and one that leaves there
                // arrived by way 1.
                let is_port = traffic.ports.iter().any(|port| names.contains(port));
                let of_ports = if *side == Side::Input { 1 } else { 2 };
                direct | if is_port { of_ports } else { 0 }
            }
        }
    }
}

/// Returns the position of the place on a packet's way.
fn stage(place: &Place) -> u32 {
    match (place.hook, &place.at) {
        (PREROUTING, Some(_)) => 0,
        (hook, Some(_)) => hook + 2,
        (hook, None) => hook + 1,
    }
}

/// Returns where a base chain sees packets; `None` for other chains.
fn place_of(chain: &Object) -> Option<Place> {
    let hook = base_of(chain)?.hook;
    let attributes = attributes::find(&chain.attributes, nfta::CHAIN_HOOK)?;
    let one = attributes::find(attributes, nfta::HOOK_DEV).into_iter();
    let several =
        attributes::find(attributes, nfta::HOOK_DEVS).map(attributes::read).into_iter().flatten();
    let names = one.chain(several.map(|(_, name)| name)).map(attributes::text);
    let names: Vec<String> = names.map(str::to_owned).collect();
    Some(match (chain.family, hook) {
        (NETDEV, NETDEV_EGRESS) => Place { hook: POSTROUTING, at: Some((Side::Output, names)) },
        (NETDEV, _) | (INET, INET_INGRESS) => {
            Place { hook: PREROUTING, at: Some((Side::Input, names)) }
        }
        (_, hook) => Place { hook, at: None },
    })
}

/// Returns the priority of a base chain.
fn priority(chain: &Object) -> i32 {
    let hook = attributes::find(&chain.attributes, nfta::CHAIN_HOOK).unwrap_or_default();
    number(attributes::find(hook, nfta::HOOK_PRIORITY)).unwrap_or_default().cast_signed()
}

/// Returns up to [`MAX_FINDINGS_PER_KIND`] findings of each kind.
fn limit_per_kind(found: BTreeMap<Key, Partial>) -> Vec<Partial> {
    let mut kept: Vec<Partial> = Vec::new();
    for partial in found.into_values() {
        let kind = std::mem::discriminant(&partial.act);
        let alike = kept.iter().filter(|known| std::mem::discriminant(&known.act) == kind);
        if alike.count() < MAX_FINDINGS_PER_KIND {
            kept.push(partial);
        }
    }
    kept
}

fn by_chain(rules: &[Object]) -> Rules<'_> {
    let mut chains: BTreeMap<&str, Vec<&Object>> = BTreeMap::new();
    for rule in rules {
        chains.entry(name_of(rule, nfta::RULE_CHAIN)).or_default().push(rule);
    }
    Rules::Nft(chains)
}

#[cfg(test)]
mod tests;
