//! Reads sets of `ipset` (`linux/netfilter/ipset/ip_set.h`), to determine which packets a rule matches.
//!
//! Implemented here because only two dumps of the protocol are needed. Requires `CAP_NET_ADMIN`.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};

use super::{
    RECEIVE_BUFFER_BYTES,
    attributes::{Attributes, address, find, octets, read, text},
    open_socket,
    raw::{Answer, answers, append},
    receive, send_all,
};

/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u16 = 6;
/// `IPSET_CMD_LIST`.
const LIST: u16 = 7;
/// Protocol versions, in the order in which they are tried. 7 (Linux 4.20) reports the sets' numbers.
const VERSIONS: [u8; 2] = [7, 6];
/// `IPSET_ATTR_*` of a message. `MEMBER` and `ELEMENT_FLAGS` are those of an element.
const PROTOCOL: u16 = 1;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const FLAGS: u16 = 6;
const ELEMENTS: u16 = 8;
const NUMBER: u16 = 11;
const MEMBER: u16 = 18;
const ELEMENT_FLAGS: u16 = 8;
/// `IPSET_ATTR_*` of an element's first and second address: first address, last address, prefix length.
const ADDRESSES: [[u16; 3]; 2] = [[1, 2, 3], [20, 22, 21]];
/// `IPSET_ATTR_PORT` and `IPSET_ATTR_PORT_TO`.
const PORTS: [u16; 2] = [4, 5];
/// `IPSET_FLAG_LIST_HEADER`.
const HEADERS: u32 = 1 << 2;
/// `IPSET_FLAG_NOMATCH`.
const NO_MATCH: u32 = 1 << 2;
/// Maximum number of sets that are listed.
const MAX_SETS: usize = 4_096;
/// Maximum number of members of a set of sets that are read.
const MAX_MEMBERS: usize = 16;

/// A set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Name of the set.
    pub name: String,
    /// Number by which rules refer to it. `None` on kernels before 4.20.
    pub number: Option<u16>,
}

/// The part of a packet that a part of an element matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// A source or destination address.
    Address,
    /// A source or destination port.
    Port,
    /// Interfaces, MAC addresses or marks.
    Other,
}

/// The content of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// The dimensions of every entry.
    pub dimensions: Vec<Dimension>,
    /// The elements, in the kernel's order.
    pub entries: Vec<Entry>,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First and last value of each dimension, in network byte order. Empty for [`Dimension::Other`].
    pub parts: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Returns all sets of this network namespace.
///
/// # Errors
/// If the kernel refuses or does not answer.
pub fn sets() -> io::Result<Vec<Set>> {
    let mut sets = Vec::new();
    list(None, HEADERS, |attributes| {
        let name = find(attributes, NAME).map(text).unwrap_or_default().to_owned();
        let number = find(attributes, NUMBER).and_then(|bytes| bytes.first_chunk().copied());
        if sets.len() < MAX_SETS {
            sets.push(Set { name, number: number.map(u16::from_be_bytes) });
        }
    })?;
    Ok(sets)
}

/// Returns the content of a set: at most `most` elements, including those of the sets in a set of sets.
/// Leaves out elements that a `nomatch` element covers.
///
/// # Errors
/// If the kernel refuses or does not answer.
pub fn content(name: &str, most: usize) -> io::Result<Content> {
    let mut content = Content::default();
    let mut members = BTreeSet::new();
    read_into(&mut content, name, most, &mut members)?;
    for member in members.into_iter().take(MAX_MEMBERS) {
        // The kernel does not allow nested sets of sets.
        read_into(&mut content, &member, most, &mut BTreeSet::new())?;
    }
    Ok(content)
}

/// Adds the elements of a set to `content`, and the names of sets in it to `members`.
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
        // Only the first message about a set has its type.
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

/// Returns the dimensions of a type such as `hash:ip,port`.
fn dimensions(kind: &str) -> Vec<Dimension> {
    let (_, parts) = kind.split_once(':').unwrap_or_default();
    let dimension = |part: &str| match part {
        "ip" | "net" => Dimension::Address,
        "port" => Dimension::Port,
        _ => Dimension::Other,
    };
    parts.split(',').map(dimension).collect()
}

/// Returns whether an element is an exception (`nomatch`).
fn is_excepted(element: &[u8]) -> bool {
    let flags = find(element, ELEMENT_FLAGS).and_then(|bytes| bytes.first_chunk().copied());
    flags.is_some_and(|flags| u32::from_be_bytes(flags) & NO_MATCH != 0)
}

/// Parses an element.
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

/// Lists a set, or all sets. Tries the protocol versions in order.
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
    // `struct nfgenmsg` without a family.
    append(SUBSYSTEM << 8 | LIST, NLM_F_REQUEST | NLM_F_DUMP, 1, [0; 4], &wanted, &mut request);
    send_all(&socket, &request)?;
    let mut buffer = Vec::with_capacity(RECEIVE_BUFFER_BYTES);
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
        let elements = [
            address_of(1, &[10, 42, 3, 9]).put(3, &[24]),
            Attributes::new().put(4, &443_u16.to_be_bytes()),
            address_of(20, &[10, 42, 1, 2]),
        ];
        let bytes: Vec<u8> = elements.iter().flat_map(|part| part.as_bytes().to_vec()).collect();
        let Entry { parts } = entry(&own, &bytes).expect("an entry");
        assert_eq!(parts[0], (vec![10, 42, 3, 0], vec![10, 42, 3, 255]));
        assert_eq!(parts[1], (vec![1, 187], vec![1, 187]));
        assert_eq!(parts[2], (vec![10, 42, 1, 2], vec![10, 42, 1, 2]));
        assert_eq!(entry(&own, &bytes[..12]), None, "cut off");
    }
}
