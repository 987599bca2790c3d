//! Reads the sets that rules look up: those of nftables and `ipset`, and the lists of `recent`.

use std::{collections::BTreeMap, io, net::IpAddr, rc::Rc};

use super::{
    super::rules::{number, value},
    selection::{Range, Selection, Traffic},
};
use crate::{
    files,
    netlink::{
        attributes,
        ipset::{self, Dimension, Entry},
        nftables::{Kind, Nftables, nfta, sets::elements_in},
    },
};

/// Upper limit of the elements that are read of one set.
const MAX_ELEMENTS: usize = 100_000;
/// Directory of the lists of addresses that rules have seen (`-m recent`).
const RECENT_DIR: &str = "/proc/thread-self/net/xt_recent";

/// The name of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SetName {
    /// A set or map of the rule's table.
    OfTable(String),
    /// An `ipset`, by number.
    Number(u16),
    /// An `ipset`, by name.
    Ipset(String),
    /// A list of `recent`.
    Recent(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
/// The content of a set.
pub struct Set {
    /// What each part of an element is; empty for sets of nftables, whose rules define it.
    pub dimensions: Vec<Dimension>,
    /// The elements.
    pub elements: Vec<Element>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
/// An element of a set.
pub struct Element {
    /// The ranges of its parts. A set of nftables has one part; none means all values without an
    /// element.
    pub parts: Vec<Range>,
    /// The value, if the set is a map.
    pub data: Option<Data>,
}

/// The value that a map assigns to an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// A verdict code, and the chain that it leads to.
    Verdict(i32, Option<String>),
    /// Another value.
    Value(Vec<u8>),
}

/// Returns the content of a set, as rules of one table see it.
pub type Sets<'a> = &'a mut dyn FnMut(&SetName) -> Rc<Set>;

/// Caches sets, so that each is read once.
#[derive(Debug, Default)]
pub struct Library {
    known: BTreeMap<(u8, String, SetName), Rc<Set>>,
    ipsets: Option<Vec<ipset::Set>>,
}

impl Library {
    /// Returns the content of a set, as a rule of this table sees it; empty if it cannot be read.
    pub fn get(
        &mut self,
        nftables: &mut Nftables,
        (family, table): (u8, &str),
        name: &SetName,
    ) -> Rc<Set> {
        let key = match name {
            SetName::OfTable(_) => (family, table.to_owned(), name.clone()),
            _ => (0, String::new(), name.clone()),
        };
        if let Some(known) = self.known.get(&key) {
            return Rc::clone(known);
        }
        let read = match name {
            SetName::OfTable(set) => of_table(nftables, family, table, set),
            SetName::Recent(list) => recent(list),
            SetName::Number(_) | SetName::Ipset(_) => {
                let all = self.ipsets.get_or_insert_with(|| ipset::sets().unwrap_or_default());
                let found = all.iter().find(|set| match name {
                    SetName::Number(number) => set.number == Some(*number),
                    SetName::Ipset(name) => set.name == *name,
                    _ => false,
                });
                found.map(|set| of_ipset(&set.name)).unwrap_or_else(|| Ok(Set::default()))
            }
        };
        let read = Rc::new(read.unwrap_or_default());
        self.known.insert(key, Rc::clone(&read));
        read
    }
}

impl Set {
    /// Creates a set whose elements have one part.
    pub fn of(ranges: Vec<Range>, dimension: Option<Dimension>) -> Self {
        let element = |range| Element { parts: vec![range], data: None };
        let elements = ranges.into_iter().map(element).collect();
        Self { dimensions: dimension.into_iter().collect(), elements }
    }

    /// Narrows the selection to elements of an `ipset`; `to` says for each part whether it is of
    /// the destination.
    pub fn limit(
        &self,
        traffic: &Traffic<'_>,
        taken: &mut Selection,
        to: &[bool],
        is_inverted: bool,
    ) -> Option<()> {
        if let ([Dimension::Address], [to]) = (&self.dimensions[..], to) {
            let ranges = self.elements.iter().flat_map(|element| element.parts.clone());
            return taken.limit_addresses(traffic, *to, &ranges.collect::<Vec<_>>(), is_inverted);
        }
        let of = |element: &Element| {
            let mut own = Selection::default();
            let parts = self.dimensions.iter().zip(&element.parts).zip(to);
            for ((dimension, range), to) in parts {
                let ranges = std::slice::from_ref(range);
                match dimension {
                    Dimension::Address => own.limit_addresses(traffic, *to, ranges, false)?,
                    Dimension::Port => {
                        own.limit_ports(traffic, *to, &[port_range(range)?], false)?
                    }
                    Dimension::Other => return None,
                }
            }
            Some(own)
        };
        limit_to_any(taken, self.elements.iter().filter_map(of), is_inverted)
    }
}

/// Narrows the selection to packets that any of `several` selects, or to those that none does.
pub fn limit_to_any(
    taken: &mut Selection,
    several: impl Iterator<Item = Selection>,
    is_inverted: bool,
) -> Option<()> {
    let any = Selection::any(several);
    match (any, is_inverted) {
        (Some(any), false) => {
            *taken = taken.and(&any)?;
            Some(())
        }
        (Some(_), true) => {
            taken.is_partial = true;
            Some(())
        }
        (None, is_inverted) => is_inverted.then_some(()),
    }
}

/// Decodes a range of ports.
pub fn port_range((first, last): &Range) -> Option<(u16, u16)> {
    let port = |bytes: &[u8]| <[u8; 2]>::try_from(bytes).ok().map(u16::from_be_bytes);
    Some((port(first)?, port(last)?))
}

/// Reads an `ipset`.
fn of_ipset(name: &str) -> io::Result<Set> {
    let ipset::Content { dimensions, entries } = ipset::content(name, MAX_ELEMENTS)?;
    let element = |Entry { parts }| Element { parts, data: None };
    Ok(Set { dimensions, elements: entries.into_iter().map(element).collect() })
}

/// Reads a list of `recent`; its lines begin with the address: `src=192.0.2.7 ttl: 64 ...`.
fn recent(list: &str) -> io::Result<Set> {
    let is_name = !list.is_empty() && !list.contains('/') && list != "..";
    let path = std::path::Path::new(RECENT_DIR).join(list);
    let text = if is_name { files::read_text(&path, files::SMALL)? } else { String::new() };
    let address = |line: &str| line.split(' ').next()?.strip_prefix("src=")?.parse::<IpAddr>().ok();
    let addresses = text.lines().filter_map(address).take(MAX_ELEMENTS).map(attributes::octets);
    let ranges = addresses.map(|octets| (octets.clone(), octets)).collect();
    Ok(Set::of(ranges, Some(Dimension::Address)))
}

/// Reads a set or map of nftables. The end of an interval is an element of its own, or part of the
/// first element.
fn of_table(nftables: &mut Nftables, family: u8, table: &str, set: &str) -> io::Result<Set> {
    let filter = elements_in(table, set);
    let dumped = nftables.dump(Kind::GetElements, family, &filter)?;
    let lists = dumped
        .iter()
        .filter_map(|object| attributes::find(&object.attributes, nfta::SET_ELEM_LIST_ELEMENTS));
    let parsed = lists.flat_map(attributes::read).map(|(_, element)| parse(element));
    Ok(Set { dimensions: Vec::new(), elements: elements_of(parsed.take(MAX_ELEMENTS).collect()) })
}

/// An element in the kernel's form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelElement {
    /// The value, or the first one of an interval.
    pub key: Vec<u8>,
    /// Whether it is a value or begins an interval; otherwise it ends one.
    pub begins: bool,
    /// The last value of the interval, if the same element contains it.
    pub end: Option<Vec<u8>>,
    /// Verdict code, chain and value of a map.
    pub data: Option<(i32, Option<String>, Vec<u8>)>,
}

