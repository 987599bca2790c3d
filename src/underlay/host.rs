//! The interfaces of a host, and which of their addresses can carry tunnels.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

use super::{ChosenUnderlay, ETHERNET_MTU, UnderlayError};
use crate::{
    config::{Config, IfaceChoice},
    dataplane::desired::{Mode, is_device_name, overhead},
    netlink::{
        Netlink,
        link::{Address, Link},
        route::Query,
    },
};

/// Maximum number of peers for which routes are looked up: enough to determine the uplink of most peers.
const MAX_PEERS: usize = 16;
/// Documentation addresses (RFC 5737, RFC 3849): their route is that of distant hosts.
const DISTANT: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Prefix of the aliases of gossamer's devices, bridges and ports.
const OUR_ALIAS: &str = "gossamer ";
/// The interfaces, and the addresses that can carry tunnels, best ones first.
pub(super) struct Host {
    /// All interfaces.
    pub(super) links: Vec<Link>,
    /// All addresses.
    pub(super) addresses: Vec<Address>,
    /// Usable addresses, best ones first.
    pub(super) candidates: Vec<Address>,
    /// Addresses of peers and seeds, with the interface that leads to each (0: none).
    peers: Vec<(IpAddr, u32)>,
}

impl Host {
    /// Reads the interfaces and ranks the addresses.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried.
    pub(super) fn read(
        netlink: &mut Netlink,
        config: &Config,
        peers: impl Iterator<Item = IpAddr>,
    ) -> io::Result<Self> {
        let (links, addresses) = (netlink.links()?, netlink.addresses()?);
        let mut link_to = |peer| netlink.route(&Query::to(peer)).map_or(0, |found| found.link);
        let seeds = config.seeds.iter().filter_map(|seed| seed.parse::<SocketAddr>().ok());
        let peers = seeds.map(|seed| seed.ip()).chain(peers).take(MAX_PEERS);
        let peers = peers.map(|peer| (peer, link_to(peer))).collect();
        let mut host = Self { links, addresses, candidates: Vec::new(), peers };
        let named = match &config.iface {
            IfaceChoice::Name(name) => Some(Named::Link(name)),
            IfaceChoice::Address(ip) => Some(Named::Address(*ip)),
            _ => config.listen.map(|listen| Named::Address(listen.ip())),
        };
        // A host whose interfaces have no usable address may have one on the loopback interface.
        let source = |to: IpAddr| netlink.route(&Query::to(to)).ok().and_then(|found| found.source);
        let used: Vec<IpAddr> = DISTANT.into_iter().filter_map(source).collect();
        let carriers = host.addresses.iter().filter(|address| {
            let named = named.or(used.contains(&address.ip).then_some(Named::Address(address.ip)));
            host.carries(address, named)
        });
        let mut candidates: Vec<Address> = carriers.copied().collect();
        let sources = sources(netlink, &candidates);
        candidates.sort_by_key(|address| {
            let is_source = sources.contains(&(address.link, address.ip)) && !address.temporary;
            (address.ip.is_ipv6(), !is_source, address.demerits)
        });
        host.candidates = candidates;
        Ok(host)
    }

    /// Drops all candidates but the address to which gossip is bound, if peers use this host's own address:
    /// the socket receives only packets to that one.
    pub(super) fn keep_bound(&mut self, config: &Config) {
        if let Some(bound) = config.bound_peer_address() {
            self.candidates.retain(|candidate| candidate.ip == bound);
        }
    }

    /// Returns the interface with this index.
    pub(super) fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Returns whether tunnels can use this address. An address that the operator named may be on a
    /// loopback interface, in a VRF, or on a VXLAN device of the network below. Other VXLAN devices are those
    /// of overlays.
    fn carries(&self, address: &Address, named: Option<Named<'_>>) -> bool {
        let Some(link) = self.link(address.link) else { return false };
        let is_named = match named {
            Some(Named::Link(name)) => link.is_called(name),
            Some(Named::Address(ip)) => address.ip == ip,
            None => false,
        };
        let is_ours = link.kind == "vxlan" && (!is_named || is_device_name(&link.name));
        let is_ours = is_ours || link.alias.starts_with(OUR_ALIAS);
        let is_free = match link.controller().map(|index| self.link(index)) {
            None => true,
            Some(Some(controller)) => is_named && controller.kind == "vrf",
            Some(None) => false,
        };
        let usable = is_reachable(address.ip) && !address.tentative && !address.deprecated;
        link.up && (!link.loopback || is_named) && !is_ours && is_free && usable
    }

