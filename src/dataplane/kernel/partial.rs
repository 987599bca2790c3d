//! Rules of others that do something with some packets of pods: single ports or addresses, large packets,
//! some by chance. They are only read, to say so.
//!
//! Whether packets pass at all is tried; what single ones meet would have to be guessed. So rules are
//! followed from the base chains, and a rule counts only if nothing on the way to it leaves packets between
//! pods out, as far as its form tells. What cannot be read leaves them out.

mod matches;
mod reader;
mod selection;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs, io,
};

pub use self::selection::Traffic;
use self::{
    reader::{selection, value},
    selection::{ESTABLISHED, Range, Selection},
};
use super::{
    firewall::name_of,
    rules::{
        self, Effect, base_of, expressions, family_name, number, text_of, translates_destination,
        translates_source,
    },
};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::{self, Attributes},
        nftables::{ANY, BRIDGE, INET, Kind, Nftables, Object},
    },
};

/// `NF_INET_*`; those of bridges have the same numbers.
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const POSTROUTING: u32 = 4;
/// `NFT_META_MARK`
const META_MARK: u32 = 3;
/// Chains led to one after another.
const DEPTH: usize = 8;
/// Rules looked at, of one base chain.
const RULES: usize = 20_000;
/// Elements of one set that are looked at.
const ELEMENTS: usize = 100_000;
/// Findings of one kind that are named at once.
const NAMED: usize = 3;
/// Chains of programs that know what they do with addresses of pods.
const KNOWN: [&str; 6] = ["DOCKER", "KUBE-", "CNI-", "NETAVARK", "cali-", "CILIUM"];
/// Listeners to queues of packets, in a table whose first column is the queue.
const QUEUES: &str = "/proc/thread-self/net/netfilter/nfnetlink_queue";

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
}

/// Rules of one chain that do the same with some packets of pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    pub act: Act,
    /// Family, table and name of the base chain, where packets can be exempted.
    pub base: String,
    /// The same of the chain that has the rules.
    pub chain: String,
    /// Of the first.
    pub handle: u64,
    /// What the first takes.
    pub what: String,
    /// How many more there are.
    pub more: usize,
    /// They are met before it is looked up where packets go.
    pub is_early: bool,
}

/// What one rule is found under: rules that do alike in one chain are named together.
type Key = (Act, String, String);

/// The rules that do something with some of these packets, of which none before lets them pass.
pub fn partial_rules(nftables: &mut Nftables, traffic: &Traffic<'_>) -> io::Result<Vec<Partial>> {
    let families = [INET, if traffic.is_ipv4() { 2 } else { 10 }, BRIDGE];
    let hooks: &[u32] = if traffic.tunnel.is_some() {
        &[PREROUTING, INPUT]
    } else {
        &[PREROUTING, FORWARD, POSTROUTING]
    };
    let mut found = BTreeMap::new();
    let mut tables: BTreeMap<(u8, String), Vec<Object>> = BTreeMap::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let Some(base) = base_of(&chain) else { continue };
        let (family, table) = (chain.family, name_of(&chain, 1));
        let is_it = families.contains(&family) && hooks.contains(&base.hook);
        if !is_it || is_own_table(table) || family == BRIDGE && traffic.tunnel.is_some() {
            continue;
        }
        let filter = Attributes::new().text(1, table);
        let rules = match tables.entry((family, table.to_owned())) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(nftables.dump(Kind::GetRule, family, &filter)?),
        };
        let mut sets = BTreeMap::new();
        let mut elements = |set: &str| {
            let read = || elements_of(nftables, family, table, set).unwrap_or_default();
            sets.entry(set.to_owned()).or_insert_with(read).clone()
        };
        let prefix = format!("{} {table}", family_name(family));
        let name = name_of(&chain, 3);
        let mut walk = Walk {
            rules: by_chain(rules),
            traffic,
            hook: base.hook,
            elements: &mut elements,
            left: RULES,
            passes_established: false,
            prefix,
            base: name,
            found,
        };
        walk.chain(name, DEPTH, &Selection::default());
        found = walk.found;
    }
    Ok(few(found))
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

fn by_chain(rules: &[Object]) -> BTreeMap<&str, Vec<&Object>> {
    let mut chains: BTreeMap<&str, Vec<&Object>> = BTreeMap::new();
    for rule in rules {
        chains.entry(name_of(rule, 2)).or_default().push(rule);
    }
    chains
}