/// Parses an element.
fn parse(element: &[u8]) -> KernelElement {
    const IS_END: u32 = 1;
    let data = attributes::find(element, nfta::SET_ELEM_DATA).map(|data| {
        let verdict = attributes::find(data, nfta::DATA_VERDICT);
        let code = verdict.and_then(|verdict| {
            attributes::find(verdict, nfta::VERDICT_CODE)?.first_chunk().copied()
        });
        let chain = verdict
            .and_then(|verdict| attributes::find(verdict, nfta::VERDICT_CHAIN))
            .map(attributes::text);
        let value = attributes::find(data, nfta::DATA_VALUE).unwrap_or_default().to_vec();
        (code.map_or(i32::MIN, i32::from_be_bytes), chain.map(str::to_owned), value)
    });
    KernelElement {
        key: value(attributes::find(element, nfta::SET_ELEM_KEY)).unwrap_or_default().to_vec(),
        begins: number(attributes::find(element, nfta::SET_ELEM_FLAGS)).unwrap_or(0) & IS_END == 0,
        end: value(attributes::find(element, nfta::SET_ELEM_KEY_END)).map(<[u8]>::to_vec),
        data,
    }
}

/// Combines elements that begin intervals with those that end them.
pub fn elements_of(mut all: Vec<KernelElement>) -> Vec<Element> {
    all.sort();
    let has_ends = all.iter().any(|element| !element.begins);
    let mut next: Option<&[u8]> = None;
    let mut elements = Vec::new();
    let mut later: Option<&[u8]> = None;
    for element in all.iter().rev() {
        // Of two elements with the same key, both are before the next key.
        if later != Some(&element.key[..]) {
            (next, later) = (later, Some(&element.key[..]));
        }
        if !element.begins {
            continue;
        }
        let last = match (&element.end, next) {
            (Some(end), _) => end.clone(),
            (None, _) if !has_ends => element.key.clone(),
            (None, Some(next)) => before(next),
            (None, None) => vec![u8::MAX; element.key.len()],
        };
        let parts =
            if element.key.is_empty() { Vec::new() } else { vec![(element.key.clone(), last)] };
        let data = element.data.as_ref().map(|(code, chain, value)| match *code {
            i32::MIN => Data::Value(value.clone()),
            code => Data::Verdict(code, chain.clone()),
        });
        elements.push(Element { parts, data });
    }
    elements.reverse();
    elements
}

/// Returns the preceding number, in network order.
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
