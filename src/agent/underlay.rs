//! Which interface carries the tunnels, and under which address: flannel's ways of choosing.
//!
//! Without a choice: the interface of the default route; without one of those, the one by which a seed
//! is reached; without seeds, the only candidate there is.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::{
    config::{Config, IfaceChoice},
    dataplane::desired::{Mode, Underlay, overhead},
    netlink::{
        Netlink,
        link::{Address, Link, Path},
    },
    pods::bridge,
};

/// The chosen end of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub name: String,
    pub link: u32,
    pub local: IpAddr,
    /// Source of tunnel packets: what peers are told, where this host has that address, for that is what
    /// their guards let in.
    pub source: IpAddr,
    /// Networks of the interface: their hosts are reached without a router.
    pub networks: Vec<IpNet>,
    /// MTU of the overlay, for pods.
    pub mtu: u32,
    /// MTU of the overlay device: the same, unless packets go without a tunnel and may be larger.
    pub tunnel_mtu: u32,
}

impl Chosen {
    /// As the data plane uses it.
    pub fn with_mode(&self, mode: Mode) -> Underlay {
        let Self { link, source: local, ref networks, tunnel_mtu, .. } = *self;
        Underlay { link, local, networks: networks.clone(), tunnel_mtu, mode }
    }
}

/// No interface can be chosen.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    #[error("iface: {what}; interfaces with addresses are: {candidates}")]
    NoMatch { what: String, candidates: String },
    #[error(
        "mtu: {mtu} does not fit interface {iface} with MTU {underlay}: use at most {most} \
         or leave it out"
    )]
    Mtu { mtu: u32, iface: String, underlay: u32, most: u32 },
    #[error("netlink: {0}")]
    Netlink(#[from] std::io::Error),
}

/// Chooses from the interfaces as they are now.
pub fn choose(netlink: &mut Netlink, config: &Config) -> Result<Chosen, UnderlayError> {
    let host = Host::look(netlink)?;
    let found = match host.by_config(netlink, config)? {
        None if matches!(config.iface, IfaceChoice::Default) => host.only_candidate(),
        found => found,
    };
    found.ok_or_else(|| host.no_match(&config.iface)).and_then(|found| host.chosen(found, config))
}

/// Chooses anew because something about the interfaces has changed. What was chosen stays for as long as it
/// has its address, up or down; then another address of the same interface is taken before another interface.
pub fn choose_again(
    netlink: &mut Netlink,
    config: &Config,
    present: &Chosen,
) -> Result<Chosen, UnderlayError> {
    let over_ipv4 = Some(present.local.is_ipv4());
    let host = Host { over_ipv4, ..Host::look(netlink)? };
    let fixed = config.listen.is_some_and(|listen| !listen.ip().is_unspecified());
    let found = match host.kept(present) {
        Some(found) => Some(found),
        None if fixed || matches!(config.iface, IfaceChoice::Address(_)) => None,
        None => host.by_name(&present.name),
    };
    let found = match found {
        None => host.by_config(netlink, config)?,
        found => found,
    };
    found.ok_or_else(|| host.no_match(&config.iface)).and_then(|found| host.chosen(found, config))
}

struct Host {
    links: Vec<Link>,
    addresses: Vec<Address>,
    /// The tunnels that there are go over IPv4, or over IPv6: only that will do.
    over_ipv4: Option<bool>,
}

impl Host {
    fn look(netlink: &mut Netlink) -> Result<Self, UnderlayError> {
        Ok(Self { links: netlink.links()?, addresses: netlink.addresses()?, over_ipv4: None })
    }

    fn chosen(
        &self,
        (link, address): (&Link, &Address),
        config: &Config,
    ) -> Result<Chosen, UnderlayError> {
        let tunnelled = link.mtu.saturating_sub(overhead(address.ip));
        let most = if config.mode == Mode::HostGw { link.mtu } else { tunnelled };
        let mtu = config.mtu.unwrap_or(most);
        if mtu > most {
            let iface = link.name.clone();
            return Err(UnderlayError::Mtu { mtu, iface, underlay: link.mtu, most });
        }
        let on_link = self.addresses.iter().filter(|address| address.link == link.index);
        let networks =
            on_link.filter_map(|address| IpNet::new(address.ip, address.prefix_len).ok());
        Ok(Chosen {
            name: link.name.clone(),
            link: link.index,
            local: address.ip,
            source: config
                .advertise
                .map(|(ip, _)| ip)
                .filter(|ip| self.addresses.iter().any(|address| address.ip == *ip))
                .unwrap_or(address.ip),
            networks: networks.map(|network| network.trunc()).collect(),
            mtu,
            tunnel_mtu: mtu.min(tunnelled),
        })
    }

