//! Interfaces with the bridge's name that prevent pods from being connected.

use std::io;

use ipnet::IpNet;

use super::{
    desired::{ALIAS, Bridge},
    gateway, is_address_mac, mac_at,
};
use crate::{
    model::{Mac, Problem, ProblemCode, Subnets, is_link_local},
    netlink::{
        Netlink,
        link::{Address, Link},
    },
};

/// Returns why an interface with the bridge's name is not gossamer's bridge; `None` if it is.
///
/// The bridge has gossamer's alias. If an agent ended while creating it, it may lack the alias and have the
/// MAC that follows from the gateway's address. Without an agent (`subnets` is `None`) any MAC that follows
/// from an address counts.
pub fn obstacle(link: &Link, subnets: Option<Subnets>) -> Option<Problem> {
    let has_mac = |mac: Mac| match subnets {
        Some(subnets) => mac == mac_at(gateway(subnets.first)),
        None => is_address_mac(mac),
    };
    let is_ours = link.alias == ALIAS || link.mac.is_some_and(has_mac);
    (link.kind != "bridge" || !is_ours).then(|| {
        let name = &link.name;
        let what =
            format!("no pod can be connected: the interface {name} belongs to another program");
        let fix = "choose another name for the pods' bridge (the setting bridge)";
        Problem::new(ProblemCode::PodsRefused, name, what, fix)
    })
}

/// Returns why no pod can be plugged into the interface with the name of this bridge; `None` if one can.
///
/// # Errors
/// If the kernel's addresses or interfaces cannot be read.
pub(super) fn to(
    bridge: &Bridge,
    link: &Link,
    netlink: &mut Netlink,
) -> io::Result<Option<Problem>> {
    match obstacle(link, Some(bridge.subnets)) {
        None => other_overlay(netlink, link, bridge),
        obstacle => Ok(obstacle),
    }
}

/// Returns an obstacle if the bridge belongs to another overlay on this host. Then it has a gateway's address
/// in a subnet from which another VXLAN device has its VTEP's address.
fn other_overlay(
    netlink: &mut Netlink,
    link: &Link,
    bridge: &Bridge,
) -> io::Result<Option<Problem>> {
    let has = netlink.addresses()?;
    // Link-local addresses are in the same network on every interface.
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
        let name = &link.name;
        let what = format!(
            "no pod can be connected: bridge {name} has the pods of another overlay on this host ({})",
            device.name
        );
        let fix = "choose another name for this one's bridge (the setting bridge)";
        Problem::new(ProblemCode::PodsRefused, name, what, fix)
    }))
}
