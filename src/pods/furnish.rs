//! The inside of a pod: its interface up, with addresses and routes.
//!
//! The namespace may have been furnished before: with another interface of the same pod, which keeps the
//! default route, or with sysctls that turn IPv6 off for new interfaces.

use std::{fs::File, io, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
    packet_route::{RouteNetlinkMessage, link::LinkMessage},
};

use super::{
    bridge::{Bridge, address_request},
    gateway,
    wiring::OPENING,
};
use crate::{
    dataplane::{
        desired::ROUTE_PROTOCOL,
        kernel::interface::{Switched, answer_for_own_addresses, switch_on_ipv6},
    },
    model::{Mac, Pod},
    netlink::{
        Netlink, Request,
        link::{Address, Link},
        neighbour::staying,
        route::MAIN,
    },
};

/// What the kernel says of a route that is there already.
const EEXIST: i32 = 17;

/// Of a default route that others precede: netavark's have 100.
const LATER: u32 = 200;

/// Which default routes a pod gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultRoute {
    None,
    /// One for each family that has none yet.
    IfMissing,
    /// One that those of the pod's other networks precede, whichever of them is connected first.
    AfterOthers,
}

/// A route that a pod was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub to: IpNet,
    pub via: IpAddr,
    metric: Option<u32>,
}

/// A pod's namespace, entered.
pub(super) struct Inside<'a> {
    pub(super) netlink: Netlink,
    pub(super) netns: &'a File,
    /// The namespace of this thread.
    pub(super) home: &'a File,
}

impl Inside<'_> {
    /// Sets addresses and routes; says which routes.
    pub(super) fn furnish(
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
        // Others can fill the kernel's table of neighbors, which all pods share.
        for (subnet, mac) in bridge.subnets.iter().zip(gateway_mac.into_iter().cycle()) {
            changes.push(staying(index, gateway(subnet), Some(mac), ROUTE_PROTOCOL));
        }
        let mut there = Vec::new();
        for refused in self.netlink.apply(changes)? {
            match refused.index.checked_sub(fixed) {
                // The pod's other interfaces lead there already.
                Some(route) if refused.errno == EEXIST => there.push(route),
                Some(_) if refused.index >= named => {
                    let error = refused.to_io();
                    tracing::debug!(interface, %error, "neighbor entry of the gateway not made");
                }
                _ => return Err(refused.to_io()),
            }
        }
        there.sort_unstable();
        there.iter().rev().for_each(|route| _ = routes.remove(*route));
        if let Err(error) = self.netlink.await_link(interface, OPENING, Link::is_operational) {
            tracing::debug!(interface, %error, "a pod's interface does not send yet");
        }
        Ok(routes)
    }

    /// The default routes. A family without one of the pod's own, or with one that others precede, gets the
    /// networks of the overlay, unless another interface of the pod is in them.
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
                    routes.push(Route { to: everything(via), via, metric: Some(LATER) });
                }
            }
            let has = self.netlink.addresses()?;
            if has.iter().any(|address| network.contains(&address.ip)) {
                // Or this interface would answer for addresses of the other one, and take its packets.
                self.inside(|| answer_for_own_addresses(pod.attachment.interface()))?;
            } else {
                routes.push(Route { to: network, via, metric: None });
            }
        }
        Ok(routes)
    }

    /// Gives the default routes and those to the overlay that one interface has to another, by whose gateways
    /// they lead then. One that may have no default route gets routes to the overlay in their place.
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
                let is_its = |has: &&Address| has.link == link && network.contains(&has.ip);
                let has = addresses.iter().find(is_its)?;
                Some(gateway(IpNet::new(has.ip, has.prefix_len).ok()?.trunc()))
            };
            let (Some(old), Some(via)) = (gateway_of(leaving), gateway_of(successor)) else {
                continue;
            };
            for route in self.netlink.routes(old.is_ipv4())? {
                let is_default = route.to.prefix_len() == 0;
                let is_its = route.link == Some(leaving) && route.gateways == [old];
                if !is_its || route.table != MAIN || !(is_default || route.to == network) {
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

    /// Sysctls are those of the namespace of the thread that opens them.
    fn inside<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        setns(self.netns, CloneFlags::CLONE_NEWNET)?;
        let done = work();
        setns(self.home, CloneFlags::CLONE_NEWNET)?;
        Ok(done)
    }

    fn switch_on_ipv6(&self, interface: &str) -> io::Result<()> {
        match self.inside(|| switch_on_ipv6(interface))? {
            Ok(Switched::On) => Ok(()),
            Ok(Switched::NoKernel) => Err(io::Error::other(
                "this kernel has no IPv6, which pods of this cluster need: start it without ipv6.disable=1",
            )),
            Ok(Switched::NoInterface) => Err(io::Error::other(
                "the kernel gives this interface no IPv6: the MTU of the overlay must be 1280 or more",
            )),
            Err(error) => Err(io::Error::other(format!(
                "net.ipv6.conf.{interface}.disable_ipv6 of the pod is 1 and cannot be set to 0 ({error}): \
                 make /proc/sys writable for gossamer, or set net.ipv6.conf.default.disable_ipv6=0 in new \
                 namespaces"
            ))),
        }
    }
}

fn everything(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

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
