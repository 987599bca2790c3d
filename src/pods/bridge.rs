//! What pods are plugged into: a bridge with the gateway's addresses, and their ports on it.
//!
//! Made when the first pod comes and put right whenever it is not as it should be. Which pods there are is
//! not known here, only how their ports are called.

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
    renamed::take_names_back,
    standin,
};
use crate::{
    dataplane::kernel::interface::{self, Ipv6},
    model::{Addresses, Mac, Pod, Subnets},
    netlink::{
        Netlink, Request,
        link::{Address, Link, address_message, no_ipv6_address},
    },
};

/// By which a bridge is known as ours.
pub const ALIAS: &str = "gossamer pods";
/// Of bridges, and of pods' ends on this host.
pub const PREFIX: &str = "gsm";

/// How MACs begin that follow from addresses.
const ADDRESS_MAC: [u8; 2] = [0x0a, 0x58];

/// What it should be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    pub subnets: Subnets,
    /// Of the whole overlay.
    pub networks: Subnets,
    /// Of the bridge, and of every pod.
    pub mtu: u32,
    /// The name of the overlay's device, after which tables of nftables are called.
    pub table: String,
    /// Whether there are to be tables about pods' addresses.
    pub anti_spoofing: bool,
}

/// Who is behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Id of the container: its other interfaces are ports of their own.
    pub container: String,
    pub addresses: Addresses,
    /// None where another program has given it, and nobody remembers.
    pub mac: Option<Mac>,
    /// Path of the network namespace.
    pub netns: String,
}

/// By the names of the ports.
pub type Tenants = BTreeMap<String, Tenant>;

impl Tenant {
    pub fn new(pod: &Pod, mac: Option<Mac>) -> Self {
        let container = pod.attachment.container().to_owned();
        Self { container, addresses: pod.addresses, mac, netns: pod.netns.clone() }
    }
}

/// How much was not as it should be, and what of it still is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mended {
    pub bridge: u64,
    pub ports: u64,
    pub sysctls: u64,
    /// Of the tables about pods' addresses.
    pub spoofing: u64,
    /// The last interface of which something was wrong, but for its sysctls.
    last: Option<(String, u32)>,
    /// Where a pod can give this host routes as far as sysctls say, as sentences with what helps.
    pub open: Vec<String>,
    /// Names of ports that the kernel does not have.
    pub absent: BTreeSet<String>,
    /// Names of ports whose other end is on this host.
    pub loose: BTreeSet<String>,
    /// Names of the bridge's ports of others.
    pub foreign_ports: BTreeSet<String>,
}

impl Mended {
    /// Takes nothing of it for what other programs have changed.
    pub fn forget_counts(&mut self) {
        (self.bridge, self.ports, self.sysctls, self.spoofing) = (0, 0, 0, 0);
        self.last = None;
    }

    /// Notes that something was wrong with a port.
    pub(super) fn note_port(&mut self, name: &str, index: u32) {
        self.note(format!("port {name}"), index);
    }

    /// Notes that something of an interface was wrong that pods need.
    pub(super) fn note(&mut self, object: String, index: u32) {
        self.ports += 1;
        self.last = Some((object, index));
    }

    pub const fn count(&self) -> u64 {
        self.bridge + self.ports + self.sysctls + self.spoofing
    }

    /// What was wrong beside sysctls, and the index of that interface.
    pub fn object(&self) -> Option<(&str, u32)> {
        self.last.as_ref().map(|(object, link)| (object.as_str(), *link))
    }
}

/// A bridge that is as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Provided {
    pub(super) bridge: Bridge,
    pub(super) index: u32,
    pub(super) mac: Option<Mac>,
}

/// The bridge of an overlay with this VNI, unless the operator names another.
pub fn bridge_name(vni: u32) -> String {
    if vni == 1 { format!("{PREFIX}0") } else { format!("{PREFIX}{vni}") }
}