/// What a set holds; ends of its intervals are elements of their own.
fn elements_of(
    nftables: &mut Nftables,
    family: u8,
    table: &str,
    set: &str,
) -> io::Result<Vec<Range>> {
    const IS_END: u32 = 1;
    let filter = Attributes::new().text(1, table).text(2, set);
    let dumped = nftables.dump(Kind::GetElements, family, &filter)?;
    let lists = dumped.iter().filter_map(|object| attributes::find(&object.attributes, 3));
    let elements = lists.flat_map(attributes::read).filter_map(|(_, element)| {
        let key = value(attributes::find(element, 1))?.to_vec();
        Some((key, number(attributes::find(element, 3)).unwrap_or(0) & IS_END == 0))
    });
    Ok(ranges_of(elements.take(ELEMENTS).collect()))
}

/// The ranges of keys, of which some begin one, and the others end the one before.
fn ranges_of(mut keys: Vec<(Vec<u8>, bool)>) -> Vec<Range> {
    keys.sort();
    let has_ends = keys.iter().any(|(_, begins)| !begins);
    let ranges =
        keys.iter().enumerate().filter(|(_, (_, begins))| *begins).map(|(at, (key, _))| {
            let last = match keys[at + 1..].iter().find(|(next, _)| next > key) {
                _ if !has_ends => key.clone(),
                Some((next, _)) => before(next),
                None => vec![u8::MAX; key.len()],
            };
            (key.clone(), last)
        });
    ranges.collect()
}

/// The number before, in network order.
fn before(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (less, borrows) = byte.overflowing_sub(1);
        *byte = less;
        if !borrows {
            break;
        }
    }
    key
}

struct Walk<'a> {
    rules: BTreeMap<&'a str, Vec<&'a Object>>,
    traffic: &'a Traffic<'a>,
    hook: u32,
    elements: &'a mut dyn FnMut(&str) -> Vec<Range>,
    left: usize,
    /// A rule has let those of established connections pass.
    passes_established: bool,
    /// Family and table.
    prefix: String,
    base: &'a str,
    found: BTreeMap<Key, Partial>,
}

/// Where packets go that have come into a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// Back to the chain that has led to it.
    Back,
    Ends,
}

impl<'a> Walk<'a> {
    /// Says whether some of the packets may come to what follows the chain.
    fn chain(&mut self, name: &'a str, depth: usize, into: &Selection) -> Flow {
        let rules = self.rules.get(name).cloned().unwrap_or_default();
        let mut accepted: Vec<Vec<String>> = Vec::new();
        for rule in rules {
            if self.left == 0 {
                return Flow::Ends;
            }
            self.left -= 1;
            let Some(own) = selection(self.traffic, rule, self.elements) else { continue };
            let Some(all) = into.and(&own) else { continue };
            if let Some(act) = self.act(rule, &all)
                && !accepted.contains(&own.what)
                && !(self.passes_established && all.is_late)
            {
                self.note(act, name, rule, &all);
            }
            let target = led_to(rule);
            let mut ends = false;
            if let Some((target, goes)) = target.filter(|_| depth > 0) {
                let flow = self.chain(target, depth - 1, &all);
                if own.is_all() && goes {
                    return flow;
                }
                ends = flow == Flow::Ends;
            }
            let accepts = rules::effect(rule) == Effect::Accepts;
            if accepts && !all.is_partial && own.takes(ESTABLISHED) {
                self.passes_established = true;
            } else if accepts {
                accepted.push(own.what.clone());
            }
            if !own.is_all() {
                continue;
            }
            let verdict = expressions(rule)
                .filter(|(name, _)| *name == "immediate")
                .find_map(|(_, data)| rules::verdict_of(data));
            if verdict == Some(rules::RETURN) {
                return Flow::Back;
            }
            let translates = translates_source(rule) || translates_destination(rule);
            if ends || accepts || translates || rules::effect(rule) == Effect::Drops {
                return Flow::Ends;
            }
        }
        Flow::Back
    }

