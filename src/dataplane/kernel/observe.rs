//! Reads gossamer's objects from the kernel: the device, and the entries of the three tables.
//!
//! `dataplane/plan` compares them with the desired state.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol},
};

use super::{
    Kernel, KernelError, is_overlay_device,
    messages::{destination, fixed_attributes, is_of_overlay, lladdr, our_route, subnet_of},
};
use crate::{
    dataplane::{
        desired::{Device, Hop, ROUTE_PROTOCOL, RouteTarget},
        overlap::{self, Foreign, ForeignKind, Overlay},
        plan::{Actual, Found},
    },
    model::{Mac, Pool, Problem},
    netlink::{
        MessageSubject, Netlink,
        ethtool::TX_CHECKSUM,
        link::{Address, Link},
    },
    pods::desired::ALIAS,
};

/// Milliseconds per tick of `USER_HZ`, which is 100 on all supported architectures.
const MS_PER_TICK: u64 = 10;

impl Kernel {
    /// Returns gossamer's objects: those on the device with this name, and its routes into the
    /// pool's networks.
    ///
    /// # Errors
    /// When a dump fails or an object of gossamer is unreadable, or a device of another kind has
    /// the name.
    pub fn observe(&mut self, name: &str, pool: Option<&Pool>) -> Result<Actual, KernelError> {
        let Some(link) = self.netlink.link(name)? else {
            let routes = self.our_routes(None, pool)?;
            return Ok(Actual { routes, ..Actual::default() });
        };
        if link.kind != "vxlan" {
            let kind = if link.kind.is_empty() { "physical".to_owned() } else { link.kind };
            return Err(KernelError::NameTaken { name: name.to_owned(), kind });
        }
        self.device = Some(link.index);
        // Earlier unreadable messages do not concern this pass.
        self.netlink.take_unreadable();
        let actual = Actual {
            neighbors: self.neighbors(link.index)?,
            fdb: self.fdb(link.index)?,
            routes: self.our_routes(Some(link.index), pool)?,
            device: Some(self.device_state(&link)?),
        };
        let of_ours = [
            MessageSubject::Interface(link.index),
            MessageSubject::Route { protocol: ROUTE_PROTOCOL },
        ];
        let unreadable = self.netlink.take_unreadable();
        match unreadable.iter().find(|message| of_ours.contains(&message.about)) {
            Some(message) => Err(message.to_io().into()),
            None => Ok(actual),
        }
    }

    /// Returns the foreign networks of this host: addresses of interfaces, and routes of other
    /// programs in the main table.
    ///
    /// # Errors
    /// When the kernel's tables cannot be read.
    pub fn foreign_networks(&mut self) -> io::Result<Vec<Foreign>> {
        let links = self.netlink.links()?;
        let of = |index: u32| links.iter().find(|link| link.index == index);
        let mut foreign = foreign_of(&links, &self.netlink.addresses()?);
        foreign.extend(self.main_routes(None, |route| {
            let by = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            let link = by.and_then(of);
            let protocol = route.header.protocol;
            // The kernel's own routes follow from addresses.
            let is_known =
                [RouteProtocol::Other(ROUTE_PROTOCOL), RouteProtocol::Kernel].contains(&protocol);
            if is_known || link.is_some_and(is_ours) {
                return None;
            }
            let interface = link.map(|link| link.name.clone()).unwrap_or_default();
            let network = subnet_of(&route).filter(|network| network.prefix_len() > 0)?;
            Some(Foreign { network, interface, kind: ForeignKind::Route })
        })?);
        Ok(foreign)
    }

    /// Returns what `keep` returns for the routes of the main table, of both families; `protocol`
    /// selects routes.
    pub(super) fn main_routes<T>(
        &mut self,
        protocol: Option<u8>,
        mut keep: impl FnMut(RouteMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            filter.header.table = RouteHeader::RT_TABLE_MAIN;
            filter.header.protocol = protocol.map_or(RouteProtocol::Unspec, RouteProtocol::Other);
            let wanted = RouteNetlinkMessage::GetRoute(filter);
            let found = self.netlink.dump_some(&wanted, |message| match message {
                RouteNetlinkMessage::NewRoute(route) if route.header.address_family == family => {
                    keep(route)
                }
                _ => None,
            });
            match found {
                // A kernel without IPv6 refuses the dump.
                Err(_) if family == AddressFamily::Inet6 => {}
                found => routes.extend(found?),
            }
        }
        Ok(routes)
    }

