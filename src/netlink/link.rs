//! Interfaces and addresses: made, changed and found.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkInfo,
            LinkMessage,
        },
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::Netlink;
use crate::model::Mac;

/// What the kernel says of an interface that is gone.
pub(crate) const ENODEV: i32 = 19;

/// An interface as the kernel lists it.
#[derive(Clone, Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `IFLA_INFO_KIND`: "vxlan", "veth" ...; empty for physical devices.
    pub kind: String,
    pub mac: Option<Mac>,
    pub mtu: u32,
    /// What `ip link set alias` gave it; empty without.
    pub alias: String,
    pub up: bool,
    pub loopback: bool,
    pub message: LinkMessage,
}

impl Link {
    /// Whether it is a port of the bridge with this index.
    pub fn is_plugged_into(&self, bridge: u32) -> bool {
        self.message.attributes.contains(&LinkAttribute::Controller(bridge))
    }
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub link: u32,
    pub ip: IpAddr,
    pub prefix_len: u8,
    /// Worse than another address of the same interface: link-local, temporary, dynamic or deprecated.
    pub demerits: u8,
}

/// What a route lookup gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub link: u32,
    pub source: Option<IpAddr>,
}

impl Netlink {
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let found = self.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
                _ => None,
            })
            .collect())
    }

    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.get(RouteNetlinkMessage::GetLink(wanted)) {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(Link::from(message))),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "no link in the answer")),
            Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The index of an interface that must exist.
    pub fn index_of(&mut self, name: &str) -> io::Result<u32> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}"));
        self.link(name)?.map(|link| link.index).ok_or_else(missing)
    }

    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let found = self.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) => Address::new(&message),
                _ => None,
            })
            .collect())
    }

    pub fn create_link(&mut self, message: LinkMessage) -> io::Result<()> {
        self.apply_one(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Changes attributes of an existing interface.
    pub fn set_link(&mut self, change: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.apply_one(RouteNetlinkMessage::SetLink(change.build()), 0)
    }

    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).build();
        self.apply_one(RouteNetlinkMessage::DelLink(message), 0)
    }

    pub fn add_address(&mut self, link: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
        let message = address_message(link, ip, prefix_len);
        let added =
            self.apply_one(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL);
        match added {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    pub fn remove_address(&mut self, link: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
        let message = address_message(link, ip, prefix_len);
        match self.apply_one(RouteNetlinkMessage::DelAddress(message), 0) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(()),
            result => result,
        }
    }

    /// Adds a route by a gateway.
    pub fn add_route(&mut self, destination: ipnet::Ipv4Net, via: Ipv4Addr) -> io::Result<()> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination.network(), destination.prefix_len())
            .gateway(via)
            .build();
        self.apply_one(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Over which interface, and from which address, packets to `to` would leave.
    pub fn path_to(&mut self, to: IpAddr) -> io::Result<Option<Path>> {
        let length = if to.is_ipv4() { 32 } else { 128 };
        Ok(self
            .routes(to.is_ipv4())?
            .into_iter()
            .filter(|route| route.leads_to(to, length))
            .max_by_key(|route| (route.prefix_len, std::cmp::Reverse(route.metric)))
            .map(|route| route.path))
    }

    /// The interface of the default route with the lowest metric.
    pub fn default_path(&mut self) -> io::Result<Option<Path>> {
        for ipv4 in [true, false] {
            let routes = self.routes(ipv4)?.into_iter().filter(|route| route.prefix_len == 0);
            if let Some(route) = routes.min_by_key(|route| route.metric) {
                return Ok(Some(route.path));
            }
        }
        Ok(None)
    }

    fn routes(&mut self, ipv4: bool) -> io::Result<Vec<UnderlayRoute>> {
        let mut filter = RouteMessage::default();
        filter.header.address_family =
            if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        filter.header.table = RouteHeader::RT_TABLE_MAIN;
        let found = self.dump(&RouteNetlinkMessage::GetRoute(filter))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => UnderlayRoute::new(&message),
                _ => None,
            })
            .collect())
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: String::new(),
            mac: None,
            mtu: 0,
            alias: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            message: LinkMessage::default(),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
                LinkAttribute::Address(bytes) => {
                    link.mac = bytes.as_slice().try_into().ok().map(Mac::from_bytes);
                }
                LinkAttribute::LinkInfo(infos) => {
                    let kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                    link.kind = kind.unwrap_or_default();
                }
                _ => {}
            }
        }
        Self { message, ..link }
    }
}

impl Address {
    pub(crate) fn new(message: &AddressMessage) -> Option<Self> {
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        // On point-to-point links IFA_ADDRESS is the other end.
        let ip = find(true).or_else(|| find(false))?;
        let header = &message.header;
        let bad = [
            header.scope != AddressScope::Universe,
            header.flags.contains(AddressHeaderFlags::Deprecated),
            !header.flags.contains(AddressHeaderFlags::Permanent),
            ip.is_ipv6() && header.flags.contains(AddressHeaderFlags::Secondary),
        ];
        let demerits = bad.iter().rev().enumerate().map(|(i, bad)| u8::from(*bad) << i).sum();
        Some(Self { link: header.index, ip, prefix_len: header.prefix_len, demerits })
    }
}

struct UnderlayRoute {
    destination: IpAddr,
    prefix_len: u8,
    metric: u32,
    path: Path,
}

impl UnderlayRoute {
    fn new(message: &RouteMessage) -> Option<Self> {
        let ipv4 = message.header.address_family == AddressFamily::Inet;
        let any = if ipv4 {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        } else {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        };
        let mut route = Self {
            destination: any,
            prefix_len: message.header.destination_prefix_length,
            metric: 0,
            path: Path { link: 0, source: None },
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
                    route.destination = (*ip).into();
                }
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                    route.destination = (*ip).into();
                }
                RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => {
                    route.path.source = Some((*ip).into());
                }
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::Oif(index) => route.path.link = *index,
                _ => {}
            }
        }
        let usable = message.header.kind == RouteType::Unicast && route.path.link != 0;
        usable.then_some(route)
    }

    fn leads_to(&self, to: IpAddr, full_len: u8) -> bool {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
            IpAddr::V6(ip) => u128::from(ip),
        };
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_len)).unwrap_or(0);
        to.is_ipv4() == self.destination.is_ipv4()
            && self.prefix_len <= full_len
            && (bits(to) ^ bits(self.destination)) & mask == 0
    }
}

/// The attribute by which a device gets no IPv6 address of its own.
pub(crate) fn no_ipv6_address() -> LinkAttribute {
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])])
}

pub(crate) fn address_message(link: u32, ip: IpAddr, prefix_len: u8) -> AddressMessage {
    match ip {
        IpAddr::V4(ip) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(link).address(ip, prefix_len).build()
        }
        IpAddr::V6(ip) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(link).address(ip, prefix_len).build()
        }
    }
}
