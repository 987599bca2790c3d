//! Sets of `ipset` (linux/netfilter/ipset/ip_set.h): read, to see which packets a rule means.
//!
//! By hand, because of all that protocol two dumps are needed. Takes CAP_NET_ADMIN.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};

use super::{
    RECEIVE_BUFFER,
    attributes::{Attributes, address, find, octets, read, text},
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

const SUBSYSTEM: u16 = 6;
/// `IPSET_CMD_LIST`
const LIST: u16 = 7;
/// The one that gives numbers of sets (Linux 4.20), and the one before.
const VERSIONS: [u8; 2] = [7, 6];
/// `IPSET_ATTR_*` of a message, and of an element.
const PROTOCOL: u16 = 1;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const FLAGS: u16 = 6;
const ELEMENTS: u16 = 8;
const NUMBER: u16 = 11;
const MEMBER: u16 = 18;
const ELEMENT_FLAGS: u16 = 8;
/// Of an address: first, last, length of a prefix.
const ADDRESSES: [[u16; 3]; 2] = [[1, 2, 3], [20, 22, 21]];
const PORTS: [u16; 2] = [4, 5];
/// `IPSET_FLAG_LIST_HEADER` and `IPSET_FLAG_NOMATCH`
const HEADERS: u32 = 1 << 2;
const NO_MATCH: u32 = 1 << 2;
/// Sets that are listed, and sets in a set of sets.
const SETS: usize = 4_096;
const MEMBERS: usize = 16;

/// A set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub name: String,
    /// By which rules name it; older kernels do not tell.
    pub number: Option<u16>,
}

/// What part of a packet a part of an element is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    Address,
    Port,
    /// Interfaces, MAC addresses, marks.
    Other,
}

/// What a set holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    pub dimensions: Vec<Dimension>,
    pub entries: Vec<Entry>,
}

/// First and last of each dimension, in network order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub parts: Vec<(Vec<u8>, Vec<u8>)>,
}

/// All sets of this network namespace.
pub fn sets() -> io::Result<Vec<Set>> {
    let mut sets = Vec::new();
    list(None, HEADERS, |attributes| {
        let name = find(attributes, NAME).map(text).unwrap_or_default().to_owned();
        let number = find(attributes, NUMBER).and_then(|bytes| bytes.first_chunk().copied());
        if sets.len() < SETS {
            sets.push(Set { name, number: number.map(u16::from_be_bytes) });
        }
    })?;
    Ok(sets)
}

/// What a set holds: so many elements at most, those of the sets in a set of sets included. What an element
/// takes out again (`nomatch`) is left out.
pub fn content(name: &str, most: usize) -> io::Result<Content> {
    let mut content = Content::default();
    let mut members = BTreeSet::new();
    read_into(&mut content, name, most, &mut members)?;
    for member in members.into_iter().take(MEMBERS) {
        // A set of sets is in none.
        read_into(&mut content, &member, most, &mut BTreeSet::new())?;
    }
    Ok(content)
}

fn read_into(
    content: &mut Content,
    name: &str,
    most: usize,
    members: &mut BTreeSet<String>,
) -> io::Result<()> {
    let mut own: Option<Vec<Dimension>> = None;
    let mut excepted = Vec::new();
    let mut entries = Vec::new();
    list(Some(name), 0, |attributes| {
        // Only the first message of a set tells its type.
        if let Some(kind) = find(attributes, TYPE).map(text) {
            own = Some(dimensions(kind));
        }
        let shown = find(attributes, ELEMENTS).unwrap_or_default();
        for (_, element) in read(shown) {
            if let Some(member) = find(element, MEMBER).map(text) {
                members.insert(member.to_owned());
                continue;
            }
            let entry = own.as_deref().and_then(|own| entry(own, element));
            match entry {
                Some(entry) if is_excepted(element) => excepted.push(entry),
                Some(entry) if entries.len() < most => entries.push(entry),
                _ => {}
            }
        }
    })?;
    entries.retain(|entry: &Entry| !excepted.iter().any(|other: &Entry| other.contains(entry)));
    let own = own.unwrap_or_default();
    if entries.is_empty() {
        return Ok(());
    }
    if content.entries.is_empty() {
        content.dimensions = own;
    } else if content.dimensions != own {
        return Ok(());
    }
    let room = most.saturating_sub(content.entries.len());
    content.entries.extend(entries.into_iter().take(room));
    Ok(())
}

impl Entry {
    fn contains(&self, other: &Self) -> bool {
        let mut pairs = self.parts.iter().zip(&other.parts);
        pairs.all(|(own, other)| own.0 <= other.0 && other.1 <= own.1)
    }
}

