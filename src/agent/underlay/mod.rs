//! Which interface carries the tunnels, and under which address.
//!
//! Without a choice of the operator: the interface of the best default route; without one of those, the
//! one by which the kernel would reach a distant host or a seed; without seeds, the only candidate there
//! is. Of several addresses of an interface it is the one that the kernel would take as source. Interfaces
//! of our own, ports of bridges, and addresses that peers cannot reach or that are about to go never carry
//! tunnels.
//!
//! [`watch`] decides when a change counts.

mod watch;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

pub use self::watch::Watch;
use crate::{
    config::{Config, IfaceChoice},
    dataplane::desired::{Mode, Underlay, overhead},
    netlink::{
        Netlink,
        link::{Address, Link},
        route::Query,
    },
};

/// Hosts of no network (RFC 5737, RFC 3849): the way to them is the way to distant hosts.
const DISTANT: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// What aliases of our devices, bridges and ports begin with.
const OUR_ALIAS: &str = "gossamer ";
/// Where no interface tells.
const ETHERNET_MTU: u32 = 1_500;

/// The chosen end of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Empty while there is none, and the address is the last one known.
    pub name: String,
    pub link: u32,
    /// Tunnel packets are to leave by this interface, whatever the main table says: it is part of a VRF.
    pub pinned: bool,
    pub local: IpAddr,
    /// Source of tunnel packets: what peers are told, where this host has that address, for that is what
    /// their guards let in.
    pub source: IpAddr,
    /// Networks of the interface: their hosts are reached without a router.
    pub networks: Vec<IpNet>,
    /// MTU of the interface.
    pub carried: u32,
    /// MTU of the overlay, for pods.
    pub mtu: u32,
    /// MTU of the overlay device: the same, unless packets go without a tunnel and may be larger.
    pub tunnel_mtu: u32,
}

impl Chosen {
    /// The end that a node remembers while its host has no network: pods of this host are served.
    pub fn remembered(local: IpAddr, mtu: Option<u32>) -> Self {
        let mtu = mtu.unwrap_or(ETHERNET_MTU - overhead(local));
        let carried = mtu + overhead(local);
        Self {
            name: String::new(),
            link: 0,
            pinned: false,
            local,
            source: local,
            networks: Vec::new(),
            carried,
            mtu,
            tunnel_mtu: mtu,
        }
    }

    /// Whether an interface has been found.
    pub const fn is_present(&self) -> bool {
        !self.name.is_empty()
    }

    /// The form in which the data plane uses it.
    pub fn with_mode(&self, mode: Mode) -> Underlay {
        let Self { link, pinned, source: local, ref networks, tunnel_mtu, .. } = *self;
        let networks = networks.clone();
        Underlay { pinned, networks, mode, ..Underlay::of_tunnels(link, local, tunnel_mtu) }
    }
}

/// No interface can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    #[error("iface: {what}; interfaces with addresses are: {candidates}")]
    NoMatch { what: String, candidates: String },
    #[error(
        "mtu: {mtu} does not fit interface {iface} with MTU {underlay}: use at most {most} \
         or leave it out"
    )]
    Mtu { mtu: u32, iface: String, underlay: u32, most: u32 },
    #[error("iface: {iface} has no carrier: is the cable plugged in, and the other end up?")]
    NoCarrier { iface: String },
    #[error("netlink: {0}")]
    Netlink(String),
}

impl From<io::Error> for UnderlayError {
    fn from(error: io::Error) -> Self {
        Self::Netlink(error.to_string())
    }
}

/// Chooses from the interfaces as they are now.
pub fn choose(netlink: &mut Netlink, config: &Config) -> Result<Chosen, UnderlayError> {
    let host = Host::look(netlink, config)?;
    match host.by_config(netlink, config, None)? {
        Some(found) => host.chosen(netlink, found, config),
        None => Err(host.no_match(&config.iface)),
    }
}

/// A comparison of the present choice with the interfaces as they are now.
#[derive(Clone, Debug)]
pub struct Look {
    /// The best choice; the present one, as long as nothing is better.
    pub found: Result<Chosen, UnderlayError>,
    /// The interface still has the present address.
    pub present_holds: bool,
}

/// Compares the present choice with the interfaces as they are now.
///
/// An address stays chosen as long as its interface has it, unless the operator left the choice open and
/// the best default route leads over another interface. Only addresses of the present family count, for the
/// tunnels that exist go over it.
pub fn look_again(netlink: &mut Netlink, config: &Config, present: &Chosen) -> Look {
    let look = |netlink: &mut Netlink| -> Result<(Chosen, bool), UnderlayError> {
        let mut host = Host::look(netlink, config)?;
        host.candidates.retain(|candidate| candidate.ip.is_ipv4() == present.local.is_ipv4());
        // A socket that is bound to one address receives what is sent to that one alone.
        let bound = config.listen.map(|listen| listen.ip()).filter(|ip| !ip.is_unspecified());
        if let (Some(bound), None) = (bound, config.advertise) {
            host.candidates.retain(|candidate| candidate.ip == bound);
        }
        let held = host.held(present, &config.iface);
        let best = host.by_config(netlink, config, Some(&present.name))?;
        let found = match (held, best) {
            (Some(held), Some(best)) if held.link != best.link => best,
            (Some(held), _) => held,
            (None, Some(best)) => best,
            (None, None) => host.fading(present).ok_or_else(|| host.no_match(&config.iface))?,
        };
        if let Some(link) = host.link(found.link).filter(|link| !link.carrier) {
            return Err(UnderlayError::NoCarrier { iface: link.name.clone() });
        }
        Ok((host.chosen(netlink, found, config)?, held.is_some()))
    };
    match look(netlink) {
        Ok((found, present_holds)) => Look { found: Ok(found), present_holds },
        Err(error) => Look { found: Err(error), present_holds: false },
    }
}

