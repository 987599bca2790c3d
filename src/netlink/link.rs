//! Interfaces and addresses: made, changed and found.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVrf, LinkAttribute, LinkFlags,
            LinkInfo, LinkMessage, Prop, State,
        },
        nsid::{NsidAttribute, NsidMessage},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags,
            RouteType,
        },
    },
};

use super::Netlink;
use crate::model::Mac;

/// What the kernel says of an interface that is gone.
const ENXIO: i32 = 6;
pub(crate) const ENODEV: i32 = 19;

/// Between two looks at an interface that is awaited.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

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
    /// A veth pair, a radio link or the other end of the pair is there (`IFF_LOWER_UP`).
    pub carrier: bool,
    pub loopback: bool,
    pub message: LinkMessage,
}

impl Link {
    /// Whether it sends and receives (`IF_OPER_UP` of RFC 2863). The kernel gets there a moment after there
    /// is a carrier, and drops what is sent before that.
    pub fn is_operational(&self) -> bool {
        self.message.attributes.contains(&LinkAttribute::OperState(State::Up))
    }

    /// Index of the bridge, bond, team or VRF that it is a port of.
    pub fn controller(&self) -> Option<u32> {
        self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) if *index != 0 => Some(*index),
            _ => None,
        })
    }

    /// The routing table of a VRF.
    pub fn vrf_table(&self) -> Option<u32> {
        let infos = self.message.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        infos.flatten().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vrf(data)) => data.iter().find_map(|data| match data {
                InfoVrf::TableId(table) => Some(*table),
                _ => None,
            }),
            _ => None,
        })
    }

    /// The kernel's number for the namespace that the other end of a veth pair is in; negative, if that is
    /// ending; none, if it is this one.
    pub fn peer_namespace(&self) -> Option<i32> {
        self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkNetNsId(number) => Some(*number),
            _ => None,
        })
    }

    /// Whether this is its name, or one of its alternative names (`ip link property add ... altname`).
    pub fn is_called(&self, name: &str) -> bool {
        let properties = self.message.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::PropList(properties) => Some(properties),
            _ => None,
        });
        let is_alternative =
            |property: &Prop| matches!(property, Prop::AltIfName(other) if other == name);
        self.name == name || properties.flatten().any(is_alternative)
    }

    /// Bytes in the largest packet of this family that it sends. IPv6 has an MTU of its own, which a router
    /// may have told (RFC 4861).
    pub fn mtu_of(&self, ipv4: bool) -> u32 {
        let ipv6 = || {
            let told = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{}/mtu", self.name));
            told.ok().and_then(|told| told.trim().parse().ok())
        };
        if ipv4 { self.mtu } else { ipv6().unwrap_or(self.mtu).min(self.mtu) }
    }

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
    /// Worse than another address of the same interface: of a narrow scope, dynamic or temporary.
    pub demerits: u8,
    /// May not be used (yet): duplicate address detection runs, or has found a duplicate.
    pub tentative: bool,
    /// An IPv6 address that another machine has, too: duplicate address detection has found it.
    pub duplicate: bool,
    /// New connections are not to use it any more.
    pub deprecated: bool,
    /// An IPv6 privacy address (RFC 8981), which another one replaces within a day.
    pub temporary: bool,
}

