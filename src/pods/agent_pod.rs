//! An agent pod: a pod of the agent's own, to test whether the host forwards pods' packets. It is an
//! unnamed network namespace on the pods' bridge.
//!
//! The kernel removes the namespace and its veth pair when the last file descriptor on it is closed, so a
//! killed agent leaves nothing behind. The agent pod has the last address of the subnet, which no other
//! pod gets. A pod may have it from an earlier version, or because the subnet has no other. Then there is no
//! agent pod.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
    sync::Arc,
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoVeth},
        route::{RouteAttribute, RouteMetric},
    },
};

use super::{
    desired::ALIAS,
    gateway, mac_at,
    requests::{address_request, without_address},
};
use crate::{
    model::{Addresses, Mac, Subnets},
    netlink::{Netlink, Request, in_thread, inside, link::no_ipv6_address},
};

/// Alias of the agent pod's end on this host.
pub const OWN_ALIAS: &str = "gossamer forwarding trial";
/// Prefix of the name of its end on this host; the VNI follows.
const PREFIX: &str = "gsp.";
/// Suffix of the name of the second agent pod's end on this host.
const SECOND_SUFFIX: &str = "b";
/// Name of the interface inside the agent pod.
pub const INNER: &str = "eth0";

/// The desired state of an agent pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name of its end on this host.
    pub link: String,
    /// Name of the pods' bridge.
    pub bridge: String,
    /// This node's subnets.
    pub subnets: Subnets,
    /// Addresses of the first agent pod.
    pub addresses: Addresses,
    /// Addresses of a second one, for packets between two pods. `None` if the subnet is too small.
    pub second_pod: Option<Addresses>,
    /// MTU of the interface, in bytes.
    pub mtu: u32,
    /// MTU of its default route, in bytes. As in pods, larger packets are fragmented.
    pub route_mtu: u32,
}

/// An agent pod. It exists until this value is dropped.
#[derive(Debug)]
pub struct AgentPod {
    netns: Arc<File>,
    shape: Shape,
    link: String,
    /// Index of the bridge.
    bridge: u32,
    /// Index of its port on the bridge.
    port: u32,
}

/// The namespace of an agent pod, for code that opens sockets there. Does not keep the end on this host.
#[derive(Clone, Debug)]
pub struct PodNamespace {
    netns: Arc<File>,
    /// Addresses of the first agent pod.
    pub addresses: Addresses,
}

/// One of the two agent pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The one that is configured like a pod.
    First,
    /// The one that exchanges packets with the first across the bridge only. It answers no ARP and only the
    /// first knows its MAC, because a pod may have its address.
    Second,
}

/// Returns the name of an agent pod's end on this host, in the overlay of this VNI. Differs from the names
/// of pods' ends.
pub fn link_name(vni: u32) -> String {
    format!("{PREFIX}{vni}")
}

/// Returns whether an interface name is that of an agent pod's end.
pub fn is_link_name(name: &str) -> bool {
    let vni =
        name.strip_prefix(PREFIX).map(|rest| rest.strip_suffix(SECOND_SUFFIX).unwrap_or(rest));
    vni.is_some_and(|vni| vni.parse::<u32>().is_ok())
}

impl AgentPod {
    /// Creates an agent pod on the pods' bridge. Returns `None` if the bridge does not exist.
    ///
    /// # Errors
    /// If the kernel refuses the namespace, the veth pair, an address or a route.
    pub fn make(netlink: &mut Netlink, shape: &Shape) -> io::Result<Option<Self>> {
        let found = netlink.link(&shape.bridge)?;
        let Some(bridge) = found.filter(|link| link.alias == ALIAS) else { return Ok(None) };
        Self::plugged_into(bridge.index, netlink, shape, Role::First).map(Some)
    }

    /// Creates a second agent pod, with the addresses in `second_pod` of the shape.
    ///
    /// # Errors
    /// As for [`AgentPod::make`].
    pub fn make_second_pod(&self, netlink: &mut Netlink) -> io::Result<Self> {
        Self::plugged_into(self.bridge, netlink, &self.shape, Role::Second)
    }