/// Makes the bridge, or what it lacks, and takes away what it had for other subnets.
pub(super) fn provide(netlink: &mut Netlink, bridge: &Bridge) -> io::Result<(Provided, Mended)> {
    let mut mended = Mended::default();
    let found = netlink.link(&bridge.name)?;
    let is_new = found.is_none();
    let link = match found {
        Some(link) => link,
        None => {
            mended.bridge += 1;
            remove_former(netlink, bridge)?;
            make(netlink, bridge)?
        }
    };
    if let Some(obstacle) = obstacle::to(bridge, &link, netlink)? {
        return Err(io::Error::other(obstacle));
    }
    // Before it is up: it hears nothing before that.
    let closed = interface::close(&bridge.name, bridge.ipv6());
    mended.sysctls += if is_new { 0 } else { closed.set };
    mended.open = closed.problems;
    if !is_as_it_should_be(&link, bridge) {
        let change = LinkUnspec::new_with_index(link.index).mtu(bridge.mtu).alias(ALIAS).up();
        netlink.set_link(change)?;
        netlink.apply_one(settings(&link), 0)?;
        mended.bridge += 1;
    }
    let has: Vec<Address> = netlink.addresses()?;
    let mut has = has.iter().filter(|address| address.link == link.index);
    // Of a subnet that is another node's by now, which could not be reached.
    for address in has.clone().filter(|address| !bridge.is_gateway(address.ip)) {
        if !is_link_local(address.ip) {
            netlink.remove_address(link.index, address.ip, address.prefix_len)?;
            mended.bridge += 1;
        }
    }
    for subnet in bridge.subnets.iter() {
        let ip = gateway(subnet);
        if !has.any(|address| address.ip == ip) {
            let Request { message, flags } = address_request(link.index, ip, subnet.prefix_len());
            netlink.apply_one(message, flags)?;
            mended.bridge += 1;
        }
    }
    if mended.bridge > 0 {
        mended.last = Some((format!("bridge {}", bridge.name), link.index));
    }
    Ok((Provided { bridge: bridge.clone(), index: link.index, mac: link.mac }, mended))
}

/// Plugs those of the ports in again that are on no bridge, or on another one, or down, and closes them.
pub(super) fn plug_again(
    netlink: &mut Netlink,
    provided: &Provided,
    ports: &Tenants,
    mended: &mut Mended,
) -> io::Result<()> {
    let mut links = netlink.links()?;
    take_names_back(netlink, &mut links, ports, mended)?;
    let there: BTreeSet<&String> = links.iter().map(|link| &link.name).collect();
    mended.absent = ports.keys().filter(|name| !there.contains(name)).cloned().collect();
    let is_loose = |name: &&String| there.contains(&loose_end(name));
    mended.loose = ports.keys().filter(is_loose).cloned().collect();
    let foreign_ports = links.iter().filter(|link| is_foreign(link, provided.index, ports));
    mended.foreign_ports = foreign_ports.map(|link| link.name.clone()).collect();
    for port in links.iter().filter(|link| ports.contains_key(&link.name)) {
        let closed = interface::close(&port.name, Ipv6::AsItIs);
        mended.sysctls += closed.set;
        // One of them stands for all.
        if mended.open.is_empty() {
            mended.open = closed.problems;
        }
        if !is_plugged(port, provided.index) {
            netlink
                .set_link(LinkUnspec::new_with_index(port.index).controller(provided.index).up())?;
            netlink.apply_one(port::hairpin(&port.name).message, 0)?;
        }
        let changes = port::repair(port);
        if !is_plugged(port, provided.index) || !changes.is_empty() {
            // A pod may be on its way out, or its end go down meanwhile.
            let refused = netlink.apply(changes)?;
            refused.iter().for_each(|refused| {
                tracing::debug!(port = %port.name, error = %refused.to_io(), "port not set right");
            });
            mended.note_port(&port.name, port.index);
        }
        // A smaller one drops what the pod is sent; a larger one is of pods that were there before it.
        if port.mtu < provided.bridge.mtu {
            netlink.set_link(LinkUnspec::new_with_index(port.index).mtu(provided.bridge.mtu))?;
            mended.note_port(&port.name, port.index);
        }
    }
    neighbors::keep(netlink, provided, ports, mended)
}

