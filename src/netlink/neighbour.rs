//! Neighbor entries of the kernel: the MACs of addresses (ARP and ND).

use std::{io, net::IpAddr};

use nix::libc::ENOENT;
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

/// The kernel's neighbor table of a family, which all interfaces and namespaces share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NeighborTable {
    /// Whether it is the table of IPv4.
    pub is_ipv4: bool,
    /// Number of entries.
    pub entries: u32,
    /// Maximum number of entries (`gc_thresh3`).
    pub most: u32,
    /// Number of entries refused because the table was full, since boot.
    pub refused: u64,
}

/// A neighbor entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// Index of the interface.
    pub link: u32,
    /// Address of the neighbor.
    pub ip: IpAddr,
    /// MAC of the neighbor, if it is known.
    pub mac: Option<Mac>,
    /// Whether the kernel has resolved the MAC by ARP or ND.
    pub is_resolved: bool,
    /// Whether the kernel does not evict it from a full table and does not count it there (`extern_learn`).
    pub stays: bool,
    /// Protocol number of the program that added it.
    pub protocol: Option<u8>,
}

impl Netlink {
    /// Returns all neighbor entries of this namespace.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn neighbors(&mut self) -> io::Result<Vec<Neighbor>> {
        let wanted = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewNeighbour(found) => neighbor(&found),
            _ => None,
        })
    }

    /// Returns the kernel's neighbor tables.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn neighbor_tables(&mut self) -> io::Result<Vec<NeighborTable>> {
        let wanted = RouteNetlinkMessage::GetNeighbourTable(NeighbourTableMessage::default());
        self.dump_some(&wanted, |message| match message {
            RouteNetlinkMessage::NewNeighbourTable(table) => neighbor_table(&table),
            _ => None,
        })
    }

    /// Removes the entry of an address, so that the kernel resolves its MAC again for the next packet.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_neighbor(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        let Request { message, flags } = entry_removal(link, ip);
        match self.apply_one(message, flags) {
            Err(error) if error.raw_os_error() != Some(ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// Lets the kernel query the MAC of an address, as for a packet to it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn resolve_neighbor(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        let mut wanted = message(link, ip);
        wanted.header.flags = NeighbourFlags::Use;
        self.apply_one(RouteNetlinkMessage::NewNeighbour(wanted), NLM_F_CREATE)
    }

    /// Lets the kernel verify a MAC that it has resolved: unless the machine answers within 3 s, the entry
    /// fails. Entries that are never verified, or that the kernel verifies already, are left alone.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn verify_neighbor(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        match self.entry(link, ip)?.and_then(|found| verification(&found, ip)) {
            Some(wanted) => self.apply_one(RouteNetlinkMessage::NewNeighbour(wanted), 0),
            None => Ok(()),
        }
    }

    /// Returns the state of an entry; `None` if there is no entry.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn neighbour(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<NeighbourState>> {
        Ok(self.entry(link, ip)?.map(|found| found.header.state))
    }

    /// Returns the MAC of an entry that the kernel never checks (`permanent` or `noarp`); `None` if the
    /// address has no such entry.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn fixed_neighbor(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<Mac>> {
        let is_fixed = |found: &NeighbourMessage| {
            matches!(found.header.state, NeighbourState::Permanent | NeighbourState::Noarp)
        };
        let found = self.entry(link, ip)?.filter(is_fixed);
        Ok(found.and_then(|found| neighbor(&found)?.mac))
    }

    /// Returns all permanent entries of an interface.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn permanent_neighbors(&mut self, link: u32) -> io::Result<Vec<(IpAddr, Mac)>> {
        let mut wanted = NeighbourMessage::default();
        wanted.header.ifindex = link;
        let found = self.dump(&RouteNetlinkMessage::GetNeighbour(wanted))?;
        let of_link = found.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(found) => Some(found),
            _ => None,
        });
        let of_link = of_link.filter(|found| found.header.ifindex == link);
        Ok(of_link.filter_map(permanent).collect())
    }

    fn entry(&mut self, link: u32, ip: IpAddr) -> io::Result<Option<NeighbourMessage>> {
        match self.get(RouteNetlinkMessage::GetNeighbour(message(link, ip))) {
            Ok(RouteNetlinkMessage::NewNeighbour(found)) => Ok(Some(found)),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "no neighbor in the answer")),
            Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds or replaces a permanent entry.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_permanent_neighbor(&mut self, link: u32, ip: IpAddr, mac: Mac) -> io::Result<()> {
        let Request { message, flags } = permanent_entry(link, ip, mac);
        self.apply_one(message, flags)
    }
}

