//! Chooses the interface and address that carry the tunnels.
//!
//! Without a setting, this is the interface of the best default route, unless it leads to no peer and
//! another one does; without a default route, the interface by which the kernel would reach a distant
//! host or a seed; without seeds, the only candidate. Of several addresses of an interface, the one that
//! the kernel would use as source is chosen. gossamer's interfaces, ports of bridges, and addresses that
//! peers cannot reach or that are deprecated never carry tunnels.
//!
//! [`watch`] decides when a change counts.

mod carrier;
mod errors;
mod host;
mod limits;
mod own;
mod watch;

use std::{io, net::IpAddr};

use ipnet::IpNet;

use self::host::Host;
pub(crate) use self::limits::limits;
pub use self::{carrier::Flaps, own::is_own_address, watch::Watch};
use crate::{
    config::Config,
    dataplane::desired::{Mode, Underlay, overhead},
    netlink::Netlink,
};

/// MTU in bytes if no interface provides one.
const ETHERNET_MTU: u32 = 1_500;

/// This host's end of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenUnderlay {
    /// Name of the interface; empty while there is none and the address is the last known one.
    pub name: String,
    /// Index of the interface.
    pub link: u32,
    /// Whether tunnel packets must leave by this interface regardless of the main table, because it is
    /// in a VRF.
    pub pinned: bool,
    /// The address that carries the tunnels.
    pub local: IpAddr,
    /// Source of tunnel packets: the advertised address if this host has it, because the peers' guards
    /// accept only that one.
    pub source: IpAddr,
    /// Networks of the interface: their hosts are reached without a router.
    pub networks: Vec<IpNet>,
    /// MTU of the interface in bytes.
    pub carried: u32,
    /// MTU of the overlay for pods in bytes.
    pub mtu: u32,
    /// MTU of the overlay device in bytes: the same, unless packets without a tunnel may be larger.
    pub tunnel_mtu: u32,
}

impl ChosenUnderlay {
    /// Returns the remembered end for a host without a network, so that its pods are served.
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

    /// Returns whether an interface was found.
    pub const fn is_present(&self) -> bool {
        !self.name.is_empty()
    }

    /// Converts to the form that the data plane uses.
    pub fn with_mode(&self, mode: Mode) -> Underlay {
        let Self { link, pinned, source: local, ref networks, tunnel_mtu, .. } = *self;
        let networks = networks.clone();
        Underlay { pinned, networks, mode, ..Underlay::of_tunnels(link, local, tunnel_mtu) }
    }
}

/// Why no interface can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// No interface fits the settings.
    #[error("iface: {what}; interfaces with addresses are: {candidates}")]
    NoMatch { what: String, candidates: String },
    /// This host does not have the address that the setting `listen` names. The socket is bound to it all the
    /// same, and works as soon as the address appears.
    #[error(
        "listen: this host has no address {listen}; it has {candidates}. Add the address, or correct \
         listen (--listen) and restart the agent"
    )]
    NoListenAddress { listen: IpAddr, candidates: String },
    /// The setting `mtu` is too large.
    #[error(
        "mtu: {mtu} does not fit interface {iface} with MTU {underlay}: use at most {most} \
         or leave it out"
    )]
    Mtu { mtu: u32, iface: String, underlay: u32, most: u32 },
    /// The interface has lost the address.
    #[error(
        "address {address} has vanished from interface {iface} (there now: {others}): the agent waits \
         until {awaited}. If the address was leased, look at the DHCP client of {iface}, else give it \
         back (ip addr add {address}/LENGTH dev {iface})"
    )]
    Vanished { address: IpAddr, iface: String, others: String, awaited: String },
    /// Another interface has the address.
    #[error(
        "address {address} is on interface {now} now, and iface = \"{iface}\" forbids that one: set iface = \
         \"{now}\" (--iface {now}) and restart the agent"
    )]
    Moved { address: IpAddr, iface: String, now: String },
    /// The interface is a port of another one.
    #[error(
        "{iface} is a port of {controller} and nevertheless has the address {address}, so {controller} \
         receives its packets. Move the address there (ip addr del {address} dev {iface}; ip addr add \
         {address} dev {controller}), and routes that go by {iface}"
    )]
    Port { iface: String, controller: String, address: IpNet },
    /// The interface has no carrier.
    #[error("iface: {iface} has no carrier: {why}")]
    NoCarrier { iface: String, why: String },
    /// The kernel cannot be queried.
    #[error("netlink: {0}")]
    Netlink(String),
}

impl From<io::Error> for UnderlayError {
    fn from(error: io::Error) -> Self {
        Self::Netlink(error.to_string())
    }
}

/// Chooses an address. Of several uplinks, the one is preferred by which the kernel reaches `peers` and
/// the seeds.
///
/// # Errors
/// Fails if no interface fits, or the kernel cannot be queried.
pub fn choose(
    netlink: &mut Netlink,
    config: &Config,
    peers: impl Iterator<Item = IpAddr>,
) -> Result<ChosenUnderlay, UnderlayError> {
    let mut host = Host::read(netlink, config, peers)?;
    if let Some(error) = host.listen_error(config) {
        return Err(error);
    }
    host.keep_bound(config);
    match host.by_config(netlink, config, None)? {
        Some(found) => host.chosen(netlink, found, config),
        None => Err(host.port_error(&config.iface).unwrap_or_else(|| host.no_match(&config.iface))),
    }
}

/// A comparison of the present choice with the current interfaces.
#[derive(Clone, Debug)]
pub struct UnderlayCheck {
    /// The best choice; the present one unless another is better.
    pub found: Result<ChosenUnderlay, UnderlayError>,
    /// Whether the interface still has the present address.
    pub present_holds: bool,
}

/// Compares the present choice with the current interfaces.
///
/// An address stays chosen while its interface has it, unless the operator left the choice open and the
/// best default route leads over another interface, by which the kernel also reaches the peers. Only
/// addresses of the present family count, because existing tunnels use it.
pub fn recheck(
    netlink: &mut Netlink,
    config: &Config,
    present: &ChosenUnderlay,
    peers: impl Iterator<Item = IpAddr>,
) -> UnderlayCheck {
    let check = |netlink: &mut Netlink| -> Result<(ChosenUnderlay, bool), UnderlayError> {
        let mut host = Host::read(netlink, config, peers)?;
        host.candidates.retain(|candidate| candidate.ip.is_ipv4() == present.local.is_ipv4());
        // The vanished address of the underlay is usually this one, which is reported as such.
        let unbound = host.listen_error(config);
        host.keep_bound(config);
        let held = host.held(present, &config.iface);
        let best = host.by_config(netlink, config, Some(present))?;
        let found = match (held, best) {
            (Some(held), Some(best)) if held.link != best.link => best,
            (Some(held), _) => held,
            (None, Some(best)) => best,
            (None, None) => host.deprecated_present(present)?.ok_or_else(|| {
                let moved_error = host.moved_error(present, config);
                moved_error
                    .or_else(|| host.vanished_error(present, config))
                    .or_else(|| unbound.clone())
                    .unwrap_or_else(|| host.no_match(&config.iface))
            })?,
        };
        if let Some(unbound) = unbound {
            return Err(unbound);
        }
        if let Some(link) = host.link(found.link).filter(|link| !link.carrier) {
            return Err(host.no_carrier(link));
        }
        Ok((host.chosen(netlink, found, config)?, held.is_some()))
    };
    match check(netlink) {
        Ok((found, present_holds)) => UnderlayCheck { found: Ok(found), present_holds },
        Err(error) => UnderlayCheck { found: Err(error), present_holds: false },
    }
}