    /// Converts a VXLAN device to the form that the plan compares.
    fn device_state(&mut self, link: &Link) -> io::Result<Found> {
        let ((vni, port), local, underlay, foreign) = fixed_attributes(link);
        let all = self.netlink.addresses()?;
        // In a VRF, the routes of its addresses are in the table of the VRF.
        let unreceived = match link.up && link.controller().is_none() {
            true => self.netlink.unreceived(link.index, &all)?,
            false => BTreeSet::new(),
        };
        let on_it = all.into_iter().filter(|address| address.link == link.index);
        let not_link_local = |ip: &IpAddr| match ip {
            IpAddr::V4(_) => true,
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        };
        let addresses = on_it.map(|address| (address.ip, address.prefix_len));
        let device = Device {
            name: link.name.clone(),
            vni,
            port,
            mac: link.mac.unwrap_or(Mac::from_bytes([0; 6])),
            mtu: link.mtu,
            alias: link.alias.clone(),
            local,
            link: underlay,
            addresses: BTreeSet::new(),
            checksum_offload: self
                .ethtool
                .as_mut()
                .and_then(|tool| tool.is_on(link.index, TX_CHECKSUM).ok()),
        };
        let addresses = addresses.filter(|(ip, _)| not_link_local(ip)).collect();
        let is_port = self.is_port(link)?;
        let up = link.up && !link.is_proto_down();
        Ok(Found { up, is_port, device, foreign, addresses, unreceived })
    }

    /// Whether it is a port of a bridge or bond. Packets of an interface in a VRF still reach this
    /// host.
    fn is_port(&mut self, link: &Link) -> io::Result<bool> {
        let Some(controller) = link.controller() else { return Ok(false) };
        let links = self.netlink.links()?;
        let is_vrf = |link: &Link| link.index == controller && link.kind == "vrf";
        Ok(!links.iter().any(is_vrf))
    }

    /// Returns the permanent neighbors on a device.
    fn neighbors(&mut self, index: u32) -> io::Result<BTreeMap<IpAddr, Mac>> {
        let permanent = |entry: &NeighbourMessage| entry.header.state == NeighbourState::Permanent;
        let mut entries = self.dump_neighbors(AddressFamily::Inet, index)?;
        // A kernel without IPv6 has no such entries.
        entries.extend(self.dump_neighbors(AddressFamily::Inet6, index).unwrap_or_default());
        Ok(entries
            .iter()
            .filter(|entry| permanent(entry))
            .filter_map(|entry| Some((destination(entry)?, lladdr(entry)?)))
            .collect())
    }