/// Returns a request to add or replace a permanent entry. The kernel does not resolve its MAC.
pub fn permanent_entry(link: u32, ip: IpAddr, mac: Mac) -> Request {
    let mut known = message(link, ip);
    known.header.state = NeighbourState::Permanent;
    known.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    Request { message: RouteNetlinkMessage::NewNeighbour(known), flags }
}

/// Returns a request to protect an entry: a full table does not evict it, and it does not count there. The
/// kernel still refreshes its MAC. Without a MAC, an entry is added for an address that has none, and the
/// kernel resolves the MAC.
pub fn protected_entry(link: u32, ip: IpAddr, mac: Option<Mac>, protocol: u8) -> Request {
    let mut known = message(link, ip);
    known.header.flags = NeighbourFlags::ExtLearned;
    known.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::from(protocol)));
    learned(known, mac)
}

/// Returns a request to remove the protection of [`protected_entry`].
pub fn unprotected_entry(link: u32, ip: IpAddr, mac: Mac) -> Request {
    learned(message(link, ip), Some(mac))
}

/// Returns a message that lets the kernel verify an entry; `None` if it needs none.
fn verification(found: &NeighbourMessage, ip: IpAddr) -> Option<NeighbourMessage> {
    use NeighbourState::{Delay, Reachable, Stale};
    // The kernel would take a flag away that the message does not repeat.
    let has_more = |of: &NeighbourAttribute| matches!(of, NeighbourAttribute::ExtFlags(_));
    let is_verifiable = matches!(found.header.state, Reachable | Stale | Delay);
    if !is_verifiable || found.attributes.iter().any(has_more) {
        return None;
    }
    let mut wanted = message(found.header.ifindex, ip);
    wanted.header.state = NeighbourState::Probe;
    wanted.header.flags =
        found.header.flags & (NeighbourFlags::ExtLearned | NeighbourFlags::Router);
    Some(wanted)
}

/// Returns a request for an entry whose MAC the kernel verifies.
fn learned(mut known: NeighbourMessage, mac: Option<Mac>) -> Request {
    let exists = if mac.is_some() { NLM_F_REPLACE } else { NLM_F_EXCL };
    if let Some(mac) = mac {
        // In this state the kernel verifies the MAC when the entry is used.
        known.header.state = NeighbourState::Stale;
        known.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
    }
    Request { message: RouteNetlinkMessage::NewNeighbour(known), flags: NLM_F_CREATE | exists }
}

/// Returns a request to remove an entry. The kernel refuses it if there is none.
pub fn entry_removal(link: u32, ip: IpAddr) -> Request {
    Request { message: RouteNetlinkMessage::DelNeighbour(message(link, ip)), flags: 0 }
}

/// Parses a message about a table. `None` for messages about the parameters of one interface.
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

/// Returns address and MAC of a permanent entry.
fn permanent(found: &NeighbourMessage) -> Option<(IpAddr, Mac)> {
    let is_permanent = found.header.state == NeighbourState::Permanent;
    let Neighbor { ip, mac, .. } = neighbor(found).filter(|_| is_permanent)?;
    Some((ip, mac?))
}

/// Returns whether an entry in this state has an address that the kernel sends to.
pub const fn is_resolved(state: NeighbourState) -> bool {
    use NeighbourState::{Delay, Probe, Reachable, Stale};
    matches!(state, Reachable | Stale | Delay | Probe)
}

/// Parses an entry. `None` if it has no IP address.
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
    let is_resolved = is_resolved(found.header.state);
    Some(Neighbor {
        link: found.header.ifindex,
        ip: ip?,
        mac,
        is_resolved: is_resolved && mac.is_some(),
        stays: found.header.flags.contains(NeighbourFlags::ExtLearned),
        protocol,
    })
}

/// Returns a message about the entry of an address.
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
