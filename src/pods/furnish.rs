//! The configuration inside a pod's namespace: the interface's state, addresses and routes.
//!
//! The namespace may already have a configuration: another interface of the pod with the default route, or
//! sysctls that turn off IPv6 for new interfaces.

use std::{fs::File, io, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::{
    libc::EEXIST,
    sched::{CloneFlags, setns},
};
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{RouteNetlinkMessage, link::LinkMessage},
};

use super::{desired::Bridge, gateway, port::PORT_OPEN_TIMEOUT, requests::address_request};
use crate::{
    model::{Mac, Pod, ROUTE_PROTOCOL},
    netlink::{
        Netlink, Request,
        link::{Address, Link},
        neighbour::protected_entry,
        route::MAIN,
    },
    sysctl::interface::{Ipv6Availability, answer_for_own_addresses, switch_on_ipv6},
};

/// Metric of a default route to which others are preferred. netavark's default routes have 100.
const LATE_METRIC: u32 = 200;

/// The default routes that a pod gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultRoute {
    /// None.
    None,
    /// One for each family that has none yet.
    IfMissing,
    /// One with a high metric: the default routes of the pod's other networks are preferred, in any order of
    /// connecting.
    AfterOthers,
}

/// A route of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination.
    pub to: IpNet,
    /// The gateway.
    pub via: IpAddr,
    metric: Option<u32>,
}

/// A pod's namespace, with a netlink socket inside.
pub(super) struct PodNamespace<'a> {
    pub(super) netlink: Netlink,
    pub(super) netns: &'a File,
    /// This thread's own namespace.
    pub(super) host_netns: &'a File,
}