    /// Returns the MACs in the FDB of gossamer's device to which nothing was sent for at least
    /// `after`.
    ///
    /// # Errors
    /// When the FDB cannot be read.
    pub fn idle_macs(&mut self, after: Duration) -> io::Result<Vec<Mac>> {
        let Some(index) = self.device else { return Ok(Vec::new()) };
        let entries = self.dump_neighbors(AddressFamily::Bridge, index)?;
        let unused = |entry: &NeighbourMessage| {
            let info = entry.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::CacheInfo(info) => Some(info.used),
                _ => None,
            });
            info.is_some_and(|ticks| Duration::from_millis(u64::from(ticks) * MS_PER_TICK) >= after)
        };
        Ok(entries.iter().filter(|entry| unused(entry)).filter_map(lladdr).collect())
    }

    /// Returns the FDB of a device.
    fn fdb(&mut self, index: u32) -> io::Result<BTreeSet<(Mac, IpAddr)>> {
        let entries = self.dump_neighbors(AddressFamily::Bridge, index)?.into_iter();
        Ok(entries.filter_map(|entry| Some((lladdr(&entry)?, destination(&entry)?))).collect())
    }

    fn dump_neighbors(
        &mut self,
        family: AddressFamily,
        index: u32,
    ) -> io::Result<Vec<NeighbourMessage>> {
        let mut filter = NeighbourMessage::default();
        filter.header.family = family;
        match family {
            AddressFamily::Bridge => filter.header.ifindex = index,
            _ => filter.attributes.push(NeighbourAttribute::IfIndex(index)),
        }
        let found = self.netlink.dump(&RouteNetlinkMessage::GetNeighbour(filter))?;
        Ok(found
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewNeighbour(entry)
                    if entry.header.ifindex == index && entry.header.family == family =>
                {
                    Some(entry)
                }
                _ => None,
            })
            .collect())
    }

    /// Returns gossamer's routes over the device, and those into the pool's networks by any
    /// interface. Another overlay on this host has a device and networks of its own.
    pub(super) fn our_routes(
        &mut self,
        device: Option<u32>,
        pool: Option<&Pool>,
    ) -> io::Result<BTreeSet<(IpNet, Hop)>> {
        let found = self.main_routes(Some(ROUTE_PROTOCOL), |route| our_route(&route, device))?;
        let is_direct = |(_, hop): &(IpNet, Hop)| matches!(hop.way, RouteTarget::Direct { .. });
        let links = match found.iter().any(is_direct) {
            true => self.netlink.links()?,
            false => Vec::new(),
        };
        let devices: Vec<u32> =
            links.iter().filter(|link| is_overlay_device(link)).map(|link| link.index).collect();
        let is_ours =
            |(subnet, hop): &(IpNet, Hop)| is_of_overlay(subnet, Some(hop.way), pool, &devices);
        Ok(found.into_iter().filter(is_ours).collect())
    }

    /// Returns neighbors on gossamer's device that are not permanent: outdated answers, and
    /// requests that could not be answered.
    ///
    /// # Errors
    /// When the neighbors cannot be listed.
    pub fn temporary_neighbors(&mut self) -> io::Result<Vec<IpAddr>> {
        let Some(index) = self.device else { return Ok(Vec::new()) };
        let mut entries = self.dump_neighbors(AddressFamily::Inet, index)?;
        entries.extend(self.dump_neighbors(AddressFamily::Inet6, index).unwrap_or_default());
        let over = |entry: &&NeighbourMessage| {
            use NeighbourState as State;
            !matches!(entry.header.state, State::Permanent | State::Noarp | State::Incomplete)
        };
        Ok(entries.iter().filter(over).filter_map(destination).collect())
    }
}

/// Returns a problem for each address of this host that diverts packets of pods.
/// `networks` and `pool` are the overlay's, `own` this node's subnets; `has_all_routes` says whether each
/// peer's subnet has a route of its own.
///
/// # Errors
/// When links or addresses cannot be listed.
pub fn overlaps(
    netlink: &mut Netlink,
    networks: &[IpNet],
    pool: Option<&Pool>,
    own: &[IpNet],
    has_all_routes: bool,
) -> io::Result<Vec<Problem>> {
    let (links, addresses) = (netlink.links()?, netlink.addresses()?);
    let in_own = |link: &Link| {
        let of_link = addresses.iter().filter(|address| address.link == link.index);
        of_link.flat_map(|address| own.iter().map(|own| own.contains(&address.ip))).any(|is| is)
    };
    let pods = links.iter().find(|link| link.alias == ALIAS && in_own(link));
    let pods = pods.map(|link| link.name.as_str());
    let overlay = Overlay { networks, pool, own, pods, has_all_routes };
    Ok(overlap::problems(&foreign_of(&links, &addresses), &overlay))
}

/// Returns the addresses of interfaces that are not gossamer's.
fn foreign_of(links: &[Link], addresses: &[Address]) -> Vec<Foreign> {
    let foreign = addresses.iter().filter_map(|address| {
        let link = links.iter().find(|link| link.index == address.link)?;
        let network = IpNet::new(address.ip, address.prefix_len).ok()?;
        let kind = if link.kind == "bridge" { ForeignKind::Bridge } else { ForeignKind::Address };
        let found = Foreign { network, interface: link.name.clone(), kind };
        (!is_ours(link)).then_some(found)
    });
    foreign.collect()
}

/// Devices of overlays are recognized by name, bridges and ports of pods by their aliases.
fn is_ours(link: &Link) -> bool {
    is_overlay_device(link) || link.alias.starts_with("gossamer ")
}