/// Of a type as `hash:ip,port`.
fn dimensions(kind: &str) -> Vec<Dimension> {
    let (_, parts) = kind.split_once(':').unwrap_or_default();
    let dimension = |part: &str| match part {
        "ip" | "net" => Dimension::Address,
        "port" => Dimension::Port,
        _ => Dimension::Other,
    };
    parts.split(',').map(dimension).collect()
}

fn is_excepted(element: &[u8]) -> bool {
    let flags = find(element, ELEMENT_FLAGS).and_then(|bytes| bytes.first_chunk().copied());
    flags.is_some_and(|flags| u32::from_be_bytes(flags) & NO_MATCH != 0)
}

fn entry(dimensions: &[Dimension], element: &[u8]) -> Option<Entry> {
    let mut addresses = ADDRESSES.iter();
    let part = |dimension: &Dimension| match dimension {
        Dimension::Address => {
            let [first, last, length] = addresses.next()?;
            let ip = |kind: u16| {
                let (_, octets) = read(find(element, kind)?).next()?;
                address(octets)
            };
            let first = ip(*first)?;
            if let Some(last) = ip(*last) {
                return Some((octets(first), octets(last)));
            }
            let full = if first.is_ipv4() { 32 } else { 128 };
            let length = find(element, *length).and_then(|bytes| bytes.first().copied());
            let network = IpNet::new(first, length.unwrap_or(full)).ok()?;
            Some((octets(network.network()), octets(network.broadcast())))
        }
        Dimension::Port => {
            let [first, last] = PORTS.map(|kind| find(element, kind));
            let first = first?.to_vec();
            let last = last.map_or_else(|| first.clone(), <[u8]>::to_vec);
            Some((first, last))
        }
        Dimension::Other => Some((Vec::new(), Vec::new())),
    };
    Some(Entry { parts: dimensions.iter().map(part).collect::<Option<_>>()? })
}

/// Has the kernel list a set, or all. A kernel without them has none.
fn list(name: Option<&str>, flags: u32, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut listed = Ok(());
    for version in VERSIONS {
        listed = list_by(version, name, flags, &mut each);
        if listed.is_ok() {
            break;
        }
    }
    listed
}

fn list_by(
    version: u8,
    name: Option<&str>,
    flags: u32,
    each: &mut impl FnMut(&[u8]),
) -> io::Result<()> {
    let socket = open_socket(NETLINK_NETFILTER)?;
    let mut wanted = Attributes::new().put(PROTOCOL, &[version]);
    if let Some(name) = name {
        wanted = wanted.text(NAME, name);
    }
    if flags != 0 {
        wanted = wanted.be32(FLAGS | BIG_ENDIAN, flags);
    }
    let mut request = Vec::new();
    // `struct nfgenmsg` of no family.
    append(SUBSYSTEM << 8 | LIST, NLM_F_REQUEST | NLM_F_DUMP, 1, [0; 4], &wanted, &mut request);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
    loop {
        receive(&socket, &mut buffer)?;
        for Answer { error, done, attributes, .. } in answers(&buffer) {
            match error {
                Some(errno) if errno != 0 => return Err(io::Error::from_raw_os_error(errno)),
                _ if done => return Ok(()),
                _ => each(&attributes),
            }
        }
    }
}

/// `NLA_F_NET_BYTEORDER`
const BIG_ENDIAN: u16 = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    fn address_of(kind: u16, octets: &[u8]) -> Attributes {
        Attributes::new().nest(kind, &Attributes::new().put(1, octets))
    }

    #[test]
    fn element_of_several_dimensions_is_read_with_the_range_of_each() {
        let own = dimensions("hash:net,port,ip");
        assert_eq!(own, [Dimension::Address, Dimension::Port, Dimension::Address]);
        let of = [
            address_of(1, &[10, 42, 3, 9]).put(3, &[24]),
            Attributes::new().put(4, &443_u16.to_be_bytes()),
            address_of(20, &[10, 42, 1, 2]),
        ];
        let bytes: Vec<u8> = of.iter().flat_map(|part| part.as_bytes().to_vec()).collect();
        let Entry { parts } = entry(&own, &bytes).expect("an entry");
        assert_eq!(parts[0], (vec![10, 42, 3, 0], vec![10, 42, 3, 255]));
        assert_eq!(parts[1], (vec![1, 187], vec![1, 187]));
        assert_eq!(parts[2], (vec![10, 42, 1, 2], vec![10, 42, 1, 2]));
        assert_eq!(entry(&own, &bytes[..12]), None, "cut off");
    }
}
