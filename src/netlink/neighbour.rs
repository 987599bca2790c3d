//! Neighbours: the answer of the kernel to the question which MAC an address has.

use std::{io, net::IpAddr};

use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};

use super::Netlink;
use crate::model::Mac;

const ENOENT: i32 = 2;

impl Netlink {
    /// Forgets an address on the link with this index: the next packet to it makes the kernel ask for its
    /// MAC.
    pub fn forget_neighbour(&mut self, link: u32, ip: IpAddr) -> io::Result<()> {
        match self.apply_one(RouteNetlinkMessage::DelNeighbour(message(link, ip)), 0) {
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
        let found = found.filter(|found| found.header.state == NeighbourState::Permanent);
        let attributes = found.into_iter().flat_map(|found| found.attributes);
        Ok(attributes.into_iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                bytes.first_chunk().copied().map(Mac::from_bytes)
            }
            _ => None,
        }))
    }

    /// Addresses on a link that have a MAC for good.
    ///
    /// # Errors
    /// The kernel's answer to the question.
    pub fn pinned_neighbours(&mut self, link: u32) -> io::Result<Vec<(IpAddr, Mac)>> {
        let mut wanted = NeighbourMessage::default();
        wanted.header.ifindex = link;
        let found = self.dump(&RouteNetlinkMessage::GetNeighbour(wanted))?;
        Ok(found.iter().filter_map(|message| pinned(message, link)).collect())
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
        let mut known = message(link, ip);
        known.header.state = NeighbourState::Permanent;
        known.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.as_bytes().to_vec()));
        self.apply_one(RouteNetlinkMessage::NewNeighbour(known), NLM_F_CREATE | NLM_F_REPLACE)
    }
}

fn pinned(message: &RouteNetlinkMessage, link: u32) -> Option<(IpAddr, Mac)> {
    let RouteNetlinkMessage::NewNeighbour(found) = message else { return None };
    if found.header.ifindex != link || found.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &found.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(has)) => {
                ip = Some((*has).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(has)) => {
                ip = Some((*has).into());
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.first_chunk().copied().map(Mac::from_bytes);
            }
            _ => {}
        }
    }
    ip.zip(mac)
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
