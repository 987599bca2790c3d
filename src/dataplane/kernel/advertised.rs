//! Interfaces with routes and addresses that the kernel has learned from router advertisements.
//!
//! A kernel that forwards IPv6 drops such routes and takes no more advertisements, unless `accept_ra` is 2:
//! a host that is turned into a router would lose its own default route.

use std::{collections::BTreeSet, io};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressHeaderFlags, AddressMessage, AddressScope},
    route::{RouteAttribute, RouteMessage, RouteProtocol},
};

use super::{
    is_gossamers,
    sysctl::{dotted, read, write},
};
use crate::{
    netlink::{Netlink, link::Link},
    pods::bridge::ALIAS,
};

/// Kinds of interfaces that lead to routers; physical ones have none.
const UPLINKS: [&str; 4] = ["", "bond", "team", "vlan"];

/// Interfaces that take advertisements now and would not when this host forwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advertised {
    /// They have routes or addresses from advertisements.
    pub learned: Vec<String>,
    /// They may get some.
    pub may_learn: Vec<String>,
}

impl Advertised {
    /// Asks the kernel of this thread's network namespace. `underlay` is an uplink whatever its kind.
    pub fn find(underlay: &str) -> io::Result<Self> {
        let mut netlink = Netlink::open()?;
        let learned = learned(&mut netlink)?;
        let mut found = Self::default();
        for link in netlink.links()? {
            let ours = is_gossamers(&link) || link.alias == ALIAS;
            if ours || link.loopback || !takes_them(&link.name) {
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

    /// Makes all of them take advertisements from a host that forwards, too. Gives those that do now.
    ///
    /// # Errors
    /// The interface whose routes would be lost, and the command that keeps them.
    pub fn keep(&self) -> Result<BTreeSet<String>, String> {
        let mut kept = BTreeSet::new();
        for interface in &self.learned {
            keep(interface).map_err(|error| {
                format!(
                    "{interface} has routes or addresses from router advertisements, which the kernel would \
                     drop, and {} cannot be set to 2 ({error}): run sysctl -w {0}=2",
                    dotted(&setting(interface))
                )
            })?;
            kept.insert(interface.clone());
        }
        kept.extend(self.may_learn.iter().filter(|name| keep(name).is_ok()).cloned());
        Ok(kept)
    }

    /// Arguments of `sysctl -w` that keep what was learned.
    pub fn arguments(&self) -> String {
        self.learned.iter().map(|name| format!("{}=2 ", dotted(&setting(name)))).collect()
    }
}

/// Makes an interface take advertisements again that has been re-created since.
pub fn keep_again(interface: &str) -> bool {
    takes_them_no_more(interface) && keep(interface).is_ok()
}

fn keep(interface: &str) -> io::Result<()> {
    write(&setting(interface), "2")
}

fn setting(interface: &str) -> String {
    format!("net/ipv6/conf/{interface}/accept_ra")
}

/// With 0 another program (systemd-networkd, NetworkManager) does it, or the operator wants none.
fn takes_them(interface: &str) -> bool {
    let is = |setting: &str, value: &str| {
        read(&format!("net/ipv6/conf/{interface}/{setting}")).is_some_and(|is| is == value)
    };
    is("accept_ra", "1") && is("forwarding", "0") && is("disable_ipv6", "0")
}

fn takes_them_no_more(interface: &str) -> bool {
    read(&setting(interface)).is_some_and(|value| value == "1")
}

fn is_uplink(link: &Link) -> bool {
    UPLINKS.contains(&link.kind.as_str())
}

/// Indexes of interfaces.
fn learned(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
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
