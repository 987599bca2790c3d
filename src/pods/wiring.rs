//! A pod's cable: a veth pair from the bridge of this host's pods into a network namespace, with addresses
//! and routes, by netlink alone.
//!
//! The kernel answers for what is there: an end on this host is known by its name, which follows from the
//! attachment, so that whatever an agent left half-made is found again. Which addresses a pod has is not
//! decided here.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use rtnetlink::{
    LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        link::{
            InfoBridgePort, InfoData, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute,
            LinkMessage,
        },
    },
};
use sha2::{Digest as _, Sha256};

use super::gateway;
use crate::{
    model::{Attachment, Mac, Pod, Subnets},
    netlink::{
        Netlink, Request,
        link::{ENODEV, Link, address_message},
    },
};

/// Of bridges, and of pods' ends on this host.
const PREFIX: &str = "gsm";
/// By which a bridge is known as ours.
const ALIAS: &str = "gossamer pods";
/// So many bytes of the hash: the name has 13 characters, the kernel allows 15.
const HASHED: usize = 5;

/// Why a pod was not connected. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    #[error("network namespace {}: {error}", path.display())]
    NoNamespace { path: PathBuf, error: io::Error },
    #[error("network namespace {}: that is none", .0.display())]
    NotANamespace(PathBuf),
    #[error("interface {interface}: there is one of that name in {} already", netns.display())]
    InterfaceTaken { interface: String, netns: PathBuf },
    #[error("{0}")]
    Lacks(String),
    #[error("{what}: {error}")]
    Kernel { what: &'static str, error: io::Error },
}

/// What pods are plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    pub subnets: Subnets,
    /// Of the bridge, and of every pod.
    pub mtu: u32,
}

/// A connected pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    pub mac: Mac,
    pub link_mac: Option<Mac>,
    pub bridge_mac: Option<Mac>,
}

/// Makes and removes cables on this host.
#[derive(Debug)]
pub struct Wiring(Netlink);

impl Wiring {
    pub fn open() -> io::Result<Self> {
        Netlink::open().map(Self)
    }

    /// Plugs a pod in.
    ///
    /// # Errors
    /// Why not; nothing of it is left then.
    pub fn connect(&mut self, bridge: &Bridge, pod: &Pod) -> Result<Connected, WiringError> {
        let netns = Path::new(&pod.netns);
        let (file, mut inside) = enter(netns)?;
        let interface = pod.attachment.interface();
        let present = inside.link(interface).map_err(failed("looking for the interface"))?;
        if present.is_some() {
            let interface = interface.to_owned();
            return Err(WiringError::InterfaceTaken { interface, netns: netns.to_owned() });
        }
        let (port, bridge_mac) = self.provide(bridge).map_err(failed("making the bridge"))?;
        // Of an attachment that nobody knows any more.
        self.disconnect(&pod.attachment).map_err(failed("removing an old interface"))?;
        let connected = self
            .plug(pod, &file, bridge.mtu, port)
            .map_err(failed("making the interface"))
            .and_then(|()| {
                furnish(&mut inside, pod, bridge.subnets).map_err(failed("setting addresses"))
            })
            .and_then(|()| {
                let name = link_name(&pod.attachment);
                self.0.link(&name).map_err(failed("looking for the interface"))
            });
        match connected {
            Ok(link) => {
                let link_mac = link.and_then(|link| link.mac);
                Ok(Connected { mac: mac_of(pod), link_mac, bridge_mac })
            }
            Err(error) => {
                let _ = self.disconnect(&pod.attachment);
                Err(error)
            }
        }
    }

    /// Of a pod's end on this host, if there is one.
    pub fn index(&mut self, attachment: &Attachment) -> io::Result<Option<u32>> {
        Ok(self.0.link(&link_name(attachment))?.map(|link| link.index))
    }

    /// Removes an end on this host, and the other with it; whether there was one.
    pub fn delete(&mut self, index: u32) -> io::Result<bool> {
        match self.0.delete_link(index) {
            Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(false),
            result => result.map(|()| true),
        }
    }