/// A default route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    pub link: u32,
    /// The source address that the route itself names.
    pub source: Option<IpAddr>,
    pub metric: u32,
    /// Its interface has no carrier.
    pub link_down: bool,
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

    /// Waits until an interface is as wanted, but not longer than `patience`. The kernel brings an interface
    /// into operation when it is asked about it (since 6.8), or when it comes to that by itself.
    ///
    /// # Errors
    /// It is not, in that time; or the kernel does not say.
    pub fn await_link(
        &mut self,
        name: &str,
        patience: Duration,
        is_as_wanted: impl Fn(&Link) -> bool,
    ) -> io::Result<()> {
        let start = Instant::now();
        loop {
            match self.link(name)? {
                Some(link) if is_as_wanted(&link) => return Ok(()),
                _ if start.elapsed() >= patience => return Err(io::ErrorKind::TimedOut.into()),
                _ => thread::sleep(LOOK_AGAIN),
            }
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

    /// Calls an interface by another name.
    pub fn rename_link(&mut self, index: u32, name: &str) -> io::Result<()> {
        let change = || LinkUnspec::new_with_index(index);
        let rename = || change().name(name.to_owned());
        match self.set_link(rename()) {
            // Kernels before 6.2 rename only what is down.
            // What is lost by that is for the caller to put back.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                self.set_link(change().down())?;
                self.set_link(rename())
            }
            result => result,
        }
    }

    /// The number by which the kernel calls a namespace in this one; none, where it has not needed one yet.
    pub fn namespace(&mut self, netns: &impl AsRawFd) -> io::Result<Option<i32>> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(netns.as_raw_fd().cast_unsigned()));
        let RouteNetlinkMessage::NewNsId(found) =
            self.get(RouteNetlinkMessage::GetNsId(message))?
        else {
            return Ok(None);
        };
        let number = found.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(number) => Some(*number),
            _ => None,
        });
        Ok(number.filter(|number| *number >= 0))
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
            // Below an MTU of 1280 an interface has no IPv6, and has lost its addresses.
            Err(error) if error.raw_os_error() == Some(ENXIO) => Ok(()),
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

    /// The default routes of the main table, the one that the kernel prefers first. Of a multipath route each
    /// next hop is one.
    pub fn default_routes(&mut self, ipv4: bool) -> io::Result<Vec<DefaultRoute>> {
        let mut filter = RouteMessage::default();
        filter.header.address_family =
            if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        filter.header.table = RouteHeader::RT_TABLE_MAIN;
        let found =
            self.dump_some(&RouteNetlinkMessage::GetRoute(filter), |message| match message {
                RouteNetlinkMessage::NewRoute(message) => {
                    Some(default_routes(&message)).filter(|routes| !routes.is_empty())
                }
                _ => None,
            });
        let found = match found {
            // A kernel without IPv6.
            Err(_) if !ipv4 => return Ok(Vec::new()),
            found => found?,
        };
        let mut routes: Vec<DefaultRoute> = found.into_iter().flatten().collect();
        routes.sort_by_key(|route| (route.link_down, route.metric));
        Ok(routes)
    }
}

/// The next hops of a default route; none of a route that is no default, or leads nowhere.
fn default_routes(message: &RouteMessage) -> Vec<DefaultRoute> {
    let header = &message.header;
    if header.destination_prefix_length != 0 || header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let link_down = header.flags.intersects(RouteFlags::Linkdown | RouteFlags::Dead);
    let mut route = DefaultRoute { link: 0, source: None, metric: 0, link_down };
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => route.source = Some((*ip).into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => {
                route.source = Some((*ip).into());
            }
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => route.link = *index,
            RouteAttribute::MultiPath(several) => hops.extend(several.iter().map(|hop| {
                let down = RouteNextHopFlags::Linkdown | RouteNextHopFlags::Dead;
                (hop.interface_index, hop.flags.intersects(down))
            })),
            _ => {}
        }
    }
    if hops.is_empty() {
        hops.push((route.link, link_down));
    }
    let hops = hops.into_iter().filter(|(link, _)| *link != 0);
    hops.map(|(link, link_down)| DefaultRoute { link, link_down, ..route }).collect()
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
            carrier: message.header.flags.contains(LinkFlags::LowerUp),
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
            !header.flags.contains(AddressHeaderFlags::Permanent),
            ip.is_ipv6() && header.flags.contains(AddressHeaderFlags::Secondary),
        ];
        let demerits = bad.iter().rev().enumerate().map(|(i, bad)| u8::from(*bad) << i).sum();
        let not_yet = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
        Some(Self {
            link: header.index,
            ip,
            prefix_len: header.prefix_len,
            demerits,
            duplicate: header.flags.contains(AddressHeaderFlags::Dadfailed),
            tentative: ip.is_ipv6()
                && header.flags.intersects(not_yet)
                && !header.flags.contains(AddressHeaderFlags::Optimistic),
            deprecated: header.flags.contains(AddressHeaderFlags::Deprecated),
            temporary: ip.is_ipv6() && header.flags.contains(AddressHeaderFlags::Secondary),
        })
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