    /// Returns the address that the settings select. Without a default route the present one is
    /// preferred.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried.
    pub(super) fn by_config(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&ChosenUnderlay>,
    ) -> io::Result<Option<Address>> {
        let by_regex = |regex: &regex_lite::Regex| {
            let by_address = self.find(|address| regex.is_match(&address.ip.to_string()));
            by_address.or_else(|| {
                self.find(|address| {
                    self.link(address.link).is_some_and(|link| regex.is_match(&link.name))
                })
            })
        };
        Ok(match &config.iface {
            IfaceChoice::Name(name) => self.by_name(name),
            IfaceChoice::Address(ip) => self.find(|address| address.ip == *ip),
            IfaceChoice::Regex(regex) => by_regex(regex),
            IfaceChoice::CanReach(ip) => self.by_route(netlink, *ip),
            IfaceChoice::Default => self.by_default(netlink, config, present)?,
        })
    }

    fn find(&self, is_wanted: impl Fn(&Address) -> bool) -> Option<Address> {
        self.candidates.iter().find(|address| is_wanted(address)).copied()
    }

    fn by_name(&self, name: &str) -> Option<Address> {
        self.find(|address| self.is_called(address, name))
    }

    /// Returns the source address that the kernel would use for packets to `to`.
    fn by_route(&self, netlink: &mut Netlink, to: IpAddr) -> Option<Address> {
        let found = netlink.route(&Query::to(to)).ok()?;
        let of_family = |address: &Address| address.ip.is_ipv4() == to.is_ipv4();
        self.find(|address| address.link == found.link && Some(address.ip) == found.source)
            .or_else(|| self.find(|address| Some(address.ip) == found.source))
            .or_else(|| self.find(|address| address.link == found.link && of_family(address)))
    }

    /// Returns the choice without the setting `iface`.
    fn by_default(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&ChosenUnderlay>,
    ) -> io::Result<Option<Address>> {
        if let Some(bound) = config.bound_address() {
            return Ok(self.find(|address| address.ip == bound));
        }
        if let Some((ip, _)) = config.advertise
            && let Some(found) = self.find(|address| address.ip == ip)
        {
            return Ok(Some(found));
        }
        let mut ranked = Vec::new();
        for ipv4 in [true, false] {
            for route in netlink.default_routes(ipv4)? {
                let on_link =
                    |address: &Address| address.link == route.link && address.ip.is_ipv4() == ipv4;
                let source = self.find(|address| {
                    on_link(address) && route.source.is_some_and(|source| source == address.ip)
                });
                ranked.extend(source.or_else(|| self.find(on_link)));
            }
        }
        let held = present.and_then(|present| {
            let is_held = |address: &Address| address.ip == present.local;
            self.find(|address| is_held(address) && self.is_called(address, &present.name))
        });
        if let Some(found) = self.towards_peers(&ranked, held) {
            return Ok(Some(found));
        }
        if let Some(found) = ranked.first() {
            return Ok(Some(*found));
        }
        if let Some(found) = present.and_then(|present| self.by_name(&present.name)) {
            return Ok(Some(found));
        }
        let mut targets = DISTANT.into_iter().chain(self.peers.iter().map(|(peer, _)| *peer));
        Ok(targets.find_map(|to| self.by_route(netlink, to)).or_else(|| self.only_candidate()))
    }