    fn disconnect(&mut self, attachment: &Attachment) -> io::Result<bool> {
        self.index(attachment)?.map_or(Ok(false), |index| self.delete(index))
    }

    /// Names of all interfaces of this host.
    pub fn links(&mut self) -> io::Result<BTreeSet<String>> {
        Ok(self.0.links()?.into_iter().map(|link| link.name).collect())
    }

    /// Bridges of pods on this host, whichever overlay they are of.
    pub fn bridges(&mut self) -> io::Result<Vec<String>> {
        let ours = self.0.links()?.into_iter().filter(|link| link.alias == ALIAS);
        Ok(ours.filter(|link| link.kind == "bridge").map(|link| link.name).collect())
    }

    /// Removes a bridge of pods with all cables on it.
    pub fn remove(&mut self, bridge: &str) -> io::Result<()> {
        self.sweep(bridge, &BTreeSet::new())?;
        match self.0.link(bridge)?.filter(|link| link.alias == ALIAS) {
            Some(link) => self.delete(link.index).map(drop),
            None => Ok(()),
        }
    }

    /// Removes all cables on a bridge of pods but these; says how many.
    pub fn sweep(&mut self, bridge: &str, keep: &BTreeSet<String>) -> io::Result<usize> {
        let links = self.0.links()?;
        let found = links.iter().find(|link| link.name == bridge && link.alias == ALIAS);
        let Some(found) = found else { return Ok(0) };
        let is_stray = |link: &&Link| {
            let into = LinkAttribute::Controller(found.index);
            let is_plugged = link.message.attributes.contains(&into);
            is_plugged && link.name.starts_with(PREFIX) && !keep.contains(&link.name)
        };
        let strays: Vec<&Link> = links.iter().filter(is_stray).collect();
        strays.iter().try_for_each(|link| self.delete(link.index).map(drop))?;
        Ok(strays.len())
    }

    /// Looks whether a pod still has both ends of its cable, and its addresses.
    ///
    /// # Errors
    /// What it lacks.
    pub fn check(&mut self, pod: &Pod) -> Result<(), WiringError> {
        let look = "looking for the interface";
        let lacks = |what: String| Err(WiringError::Lacks(what));
        let link = link_name(&pod.attachment);
        if !self.0.link(&link).map_err(failed(look))?.is_some_and(|link| link.up) {
            return lacks(format!("interface {link} of this host is gone or down"));
        }
        let (_, mut inside) = enter(Path::new(&pod.netns))?;
        let interface = pod.attachment.interface();
        let found = inside.link(interface).map_err(failed(look))?.filter(|link| link.up);
        let Some(found) = found else {
            return lacks(format!("interface {interface} in {} is gone or down", pod.netns));
        };
        let has = inside.addresses().map_err(failed("looking for addresses"))?;
        let there = |ip: &IpAddr| has.iter().any(|has| has.link == found.index && has.ip == *ip);
        match pod.addresses.iter().find(|ip| !there(ip)) {
            Some(ip) => lacks(format!("interface {interface} in {} has lost {ip}", pod.netns)),
            None => Ok(()),
        }
    }

    /// Makes the bridge, or what it lacks; its index and MAC.
    fn provide(&mut self, bridge: &Bridge) -> io::Result<(u32, Option<Mac>)> {
        let link = match self.0.link(&bridge.name)? {
            Some(link) => link,
            None => self.make(bridge)?,
        };
        if link.kind != "bridge" {
            return Err(io::Error::other(format!("{} is no bridge", bridge.name)));
        }
        if !link.up || link.mtu != bridge.mtu || link.alias != ALIAS {
            let change = LinkUnspec::new_with_index(link.index).mtu(bridge.mtu).alias(ALIAS).up();
            self.0.set_link(change)?;
        }
        let has: Vec<_> = self.0.addresses()?;
        for subnet in bridge.subnets.iter() {
            let ip = gateway(subnet);
            if !has.iter().any(|address| address.link == link.index && address.ip == ip) {
                self.0.apply(vec![address_request(link.index, ip, subnet.prefix_len())])?;
            }
        }
        Ok((link.index, link.mac))
    }