/// A port needs no address of its own. Where the kernel has no IPv6, or none on a link this narrow, it
/// refuses to hear of it.
pub(super) fn without_address(port: &str) -> Request {
    let message = LinkUnspec::new_with_name(port).append_extra_attribute(no_ipv6_address()).build();
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

pub(super) fn address_request(link: u32, ip: IpAddr, prefix_len: u8) -> Request {
    let mut message = address_message(link, ip, prefix_len);
    // It is nobody else's: to ask around would take IPv6 a second.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    Request { message: RouteNetlinkMessage::NewAddress(message), flags }
}

/// Of gateways and pods. Follows from the address, so that neighbours who remember an earlier holder of it
/// are right.
pub fn mac_at(ip: IpAddr) -> Mac {
    let [.., a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let [first, second] = ADDRESS_MAC;
    Mac::from_bytes([first, second, a, b, c, d])
}

/// Whether a MAC is one that follows from an address.
pub fn is_address_mac(mac: Mac) -> bool {
    mac.as_bytes().starts_with(&ADDRESS_MAC)
}

impl Bridge {
    /// Whether the kernel tells something about an interface of this name.
    pub fn is_named(&self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                let name = LinkAttribute::IfName(self.name.clone());
                link.attributes.contains(&name)
            }
            _ => false,
        }
    }

    /// Without an IPv6 subnet it needs no IPv6 address. With one it needs the link-local one too: from there
    /// the kernel asks for pods to which it forwards.
    fn ipv6(&self) -> Ipv6 {
        if self.subnets.iter().any(|subnet| subnet.addr().is_ipv6()) { Ipv6::On } else { Ipv6::Off }
    }

    pub(super) fn is_gateway(&self, ip: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| gateway(subnet) == ip)
    }
}

/// The bridge was called otherwise: its address must not stay there. What was plugged into it is plugged in
/// again.
fn remove_former(netlink: &mut Netlink, bridge: &Bridge) -> io::Result<()> {
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

/// Whether it is a port of another program. Veth pairs of pods that are gone, and those of the agent's own
/// pods, are none.
pub(super) fn is_foreign(link: &Link, bridge: u32, ports: &Tenants) -> bool {
    let is_ours = || {
        let name = &link.name;
        ports.contains_key(name) || is_link_name(name) || standin::is_link_name(name)
    };
    link.is_plugged_into(bridge) && !is_ours()
}

pub(super) fn is_plugged(port: &Link, bridge: u32) -> bool {
    port.up && port.is_plugged_into(bridge)
}

pub(super) fn is_as_it_should_be(link: &Link, bridge: &Bridge) -> bool {
    link.up
        && link.mtu == bridge.mtu
        && link.alias == ALIAS
        && link.name == bridge.name
        && !is_wrongly_set(link)
}

/// What a pod with `CAP_NET_RAW` could use otherwise. A frame to a link-local group has the kernel learn its
/// source before nftables sees it, so one pod could take the MAC of another, or fill memory with MACs.
/// Queries of multicast listeners by a pod would have the bridge keep neighbor solicitations from all others.
/// Spanning tree keeps a new port silent for 30 s. A filter of VLANs drops packets of ports that have lost
/// theirs; kernels without one refuse to hear of it.
fn settings(link: &Link) -> RouteNetlinkMessage {
    let message = LinkBridge::new(&link.name)
        .no_linklocal_learn(true)
        .mcast_snooping(false)
        .stp_state(BridgeStpState::Disabled);
    let filters = told(link).any(|setting| *setting == InfoBridge::VlanFiltering(true));
    let message = if filters { message.vlan_filtering(false) } else { message };
    RouteNetlinkMessage::NewLink(message.build())
}

/// Whether one of [`settings`] is otherwise; not where the kernel does not tell.
fn is_wrongly_set(link: &Link) -> bool {
    told(link).any(|setting| match setting {
        InfoBridge::MultiBoolOpt(options) => {
            !options.value.contains(BridgeBooleanOptionFlags::NoLinkLocalLearn)
        }
        InfoBridge::MulticastSnooping(is_on) | InfoBridge::VlanFiltering(is_on) => *is_on,
        InfoBridge::StpState(state) => *state != BridgeStpState::Disabled,
        _ => false,
    })
}

/// Settings of a bridge, as far as the kernel tells them.
fn told(link: &Link) -> impl Iterator<Item = &InfoBridge> {
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

fn make(netlink: &mut Netlink, bridge: &Bridge) -> io::Result<Link> {
    // Without a MAC of its own it takes the lowest of its ports', which come and go.
    let mac = mac_at(gateway(bridge.subnets.first)).as_bytes().to_vec();
    // An MTU that it was born with would change with its ports; one that is set later stays.
    netlink.create_link(LinkBridge::new(&bridge.name).address(mac).build())?;
    if bridge.ipv6() == Ipv6::Off {
        let _ = netlink.apply_one(without_address(&bridge.name).message, 0);
    }
    netlink.link(&bridge.name)?.ok_or_else(|| io::ErrorKind::NotFound.into())
}