    /// Chooses among several uplinks by the peers that they lead to. A VPN or a mobile uplink may have
    /// the better default route without leading to any peer.
    ///
    /// `ranked` are the addresses with default routes, better ones first. The first one is chosen if it
    /// leads to at least as many peers as the present one, `held`; so changes of membership alone never
    /// move an underlay back and forth. A present address without a default route was chosen for the
    /// peers in its network, and stays with them, whatever addresses other interfaces have temporarily.
    /// Returns `None` if no address leads to a peer.
    fn towards_peers(&self, ranked: &[Address], held: Option<Address>) -> Option<Address> {
        let count = |address: &Address| self.count_peers(address);
        let (best, held) = (ranked.first(), held.as_ref());
        let is_ranked = |held: &Address| ranked.iter().any(|address| address.ip == held.ip);
        if let Some(held) = held.filter(|held| !is_ranked(held) && self.count_neighbors(held) > 0) {
            return Some(*held);
        }
        let of_held = held.map_or(0, count);
        match best.map_or(0, count) {
            0 if of_held == 0 => {
                // A VPN that takes all packets leads to any peer. An underlay in use moves only to the
                // peers' own network.
                let count = |address: &Address| match held {
                    Some(_) => self.count_neighbors(address),
                    None => count(address),
                };
                let others = self.candidates.iter().filter(|address| count(address) > 0);
                // Of several with the same count, the first is the best one.
                others.rev().max_by_key(|address| count(address)).copied()
            }
            of_best if of_best >= of_held => best.copied(),
            _ => held.copied(),
        }
    }

    /// Returns how many peers the kernel reaches by the interface of an address, or are in its network.
    fn count_peers(&self, address: &Address) -> usize {
        let leads = |(peer, link): &&(IpAddr, u32)| {
            let by_it = *link == address.link && peer.is_ipv4() == address.ip.is_ipv4();
            self.has_carrier(address) && (by_it || is_neighbor(address, peer))
        };
        self.peers.iter().filter(leads).count()
    }

    /// Returns how many peers are in the network of an address.
    fn count_neighbors(&self, address: &Address) -> usize {
        let is_near = |(peer, _): &&(IpAddr, u32)| is_neighbor(address, peer);
        if self.has_carrier(address) { self.peers.iter().filter(is_near).count() } else { 0 }
    }

    fn has_carrier(&self, address: &Address) -> bool {
        self.link(address.link).is_some_and(|link| link.carrier)
    }

    /// Returns whether the interface of the address has this name.
    pub(super) fn is_called(&self, address: &Address, name: &str) -> bool {
        self.link(address.link).is_some_and(|link| link.is_called(name))
    }

    /// Returns the only candidate. A bridge without a route serves virtual machines or containers, and
    /// is ignored.
    fn only_candidate(&self) -> Option<Address> {
        let is_bridge =
            |address: &Address| self.link(address.link).is_none_or(|link| link.kind == "bridge");
        let first = self.find(|address| !is_bridge(address))?;
        let others = self.candidates.iter().filter(|address| !is_bridge(address));
        others.copied().all(|address| address.link == first.link).then_some(first)
    }

    /// Returns the present address, by the name of its interface, which may have been created again.
    pub(super) fn held(&self, present: &ChosenUnderlay, choice: &IfaceChoice) -> Option<Address> {
        let is_bound_to = |link: &Link| match choice {
            IfaceChoice::Name(name) => link.is_called(name),
            _ => link.name == present.name,
        };
        self.find(|address| {
            address.ip == present.local && self.link(address.link).is_some_and(is_bound_to)
        })
    }

    /// Returns the present address if its interface still has it, even if the address is deprecated. The
    /// kernel does not use an address of which duplicate detection has found the duplicate.
    ///
    /// # Errors
    /// Fails if the interface has become a port of another one.
    pub(super) fn deprecated_present(
        &self,
        present: &ChosenUnderlay,
    ) -> Result<Option<Address>, UnderlayError> {
        let is_present = |address: &&Address| {
            let link = self.link(address.link);
            let is_there = |link: &Link| link.up && link.name == present.name;
            address.ip == present.local && !address.duplicate && link.is_some_and(is_there)
        };
        let found = self.addresses.iter().find(is_present).copied();
        match found.and_then(|found| self.left_on_port(&found)) {
            Some(error) => Err(error),
            None => Ok(found),
        }
    }