/// The interfaces, and the addresses that can carry tunnels, better ones first.
struct Host {
    links: Vec<Link>,
    addresses: Vec<Address>,
    candidates: Vec<Address>,
}

impl Host {
    fn look(netlink: &mut Netlink, config: &Config) -> io::Result<Self> {
        let (links, addresses) = (netlink.links()?, netlink.addresses()?);
        let mut host = Self { links, addresses, candidates: Vec::new() };
        let named = match &config.iface {
            IfaceChoice::Name(name) => Some(Named::Link(name)),
            IfaceChoice::Address(ip) => Some(Named::Address(*ip)),
            _ => config.listen.map(|listen| Named::Address(listen.ip())),
        };
        let carriers = host.addresses.iter().filter(|address| host.carries(address, named));
        let mut candidates: Vec<Address> = carriers.copied().collect();
        let sources = sources(netlink, &candidates);
        candidates.sort_by_key(|address| {
            let is_source = sources.contains(&(address.link, address.ip)) && !address.temporary;
            (address.ip.is_ipv6(), !is_source, address.demerits)
        });
        host.candidates = candidates;
        Ok(host)
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Whether tunnels can go out under this address. What the operator names may be a loopback interface,
    /// or part of a VRF.
    fn carries(&self, address: &Address, named: Option<Named<'_>>) -> bool {
        let Some(link) = self.link(address.link) else { return false };
        let is_named = match named {
            Some(Named::Link(name)) => link.name == name,
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
    fn by_config(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&str>,
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
        self.find(|address| self.link(address.link).is_some_and(|link| link.name == name))
    }

    /// The source address that the kernel would use for packets to this one.
    fn by_route(&self, netlink: &mut Netlink, to: IpAddr) -> Option<Address> {
        let found = netlink.route(&Query::to(to)).ok()?;
        let of_family = |address: &Address| address.ip.is_ipv4() == to.is_ipv4();
        self.find(|address| address.link == found.link && Some(address.ip) == found.source)
            .or_else(|| self.find(|address| address.link == found.link && of_family(address)))
    }

    fn by_default(
        &self,
        netlink: &mut Netlink,
        config: &Config,
        present: Option<&str>,
    ) -> io::Result<Option<Address>> {
        if let Some(listen) = config.listen.filter(|listen| !listen.ip().is_unspecified()) {
            return Ok(self.find(|address| address.ip == listen.ip()));
        }
        if let Some((ip, _)) = config.advertise
            && let Some(found) = self.find(|address| address.ip == ip)
        {
            return Ok(Some(found));
        }
        for ipv4 in [true, false] {
            for route in netlink.default_routes(ipv4)? {
                let on_link =
                    |address: &Address| address.link == route.link && address.ip.is_ipv4() == ipv4;
                let source = self.find(|address| {
                    on_link(address) && route.source.is_some_and(|source| source == address.ip)
                });
                if let Some(found) = source.or_else(|| self.find(on_link)) {
                    return Ok(Some(found));
                }
            }
        }
        if let Some(found) = present.and_then(|name| self.by_name(name)) {
            return Ok(Some(found));
        }
        let seeds = config.seeds.iter().filter_map(|seed| seed.parse::<SocketAddr>().ok());
        let mut targets = DISTANT.into_iter().chain(seeds.map(|seed| seed.ip()));
        Ok(targets.find_map(|to| self.by_route(netlink, to)))
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
    fn held(&self, present: &Chosen, choice: &IfaceChoice) -> Option<Address> {
        let is_bound_to = |link: &Link| match choice {
            IfaceChoice::Name(name) => link.name == *name,
            _ => link.name == present.name,
        };
        self.find(|address| {
            address.ip == present.local && self.link(address.link).is_some_and(is_bound_to)
        })
    }

    /// The present address, if its interface still has it although nothing new should begin to use it.
    fn fading(&self, present: &Chosen) -> Option<Address> {
        let is_present = |address: &&Address| {
            let link = self.link(address.link);
            let is_there = |link: &Link| link.up && link.name == present.name;
            address.ip == present.local && link.is_some_and(is_there)
        };
        self.addresses.iter().find(is_present).copied()
    }

    fn chosen(
        &self,
        netlink: &mut Netlink,
        address: Address,
        config: &Config,
    ) -> Result<Chosen, UnderlayError> {
        let Some(link) = self.link(address.link) else {
            return Err(self.no_match(&config.iface));
        };
        let carried = if link.loopback { self.mtu_from(netlink, address.ip) } else { link.mtu };
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
        let mtu = by_route.filter(|link| !link.loopback).map(|link| link.mtu);
        mtu.or_else(|| carriers().map(|link| link.mtu).min()).unwrap_or(ETHERNET_MTU)
    }

    fn no_match(&self, choice: &IfaceChoice) -> UnderlayError {
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
        let candidates = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        UnderlayError::NoMatch { what, candidates }
    }

    fn why_not(&self, name: &str) -> String {
        let Some(link) = self.links.iter().find(|link| link.name == name) else {
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
