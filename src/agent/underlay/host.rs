//! The interfaces of a host, and which of their addresses can carry tunnels.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

use super::{Chosen, ETHERNET_MTU, UnderlayError, carrier::absence};
use crate::{
    config::{Config, IfaceChoice},
    dataplane::desired::{Mode, overhead},
    netlink::{
        Netlink,
        link::{Address, Link},
        route::Query,
    },
};

/// So many peers are asked about: enough to see by which uplink most of them are reached.
const PEERS: usize = 16;
/// Hosts of no network (RFC 5737, RFC 3849): the way to them is the way to distant hosts.
const DISTANT: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// What aliases of our devices, bridges and ports begin with.
const OUR_ALIAS: &str = "gossamer ";
/// Addresses that cannot be used and are named with the reason.
const UNUSED: usize = 3;
/// The interfaces, and the addresses that can carry tunnels, better ones first.
pub(super) struct Host {
    links: Vec<Link>,
    addresses: Vec<Address>,
    pub(super) candidates: Vec<Address>,
    /// Addresses of other hosts, and the interface by which the kernel reaches each.
    peers: Vec<(IpAddr, u32)>,
}

impl Host {
    pub(super) fn look(
        netlink: &mut Netlink,
        config: &Config,
        peers: impl Iterator<Item = IpAddr>,
    ) -> io::Result<Self> {
        let (links, addresses) = (netlink.links()?, netlink.addresses()?);
        let mut link_to = |peer| netlink.route(&Query::to(peer)).map_or(0, |found| found.link);
        let seeds = config.seeds.iter().filter_map(|seed| seed.parse::<SocketAddr>().ok());
        let peers = seeds.map(|seed| seed.ip()).chain(peers).take(PEERS);
        let peers = peers.map(|peer| (peer, link_to(peer))).collect();
        let mut host = Self { links, addresses, candidates: Vec::new(), peers };
        let named = match &config.iface {
            IfaceChoice::Name(name) => Some(Named::Link(name)),
            IfaceChoice::Address(ip) => Some(Named::Address(*ip)),
            _ => config.listen.map(|listen| Named::Address(listen.ip())),
        };
        // Of a host whose interfaces have no address of their own it is on the loopback interface.
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

    pub(super) fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Whether tunnels can go out under this address. What the operator names may be a loopback interface,
    /// or part of a VRF.
    fn carries(&self, address: &Address, named: Option<Named<'_>>) -> bool {
        let Some(link) = self.link(address.link) else { return false };
        let is_named = match named {
            Some(Named::Link(name)) => link.is_called(name),
            Some(Named::Address(ip)) => address.ip == ip,
            None => false,
        };
        let is_ours = link.kind == "vxlan" || link.alias.starts_with(OUR_ALIAS);
        let is_free = match link.controller().map(|index| self.link(index)) {
            None => true,
            Some(Some(controller)) => is_named && controller.kind == "vrf",
            Some(None) => false,
        };
        let usable = is_reachable(address.ip) && !address.tentative && !address.deprecated;
        link.up && (!link.loopback || is_named) && !is_ours && is_free && usable
    }

    /// The interface that the settings ask for. Without a default route the present one is preferred.
    pub(super) fn by_config(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&Chosen>,
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
            IfaceChoice::Default => match self.by_default(netlink, config, present)? {
                None => self.only_candidate(),
                found => found,
            },
        })
    }

    fn find(&self, is_wanted: impl Fn(&Address) -> bool) -> Option<Address> {
        self.candidates.iter().find(|address| is_wanted(address)).copied()
    }

    fn by_name(&self, name: &str) -> Option<Address> {
        self.find(|address| self.is_called(address, name))
    }

    /// The source address that the kernel would use for packets to this one.
    fn by_route(&self, netlink: &mut Netlink, to: IpAddr) -> Option<Address> {
        let found = netlink.route(&Query::to(to)).ok()?;
        let of_family = |address: &Address| address.ip.is_ipv4() == to.is_ipv4();
        self.find(|address| address.link == found.link && Some(address.ip) == found.source)
            .or_else(|| self.find(|address| Some(address.ip) == found.source))
            .or_else(|| self.find(|address| address.link == found.link && of_family(address)))
    }

    fn by_default(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&Chosen>,
    ) -> io::Result<Option<Address>> {
        if let Some(listen) = config.listen.filter(|listen| !listen.ip().is_unspecified()) {
            return Ok(self.find(|address| address.ip == listen.ip()));
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
        Ok(targets.find_map(|to| self.by_route(netlink, to)))
    }

    /// The choice among several uplinks by the peers that they lead to. A VPN or a mobile uplink may have the
    /// better default route and lead to none of them.
    ///
    /// `ranked` are the addresses with default routes, better ones first. The best of them is taken if it
    /// leads to as many peers as the present one, `held`; so membership alone never moves an underlay to and
    /// fro. A present one without a default route was chosen for the peers in its network, and stays with
    /// them, whatever addresses others have for the moment. None, if no address leads to a peer.
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
                // Those of a VPN that takes all packets lead to any peer. An underlay that is in use moves
                // only to the peers' own network.
                let count = |address: &Address| match held {
                    Some(_) => self.count_neighbors(address),
                    None => count(address),
                };
                let others = self.candidates.iter().filter(|address| count(address) > 0);
                // Of several with as many the first, which is the better one.
                others.rev().max_by_key(|address| count(address)).copied()
            }
            of_best if of_best >= of_held => best.copied(),
            _ => held.copied(),
        }
    }

    /// How many peers the kernel reaches by the interface of an address, or are in its network.
    fn count_peers(&self, address: &Address) -> usize {
        let leads = |(peer, link): &&(IpAddr, u32)| {
            let by_it = *link == address.link && peer.is_ipv4() == address.ip.is_ipv4();
            self.has_carrier(address) && (by_it || is_neighbor(address, peer))
        };
        self.peers.iter().filter(leads).count()
    }

    /// How many peers are in the network of an address.
    fn count_neighbors(&self, address: &Address) -> usize {
        let is_near = |(peer, _): &&(IpAddr, u32)| is_neighbor(address, peer);
        if self.has_carrier(address) { self.peers.iter().filter(is_near).count() } else { 0 }
    }

    pub(super) fn no_carrier(&self, link: &Link) -> UnderlayError {
        UnderlayError::NoCarrier { iface: link.name.clone(), why: absence(link, &self.links) }
    }

    fn has_carrier(&self, address: &Address) -> bool {
        self.link(address.link).is_some_and(|link| link.carrier)
    }

    fn is_called(&self, address: &Address, name: &str) -> bool {
        self.link(address.link).is_some_and(|link| link.is_called(name))
    }

    /// A bridge with no route of its own is the home of virtual machines or containers.
    fn only_candidate(&self) -> Option<Address> {
        let is_bridge =
            |address: &Address| self.link(address.link).is_none_or(|link| link.kind == "bridge");
        let first = self.find(|address| !is_bridge(address))?;
        let others = self.candidates.iter().filter(|address| !is_bridge(address));
        others.copied().all(|address| address.link == first.link).then_some(first)
    }

    /// The present choice, by the name of its interface, which may be another one by now.
    pub(super) fn held(&self, present: &Chosen, choice: &IfaceChoice) -> Option<Address> {
        let is_bound_to = |link: &Link| match choice {
            IfaceChoice::Name(name) => link.is_called(name),
            _ => link.name == present.name,
        };
        self.find(|address| {
            address.ip == present.local && self.link(address.link).is_some_and(is_bound_to)
        })
    }

    /// The present address, if its interface still has it although nothing new should begin to use it.
    ///
    /// # Errors
    /// The interface has become a port of another one.
    pub(super) fn fading(&self, present: &Chosen) -> Result<Option<Address>, UnderlayError> {
        let is_present = |address: &&Address| {
            let link = self.link(address.link);
            let is_there = |link: &Link| link.up && link.name == present.name;
            address.ip == present.local && link.is_some_and(is_there)
        };
        let found = self.addresses.iter().find(is_present).copied();
        match found.and_then(|found| self.left_on_port(&found)) {
            Some(error) => Err(error),
            None => Ok(found),
        }
    }

    /// That the named interface has an address and is a port of another one.
    pub(super) fn misplaced(&self, choice: &IfaceChoice) -> Option<UnderlayError> {
        let IfaceChoice::Name(name) = choice else { return None };
        let mut own = self.addresses.iter();
        let own = own.find(|address| is_reachable(address.ip) && self.is_called(address, name));
        self.left_on_port(own?)
    }

    /// That the interface of an address is a port of another one, such as a bridge, which takes its packets.
    fn left_on_port(&self, address: &Address) -> Option<UnderlayError> {
        let link = self.link(address.link)?;
        let controller = self.link(link.controller()?).filter(|other| other.kind != "vrf")?;
        let (iface, controller) = (link.name.clone(), controller.name.clone());
        let address = IpNet::new(address.ip, address.prefix_len).ok()?;
        Some(UnderlayError::Port { iface, controller, address })
    }

    pub(super) fn chosen(
        &self,
        netlink: &mut Netlink,
        address: Address,
        config: &Config,
    ) -> Result<Chosen, UnderlayError> {
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
        Ok(Chosen {
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

    /// The MTU of the interface by which packets from an address of the loopback interface leave; without a
    /// route, the smallest of those that could carry them.
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

    pub(super) fn no_match(&self, choice: &IfaceChoice) -> UnderlayError {
        let what = match choice {
            IfaceChoice::Name(name) => self.why_not(name),
            IfaceChoice::Address(ip) => format!("no interface that is up has address {ip}"),
            IfaceChoice::Regex(regex) => format!("no interface that is up matches {regex}"),
            IfaceChoice::CanReach(ip) => format!("no interface leads to {ip}"),
            IfaceChoice::Default => {
                "there is no default route: wait for the network, or choose an \
                                     interface with --iface"
                    .to_owned()
            }
        };
        let named = |address: &Address| {
            self.link(address.link).map(|link| format!("{} ({})", link.name, address.ip))
        };
        let list: Vec<_> = self.candidates.iter().filter_map(named).collect();
        let mut candidates = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        let unused = self.addresses.iter().filter(|address| is_reachable(address.ip));
        let unused = unused.filter_map(|address| {
            let named = named(address)?;
            if address.duplicate {
                Some(format!(
                    "; another machine has the address of {named}, too, so it is not used"
                ))
            } else if address.tentative {
                Some(format!(
                    "; {named} is not used before the kernel knows that no other machine has it"
                ))
            } else if address.deprecated {
                Some(format!(
                    "; {named} is deprecated, so it is not used: its router or DHCP server has not \
                     renewed it, or its preferred lifetime was set to 0 (ip addr show)"
                ))
            } else {
                None
            }
        });
        candidates.extend(unused.take(UNUSED));
        UnderlayError::NoMatch { what, candidates }
    }

    /// That another interface than the named one has the present address: one was renamed, or became a port
    /// of a bridge.
    pub(super) fn moved(&self, present: &Chosen, config: &Config) -> Option<UnderlayError> {
        let IfaceChoice::Name(iface) = &config.iface else { return None };
        let holder = self.addresses.iter().find(|address| address.ip == present.local)?;
        let link = self.link(holder.link).filter(|link| link.up && !link.is_called(iface))?;
        let (address, iface, now) = (present.local, iface.clone(), link.name.clone());
        Some(UnderlayError::Moved { address, iface, now })
    }

    /// That the interface has lost the present address, if that is all there is to say.
    pub(super) fn vanished(&self, present: &Chosen, config: &Config) -> Option<UnderlayError> {
        let link = self.links.iter().find(|link| link.name == present.name && link.up)?;
        let mut own = self.addresses.iter().filter(|address| address.link == link.index);
        if own.any(|address| address.ip == present.local) {
            return None;
        }
        let is_other = |address: &&Address| {
            let ipv4 = present.local.is_ipv4();
            address.link == link.index && address.ip.is_ipv4() == ipv4
        };
        let others = self.addresses.iter().filter(is_other);
        let others: Vec<String> = others.map(|address| address.ip.to_string()).collect();
        let (address, iface) = (present.local, link.name.clone());
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let others = match others.as_slice() {
            [] => format!("no {family} address"),
            others => others.join(", "),
        };
        let awaited = match (&config.iface, config.listen.filter(|at| !at.ip().is_unspecified())) {
            (IfaceChoice::Default, None) => {
                format!("an interface with a default route has an {family} address")
            }
            (IfaceChoice::Name(_), None) => format!("{iface} has an {family} address"),
            (IfaceChoice::Regex(regex), None) => {
                format!("an interface that matches {regex} has an {family} address")
            }
            (IfaceChoice::CanReach(ip), None) => {
                format!("an interface with an {family} address leads to {ip}")
            }
            _ => "the address is back".to_owned(),
        };
        Some(UnderlayError::Vanished { address, iface, others, awaited })
    }

    fn why_not(&self, name: &str) -> String {
        let Some(link) = self.links.iter().find(|link| link.is_called(name)) else {
            return format!("there is no interface {name}");
        };
        let controller = link.controller().and_then(|index| self.link(index));
        match controller.filter(|controller| controller.kind != "vrf") {
            _ if !link.up => format!("interface {name} is down"),
            Some(controller) => {
                format!("interface {name} is a port of {0}: name {0} instead", controller.name)
            }
            None => format!("interface {name} has no address that peers could reach"),
        }
    }
}

fn is_neighbor(address: &Address, peer: &IpAddr) -> bool {
    IpNet::new(address.ip, address.prefix_len).is_ok_and(|network| network.contains(peer))
}

/// What the operator has named.
#[derive(Clone, Copy)]
enum Named<'a> {
    Link(&'a str),
    Address(IpAddr),
}

/// The kernel's source addresses on those interfaces that have several addresses of one family.
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

/// Whether peers on other hosts could send to an address. Those between a host and its own translator of IPv4
/// to IPv6 (RFC 7335) are the same on every host.
const fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let is_translated = matches!(ip.octets(), [192, 0, 0, 0..=7]);
            !ip.is_link_local() && !ip.is_loopback() && !ip.is_unspecified() && !is_translated
        }
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback() && !ip.is_unspecified(),
    }
}
