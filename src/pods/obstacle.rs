//! What keeps pods from being plugged into the interface that has the bridge's name.

use std::io;

use ipnet::IpNet;

use super::{
    bridge::{ALIAS, Bridge, is_address_mac, is_link_local, mac_at},
    gateway,
};
use crate::{
    model::{Mac, Subnets},
    netlink::{
        Netlink,
        link::{Address, Link},
    },
};

/// Why no pod can be plugged into an interface that has the bridge's name; none, if it is the bridge.
///
/// It is known by its alias, or by its MAC if an agent ended in the middle of making it. Without an agent the
/// subnets are not known.
pub fn obstacle(link: &Link, subnets: Option<Subnets>) -> Option<String> {
    let has_mac = |mac: Mac| match subnets {
        Some(subnets) => mac == mac_at(gateway(subnets.first)),
        None => is_address_mac(mac),
    };
    let is_ours = link.alias == ALIAS || link.mac.is_some_and(has_mac);
    (link.kind != "bridge" || !is_ours).then(|| {
        format!(
            "no pod can be connected: an interface {} is there and is not gossamer's: choose another name \
             for the pods' bridge (the setting bridge)",
            link.name
        )
    })
}

/// Why no pod can be plugged into an interface that has the name of this bridge.
///
/// # Errors
/// The kernel does not show its addresses or interfaces.
pub(super) fn to(
    bridge: &Bridge,
    link: &Link,
    netlink: &mut Netlink,
) -> io::Result<Option<String>> {
    match obstacle(link, Some(bridge.subnets)) {
        None => other_overlay(netlink, link, bridge),
        obstacle => Ok(obstacle),
    }
}

/// Why the bridge is not this overlay's but that of another one on this host: it has a gateway of a subnet
/// whose VTEP another device has.
fn other_overlay(
    netlink: &mut Netlink,
    link: &Link,
    bridge: &Bridge,
) -> io::Result<Option<String>> {
    let has = netlink.addresses()?;
    // Every interface with IPv6 has an address in the same link-local network.
    let is_foreign = |address: &&Address| {
        address.link == link.index && !bridge.is_gateway(address.ip) && !is_link_local(address.ip)
    };
    let foreign = has.iter().filter(is_foreign);
    let foreign: Vec<IpNet> =
        foreign.filter_map(|address| IpNet::new(address.ip, address.prefix_len).ok()).collect();
    if foreign.is_empty() {
        return Ok(None);
    }
    let links = netlink.links()?;
    let is_its_vtep = |device: &Link, address: &Address| {
        address.link == device.index && foreign.iter().any(|network| network.contains(&address.ip))
    };
    let mut devices =
        links.iter().filter(|device| device.kind == "vxlan" && device.name != bridge.table);
    let device = devices.find(|device| has.iter().any(|address| is_its_vtep(device, address)));
    Ok(device.map(|device| {
        format!(
            "no pod can be connected: bridge {} has the pods of another overlay on this host ({}): choose \
             another name for this one's bridge (the setting bridge)",
            link.name, device.name
        )
    }))
}
