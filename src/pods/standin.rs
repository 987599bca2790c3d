//! A pod of the agent's own: a network namespace without a name on the pods' bridge, whose packets are
//! forwarded like those of any pod.
//!
//! The kernel removes the namespace with its veth pair as soon as the last file descriptor on it is closed,
//! so that nothing is left of an agent that was killed. It has the last address of the subnet, which is
//! given to a pod when there is no other; whoever uses this gives it up then.

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
    bridge::{ALIAS, address_request, mac_at, without_address},
    gateway,
};
use crate::{
    model::{Addresses, Mac, Subnets},
    netlink::{Netlink, Request, in_thread, inside, link::no_ipv6_address},
};

/// By which its end on this host is known.
pub const OWN_ALIAS: &str = "gossamer forwarding trial";
/// How its end on this host is called: this and the VNI, and with this behind that the second one's.
const PREFIX: &str = "gsp.";
const MATE: &str = "b";
/// Its interface inside.
pub const INNER: &str = "eth0";

/// What it is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Name of its end on this host.
    pub link: String,
    pub bridge: String,
    pub subnets: Subnets,
    pub addresses: Addresses,
    /// Of a second one, for packets between two pods; none where the subnet is too small.
    pub mate: Option<Addresses>,
    pub mtu: u32,
    /// That of its route to others, above which it sends fragments, as pods do.
    pub route_mtu: u32,
}

/// It exists for as long as this is kept.
#[derive(Debug)]
pub struct StandIn {
    netns: Arc<File>,
    shape: Shape,
    link: String,
    /// Indices of the bridge and of its port.
    bridge: u32,
    port: u32,
}

/// Its inside, for others that have sockets there. That alone keeps nothing on this host.
#[derive(Clone, Debug)]
pub struct Room {
    netns: Arc<File>,
    pub addresses: Addresses,
}

/// Which of the two it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The one that is like a pod.
    First,
    /// The one to which the first speaks by way of the bridge alone. It answers no ARP, and its MAC is known
    /// to the first alone: its address may be a pod's.
    Mate,
}

/// The name of its end on this host, in the overlay of this VNI: no pod's end is called like that.
pub fn link_name(vni: u32) -> String {
    format!("{PREFIX}{vni}")
}

/// Whether an interface is called as the end of one is.
pub fn is_link_name(name: &str) -> bool {
    let vni = name.strip_prefix(PREFIX).map(|rest| rest.strip_suffix(MATE).unwrap_or(rest));
    vni.is_some_and(|vni| vni.parse::<u32>().is_ok())
}

impl StandIn {
    /// Makes it on a bridge of pods; without such a bridge there are no pods, and nothing is made.
    pub fn make(netlink: &mut Netlink, shape: &Shape) -> io::Result<Option<Self>> {
        let found = netlink.link(&shape.bridge)?;
        let Some(bridge) = found.filter(|link| link.alias == ALIAS) else { return Ok(None) };
        Self::plugged_into(bridge.index, netlink, shape, Role::First).map(Some)
    }

    /// Makes a second one beside it, at the mate's addresses of its shape.
    pub fn make_mate(&self, netlink: &mut Netlink) -> io::Result<Self> {
        Self::plugged_into(self.bridge, netlink, &self.shape, Role::Mate)
    }

    fn plugged_into(
        bridge: u32,
        netlink: &mut Netlink,
        shape: &Shape,
        role: Role,
    ) -> io::Result<Self> {
        let (link, mac) = match role {
            Role::First => (shape.link.clone(), mac_at(shape.addresses.first)),
            Role::Mate => (format!("{}{MATE}", shape.link), mate_mac(shape.addresses)),
        };
        remove_former(netlink, &link)?;
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
        // A port needs none; a kernel without IPv6 refuses to hear of it.
        let Request { message, flags } = without_address(&link);
        let made = Self { netns, shape: shape.clone(), link, bridge, port };
        let _ = netlink.apply_one(message, flags);
        let up = LinkUnspec::new_with_index(port).alias(OWN_ALIAS).up();
        let furnished = netlink.set_link(up).and_then(|()| made.furnish(role));
        if let Err(error) = furnished {
            made.remove(netlink);
            return Err(error);
        }
        Ok(made)
    }

    /// Whether it is still like this, on a bridge that is still there.
    pub fn is(&self, netlink: &mut Netlink, shape: &Shape) -> io::Result<bool> {
        let port = netlink.link(&self.link)?;
        let is_whole = port.is_some_and(|port| {
            port.index == self.port && port.up && port.is_plugged_into(self.bridge)
        });
        Ok(is_whole && self.shape == *shape)
    }

    /// Does something inside. Sockets that are opened stay there for good.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&*self.netns, work)
    }

    pub fn room(&self) -> Room {
        Room { netns: self.netns.clone(), addresses: self.shape.addresses }
    }

    /// A socket inside, and the index of the interface there.
    pub fn netlink(&self) -> io::Result<(Netlink, u32)> {
        self.inside(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.index_of(INNER)?;
            Ok((netlink, index))
        })
    }

    pub const fn port(&self) -> u32 {
        self.port
    }

    /// Of the first one, whichever of the two this is.
    pub const fn addresses(&self) -> Addresses {
        self.shape.addresses
    }

    /// Removes it at once: the kernel would take its time.
    pub fn remove(self, netlink: &mut Netlink) {
        // If it is gone, so much the better.
        let _ = netlink.delete_link(self.port);
    }

    fn furnish(&self, role: Role) -> io::Result<()> {
        let Shape { addresses, subnets, mate, route_mtu, .. } = &self.shape;
        self.inside(|| {
            let mut netlink = Netlink::open()?;
            let index = netlink.index_of(INNER)?;
            let quiet = LinkUnspec::new_with_index(index);
            let _ = netlink.set_link(quiet.append_extra_attribute(no_ipv6_address()));
            let up = LinkUnspec::new_with_index(index).up();
            netlink.set_link(if role == Role::Mate { up.arp(false) } else { up })?;
            let mates = mate.iter().copied().flat_map(Addresses::iter);
            let (own, other, mac): (Vec<_>, Vec<_>, _) = match role {
                Role::First => (addresses.iter().collect(), mates.collect(), mate_mac(*addresses)),
                Role::Mate => {
                    (mates.collect(), addresses.iter().collect(), mac_at(addresses.first))
                }
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
            other.into_iter().try_for_each(|ip| netlink.set_neighbour(index, ip, mac))
        })
    }
}

impl Room {
    /// Does something inside. Sockets that are opened stay there for good.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&*self.netns, work)
    }
}

/// The MAC of the second one beside a first one with these addresses. No pod has it, whatever its address; a
/// pod that asks for it is refused.
pub fn mate_mac(of_first: Addresses) -> Mac {
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

/// Of an agent that was killed a moment ago: the kernel is about to remove it.
fn remove_former(netlink: &mut Netlink, link: &str) -> io::Result<()> {
    match netlink.link(link)? {
        Some(former) if former.kind == "veth" => {
            let _ = netlink.delete_link(former.index);
            Ok(())
        }
        Some(_) => Err(io::Error::other(format!("an interface of others is called {link}"))),
        None => Ok(()),
    }
}
