//! Interfaces, addresses and default routes.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use nix::libc::{ENODEV, ENXIO};
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
use crate::{model::Mac, sysctl};

/// Interval between two checks of an interface that is waited for.
const LINK_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// An interface as the kernel lists it.
#[derive(Clone, Debug)]
pub struct Link {
    /// Index of the interface.
    pub index: u32,
    /// Name of the interface.
    pub name: String,
    /// `IFLA_INFO_KIND`: "vxlan", "veth" ...; empty for physical devices.
    pub kind: String,
    /// The MAC. `None` if the link-layer address is not 6 bytes long.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Alias (`ip link set alias`); empty without one.
    pub alias: String,
    /// Whether it is administratively up (`IFF_UP`).
    pub up: bool,
    /// Whether a cable, a radio link or a peer that is up is connected (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Whether it is a loopback interface.
    pub loopback: bool,
    /// Whether it resolves no addresses of neighbors (flag `NOARP`).
    pub no_arp: bool,
    /// The whole message of the kernel.
    pub message: LinkMessage,
}

impl Link {
    /// Returns whether it sends and receives (`IF_OPER_UP` of RFC 2863). The kernel sets this state shortly
    /// after the carrier appears, and drops packets sent before.
    pub fn is_operational(&self) -> bool {
        self.message.attributes.contains(&LinkAttribute::OperState(State::Up))
    }

    /// Returns whether a program keeps it without a carrier (`ip link set protodown on`).
    pub fn is_proto_down(&self) -> bool {
        let is_on = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::ProtoDown(1..));
        self.message.attributes.iter().any(is_on)
    }

    /// Returns the index of the bridge, bond, team or VRF that it is a port of.
    pub fn controller(&self) -> Option<u32> {
        self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) if *index != 0 => Some(*index),
            _ => None,
        })
    }

    /// Returns the routing table of a VRF.
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

    /// Returns the kernel's id of the namespace of a veth pair's other end. Negative while that namespace is
    /// being removed; `None` if it is this namespace.
    pub fn peer_namespace(&self) -> Option<i32> {
        self.message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkNetNsId(number) => Some(*number),
            _ => None,
        })
    }

    /// Returns whether this is its name or one of its alternative names (`ip link property add ... altname`).
    pub fn is_called(&self, name: &str) -> bool {
        let properties = self.message.attributes.iter().filter_map(|attribute| match attribute {
            LinkAttribute::PropList(properties) => Some(properties),
            _ => None,
        });
        let is_alternative =
            |property: &Prop| matches!(property, Prop::AltIfName(other) if other == name);
        self.name == name || properties.flatten().any(is_alternative)
    }

    /// Returns the largest packet of a family that it sends, in bytes. IPv6 has a separate MTU, which
    /// router advertisements may set (RFC 4861).
    pub fn mtu_of(&self, ipv4: bool) -> u32 {
        let ipv6 = || {
            let mtu = sysctl::read(&format!("net/ipv6/conf/{}/mtu", self.name));
            mtu.and_then(|mtu| mtu.parse().ok())
        };
        if ipv4 { self.mtu } else { ipv6().unwrap_or(self.mtu).min(self.mtu) }
    }

    /// Returns whether it is a port of the bridge with this index.
    pub fn is_plugged_into(&self, bridge: u32) -> bool {
        self.message.attributes.contains(&LinkAttribute::Controller(bridge))
    }
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of the interface.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// Prefix length of its subnet.
    pub prefix_len: u8,
    /// Rank among addresses of the same interface; 0 is the best. From the most to the least significant bit:
    /// narrow scope, dynamic, temporary.
    pub demerits: u8,
    /// Whether it is not usable (yet): duplicate address detection is running or has found a duplicate.
    pub tentative: bool,
    /// Whether duplicate address detection has found this IPv6 address on another machine.
    pub duplicate: bool,
    /// Whether new connections should not use it.
    pub deprecated: bool,
    /// Whether it is an IPv6 privacy address (RFC 8981), which is replaced within a day.
    pub temporary: bool,
}

/// A default route of the main table, or one of its next hops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Index of the interface.
    pub link: u32,
    /// The route's preferred source address.
    pub source: Option<IpAddr>,
    /// Metric; lower is preferred.
    pub metric: u32,
    /// Whether its interface has no carrier.
    pub link_down: bool,
}

impl Netlink {
    /// Returns all interfaces of this namespace.
    ///
    /// # Errors
    /// If the kernel does not answer.
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

    /// Returns an interface by name; `None` if it does not exist.
    ///
    /// # Errors
    /// If the kernel does not answer.
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

    /// Waits until an interface meets a condition, at most for `timeout`. Each check also makes the kernel
    /// update the operational state (since 6.8).
    ///
    /// # Errors
    /// `TimedOut` if the condition is not met in time; or if the kernel does not answer.
    pub fn await_link(
        &mut self,
        name: &str,
        timeout: Duration,
        is_as_wanted: impl Fn(&Link) -> bool,
    ) -> io::Result<()> {
        let start = Instant::now();
        loop {
            match self.link(name)? {
                Some(link) if is_as_wanted(&link) => return Ok(()),
                _ if start.elapsed() >= timeout => return Err(io::ErrorKind::TimedOut.into()),
                _ => thread::sleep(LINK_POLL_INTERVAL),
            }
        }
    }

