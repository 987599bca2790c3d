//! Interfaces with routes and addresses that the kernel has learned from router advertisements.
//!
//! When forwarding of IPv6 is turned on, the kernel drops such routes and accepts no more
//! advertisements, unless `accept_ra` is 2. A host that becomes a router would lose its own default
//! route.

use std::{collections::BTreeSet, io};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressHeaderFlags, AddressMessage, AddressScope},
    route::{RouteAttribute, RouteMessage, RouteProtocol},
};

use super::is_overlay_device;
use crate::{
    model::dotted,
    netlink::{Netlink, link::Link},
    pods::desired::ALIAS,
    sysctl::{read, write},
};

/// Kinds of interfaces that may lead to routers; physical interfaces have the empty kind.
const UPLINKS: [&str; 4] = ["", "bond", "team", "vlan"];

/// Interfaces that accept advertisements, and would not once this host forwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdvertisedInterfaces {
    /// Names of interfaces that have routes or addresses from advertisements.
    pub learned: Vec<String>,
    /// Names of interfaces that may get some.
    pub may_learn: Vec<String>,
}

impl AdvertisedInterfaces {
    /// Lists the interfaces of this thread's network namespace. `underlay` counts as an uplink
    /// whatever its kind.
    ///
    /// # Errors
    /// When the kernel's tables cannot be read.
    pub fn find(underlay: &str) -> io::Result<Self> {
        let mut netlink = Netlink::open()?;
        let learned = learned_interfaces(&mut netlink)?;
        let mut found = Self::default();
        for link in netlink.links()? {
            let ours = is_overlay_device(&link) || link.alias == ALIAS;
            if ours || link.loopback || !accepts_advertisements(&link.name) {
                continue;
            }
            if learned.contains(&link.index) {
                found.learned.push(link.name);
            } else if link.name == underlay || is_uplink(&link) {
                found.may_learn.push(link.name);
            }
        }
        Ok(found)
    }

    /// Lets all of them accept advertisements also while this host forwards. Returns the names of
    /// the interfaces that were changed.
    ///
    /// # Errors
    /// When `accept_ra` of an interface with learned routes cannot be set; the message contains the
    /// command that does so.
    pub fn keep(&self) -> Result<BTreeSet<String>, String> {
        let mut kept = BTreeSet::new();
        for interface in &self.learned {
            set_accept_ra(interface).map_err(|error| {
                format!(
                    "{interface} has routes or addresses from router advertisements, which the kernel would \
                     drop, and {} cannot be set to 2 ({error}): run sysctl -w {0}=2",
                    dotted(&accept_ra_path(interface))
                )
            })?;
            kept.insert(interface.clone());
        }
        kept.extend(self.may_learn.iter().filter(|name| set_accept_ra(name).is_ok()).cloned());
        Ok(kept)
    }

    /// Returns the arguments of `sysctl -w` that preserve the learned routes.
    pub fn arguments(&self) -> String {
        self.learned.iter().map(|name| format!("{}=2 ", dotted(&accept_ra_path(name)))).collect()
    }
}

/// Lets an interface that was re-created accept advertisements again; returns whether it was
/// changed.
pub fn restore_accept_ra(interface: &str) -> bool {
    has_default_accept_ra(interface) && set_accept_ra(interface).is_ok()
}

/// Sets `accept_ra` to 2.
fn set_accept_ra(interface: &str) -> io::Result<()> {
    write(&accept_ra_path(interface), "2")
}

fn accept_ra_path(interface: &str) -> String {
    format!("net/ipv6/conf/{interface}/accept_ra")
}

/// Whether the kernel accepts advertisements on the interface. If `accept_ra` is 0, another program
/// (systemd-networkd, NetworkManager) handles them, or the operator wants none.
fn accepts_advertisements(interface: &str) -> bool {
    let is = |setting: &str, value: &str| {
        read(&format!("net/ipv6/conf/{interface}/{setting}")).is_some_and(|is| is == value)
    };
    is("accept_ra", "1") && is("forwarding", "0") && is("disable_ipv6", "0")
}

/// Whether `accept_ra` is 1, which ends advertisements on a host that forwards.
fn has_default_accept_ra(interface: &str) -> bool {
    read(&accept_ra_path(interface)).is_some_and(|value| value == "1")
}

fn is_uplink(link: &Link) -> bool {
    UPLINKS.contains(&link.kind.as_str())
}

/// Returns the indexes of interfaces with routes or non-permanent global addresses from
/// advertisements.
fn learned_interfaces(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet6;
    filter.header.protocol = RouteProtocol::Ra;
    let mut learned = BTreeSet::new();
    for message in netlink.dump(&RouteNetlinkMessage::GetRoute(filter))? {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            learned.extend(route.attributes.iter().filter_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            }));
        }
    }
    let mut filter = AddressMessage::default();
    filter.header.family = AddressFamily::Inet6;
    for message in netlink.dump(&RouteNetlinkMessage::GetAddress(filter))? {
        if let RouteNetlinkMessage::NewAddress(address) = message
            && address.header.scope == AddressScope::Universe
            && !address.header.flags.contains(AddressHeaderFlags::Permanent)
        {
            learned.insert(address.header.index);
        }
    }
    Ok(learned)
}
