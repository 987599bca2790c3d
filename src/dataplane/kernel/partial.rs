//! Rules of others that do something with some packets of pods: single ports or addresses, large packets,
//! some by chance. They are only read, to say so.
//!
//! Whether packets pass at all is tried; what single ones meet would have to be guessed. So rules are
//! followed from the base chains, and a rule counts only if nothing on the way to it leaves packets between
//! pods out, as far as its form tells. What cannot be read leaves them out.

mod effects;
mod lines;
mod matches;
mod reader;
mod reading;
mod selection;
mod sets;
mod walk;

use std::{collections::BTreeMap, io};

pub use self::{
    lines::LegacyTable,
    selection::{Traffic, Way},
};
use self::{
    reading::Marks,
    selection::{Selection, Side},
    sets::Library,
    walk::{DEPTH, Rules, Walk},
};
use super::{
    firewall::name_of,
    rules::{base_of, family_name, number},
};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, BRIDGE, INET, Kind, NETDEV, Nftables, Object},
    },
};

/// `NF_INET_*`; those of bridges have the same numbers.
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
/// `NF_INET_INGRESS`, and `NF_NETDEV_*`.
const INET_INGRESS: u32 = 5;
const NETDEV_EGRESS: u32 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Rules looked at, for one kind of packets.
const RULES: usize = 100_000;
/// Passes until all marks of connections are known.
const PASSES: usize = 3;
/// Findings of one kind that are named at once.
const NAMED: usize = 3;
/// Tables of iptables in the order of packets (`NF_IP_PRI_*`).
const LEGACY: [(&str, i32); 5] =
    [("raw", -300), ("mangle", -150), ("nat", -100), ("filter", 0), ("security", 50)];
/// The priority of translating sources, after filters.
const SOURCE_NAT: i32 = 100;
const HOOKS: [(&str, u32); 5] = [
    ("PREROUTING", PREROUTING),
    ("INPUT", INPUT),
    ("FORWARD", FORWARD),
    ("OUTPUT", OUTPUT),
    ("POSTROUTING", POSTROUTING),
];

/// What becomes of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Act {
    /// They get another destination: the only port.
    Redirects(Option<u16>),
    Drops,
    Rejects,
    /// They wait for a program that does not run.
    Queues,
    /// They get this mark, which may lead them elsewhere.
    Marks(u32),
    /// They get another source.
    Translates,
    /// They get so few hops (TTL, hop limit) that they do not arrive.
    Shortens(u8),
}

/// Rules of one chain that do the same with some packets of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    pub act: Act,
    /// The base chain, where packets can be exempted: family, table and name, with the program in the place
    /// of the family where that is iptables-legacy.
    pub base: String,
    /// The chain that has the rules, as it is said.
    pub chain: String,
    /// Which rule the first is.
    pub rule: String,
    /// What the first takes.
    pub what: String,
    /// How many more there are.
    pub more: usize,
    /// They are met before it is looked up where packets go.
    pub is_early: bool,
}

/// What one rule is found under: rules that do alike in one chain are named together.
type Key = (Act, String, String);

/// Where a base chain sees packets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// By `NF_INET_*`: what is seen as packets enter at an interface counts as before routing.
    hook: u32,
    /// Interfaces of which it sees packets; none, if of all.
    at: Option<(Side, Vec<String>)>,
}

impl Place {
    const fn is_early(&self) -> bool {
        self.hook == PREROUTING
    }
}

/// A chain in which packets begin.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Base {
    /// By the way of a packet: chains at interfaces before and after others, and then by priority.
    order: (u32, i32),
    place: Place,
    /// Which of the tables.
    table: usize,
    family: u8,
    /// Family and table, or program and table.
    prefix: String,
    name: String,
    program: Option<&'static str>,
}

impl Base {
    fn label(&self, chain: &str) -> String {
        format!("{} {chain}", self.prefix)
    }

    /// As it is said.
    fn shown(&self, chain: &str) -> String {
        match (self.program, self.prefix.split_once(' ')) {
            (Some(program), Some((_, table))) => format!("{chain} of {program}'s table {table}"),
            _ => self.label(chain),
        }
    }
}

/// A table of another program.
#[derive(Debug)]
enum Table {
    Nft(u8, String, Vec<Object>),
    Legacy(LegacyTable),
}

/// All rules of other programs, as they were read.
#[derive(Debug)]
pub struct ForeignRules {
    tables: Vec<Table>,
    bases: Vec<Base>,
    library: Library,
}