    fn make(&mut self, bridge: &Bridge) -> io::Result<Link> {
        // Without a MAC of its own it takes the lowest of its ports', which come and go.
        let mac = mac_at(gateway(bridge.subnets.first)).as_bytes().to_vec();
        let made = LinkBridge::new(&bridge.name).address(mac).mtu(bridge.mtu).up();
        self.0.create_link(made.build())?;
        self.0.link(&bridge.name)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn plug(&mut self, pod: &Pod, netns: &File, mtu: u32, port: u32) -> io::Result<()> {
        let (name, interface) = (link_name(&pod.attachment), pod.attachment.interface());
        let end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(interface)
            .address(mac_of(pod).as_bytes().to_vec())
            .mtu(mtu)
            .setns_by_fd(netns.as_raw_fd());
        let pair = LinkVeth::new(&name, interface)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(end.build())))
            .mtu(mtu)
            .controller(port)
            .up();
        self.0.create_link(pair.build())?;
        // A pod may speak to itself by way of a service's address.
        let hairpin = LinkUnspec::new_with_name(&name)
            .set_port_kind(InfoPortKind::Bridge)
            .set_port_data(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)]));
        self.0.apply_one(RouteNetlinkMessage::NewLink(hairpin.build()), 0)
    }
}

/// The bridge of an overlay with this VNI.
pub fn bridge_name(vni: u32) -> String {
    if vni == 1 { format!("{PREFIX}0") } else { format!("{PREFIX}{vni}") }
}

/// The name of the end on this host.
pub fn link_name(attachment: &Attachment) -> String {
    let hash = Sha256::digest(attachment.to_string());
    let digits: String = hash.iter().take(HASHED).map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{digits}")
}

/// A namespace, and a socket inside.
fn enter(netns: &Path) -> Result<(File, Netlink), WiringError> {
    let path = || netns.to_owned();
    let file =
        File::open(netns).map_err(|error| WiringError::NoNamespace { path: path(), error })?;
    let inside = Netlink::open_in(&file).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => WiringError::NotANamespace(path()),
        _ => WiringError::NoNamespace { path: path(), error },
    })?;
    Ok((file, inside))
}

/// Addresses and routes inside, in one system call.
fn furnish(inside: &mut Netlink, pod: &Pod, subnets: Subnets) -> io::Result<()> {
    let index = inside.index_of(pod.attachment.interface())?;
    let up: LinkMessage = LinkUnspec::new_with_index(index).up().build();
    let mut changes = vec![Request { message: RouteNetlinkMessage::SetLink(up), flags: 0 }];
    for (ip, subnet) in pod.addresses.iter().zip(subnets.iter()) {
        changes.push(address_request(index, ip, subnet.prefix_len()));
        changes.push(default_route(index, subnet));
    }
    match inside.apply(changes)?.first() {
        Some(refused) => Err(io::Error::from_raw_os_error(refused.errno)),
        None => Ok(()),
    }
}

fn address_request(link: u32, ip: IpAddr, prefix_len: u8) -> Request {
    let mut message = address_message(link, ip, prefix_len);
    // It is nobody else's: to ask around would take IPv6 a second.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    Request { message: RouteNetlinkMessage::NewAddress(message), flags }
}

fn default_route(link: u32, subnet: IpNet) -> Request {
    let message = match gateway(subnet) {
        IpAddr::V4(via) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .output_interface(link)
            .gateway(via)
            .build(),
        IpAddr::V6(via) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .output_interface(link)
            .gateway(via)
            .build(),
    };
    Request { message: RouteNetlinkMessage::NewRoute(message), flags: NLM_F_CREATE | NLM_F_EXCL }
}

/// Follows from the address, so that neighbours who remember an earlier holder of it are right.
fn mac_of(pod: &Pod) -> Mac {
    mac_at(pod.addresses.first)
}

fn mac_at(ip: IpAddr) -> Mac {
    let [.., a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    Mac::from_bytes([0x0a, 0x58, a, b, c, d])
}

const fn failed(what: &'static str) -> impl Fn(io::Error) -> WiringError {
    move |error| WiringError::Kernel { what, error }
}