impl PodNamespace<'_> {
    /// Sets the interface up, and adds addresses, routes and the gateway's neighbor entries. Returns the
    /// routes that it added.
    pub(super) fn configure(
        &mut self,
        pod: &Pod,
        bridge: &Bridge,
        default_route: DefaultRoute,
        gateway_mac: Option<Mac>,
    ) -> io::Result<Vec<Route>> {
        let interface = pod.attachment.interface();
        let index = self.netlink.index_of(interface)?;
        if pod.addresses.iter().any(|ip| ip.is_ipv6()) {
            self.switch_on_ipv6(interface)?;
        }
        let up: LinkMessage = LinkUnspec::new_with_index(index).up().build();
        let mut changes = vec![Request { message: RouteNetlinkMessage::SetLink(up), flags: 0 }];
        for (ip, subnet) in pod.addresses.iter().zip(bridge.subnets.iter()) {
            changes.push(address_request(index, ip, subnet.prefix_len()));
        }
        let fixed = changes.len();
        let mut routes = self.routes(bridge, pod, default_route)?;
        for route in &routes {
            changes.push(request(index, *route)?);
        }
        let named = changes.len();
        // Other pods can fill the kernel's neighbor table, which all namespaces share.
        // A protected entry is not evicted.
        for (subnet, mac) in bridge.subnets.iter().zip(gateway_mac.into_iter().cycle()) {
            changes.push(protected_entry(index, gateway(subnet), Some(mac), ROUTE_PROTOCOL));
        }
        let mut existing = Vec::new();
        for refused in self.netlink.apply(changes)? {
            match refused.index.checked_sub(fixed) {
                // Another interface of the pod already has this route.
                Some(route) if refused.errno == EEXIST => existing.push(route),
                Some(_) if refused.index >= named => {
                    let error = refused.to_io();
                    tracing::debug!(interface, %error, "neighbor entry of the gateway not added");
                }
                _ => return Err(refused.to_io()),
            }
        }
        existing.sort_unstable();
        existing.iter().rev().for_each(|route| _ = routes.remove(*route));
        if let Err(error) =
            self.netlink.await_link(interface, PORT_OPEN_TIMEOUT, Link::is_operational)
        {
            tracing::debug!(interface, %error, "interface of a pod not operational yet");
        }
        Ok(routes)
    }

    /// Returns the routes to add: default routes, and a route to the overlay's network in each family for
    /// which the pod's default route does not lead here. No route to the overlay is needed if another
    /// interface of the pod is in it.
    fn routes(
        &mut self,
        bridge: &Bridge,
        pod: &Pod,
        default: DefaultRoute,
    ) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        let families = pod.addresses.iter().zip(bridge.subnets.iter());
        for ((_, subnet), network) in families.zip(bridge.networks.iter()) {
            let via = gateway(subnet);
            match default {
                DefaultRoute::None => {}
                DefaultRoute::IfMissing => {
                    if self.netlink.default_routes(via.is_ipv4())?.is_empty() {
                        routes.push(Route { to: everything(via), via, metric: None });
                        continue;
                    }
                }
                DefaultRoute::AfterOthers => {
                    routes.push(Route { to: everything(via), via, metric: Some(LATE_METRIC) });
                }
            }
            let has = self.netlink.addresses()?;
            if has.iter().any(|address| network.contains(&address.ip)) {
                // With the kernel's default, this interface would answer ARP for the other interface's
                // addresses and receive its packets.
                self.run_inside(|| answer_for_own_addresses(pod.attachment.interface()))?;
            } else {
                routes.push(Route { to: network, via, metric: None });
            }
        }
        Ok(routes)
    }

    /// Moves the default routes and the routes to the overlay from one interface to another, with the other
    /// interface's gateways. If the other interface may have no default route, it gets routes to the overlay
    /// instead.
    pub(super) fn hand_over(
        &mut self,
        bridge: &Bridge,
        leaving: u32,
        successor: u32,
        default_route: bool,
    ) -> io::Result<()> {
        let addresses = self.netlink.addresses()?;
        let mut changes = Vec::new();
        for network in bridge.networks.iter() {
            let gateway_of = |link: u32| {
                let is_of_link = |has: &&Address| has.link == link && network.contains(&has.ip);
                let has = addresses.iter().find(is_of_link)?;
                Some(gateway(IpNet::new(has.ip, has.prefix_len).ok()?.trunc()))
            };
            let (Some(old), Some(via)) = (gateway_of(leaving), gateway_of(successor)) else {
                continue;
            };
            for route in self.netlink.routes(old.is_ipv4())? {
                let is_default = route.to.prefix_len() == 0;
                let is_of_link = route.link == Some(leaving) && route.gateways == [old];
                if !is_of_link || route.table != MAIN || !(is_default || route.to == network) {
                    continue;
                }
                let route = match is_default && !default_route {
                    true => Route { to: network, via, metric: None },
                    false => Route { to: route.to, via, metric: Some(route.metric) },
                };
                let Request { message, .. } = request(successor, route)?;
                changes.push(Request { message, flags: NLM_F_CREATE | NLM_F_REPLACE });
            }
        }
        match self.netlink.apply(changes)?.first() {
            Some(refused) => Err(refused.to_io()),
            None => Ok(()),
        }
    }

    /// Runs `work` in the pod's namespace. Sysctls belong to the namespace of the thread that opens them.
    fn run_inside<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        setns(self.netns, CloneFlags::CLONE_NEWNET)?;
        let done = work();
        setns(self.host_netns, CloneFlags::CLONE_NEWNET)?;
        Ok(done)
    }

    fn switch_on_ipv6(&self, interface: &str) -> io::Result<()> {
        match self.run_inside(|| switch_on_ipv6(interface))? {
            Ok(Ipv6Availability::On) => Ok(()),
            Ok(Ipv6Availability::NoKernel) => Err(io::Error::other(
                "this kernel has no IPv6, which pods of this cluster need: boot without ipv6.disable=1",
            )),
            Ok(Ipv6Availability::NoInterface) => Err(io::Error::other(
                "the kernel has IPv6 disabled on this interface: the MTU of the overlay must be 1280 or more",
            )),
            Err(error) => Err(io::Error::other(format!(
                "net.ipv6.conf.{interface}.disable_ipv6 of the pod is 1 and cannot be set to 0 ({error}): \
                 make /proc/sys writable for gossamer, or set net.ipv6.conf.default.disable_ipv6=0 in new \
                 namespaces"
            ))),
        }
    }
}

/// Returns the destination of a default route, in the family of the address.
fn everything(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

/// Returns a request to add a route.
fn request(link: u32, Route { to, via, metric }: Route) -> io::Result<Request> {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(to.network(), to.prefix_len())
        .and_then(|route| route.gateway(via))
        .map_err(io::Error::other)?
        .output_interface(link);
    let route = metric.into_iter().fold(route, RouteMessageBuilder::priority);
    let message = RouteNetlinkMessage::NewRoute(route.build());
    Ok(Request { message, flags: NLM_F_CREATE | NLM_F_EXCL })
}