    fn by_config(
        &self,
        netlink: &mut Netlink,
        config: &Config,
    ) -> Result<Option<(&Link, &Address)>, UnderlayError> {
        Ok(match &config.iface {
            IfaceChoice::Name(name) => self.by_name(name),
            IfaceChoice::Address(ip) => self.by_address(*ip),
            IfaceChoice::Regex(regex) => self
                .usable()
                .find(|(_, address)| regex.is_match(&address.ip.to_string()))
                .or_else(|| self.usable().find(|(link, _)| regex.is_match(&link.name))),
            IfaceChoice::CanReach(ip) => netlink.path_to(*ip)?.and_then(|path| self.by_path(path)),
            IfaceChoice::Default => self.by_default(netlink, config)?,
        })
    }

    /// What was chosen before, if it still has its address.
    fn kept(&self, present: &Chosen) -> Option<(&Link, &Address)> {
        let link = self.links.iter().find(|link| link.index == present.link)?;
        let on_link =
            |address: &&Address| address.link == link.index && address.ip == present.local;
        Some((link, self.addresses.iter().find(on_link)?))
    }

    /// Interfaces that are up, with each of their addresses, better addresses first.
    fn usable(&self) -> impl Iterator<Item = (&Link, &Address)> {
        let mut addresses: Vec<&Address> = self.addresses.iter().collect();
        addresses.sort_by_key(|address| (address.ip.is_ipv6(), address.demerits));
        addresses.into_iter().filter_map(|address| {
            let link = self.links.iter().find(|link| link.index == address.link)?;
            let is_ours = link.kind == "vxlan" || link.alias == bridge::ALIAS;
            let carries = link.up && !link.loopback && !is_ours;
            let ip = address.ip;
            let reaches = !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            let fits = self.over_ipv4.is_none_or(|over_ipv4| ip.is_ipv4() == over_ipv4);
            (carries && reaches && fits).then_some((link, address))
        })
    }

    fn by_name(&self, name: &str) -> Option<(&Link, &Address)> {
        self.usable().find(|(link, _)| link.name == name)
    }

    fn by_address(&self, ip: IpAddr) -> Option<(&Link, &Address)> {
        self.usable().find(|(_, address)| address.ip == ip)
    }

    fn by_path(&self, path: Path) -> Option<(&Link, &Address)> {
        let on_link = || self.usable().filter(move |(link, _)| link.index == path.link);
        on_link().find(|(_, address)| Some(address.ip) == path.source).or_else(|| on_link().next())
    }

    fn by_default(
        &self,
        netlink: &mut Netlink,
        config: &Config,
    ) -> Result<Option<(&Link, &Address)>, UnderlayError> {
        if let Some(listen) = config.listen.filter(|listen| !listen.ip().is_unspecified()) {
            return Ok(self.by_address(listen.ip()));
        }
        if let Some(found) = config.advertise.and_then(|(ip, _)| self.by_address(ip)) {
            return Ok(Some(found));
        }
        if let Some(found) = netlink.default_path()?.and_then(|path| self.by_path(path)) {
            return Ok(Some(found));
        }
        for seed in config.seeds.iter().filter_map(|seed| seed.parse::<SocketAddr>().ok()) {
            if let Some(found) = netlink.path_to(seed.ip())?.and_then(|path| self.by_path(path)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn only_candidate(&self) -> Option<(&Link, &Address)> {
        let first = self.usable().next();
        first.filter(|(link, _)| self.usable().all(|(l, _)| l.index == link.index))
    }

    fn no_match(&self, choice: &IfaceChoice) -> UnderlayError {
        let what = match choice {
            IfaceChoice::Name(name) => format!("no interface {name} that is up with an address"),
            IfaceChoice::Address(ip) => format!("no interface that is up has address {ip}"),
            IfaceChoice::Regex(regex) => format!("no interface that is up matches {regex}"),
            IfaceChoice::CanReach(ip) => format!("no interface leads to {ip}"),
            IfaceChoice::Default => {
                "there is no default route, so choose an interface with --iface".to_owned()
            }
        };
        let list: Vec<_> = self
            .usable()
            .map(|(link, address)| format!("{} ({})", link.name, address.ip))
            .collect();
        let candidates = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        UnderlayError::NoMatch { what, candidates }
    }
}