    fn note(&mut self, act: Act, name: &str, rule: &Object, taken: &Selection) {
        if KNOWN.iter().any(|known| name.starts_with(known)) {
            return;
        }
        let Self { prefix, base, .. } = &*self;
        let (base, chain) = (format!("{prefix} {base}"), format!("{prefix} {name}"));
        let handle = attributes::find(&rule.attributes, 3).and_then(<[u8]>::first_chunk);
        let new = Partial {
            act,
            base: base.clone(),
            chain: chain.clone(),
            handle: handle.copied().map(u64::from_be_bytes).unwrap_or_default(),
            what: taken.what.join(" "),
            more: 0,
            is_early: self.hook == PREROUTING,
        };
        self.found.entry((act, base, chain)).and_modify(|partial| partial.more += 1).or_insert(new);
    }

    /// What a rule does with these packets that no trial shows.
    fn act(&self, rule: &Object, taken: &Selection) -> Option<Act> {
        if self.hook == PREROUTING && self.traffic.tunnel.is_none() && translates_destination(rule)
        {
            return Some(Act::Redirects(taken.port));
        }
        if taken.what.is_empty() || taken.is_limited {
            return None;
        }
        if self.hook == POSTROUTING {
            return translates_source(rule).then_some(Act::Translates).or_else(|| mark_of(rule));
        }
        let rejects = expressions(rule).any(|(name, data)| {
            name == "reject" || name == "target" && text_of(data) == Some("REJECT")
        });
        match rules::effect(rule) {
            Effect::Drops if rejects => Some(Act::Rejects),
            Effect::Drops => Some(Act::Drops),
            _ if is_queued(rule) => Some(Act::Queues),
            _ => mark_of(rule),
        }
    }
}

/// The chain into which a rule leads, and whether no rule after it sees the packets.
fn led_to(rule: &Object) -> Option<(&str, bool)> {
    expressions(rule).find_map(|(name, data)| {
        let verdict =
            attributes::find(attributes::find(data, 2)?, 2).filter(|_| name == "immediate");
        let target = attributes::find(verdict?, 2).map(attributes::text)?;
        Some((target, rules::verdict_of(data) == Some(rules::GOTO)))
    })
}

/// The mark that packets without one get.
fn mark_of(rule: &Object) -> Option<Act> {
    let mut register = None;
    for (name, data) in expressions(rule) {
        let get = |attribute| number(attributes::find(data, attribute));
        let native = |attribute| {
            let bytes = value(attributes::find(data, attribute))?;
            bytes.first_chunk().copied().map(u32::from_ne_bytes)
        };
        match name {
            "immediate" => register = native(2),
            "meta" if get(2) == Some(META_MARK) && get(3).is_some() => {
                return register.filter(|mark| *mark != 0).map(Act::Marks);
            }
            "meta" => register = (get(2) == Some(META_MARK)).then_some(0),
            "bitwise" => {
                register = register.and_then(|mark| Some(mark & native(4)? ^ native(5)?));
            }
            "target" if text_of(data) == Some("MARK") => {
                let info = attributes::find(data, 3)?;
                return matches::word(info, 0).filter(|mark| *mark != 0).map(Act::Marks);
            }
            "counter" | "cmp" => {}
            _ => register = None,
        }
    }
    None
}

/// Whether a rule gives packets to programs of which one does not run, and they are lost without it.
fn is_queued(rule: &Object) -> bool {
    const BYPASS: u16 = 1;
    let listeners = || {
        let table = fs::read_to_string(QUEUES).unwrap_or_default();
        let first = |line: &str| line.split_whitespace().next()?.parse::<u16>().ok();
        table.lines().filter_map(first).collect::<Vec<_>>()
    };
    let queue = expressions(rule).find_map(|(name, data)| {
        let info = attributes::find(data, 3).unwrap_or_default();
        let of_target = |at: usize| info.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes);
        let own = |attribute| {
            attributes::find(data, attribute)?.first_chunk().copied().map(u16::from_be_bytes)
        };
        match name {
            "queue" => Some((own(1)?, own(2).unwrap_or(1), own(3).unwrap_or(0))),
            "target" if text_of(data) == Some("NFQUEUE") => {
                Some((of_target(0)?, of_target(2).unwrap_or(1), of_target(4).unwrap_or(0)))
            }
            _ => None,
        }
    });
    queue.is_some_and(|(first, count, flags)| {
        let known = listeners();
        let last = first.saturating_add(count.max(1) - 1);
        flags & BYPASS == 0 && (first..=last).any(|queue| !known.contains(&queue))
    })
}

#[cfg(test)]
mod tests;