impl ForeignRules {
    pub fn read(nftables: &mut Nftables, legacy: Vec<LegacyTable>) -> io::Result<Self> {
        let mut tables: Vec<Table> = Vec::new();
        let mut known: BTreeMap<(u8, String), usize> = BTreeMap::new();
        let mut bases = Vec::new();
        for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
            let (family, table) = (chain.family, name_of(&chain, 1));
            let Some(place) = place_of(&chain).filter(|_| !is_own_table(table)) else { continue };
            let key = (family, table.to_owned());
            let index = match known.get(&key) {
                Some(index) => *index,
                None => {
                    let filter = Attributes::new().text(1, table);
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
                name: name_of(&chain, 3).to_owned(),
                program: None,
            });
        }
        for table in legacy {
            let program = table.program;
            let of_table = |(chain, hook): &(&str, u32)| {
                let place = Place { hook: *hook, at: None };
                let (_, priority) = LEGACY.iter().find(|(name, _)| *name == table.name)?;
                let is_source = table.name == "nat" && *hook == POSTROUTING;
                Some(Base {
                    order: (stage(&place), if is_source { SOURCE_NAT } else { *priority }),
                    place,
                    table: tables.len(),
                    family: if program.starts_with("ip6") { IPV6 } else { IPV4 },
                    prefix: format!("{program} {}", table.name),
                    name: (*chain).to_owned(),
                    program: Some(program),
                })
            };
            let is_there = |(chain, _): &&(&str, u32)| table.chains.contains_key(*chain);
            bases.extend(HOOKS.iter().filter(is_there).filter_map(of_table));
            tables.push(Table::Legacy(table));
        }
        bases.sort_by_key(|base| base.order);
        Ok(Self { tables, bases, library: Library::default() })
    }

    /// The rules that do something with some of these packets, of which none before lets them pass.
    pub fn partial(&mut self, nftables: &mut Nftables, traffic: &Traffic<'_>) -> Vec<Partial> {
        let Self { tables, bases, library } = self;
        let own_family = if traffic.is_ipv4() { IPV4 } else { IPV6 };
        let by_chain: Vec<Rules<'_>> = tables.iter().map(Table::by_chain).collect();
        let mut marks = Marks::default();
        let mut found = BTreeMap::new();
        for _ in 0..PASSES {
            found.clear();
            let mut left = RULES;
            // Marks of packets are of this pass, those of connections are there from the first packet on.
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
                    found: &mut found,
                };
                walk.chain(&base.name, DEPTH, &Selection::of_ways(ways));
            }
            if marks.connections == known {
                break;
            }
        }
        few(found)
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
    /// Ways of packets that this place sees, as bits.
    fn ways(&self, traffic: &Traffic<'_>) -> u8 {
        let is_met = match (traffic.tunnel, traffic.is_own()) {
            (None, _) => [PREROUTING, FORWARD, POSTROUTING].contains(&self.hook),
            (Some(_), false) => [PREROUTING, INPUT].contains(&self.hook),
            (Some(_), true) => [OUTPUT, POSTROUTING].contains(&self.hook),
        };
        match &self.at {
            _ if !is_met => 0,
            None => traffic.all_ways(),
            Some((side, names)) => {
                let direct = traffic.ways_by(*side, |(_, name)| names.contains(name));
                // What enters at a pod's port goes out, what leaves there has come in.
                let is_port = traffic.ports.iter().any(|port| names.contains(port));
                let of_ports = if *side == Side::Input { 1 } else { 2 };
                direct | if is_port { of_ports } else { 0 }
            }
        }
    }
}

/// By which of its hooks a packet comes to a place first.
fn stage(place: &Place) -> u32 {
    match (place.hook, &place.at) {
        (PREROUTING, Some(_)) => 0,
        (hook, Some(_)) => hook + 2,
        (hook, None) => hook + 1,
    }
}

/// Where a base chain sees packets; none, if it is no base chain.
fn place_of(chain: &Object) -> Option<Place> {
    let hook = base_of(chain)?.hook;
    let attributes = attributes::find(&chain.attributes, 4)?;
    let one = attributes::find(attributes, 3).into_iter();
    let several = attributes::find(attributes, 4).map(attributes::read).into_iter().flatten();
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

fn priority(chain: &Object) -> i32 {
    let hook = attributes::find(&chain.attributes, 4).unwrap_or_default();
    number(attributes::find(hook, 2)).unwrap_or_default().cast_signed()
}

/// Some of each kind.
fn few(found: BTreeMap<Key, Partial>) -> Vec<Partial> {
    let mut few: Vec<Partial> = Vec::new();
    for partial in found.into_values() {
        let kind = std::mem::discriminant(&partial.act);
        let alike = few.iter().filter(|known| std::mem::discriminant(&known.act) == kind);
        if alike.count() < NAMED {
            few.push(partial);
        }
    }
    few
}

fn by_chain(rules: &[Object]) -> Rules<'_> {
    let mut chains: BTreeMap<&str, Vec<&Object>> = BTreeMap::new();
    for rule in rules {
        chains.entry(name_of(rule, 2)).or_default().push(rule);
    }
    Rules::Nft(chains)
}

#[cfg(test)]
mod tests;