    fn plugged_into(
        bridge: u32,
        netlink: &mut Netlink,
        shape: &Shape,
        role: Role,
    ) -> io::Result<Self> {
        let (link, mac) = match role {
            Role::First => (shape.link.clone(), mac_at(shape.addresses.first)),
            Role::Second => {
                (format!("{}{SECOND_SUFFIX}", shape.link), second_pod_mac(shape.addresses))
            }
        };
        remove_stale(netlink, &link)?;
        let netns = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Arc::new)
        })?;
        let inner = LinkMessageBuilder::<LinkUnspec>::new()
            .name(INNER.to_owned())
            .address(mac.as_bytes().to_vec())
            .mtu(shape.mtu)
            .setns_by_fd(netns.as_raw_fd());
        let pair = LinkVeth::new(&link, INNER)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inner.build())))
            .mtu(shape.mtu)
            .controller(bridge);
        netlink.create_link(pair.build())?;
        let port = netlink.index_of(&link)?;
        // A port needs no IPv6 address. A kernel without IPv6 refuses the request.
        let Request { message, flags } = without_address(&link);
        let made = Self { netns, shape: shape.clone(), link, bridge, port };
        let _ = netlink.apply_one(message, flags);
        let up = LinkUnspec::new_with_index(port).alias(OWN_ALIAS).up();
        let configured = netlink.set_link(up).and_then(|()| made.configure(role));
        if let Err(error) = configured {
            made.remove(netlink);
            return Err(error);
        }
        Ok(made)
    }

    /// Returns whether the agent pod is complete and has this shape.
    ///
    /// # Errors
    /// If the kernel's interfaces cannot be read.
    pub fn matches(&self, netlink: &mut Netlink, shape: &Shape) -> io::Result<bool> {
        let port = netlink.link(&self.link)?;
        let is_whole = port.is_some_and(|port| {
            port.index == self.port && port.up && port.is_plugged_into(self.bridge)
        });
        Ok(is_whole && self.shape == *shape)
    }

    /// Runs `work` in the namespace. Sockets that it opens stay there.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the error of `work`.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&*self.netns, work)
    }

    /// Returns the namespace, for sockets there.
    pub fn namespace(&self) -> PodNamespace {
        PodNamespace { netns: self.netns.clone(), addresses: self.shape.addresses }
    }

    /// Opens a netlink socket inside. Returns it with the index of the interface there.
    ///
    /// # Errors
    /// If the socket cannot be opened or the interface is gone.
    pub fn netlink(&self) -> io::Result<(Netlink, u32)> {
        self.inside(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.index_of(INNER)?;
            Ok((netlink, index))
        })
    }

    /// Returns the index of the port on the bridge.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Returns the addresses of the first agent pod, also if this is the second one.
    pub const fn addresses(&self) -> Addresses {
        self.shape.addresses
    }

    /// Removes the agent pod at once. After a drop, the kernel removes it later.
    pub fn remove(self, netlink: &mut Netlink) {
        // An error means that the interface is already gone.
        let _ = netlink.delete_link(self.port);
    }

    /// Sets up the interface inside, with addresses, routes and neighbor entries.
    fn configure(&self, role: Role) -> io::Result<()> {
        let Shape { addresses, subnets, second_pod, route_mtu, .. } = &self.shape;
        self.inside(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.index_of(INNER)?;
            let quiet = LinkUnspec::new_with_index(index);
            let _ = netlink.set_link(quiet.append_extra_attribute(no_ipv6_address()));
            let up = LinkUnspec::new_with_index(index).up();
            netlink.set_link(if role == Role::Second { up.arp(false) } else { up })?;
            let second_addresses = second_pod.iter().copied().flat_map(Addresses::iter);
            let (own, other, mac): (Vec<_>, Vec<_>, _) = match role {
                Role::First => (
                    addresses.iter().collect(),
                    second_addresses.collect(),
                    second_pod_mac(*addresses),
                ),
                Role::Second => (
                    second_addresses.collect(),
                    addresses.iter().collect(),
                    mac_at(addresses.first),
                ),
            };
            for (ip, subnet) in own.into_iter().zip(subnets.iter()) {
                let Request { message, flags } = address_request(index, ip, subnet.prefix_len());
                netlink.apply_one(message, flags)?;
                if role == Role::First {
                    netlink.apply_one(
                        default_route(index, gateway(subnet), *route_mtu),
                        NLM_F_CREATE | NLM_F_EXCL,
                    )?;
                }
            }
            other.into_iter().try_for_each(|ip| netlink.set_permanent_neighbor(index, ip, mac))
        })
    }
}

impl PodNamespace {
    /// Runs `work` in the namespace. Sockets that it opens stay there.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the error of `work`.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&*self.netns, work)
    }
}

/// Returns the MAC of the second agent pod, from the addresses of the first. No pod has it: it does not
/// follow from an address, and a pod that requests it is refused.
pub fn second_pod_mac(of_first: Addresses) -> Mac {
    let [_, rest @ ..] = *mac_at(of_first.first).as_bytes();
    let [a, b, c, d, e] = rest;
    Mac::from_bytes([0x0e, a, b, c, d, e])
}

fn default_route(link: u32, via: IpAddr, mtu: u32) -> RouteNetlinkMessage {
    let mut route = match via {
        IpAddr::V4(via) => {
            RouteMessageBuilder::<Ipv4Addr>::new().output_interface(link).gateway(via).build()
        }
        IpAddr::V6(via) => {
            RouteMessageBuilder::<Ipv6Addr>::new().output_interface(link).gateway(via).build()
        }
    };
    route.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    RouteNetlinkMessage::NewRoute(route)
}

/// Removes the interface of an agent that was killed a moment ago and that the kernel has not removed yet.
fn remove_stale(netlink: &mut Netlink, link: &str) -> io::Result<()> {
    match netlink.link(link)? {
        Some(former) if former.kind == "veth" => {
            let _ = netlink.delete_link(former.index);
            Ok(())
        }
        Some(_) => {
            Err(io::Error::other(format!("an interface of another program has the name {link}")))
        }
        None => Ok(()),
    }
}
