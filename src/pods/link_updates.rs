//! Tracks the kernel's messages about the bridge and its ports, to detect when a repair is needed.

use std::collections::BTreeMap;

use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{
    bridge::{is_correct, is_foreign, is_plugged},
    desired::{ReadyBridge, Tenants},
    port,
    renamed::is_renamed,
};
use crate::netlink::link::{Address, Link};

/// Whether each interface is in the desired state according to the last message about it.
#[derive(Debug, Default)]
pub struct LinkUpdates {
    right: BTreeMap<(u32, Source), bool>,
    is_gateway_gone: bool,
}

/// The source of a message about an interface. The two sources report different attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Kernel,
    Bridge,
}

impl LinkUpdates {
    /// Returns whether the bridge or one of the ports needs a repair.
    pub fn needs_repair(&self) -> bool {
        self.is_gateway_gone || self.right.values().any(|is_right| !is_right)
    }

    /// Records a message of the kernel.
    pub(super) fn add(
        &mut self,
        ready_bridge: &ReadyBridge,
        ports: &Tenants,
        message: RouteNetlinkMessage,
    ) {
        let is_bridge = |index| index == ready_bridge.index;
        match message {
            RouteNetlinkMessage::NewLink(message) => {
                let family = message.header.interface_family;
                let link = Link::from(message);
                let is_port = ports.contains_key(&link.name);
                let (source, is_right) = match family {
                    AddressFamily::Unspec if is_bridge(link.index) => {
                        (Source::Kernel, is_correct(&link, &ready_bridge.bridge))
                    }
                    AddressFamily::Unspec if is_port => {
                        let is_plugged = is_plugged(&link, ready_bridge.index);
                        (Source::Kernel, is_plugged && port::is_right(&link))
                    }
                    AddressFamily::Unspec
                        if is_renamed(&link, ports)
                            || is_foreign(&link, ready_bridge.index, ports) =>
                    {
                        (Source::Kernel, false)
                    }
                    // The bridge's own messages lack most attributes.
                    AddressFamily::Bridge if is_port => (Source::Bridge, port::is_right(&link)),
                    _ => return,
                };
                self.right.insert((link.index, source), is_right);
            }
            RouteNetlinkMessage::DelLink(message) => {
                let link = Link::from(message);
                if is_bridge(link.index) || ports.contains_key(&link.name) {
                    self.right.insert((link.index, Source::Kernel), false);
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                let address = Address::new(&message);
                self.is_gateway_gone |=
                    address.is_some_and(|address| ready_bridge.bridge.is_gateway(address.ip));
            }
            _ => {}
        }
    }
}