    /// Returns the index of an interface.
    ///
    /// # Errors
    /// `NotFound` if it does not exist; or if the kernel does not answer.
    pub fn index_of(&mut self, name: &str) -> io::Result<u32> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}"));
        self.link(name)?.map(|link| link.index).ok_or_else(missing)
    }

    /// Returns the addresses of all interfaces.
    ///
    /// # Errors
    /// If the kernel does not answer.
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

    /// Creates an interface.
    ///
    /// # Errors
    /// If the kernel refuses, for example because the name is taken.
    pub fn create_link(&mut self, message: LinkMessage) -> io::Result<()> {
        self.apply_one(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Changes attributes of an existing interface.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_link(&mut self, change: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.apply_one(RouteNetlinkMessage::SetLink(change.build()), 0)
    }

    /// Renames an interface. A kernel before 6.2 requires it to be down; it is left down then, and the caller
    /// has to restore what the kernel removes with that.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn rename_link(&mut self, index: u32, name: &str) -> io::Result<()> {
        let change = || LinkUnspec::new_with_index(index);
        let rename = || change().name(name.to_owned());
        match self.set_link(rename()) {
            // Kernels before 6.2 rename an interface only while it is down.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                self.set_link(change().down())?;
                self.set_link(rename())
            }
            result => result,
        }
    }

    /// Returns the kernel's id of a namespace, as seen from this one. `None` if the kernel has not assigned
    /// one.
    ///
    /// # Errors
    /// If the kernel does not answer.
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

    /// Removes an interface.
    ///
    /// # Errors
    /// If the kernel refuses; `ENODEV` if it does not exist.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).build();
        self.apply_one(RouteNetlinkMessage::DelLink(message), 0)
    }

    /// Adds an address to an interface. Succeeds if it is already there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_address(&mut self, link: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
        let message = address_message(link, ip, prefix_len);
        let added =
            self.apply_one(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL);
        match added {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// Removes an address from an interface. Succeeds if it is not there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_address(&mut self, link: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
        let message = address_message(link, ip, prefix_len);
        match self.apply_one(RouteNetlinkMessage::DelAddress(message), 0) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(()),
            // Below an MTU of 1280 an interface has no IPv6, and the kernel has removed its IPv6 addresses.
            Err(error) if error.raw_os_error() == Some(ENXIO) => Ok(()),
            result => result,
        }
    }

    /// Adds a route through a gateway.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_route(&mut self, destination: ipnet::Ipv4Net, via: Ipv4Addr) -> io::Result<()> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination.network(), destination.prefix_len())
            .gateway(via)
            .build();
        self.apply_one(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Returns the default routes of the main table, in the kernel's order of preference. Each next hop of a
    /// multipath route is a separate entry.
    ///
    /// # Errors
    /// If the kernel does not answer.
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
            // The kernel may have no IPv6.
            Err(_) if !ipv4 => return Ok(Vec::new()),
            found => found?,
        };
        let mut routes: Vec<DefaultRoute> = found.into_iter().flatten().collect();
        routes.sort_by_key(|route| (route.link_down, route.metric));
        Ok(routes)
    }
}

/// Returns the next hops of a default route. Empty for other routes.
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
            no_arp: message.header.flags.contains(LinkFlags::Noarp),
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
    /// Parses a message of the kernel. `None` if it has no address.
    pub(crate) fn new(message: &AddressMessage) -> Option<Self> {
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        // On point-to-point links IFA_ADDRESS is the peer's address.
        let ip = find(true).or_else(|| find(false))?;
        let header = &message.header;
        let flaws = [
            header.scope != AddressScope::Universe,
            !header.flags.contains(AddressHeaderFlags::Permanent),
            ip.is_ipv6() && header.flags.contains(AddressHeaderFlags::Secondary),
        ];
        let demerits = flaws.iter().rev().enumerate().map(|(i, bad)| u8::from(*bad) << i).sum();
        let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
        Some(Self {
            link: header.index,
            ip,
            prefix_len: header.prefix_len,
            demerits,
            duplicate: header.flags.contains(AddressHeaderFlags::Dadfailed),
            tentative: ip.is_ipv6()
                && header.flags.intersects(unusable)
                && !header.flags.contains(AddressHeaderFlags::Optimistic),
            deprecated: header.flags.contains(AddressHeaderFlags::Deprecated),
            temporary: ip.is_ipv6() && header.flags.contains(AddressHeaderFlags::Secondary),
        })
    }
}

/// Returns the attribute that disables automatic IPv6 addresses on an interface.
pub(crate) fn no_ipv6_address() -> LinkAttribute {
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])])
}

/// Returns a message about an address of an interface.
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
