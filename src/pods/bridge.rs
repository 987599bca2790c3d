//! The bridge of this host's pods, with the gateway's addresses, and the pods' ports on it.
//!
//! The bridge is created for the first pod and repaired whenever it differs from the desired state. The
//! caller supplies the pods' ports.

use std::{collections::BTreeSet, io};

use rtnetlink::{
    LinkBridge, LinkUnspec,
    packet_route::{
        RouteNetlinkMessage,
        link::{
            BridgeBooleanOptionFlags, BridgeStpState, InfoBridge, InfoData, LinkAttribute, LinkInfo,
        },
    },
};

use super::{
    agent_pod,
    desired::{ALIAS, Bridge, ReadyBridge, RepairReport, Tenants},
    gateway, mac_at,
    names::{is_link_name, loose_end},
    neighbors, obstacle, port,
    renamed::restore_names,
    requests::{address_request, without_address},
};
use crate::{
    model::is_link_local,
    netlink::{
        Netlink, Request,
        link::{Address, Link},
        local::local_route,
    },
    sysctl::interface::{self, Ipv6},
};

/// Creates the bridge, or repairs it. Removes addresses of subnets that this node no longer has.
pub(super) fn ensure(
    netlink: &mut Netlink,
    bridge: &Bridge,
) -> io::Result<(ReadyBridge, RepairReport)> {
    let mut report = RepairReport::default();
    let found = netlink.link(&bridge.name)?;
    let is_new = found.is_none();
    let link = match found {
        Some(link) => link,
        None => {
            report.bridge += 1;
            remove_stale(netlink, bridge)?;
            create(netlink, bridge)?
        }
    };
    if let Some(obstacle) = obstacle::to(bridge, &link, netlink)? {
        return Err(io::Error::other(obstacle.to_string()));
    }
    // Before the bridge is up, because it receives no packets until then.
    let closed = interface::close(&bridge.name, bridge.ipv6());
    report.sysctls += if is_new { 0 } else { closed.set };
    report.open = closed.problems;
    if !is_correct(&link, bridge) {
        let change = LinkUnspec::new_with_index(link.index).mtu(bridge.mtu).alias(ALIAS).up();
        netlink.set_link(change)?;
        netlink.apply_one(settings(&link), 0)?;
        report.bridge += 1;
    }
    let all: Vec<Address> = netlink.addresses()?;
    let unreceived = match link.up && link.controller().is_none() {
        true => netlink.unreceived(link.index, &all)?,
        false => BTreeSet::new(),
    };
    let mut has = all.iter().filter(|address| address.link == link.index);
    // Addresses of a subnet that belongs to another node by now would make that subnet unreachable.
    for address in has.clone().filter(|address| !bridge.is_gateway(address.ip)) {
        if !is_link_local(address.ip) {
            netlink.remove_address(link.index, address.ip, address.prefix_len)?;
            report.bridge += 1;
        }
    }
    for subnet in bridge.subnets.iter() {
        let ip = gateway(subnet);
        if unreceived.contains(&ip) {
            let Request { message, flags } = local_route(link.index, ip);
            netlink.apply_one(message, flags)?;
            report.bridge += 1;
        } else if !has.any(|address| address.ip == ip) {
            let Request { message, flags } = address_request(link.index, ip, subnet.prefix_len());
            netlink.apply_one(message, flags)?;
            report.bridge += 1;
        }
    }
    if report.bridge > 0 {
        report.last = Some((format!("bridge {}", bridge.name), link.index));
    }
    Ok((ReadyBridge { bridge: bridge.clone(), index: link.index, mac: link.mac }, report))
}

/// Repairs the pods' ports: puts those that are down or not on the bridge back on it, and sets sysctls and
/// port settings.
pub(super) fn repair_ports(
    netlink: &mut Netlink,
    ready_bridge: &ReadyBridge,
    ports: &Tenants,
    report: &mut RepairReport,
) -> io::Result<()> {
    let mut links = netlink.links()?;
    restore_names(netlink, &mut links, ports, report)?;
    let existing: BTreeSet<&String> = links.iter().map(|link| &link.name).collect();
    report.absent = ports.keys().filter(|name| !existing.contains(name)).cloned().collect();
    let is_loose = |name: &&String| existing.contains(&loose_end(name));
    report.loose = ports.keys().filter(is_loose).cloned().collect();
    let foreign_ports = links.iter().filter(|link| is_foreign(link, ready_bridge.index, ports));
    report.foreign_ports = foreign_ports.map(|link| link.name.clone()).collect();
    for port in links.iter().filter(|link| ports.contains_key(&link.name)) {
        let closed = interface::close_port(&port.name);
        report.sysctls += closed.set;
        // One problem stands for the same one of all ports.
        if report.open.is_empty() {
            report.open = closed.problems;
        }
        if !is_plugged(port, ready_bridge.index) {
            netlink.set_link(
                LinkUnspec::new_with_index(port.index).controller(ready_bridge.index).up(),
            )?;
            netlink.apply_one(port::hairpin(&port.name).message, 0)?;
        }
        let changes = port::repair(port);
        if !is_plugged(port, ready_bridge.index) || !changes.is_empty() {
            // The pod may be ending, or its end may have gone down in the meantime.
            let refused = netlink.apply(changes)?;
            refused.iter().for_each(|refused| {
                tracing::debug!(port = %port.name, error = %refused.to_io(), "port not repaired");
            });
            report.note_port(&port.name, port.index);
        }
        // A smaller MTU would drop packets to the pod. A larger one was set before the bridge's MTU changed.
        if port.mtu < ready_bridge.bridge.mtu {
            netlink
                .set_link(LinkUnspec::new_with_index(port.index).mtu(ready_bridge.bridge.mtu))?;
            report.note_port(&port.name, port.index);
        }
    }
    neighbors::keep(netlink, ready_bridge, ports, report)
}

