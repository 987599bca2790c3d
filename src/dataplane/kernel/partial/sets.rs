//! What sets hold that rules look packets up in: those of nftables, of `ipset`, and lists of `recent`.

use std::{collections::BTreeMap, io, net::IpAddr, rc::Rc};

use super::{
    super::rules::number,
    reader::value,
    selection::{Range, Selection, Traffic},
};
use crate::{
    files,
    netlink::{
        attributes::{self, Attributes},
        ipset::{self, Dimension, Entry},
        nftables::{Kind, Nftables},
    },
};

/// Elements of one set that are looked at.
const ELEMENTS: usize = 100_000;
/// Lists of addresses that a rule has seen (`-m recent`).
const RECENT: &str = "/proc/thread-self/net/xt_recent";

/// Which set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SetName {
    /// Of the rule's own table.
    OfTable(String),
    /// Of `ipset`: its number, or its name.
    Number(u16),
    Ipset(String),
    /// Of `recent`.
    Recent(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// What each part of an element is; none in sets of nftables, where a rule tells it.
    pub dimensions: Vec<Dimension>,
    pub elements: Vec<Element>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// In sets of nftables one; none, if it stands for all that the others do not.
    pub parts: Vec<Range>,
    pub data: Option<Data>,
}

/// What a map gives for an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Code, and the chain that it leads to.
    Verdict(i32, Option<String>),
    Value(Vec<u8>),
}

/// Sets that have been read, as a rule of one table asks for them.
pub type Sets<'a> = &'a mut dyn FnMut(&SetName) -> Rc<Set>;

/// Reads each set once.
#[derive(Debug, Default)]
pub struct Library {
    known: BTreeMap<(u8, String, SetName), Rc<Set>>,
    ipsets: Option<Vec<ipset::Set>>,
}

impl Library {
    /// What a set holds, as a rule of this table sees it; nothing where it cannot be read.
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
    /// Elements of one part each.
    pub fn of(ranges: Vec<Range>, dimension: Option<Dimension>) -> Self {
        let element = |range| Element { parts: vec![range], data: None };
        let elements = ranges.into_iter().map(element).collect();
        Self { dimensions: dimension.into_iter().collect(), elements }
    }

    /// Narrows the selection to what the set of `ipset` holds; `to` says of which side each part is.
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

/// Narrows the selection to what any of these take, or to what none does.
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

/// First and last port.
pub fn port_range((first, last): &Range) -> Option<(u16, u16)> {
    let port = |bytes: &[u8]| <[u8; 2]>::try_from(bytes).ok().map(u16::from_be_bytes);
    Some((port(first)?, port(last)?))
}

fn of_ipset(name: &str) -> io::Result<Set> {
    let ipset::Content { dimensions, entries } = ipset::content(name, ELEMENTS)?;
    let element = |Entry { parts }| Element { parts, data: None };
    Ok(Set { dimensions, elements: entries.into_iter().map(element).collect() })
}

/// Lines begin with the address: `src=192.0.2.7 ttl: 64 ...`.
fn recent(list: &str) -> io::Result<Set> {
    let is_name = !list.is_empty() && !list.contains('/') && list != "..";
    let path = std::path::Path::new(RECENT).join(list);
    let text = if is_name { files::read_text(&path, files::SMALL)? } else { String::new() };
    let address = |line: &str| line.split(' ').next()?.strip_prefix("src=")?.parse::<IpAddr>().ok();
    let addresses = text.lines().filter_map(address).take(ELEMENTS).map(attributes::octets);
    let ranges = addresses.map(|octets| (octets.clone(), octets)).collect();
    Ok(Set::of(ranges, Some(Dimension::Address)))
}

/// What a set or a map of nftables holds; ends of its intervals are elements of their own, or stand in the
/// element.
fn of_table(nftables: &mut Nftables, family: u8, table: &str, set: &str) -> io::Result<Set> {
    let filter = Attributes::new().text(1, table).text(2, set);
    let dumped = nftables.dump(Kind::GetElements, family, &filter)?;
    let lists = dumped.iter().filter_map(|object| attributes::find(&object.attributes, 3));
    let shown = lists.flat_map(attributes::read).map(|(_, element)| shown(element));
    Ok(Set { dimensions: Vec::new(), elements: elements_of(shown.take(ELEMENTS).collect()) })
}

/// An element as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shown {
    pub key: Vec<u8>,
    /// It begins an interval, or is one value.
    pub begins: bool,
    /// Last value of the interval, where the same element has it.
    pub end: Option<Vec<u8>>,
    pub data: Option<(i32, Option<String>, Vec<u8>)>,
}

fn shown(element: &[u8]) -> Shown {
    const IS_END: u32 = 1;
    let data = attributes::find(element, 2).map(|data| {
        let verdict = attributes::find(data, 2);
        let code = verdict.and_then(|verdict| attributes::find(verdict, 1)?.first_chunk().copied());
        let chain = verdict.and_then(|verdict| attributes::find(verdict, 2)).map(attributes::text);
        let value = attributes::find(data, 1).unwrap_or_default().to_vec();
        (code.map_or(i32::MIN, i32::from_be_bytes), chain.map(str::to_owned), value)
    });
    Shown {
        key: value(attributes::find(element, 1)).unwrap_or_default().to_vec(),
        begins: number(attributes::find(element, 3)).unwrap_or(0) & IS_END == 0,
        end: value(attributes::find(element, 10)).map(<[u8]>::to_vec),
        data,
    }
}

/// The elements, of which some begin an interval, and the others end the one before.
pub fn elements_of(mut all: Vec<Shown>) -> Vec<Element> {
    all.sort();
    let has_ends = all.iter().any(|element| !element.begins);
    let mut next: Option<&[u8]> = None;
    let mut elements = Vec::new();
    let mut later: Option<&[u8]> = None;
    for element in all.iter().rev() {
        // Of two with one key, what follows is after both.
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
