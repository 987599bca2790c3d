//! Neighbours: the answer of the kernel to the question which MAC an address has.

use std::{io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        neighbour_table::{NeighbourTableAttribute, NeighbourTableMessage},
        route::RouteProtocol,
    },
};

use super::{Netlink, Request};
use crate::model::Mac;

const ENOENT: i32 = 2;

/// The kernel's table of neighbors of a family, which is one for all interfaces and namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NeighborTable {
    pub is_ipv4: bool,
    pub entries: u32,
    /// Entries that it holds at most (`gc_thresh3`).
    pub most: u32,
    /// Neighbors that found no room, since the kernel has started.
    pub refused: u64,
}

/// An entry of these tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    pub link: u32,
    pub ip: IpAddr,
    pub mac: Option<Mac>,
    /// The kernel has asked for the MAC, and has been told.
    pub is_resolved: bool,
    /// It stays when the table is full, and takes no place there (`extern_learn`).
    pub stays: bool,
    /// What has made it so.
    pub protocol: Option<u8>,
}

impl Netlink {
    /// All entries of this namespace.
    ///
    /// # Errors
    /// The kernel's answer to the question.
    pub fn neighbors(&mut self) -> io::Result<Vec<Neighbor>> {
        let wanted = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewNeighbour(found) => neighbor(&found),
            _ => None,
        })
    }

    /// The kernel's tables of neighbors.
    pub fn neighbor_tables(&mut self) -> io::Result<Vec<NeighborTable>> {
        let wanted = RouteNetlinkMessage::GetNeighbourTable(NeighbourTableMessage::default());
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewNeighbourTable(table) => neighbor_table(&table),
            _ => None,
        })
    }

    /// Forgets an address on the link with this index: the next packet to it makes the kernel ask for its
    /// MAC.
    pub fn forget_neighbour(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        let Request { message, flags } = without(link, ip);
        match self.apply_one(message, flags) {
            Err(error) if error.raw_os_error() != Some(ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// How far the kernel is with an address; none, if it does not know of it.
    pub fn neighbour(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<NeighbourState>> {
        Ok(self.entry(link, ip)?.map(|found| found.header.state))
    }

    /// The MAC that an address has for good; none, if the kernel asks for it.
    pub fn pinned_neighbour(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<Mac>> {
        let found = self.entry(link, ip)?;
        Ok(found.and_then(|found| pinned(&found)).map(|(_, mac)| mac))
    }

    /// Addresses on a link that have a MAC for good.
    ///
    /// # Errors
    /// The kernel's answer to the question.
    pub fn pinned_neighbours(&mut self, link: u32) -> io::Result<Vec<(IpAddr, Mac)>> {
        let mut wanted = NeighbourMessage::default();
        wanted.header.ifindex = link;
        let found = self.dump(&RouteNetlinkMessage::GetNeighbour(wanted))?;
        let of_link = found.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(found) => Some(found),
            _ => None,
        });
        let of_link = of_link.filter(|found| found.header.ifindex == link);
        Ok(of_link.filter_map(pinned).collect())
    }

    fn entry(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<NeighbourMessage>> {
        match self.get(RouteNetlinkMessage::GetNeighbour(message(link, ip))) {
            Ok(RouteNetlinkMessage::NewNeighbour(found)) => Ok(Some(found)),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "no neighbour in the answer")),
            Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives an address a MAC for good: nothing is asked for.
    pub fn set_neighbour(&mut self, link: u32, ip: IpAddr, mac: Mac) -> io::Result<()> {
        let Request { message, flags } = permanent(link, ip, mac);
        self.apply_one(message, flags)
    }
}

/// Gives an address a MAC for good: nothing is asked for.
pub fn permanent(link: u32, ip: IpAddr, mac: Mac) -> Request {
    let mut known = message(link, ip);
    known.header.state = NeighbourState::Permanent;
    known.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    Request { message: RouteNetlinkMessage::NewNeighbour(known), flags }
}

/// Has an entry stay when the table is full, and take no place there; the kernel goes on asking for its MAC
/// when it is old. Without a MAC an entry is made for an address of which the kernel knows nothing.
pub fn staying(link: u32, ip: IpAddr, mac: Option<Mac>, protocol: u8) -> Request {
    let mut known = message(link, ip);
    known.header.flags = NeighbourFlags::ExtLearned;
    known.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::from(protocol)));
    learned(known, mac)
}

/// Has an entry go when the table is full, as others do.
pub fn passing(link: u32, ip: IpAddr, mac: Mac) -> Request {
    learned(message(link, ip), Some(mac))
}

fn learned(mut known: NeighbourMessage, mac: Option<Mac>) -> Request {
    let exists = if mac.is_some() { NLM_F_REPLACE } else { NLM_F_EXCL };
    if let Some(mac) = mac {
        // The kernel makes sure of it when it is used next.
        known.header.state = NeighbourState::Stale;
        known.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
    }
    Request { message: RouteNetlinkMessage::NewNeighbour(known), flags: NLM_F_CREATE | exists }
}

/// Forgets which MAC an address has; the kernel may know none.
pub fn without(link: u32, ip: IpAddr) -> Request {
    Request { message: RouteNetlinkMessage::DelNeighbour(message(link, ip)), flags: 0 }
}

/// None for what is told of one interface alone.
fn neighbor_table(message: &NeighbourTableMessage) -> Option<NeighborTable> {
    let is_ipv4 = message.header.family == AddressFamily::Inet;
    let mut table = NeighborTable { is_ipv4, ..NeighborTable::default() };
    let mut is_whole = false;
    for attribute in &message.attributes {
        match attribute {
            NeighbourTableAttribute::Threshold3(most) => table.most = *most,
            NeighbourTableAttribute::Config(config) => table.entries = config.entries,
            NeighbourTableAttribute::Stats(stats) => {
                (table.refused, is_whole) = (stats.table_fulls, true);
            }
            _ => {}
        }
    }
    is_whole.then_some(table)
}

/// Address and MAC of an entry that never changes.
fn pinned(found: &NeighbourMessage) -> Option<(IpAddr, Mac)> {
    let is_pinned = found.header.state == NeighbourState::Permanent;
    let Neighbor { ip, mac, .. } = neighbor(found).filter(|_| is_pinned)?;
    Some((ip, mac?))
}

/// None for entries that are not about addresses.
fn neighbor(found: &NeighbourMessage) -> Option<Neighbor> {
    let (mut ip, mut mac, mut protocol) = (None, None, None);
    for attribute in &found.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(has)) => {
                ip = Some((*has).into());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(has)) => {
                ip = Some((*has).into());
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.first_chunk().copied().map(Mac::from_bytes);
            }
            NeighbourAttribute::Protocol(number) => protocol = Some(u8::from(*number)),
            _ => {}
        }
    }
    let is_resolved = matches!(
        found.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
    );
    Some(Neighbor {
        link: found.header.ifindex,
        ip: ip?,
        mac,
        is_resolved: is_resolved && mac.is_some(),
        stays: found.header.flags.contains(NeighbourFlags::ExtLearned),
        protocol,
    })
}

fn message(link: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = link;
    message.attributes.push(NeighbourAttribute::Destination(ip.into()));
    message
}