/// Removes a bridge that had another name in an earlier run, because it has the gateway's address. Its ports
/// are put on the new bridge afterwards.
fn remove_stale(netlink: &mut Netlink, bridge: &Bridge) -> io::Result<()> {
    let links = netlink.links()?;
    let has = netlink.addresses()?;
    let former = |link: &&Link| {
        let held = |address: &Address| address.link == link.index && bridge.is_gateway(address.ip);
        link.alias == ALIAS && link.kind == "bridge" && has.iter().any(held)
    };
    links.iter().filter(former).try_for_each(|link| netlink.delete_link(link.index))
}

/// Returns whether a port of the bridge belongs to another program. Veth pairs of pods that are gone and
/// those of the agent's own pods do not.
pub(super) fn is_foreign(link: &Link, bridge: u32, ports: &Tenants) -> bool {
    let is_ours = || {
        let name = &link.name;
        ports.contains_key(name) || is_link_name(name) || agent_pod::is_link_name(name)
    };
    link.is_plugged_into(bridge) && !is_ours()
}

/// Returns whether a port is up and on the bridge.
pub(super) fn is_plugged(port: &Link, bridge: u32) -> bool {
    port.up && port.is_plugged_into(bridge)
}

/// Returns whether the bridge is in the desired state, except for its addresses.
pub(super) fn is_correct(link: &Link, bridge: &Bridge) -> bool {
    link.up
        && link.mtu == bridge.mtu
        && link.alias == ALIAS
        && link.name == bridge.name
        && !has_wrong_settings(link)
}

/// Returns a request for the settings that protect pods from each other and from lost packets.
///
/// - `no_linklocal_learn`: the bridge learns the source of a frame to a link-local group before nftables sees
///   it. A pod with `CAP_NET_RAW` could take over another pod's MAC that way, or fill memory with MACs.
/// - `mcast_snooping`: after a pod's queries for multicast listeners, a snooping bridge would withhold
///   neighbor solicitations from all other pods.
/// - `stp_state`: spanning tree blocks a new port for 30 s.
/// - `vlan_filtering`: a filter drops packets of ports without a VLAN. Sent only if the filter is on, because
///   kernels without VLAN support refuse the setting.
fn settings(link: &Link) -> RouteNetlinkMessage {
    let message = LinkBridge::new(&link.name)
        .no_linklocal_learn(true)
        .mcast_snooping(false)
        .stp_state(BridgeStpState::Disabled);
    let filters =
        reported_settings(link).any(|setting| *setting == InfoBridge::VlanFiltering(true));
    let message = if filters { message.vlan_filtering(false) } else { message };
    RouteNetlinkMessage::NewLink(message.build())
}

/// Returns whether a setting of [`settings`] has another value. Settings that the kernel does not report
/// count as correct.
fn has_wrong_settings(link: &Link) -> bool {
    reported_settings(link).any(|setting| match setting {
        InfoBridge::MultiBoolOpt(options) => {
            !options.value.contains(BridgeBooleanOptionFlags::NoLinkLocalLearn)
        }
        InfoBridge::MulticastSnooping(is_on) | InfoBridge::VlanFiltering(is_on) => *is_on,
        InfoBridge::StpState(state) => *state != BridgeStpState::Disabled,
        _ => false,
    })
}

/// Returns the settings of a bridge that the kernel reports.
fn reported_settings(link: &Link) -> impl Iterator<Item = &InfoBridge> {
    let infos = link.message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let settings = infos.flatten().filter_map(|info| match info {
        LinkInfo::Data(InfoData::Bridge(settings)) => Some(settings),
        _ => None,
    });
    settings.flatten()
}

fn create(netlink: &mut Netlink, bridge: &Bridge) -> io::Result<Link> {
    // A bridge without an assigned MAC takes the lowest MAC of its ports, which changes with them.
    let mac = mac_at(gateway(bridge.subnets.first)).as_bytes().to_vec();
    // An MTU set at creation would follow the ports' MTUs. One that is set later stays.
    netlink.create_link(LinkBridge::new(&bridge.name).address(mac).build())?;
    if bridge.ipv6() == Ipv6::Off {
        let _ = netlink.apply_one(without_address(&bridge.name).message, 0);
    }
    netlink.link(&bridge.name)?.ok_or_else(|| io::ErrorKind::NotFound.into())
}