    /// Completes the choice of an address.
    ///
    /// # Errors
    /// Fails if the setting `mtu` exceeds what the interface carries.
    pub(super) fn chosen(
        &self,
        netlink: &mut Netlink,
        address: Address,
        config: &Config,
    ) -> Result<ChosenUnderlay, UnderlayError> {
        let Some(link) = self.link(address.link) else {
            return Err(self.no_match(&config.iface));
        };
        let carried = if link.loopback {
            self.mtu_from(netlink, address.ip)
        } else {
            link.mtu_of(address.ip.is_ipv4())
        };
        let tunnelled = carried.saturating_sub(overhead(address.ip));
        let most = if config.mode == Mode::HostGw { carried } else { tunnelled };
        let mtu = config.mtu.unwrap_or(most);
        if mtu > most {
            let iface = link.name.clone();
            return Err(UnderlayError::Mtu { mtu, iface, underlay: carried, most });
        }
        let on_link = self.addresses.iter().filter(|other| other.link == link.index);
        let networks = on_link.filter_map(|other| IpNet::new(other.ip, other.prefix_len).ok());
        let has = |ip: &IpAddr| self.addresses.iter().any(|address| address.ip == *ip);
        let advertised = config.advertise.map(|(ip, _)| ip).filter(has);
        Ok(ChosenUnderlay {
            name: link.name.clone(),
            link: link.index,
            pinned: link.controller().is_some(),
            local: address.ip,
            source: advertised.unwrap_or(address.ip),
            networks: networks.map(|network| network.trunc()).collect(),
            carried,
            mtu,
            tunnel_mtu: mtu.min(tunnelled),
        })
    }

    /// Returns the MTU of the interface by which packets from a loopback address leave; without a route,
    /// the smallest MTU of the possible interfaces.
    fn mtu_from(&self, netlink: &mut Netlink, from: IpAddr) -> u32 {
        let distant = DISTANT.into_iter().find(|to| to.is_ipv4() == from.is_ipv4());
        let query = distant.map(|to| Query { from: Some(from), ..Query::to(to) });
        let found = query.and_then(|query| netlink.route(&query).ok());
        let by_route = found.and_then(|found| self.link(found.link));
        let carriers = || {
            let links = self.links.iter();
            links.filter(|link| link.up && !link.loopback && !link.alias.starts_with(OUR_ALIAS))
        };
        let mtu = |link: &Link| link.mtu_of(from.is_ipv4());
        let by_route = by_route.filter(|link| !link.loopback).map(mtu);
        by_route.or_else(|| carriers().map(mtu).min()).unwrap_or(ETHERNET_MTU)
    }
}

/// Returns whether the peer is in the network of the address.
fn is_neighbor(address: &Address, peer: &IpAddr) -> bool {
    IpNet::new(address.ip, address.prefix_len).is_ok_and(|network| network.contains(peer))
}

/// The interface or address that the operator has named.
#[derive(Clone, Copy)]
enum Named<'a> {
    Link(&'a str),
    Address(IpAddr),
}

/// Returns the kernel's source addresses on interfaces with several addresses of one family.
fn sources(netlink: &mut Netlink, candidates: &[Address]) -> Vec<(u32, IpAddr)> {
    let mut asked = Vec::new();
    let mut sources = Vec::new();
    for address in candidates {
        let key = (address.link, address.ip.is_ipv4());
        let same = candidates.iter().filter(|other| (other.link, other.ip.is_ipv4()) == key);
        if same.count() < 2 || asked.contains(&key) {
            continue;
        }
        asked.push(key);
        let distant = DISTANT.into_iter().find(|to| to.is_ipv4() == address.ip.is_ipv4());
        let query = distant.map(|to| Query { output: Some(address.link), ..Query::to(to) });
        let source = query.and_then(|query| netlink.route(&query).ok()?.source);
        sources.extend(source.map(|source| (address.link, source)));
    }
    sources
}

/// Returns whether peers on other hosts could reach an address. Addresses between a host and its own
/// IPv4-to-IPv6 translator (RFC 7335) are the same on every host.
pub(super) const fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let is_translated = matches!(ip.octets(), [192, 0, 0, 0..=7]);
            !ip.is_link_local() && !ip.is_loopback() && !ip.is_unspecified() && !is_translated
        }
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback() && !ip.is_unspecified(),
    }
}
