//! Which interface carries the tunnels, and under which address.
//!
//! Without a choice of the operator: the interface of the best default route, unless it leads to no peer and
//! another one does; without a default route, the one by which the kernel would reach a distant host or a
//! seed; without seeds, the only candidate there is. Of several addresses of an interface it is the one that
//! the kernel would take as source. Interfaces of our own, ports of bridges, and addresses that peers cannot
//! reach or that are about to go never carry tunnels.
//!
//! [`watch`] decides when a change counts.

mod carrier;
mod host;
mod watch;

use std::{io, net::IpAddr};

use ipnet::IpNet;

use self::host::Host;
pub use self::{carrier::Flaps, watch::Watch};
use crate::{
    config::Config,
    dataplane::desired::{Mode, Underlay, overhead},
    netlink::Netlink,
};

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
    #[error(
        "address {address} has vanished from interface {iface} (there now: {others}): the agent \
         waits until {awaited}; where the address was leased, look at the DHCP client of {iface}, else give \
         it back (ip addr add {address}/LENGTH dev {iface})"
    )]
    Vanished { address: IpAddr, iface: String, others: String, awaited: String },
    #[error(
        "address {address} is on interface {now} now, and iface = \"{iface}\" forbids that one: set iface = \
         \"{now}\" (--iface {now}) and restart the agent"
    )]
    Moved { address: IpAddr, iface: String, now: String },
    #[error(
        "{iface} is a port of {controller} and has the address {address} all the same, so {controller} takes \
         what comes in for it: move the address there (ip addr del {address} dev {iface}; ip addr add \
         {address} dev {controller}, and routes that go by {iface})"
    )]
    Port { iface: String, controller: String, address: IpNet },
    #[error("iface: {iface} has no carrier: {why}")]
    NoCarrier { iface: String, why: String },
    #[error("netlink: {0}")]
    Netlink(String),
}

impl From<io::Error> for UnderlayError {
    fn from(error: io::Error) -> Self {
        Self::Netlink(error.to_string())
    }
}

/// Chooses from the interfaces as they are now. Of several uplinks it is the one by which the kernel reaches
/// `peers`, as far as any are known, and the seeds.
pub fn choose(
    netlink: &mut Netlink,
    config: &Config,
    peers: impl Iterator<Item = IpAddr>,
) -> Result<Chosen, UnderlayError> {
    let host = Host::look(netlink, config, peers)?;
    match host.by_config(netlink, config, None)? {
        Some(found) => host.chosen(netlink, found, config),
        None => Err(host.misplaced(&config.iface).unwrap_or_else(|| host.no_match(&config.iface))),
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
/// the best default route leads over another interface, by which the kernel also reaches the peers. Only
/// addresses of the present family count, for the tunnels that exist go over it.
pub fn look_again(
    netlink: &mut Netlink,
    config: &Config,
    present: &Chosen,
    peers: impl Iterator<Item = IpAddr>,
) -> Look {
    let look = |netlink: &mut Netlink| -> Result<(Chosen, bool), UnderlayError> {
        let mut host = Host::look(netlink, config, peers)?;
        host.candidates.retain(|candidate| candidate.ip.is_ipv4() == present.local.is_ipv4());
        // A socket that is bound to one address receives what is sent to that one alone.
        let bound = config.listen.map(|listen| listen.ip()).filter(|ip| !ip.is_unspecified());
        if let (Some(bound), None) = (bound, config.advertise) {
            host.candidates.retain(|candidate| candidate.ip == bound);
        }
        let held = host.held(present, &config.iface);
        let best = host.by_config(netlink, config, Some(present))?;
        let found = match (held, best) {
            (Some(held), Some(best)) if held.link != best.link => best,
            (Some(held), _) => held,
            (None, Some(best)) => best,
            (None, None) => host.fading(present)?.ok_or_else(|| {
                let moved = host.moved(present, config);
                moved
                    .or_else(|| host.vanished(present, config))
                    .unwrap_or_else(|| host.no_match(&config.iface))
            })?,
        };
        if let Some(link) = host.link(found.link).filter(|link| !link.carrier) {
            return Err(host.no_carrier(link));
        }
        Ok((host.chosen(netlink, found, config)?, held.is_some()))
    };
    match look(netlink) {
        Ok((found, present_holds)) => Look { found: Ok(found), present_holds },
        Err(error) => Look { found: Err(error), present_holds: false },
    }
}
