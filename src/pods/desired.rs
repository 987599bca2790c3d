//! The desired state of the pods' bridge and of its ports, and the report on their repair.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use rtnetlink::packet_route::{RouteNetlinkMessage, link::LinkAttribute};

use super::gateway;
use crate::{
    model::{Addresses, Mac, Pod, Problem, Subnets},
    sysctl::interface::Ipv6,
};

/// Alias that marks a bridge as gossamer's.
pub const ALIAS: &str = "gossamer pods";

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
    pub(super) last: Option<(String, u32)>,
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
    pub(super) fn ipv6(&self) -> Ipv6 {
        if self.subnets.iter().any(|subnet| subnet.addr().is_ipv6()) { Ipv6::On } else { Ipv6::Off }
    }

    pub(super) fn is_gateway(&self, ip: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| gateway(subnet) == ip)
    }
}
