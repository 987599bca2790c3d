//! The bridge of this host's pods, with the gateway's addresses, and the pods' ports on it.
//!
//! The bridge is created for the first pod and repaired whenever it differs from the desired state. The
//! caller supplies the pods' ports.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use rtnetlink::{
    LinkBridge, LinkUnspec,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        link::{
            BridgeBooleanOptionFlags, BridgeStpState, InfoBridge, InfoData, LinkAttribute, LinkInfo,
        },
    },
};

use super::{
    gateway,
    names::{is_link_name, loose_end},
    neighbors, obstacle, port,
    renamed::restore_names,
    standin,
};
use crate::{
    model::{Addresses, Mac, Pod, Problem, Subnets},
    netlink::{
        Netlink, Request,
        link::{Address, Link, address_message, no_ipv6_address},
    },
    sysctl::interface::{self, Ipv6},
};

/// Alias that marks a bridge as gossamer's.
pub const ALIAS: &str = "gossamer pods";
/// Prefix of the names of bridges and of pods' ends on this host.
pub const PREFIX: &str = "gsm";

/// First two bytes of MACs that follow from addresses.
const ADDRESS_MAC: [u8; 2] = [0x0a, 0x58];

/// The desired state of the bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Name of the interface.
    pub name: String,
    /// This node's subnets.
    pub subnets: Subnets,
    /// The networks of the whole overlay.
    pub networks: Subnets,
    /// MTU of the bridge and of every pod, in bytes.
    pub mtu: u32,
    /// Name of the overlay's device. The nftables tables are named after it.
    pub table: String,
    /// Whether packets from a pod with a source address or MAC of another one are dropped.
    pub anti_spoofing: bool,
}

/// The interface of a pod behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Id of the container. Each of its other interfaces has a separate port.
    pub container: String,
    /// The pod's addresses on this interface.
    pub addresses: Addresses,
    /// The interface's MAC. `None` if another program has set it and no record has it.
    pub mac: Option<Mac>,
    /// Path of the network namespace.
    pub netns: String,
}

/// The pods' interfaces by the names of their ports.
pub type Tenants = BTreeMap<String, Tenant>;

impl Tenant {
    /// Returns the tenant for a pod with this MAC.
    pub fn new(pod: &Pod, mac: Option<Mac>) -> Self {
        let container = pod.attachment.container().to_owned();
        Self { container, addresses: pod.addresses, mac, netns: pod.netns.clone() }
    }
}

/// Counts of repairs, and what is still wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Repairs of the bridge.
    pub bridge: u64,
    /// Repairs of ports and of neighbor entries.
    pub ports: u64,
    /// Repaired sysctls.
    pub sysctls: u64,
    /// Repairs of the tables against spoofing.
    pub spoofing: u64,
    /// Name and index of the last repaired interface, except for sysctls.
    last: Option<(String, u32)>,
    /// Sysctls that let a pod send routes to this host.
    pub open: Vec<Problem>,
    /// Names of ports that the kernel does not have.
    pub absent: BTreeSet<String>,
    /// Names of ports whose other end is on this host.
    pub loose: BTreeSet<String>,
    /// Names of ports of the bridge that belong to other programs.
    pub foreign_ports: BTreeSet<String>,
}

impl RepairReport {
    /// Resets the counts, so that they are not attributed to another program.
    pub fn reset_counts(&mut self) {
        (self.bridge, self.ports, self.sysctls, self.spoofing) = (0, 0, 0, 0);
        self.last = None;
    }

    /// Counts a repair of a port.
    pub(super) fn note_port(&mut self, name: &str, index: u32) {
        self.note(format!("port {name}"), index);
    }

    /// Counts a repair of an interface or of a neighbor entry that pods need.
    pub(super) fn note(&mut self, object: String, index: u32) {
        self.ports += 1;
        self.last = Some((object, index));
    }

    /// Returns the number of all repairs.
    pub const fn count(&self) -> u64 {
        self.bridge + self.ports + self.sysctls + self.spoofing
    }

    /// Returns the name and index of the last repaired interface, except for sysctls.
    pub fn object(&self) -> Option<(&str, u32)> {
        self.last.as_ref().map(|(object, link)| (object.as_str(), *link))
    }
}

/// A bridge in the desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReadyBridge {
    pub(super) bridge: Bridge,
    pub(super) index: u32,
    pub(super) mac: Option<Mac>,
}

/// Returns the default name of the bridge of the overlay with this VNI.
pub fn bridge_name(vni: u32) -> String {
    if vni == 1 { format!("{PREFIX}0") } else { format!("{PREFIX}{vni}") }
}

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
    let has: Vec<Address> = netlink.addresses()?;
    let mut has = has.iter().filter(|address| address.link == link.index);
    // Addresses of a subnet that belongs to another node by now would make that subnet unreachable.
    for address in has.clone().filter(|address| !bridge.is_gateway(address.ip)) {
        if !is_link_local(address.ip) {
            netlink.remove_address(link.index, address.ip, address.prefix_len)?;
            report.bridge += 1;
        }
    }
    for subnet in bridge.subnets.iter() {
        let ip = gateway(subnet);
        if !has.any(|address| address.ip == ip) {
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

/// Returns a request to disable automatic IPv6 addresses on a port, which needs none. A kernel without IPv6
/// refuses it, as does any kernel for a link with an MTU below 1280.
pub(super) fn without_address(port: &str) -> Request {
    let message = LinkUnspec::new_with_name(port).append_extra_attribute(no_ipv6_address()).build();
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Returns a request to add an address to an interface.
pub(super) fn address_request(link: u32, ip: IpAddr, prefix_len: u8) -> Request {
    let mut message = address_message(link, ip, prefix_len);
    // Duplicate detection would delay IPv6 by a second. The address is known to be unique.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    Request { message: RouteNetlinkMessage::NewAddress(message), flags }
}

/// Returns the MAC that follows from the address of a gateway or pod. Since it follows from the address,
/// neighbors that remember an earlier owner of the address are right.
pub fn mac_at(ip: IpAddr) -> Mac {
    let [.., a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let [first, second] = ADDRESS_MAC;
    Mac::from_bytes([first, second, a, b, c, d])
}

/// Returns whether a MAC follows from an address.
pub fn is_address_mac(mac: Mac) -> bool {
    mac.as_bytes().starts_with(&ADDRESS_MAC)
}

impl Bridge {
    /// Returns whether a message of the kernel is about an interface of the bridge's name.
    pub fn is_named(&self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                let name = LinkAttribute::IfName(self.name.clone());
                link.attributes.contains(&name)
            }
            _ => false,
        }
    }

    /// Returns the IPv6 setting of the bridge. Without an IPv6 subnet it needs no IPv6 address. With one it
    /// also needs the link-local address, from which the kernel sends neighbor solicitations to pods.
    fn ipv6(&self) -> Ipv6 {
        if self.subnets.iter().any(|subnet| subnet.addr().is_ipv6()) { Ipv6::On } else { Ipv6::Off }
    }

    pub(super) fn is_gateway(&self, ip: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| gateway(subnet) == ip)
    }
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

pub(super) const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Returns whether a port of the bridge belongs to another program. Veth pairs of pods that are gone and
/// those of the agent's stand-in pods do not.
pub(super) fn is_foreign(link: &Link, bridge: u32, ports: &Tenants) -> bool {
    let is_ours = || {
        let name = &link.name;
        ports.contains_key(name) || is_link_name(name) || standin::is_link_name(name)
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
