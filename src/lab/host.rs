//! Hosts, their underlay, and pods.

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
use crate::{model::forwarding_sysctl, netlink::Netlink};

/// Prefix length of the underlay 10.99.0.0/16.
const UNDERLAY_LEN: u8 = 16;
/// Address of the bridge, which routes for the underlay.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Name of the bridge.
const BRIDGE: &str = "underlay";

/// The underlay: a bridge in the current network namespace, to which hosts are connected.
pub struct Lab {
    netlink: Netlink,
    bridge: u32,
}

/// A host: a network namespace with `eth0` on the underlay.
#[derive(Debug)]
pub struct Host {
    /// Name of the host and of its namespace.
    pub name: String,
    /// Address on the underlay.
    pub ip: Ipv4Addr,
    /// Network namespace.
    pub netns: NetNs,
    /// Directory of its files: state, socket, subnet.env, log.
    pub dir: PathBuf,
}

/// A pod: a network namespace behind the host's pod bridge.
#[derive(Debug)]
pub struct Pod {
    /// Network namespace.
    pub netns: NetNs,
    /// Address in the host's subnet.
    pub ip: Ipv4Addr,
}

impl Lab {
    /// Creates the underlay. Must run inside namespaces created by [`super::enter()`].
    ///
    /// # Errors
    /// Fails if the kernel refuses to create the bridge.
    pub fn new() -> io::Result<Self> {
        // Makes /proc show the processes of the new process namespace. Some containers forbid this mount;
        // only measurements of processes then fail.
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

    /// Adds the host with this number (1 to 60,000), whose address is 10.99.x.y.
    ///
    /// # Errors
    /// Fails if the kernel refuses, for example because the host already exists.
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
        netns.sysctl(forwarding_sysctl(true), "1")?;
        // Fails on a kernel without IPv6, where no forwarding is needed.
        let _ = netns.sysctl(forwarding_sysctl(false), "1");
        let dir = PathBuf::from("/run/lab").join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(Host { name: name.to_owned(), ip, netns, dir })
    }

    /// Connects or disconnects a host's cable to the underlay.
    ///
    /// # Errors
    /// Fails if there is no such host.
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
    /// Adds a pod as a CNI plugin would: behind a bridge `pods` that has the subnet's first address.
    ///
    /// # Errors
    /// Fails if the subnet has no address for a pod, or if the kernel refuses.
    pub fn pod(&self, subnet: Ipv4Net, mtu: u32) -> io::Result<Pod> {
        let netns = NetNs::new(&format!("{}-pod", self.name))?;
        let ip = self.connect(&netns, subnet, mtu)?;
        Ok(Pod { netns, ip })
    }

    /// Gives a pod of this host, and its bridge, addresses of another subnet.
    ///
    /// # Errors
    /// As [`Self::pod`].
    pub fn move_pod(&self, pod: &mut Pod, subnet: Ipv4Net, mtu: u32) -> io::Result<()> {
        let mut outside = self.netns.netlink()?;
        for name in ["pod", "pods"] {
            let index = outside.index_of(name)?;
            outside.delete_link(index)?;
        }
        pod.ip = self.connect(&pod.netns, subnet, mtu)?;
        Ok(())
    }

    fn connect(&self, netns: &NetNs, subnet: Ipv4Net, mtu: u32) -> io::Result<Ipv4Addr> {
        let mut outside = self.netns.netlink()?;
        let mut addresses = subnet.hosts();
        let (Some(gateway), Some(ip)) = (addresses.next(), addresses.next()) else {
            return Err(io::Error::other(format!("{subnet} has no room for a pod")));
        };
        outside.create_link(LinkBridge::new("pods").mtu(mtu).build())?;
        let bridge = outside.index_of("pods")?;
        outside.add_address(bridge, IpAddr::V4(gateway), subnet.prefix_len())?;
        veth_into(&mut outside, netns, "pod", "eth0", Some(mtu))?;
        let port = outside.index_of("pod")?;
        outside.set_link(LinkUnspec::new_with_index(port).controller(bridge).up())?;

        let mut inside = netns.netlink()?;
        let eth0 = inside.index_of("eth0")?;
        inside.set_link(LinkUnspec::new_with_index(eth0).up())?;
        inside.add_address(eth0, IpAddr::V4(ip), subnet.prefix_len())?;
        inside.add_route(Ipv4Net::default(), gateway)?;
        Ok(ip)
    }
}

/// Creates a veth pair with one end in the namespace of `netlink` and the other in `netns`.
fn veth_into(
    netlink: &mut Netlink,
    netns: &NetNs,
    outer: &str,
    inner: &str,
    mtu: Option<u32>,
) -> io::Result<()> {
    // The inner end has its final name only inside: here the name may be taken, such as eth0.
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
