//! Hosts, the underlay that joins them, and pods.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    path::PathBuf,
};

use ipnet::Ipv4Net;
use nix::mount::{MsFlags, mount};
use rtnetlink::{LinkBridge, LinkUnspec, LinkVeth};

use super::NetNs;
use crate::netlink::Netlink;

/// Prefix length of the underlay 10.99.0.0/16; the bridge is its router.
const UNDERLAY_LEN: u8 = 16;
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const BRIDGE: &str = "underlay";

/// A bridge in the present namespace, and hosts on it.
pub struct Lab {
    netlink: Netlink,
    bridge: u32,
}

/// A host: a namespace with `eth0` on the underlay.
#[derive(Debug)]
pub struct Host {
    pub name: String,
    pub ip: Ipv4Addr,
    pub netns: NetNs,
    /// Its files: state, socket, subnet.env, log.
    pub dir: PathBuf,
}

/// A pod of a host: a namespace behind the host's pod bridge.
#[derive(Debug)]
pub struct Pod {
    pub netns: NetNs,
    pub ip: Ipv4Addr,
}

impl Lab {
    /// Must run inside namespaces made by [`super::enter()`].
    pub fn new() -> io::Result<Self> {
        // The numbers of processes as they are in here. Some containers forbid it; then /proc shows
        // those outside, which only measurements would mind.
        let none: Option<&str> = None;
        let _ = mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none);
        let mut netlink = Netlink::open()?;
        let lo = netlink.index_of("lo")?;
        netlink.set_link(LinkUnspec::new_with_index(lo).up())?;
        netlink.create_link(LinkBridge::new(BRIDGE).build())?;
        let bridge = netlink.index_of(BRIDGE)?;
        netlink.add_address(bridge, IpAddr::V4(ROUTER), UNDERLAY_LEN)?;
        Ok(Self { netlink, bridge })
    }

    /// Adds the `number`-th host (1 to 60,000), 10.99.x.y.
    pub fn host(&mut self, number: u16, name: &str) -> io::Result<Host> {
        let [high, low] = (number + 9).to_be_bytes();
        let ip = Ipv4Addr::new(10, 99, high, low);
        let netns = NetNs::new(name)?;
        let port = format!("port{number}");
        self.plug(&netns, &port, "eth0")?;
        let mut inside = netns.netlink()?;
        let eth0 = inside.index_of("eth0")?;
        inside.add_address(eth0, IpAddr::V4(ip), UNDERLAY_LEN)?;
        inside.set_link(LinkUnspec::new_with_index(eth0).up())?;
        inside.add_route(Ipv4Net::default(), ROUTER)?;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        // Where the kernel has no IPv6 there is nothing to forward.
        let _ = netns.sysctl("net/ipv6/conf/all/forwarding", "1");
        let dir = PathBuf::from("/run/lab").join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(Host { name: name.to_owned(), ip, netns, dir })
    }

    /// Pulls or plugs the veth pair of a host.
    pub fn set_veth(&mut self, number: u16, plugged: bool) -> io::Result<()> {
        let index = self.netlink.index_of(&format!("port{number}"))?;
        let link = LinkUnspec::new_with_index(index);
        self.netlink.set_link(if plugged { link.up() } else { link.down() })
    }

    fn plug(&mut self, netns: &NetNs, port: &str, inner: &str) -> io::Result<()> {
        let netlink = &mut self.netlink;
        veth_into(netlink, netns, port, inner, None)?;
        let index = netlink.index_of(port)?;
        netlink.set_link(LinkUnspec::new_with_index(index).controller(self.bridge).up())
    }
}

impl Host {
    /// Adds a pod in `subnet`, behind the bridge `pods` that has the subnet's first address: what a CNI
    /// plugin would do.
    pub fn pod(&self, subnet: Ipv4Net, mtu: u32) -> io::Result<Pod> {
        let netns = NetNs::new(&format!("{}-pod", self.name))?;
        let mut outside = self.netns.netlink()?;
        let mut addresses = subnet.hosts();
        let (Some(gateway), Some(ip)) = (addresses.next(), addresses.next()) else {
            return Err(io::Error::other(format!("{subnet} has no room for a pod")));
        };
        outside.create_link(LinkBridge::new("pods").mtu(mtu).build())?;
        let bridge = outside.index_of("pods")?;
        outside.add_address(bridge, IpAddr::V4(gateway), subnet.prefix_len())?;
        veth_into(&mut outside, &netns, "pod", "eth0", Some(mtu))?;
        let port = outside.index_of("pod")?;
        outside.set_link(LinkUnspec::new_with_index(port).controller(bridge).up())?;

        let mut inside = netns.netlink()?;
        let eth0 = inside.index_of("eth0")?;
        inside.set_link(LinkUnspec::new_with_index(eth0).up())?;
        inside.add_address(eth0, IpAddr::V4(ip), subnet.prefix_len())?;
        inside.add_route(Ipv4Net::default(), gateway)?;
        Ok(Pod { netns, ip })
    }
}

/// A veth pair with one end in the present namespace of `netlink` and the other inside `netns`.
fn veth_into(
    netlink: &mut Netlink,
    netns: &NetNs,
    outer: &str,
    inner: &str,
    mtu: Option<u32>,
) -> io::Result<()> {
    // The peer must not exist under its final name here: there may be an eth0 already.
    let passing = format!("{outer}-peer");
    netlink.create_link(LinkVeth::new(outer, &passing).build())?;
    let index = netlink.index_of(&passing)?;
    let fd = netns.file().as_raw_fd();
    let moved = LinkUnspec::new_with_index(index).name(inner).setns_by_fd(fd);
    netlink.set_link(match mtu {
        Some(mtu) => moved.mtu(mtu),
        None => moved,
    })?;
    if let Some(mtu) = mtu {
        let index = netlink.index_of(outer)?;
        netlink.set_link(LinkUnspec::new_with_index(index).mtu(mtu))?;
    }
    Ok(())
}
