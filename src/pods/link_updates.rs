//! What the kernel tells of the bridge and its ports, after which they are to be looked at again.

use std::collections::BTreeMap;

use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{
    bridge::{Provided, Tenants, is_as_it_should_be, is_foreign, is_plugged},
    port,
    renamed::is_renamed,
};
use crate::netlink::link::{Address, Link};

/// Whether each interface is right by what was told of it last.
#[derive(Debug, Default)]
pub struct LinkUpdates {
    right: BTreeMap<(u32, Teller), bool>,
    is_gateway_gone: bool,
}

/// The messages about one interface tell different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Teller {
    Kernel,
    Bridge,
}

impl LinkUpdates {
    /// Whether something is wrong with the bridge or one of the ports.
    pub fn is_bad(&self) -> bool {
        self.is_gateway_gone || self.right.values().any(|is_right| !is_right)
    }

    pub(super) fn add(&mut self, provided: &Provided, ports: &Tenants, told: RouteNetlinkMessage) {
        let is_bridge = |index| index == provided.index;
        match told {
            RouteNetlinkMessage::NewLink(message) => {
                let family = message.header.interface_family;
                let link = Link::from(message);
                let is_port = ports.contains_key(&link.name);
                let (teller, is_right) = match family {
                    AddressFamily::Unspec if is_bridge(link.index) => {
                        (Teller::Kernel, is_as_it_should_be(&link, &provided.bridge))
                    }
                    AddressFamily::Unspec if is_port => {
                        let is_plugged = is_plugged(&link, provided.index);
                        (Teller::Kernel, is_plugged && port::is_right(&link))
                    }
                    AddressFamily::Unspec
                        if is_renamed(&link, ports) || is_foreign(&link, provided.index, ports) =>
                    {
                        (Teller::Kernel, false)
                    }
                    // What bridges tell in messages of their own lacks most attributes.
                    AddressFamily::Bridge if is_port => (Teller::Bridge, port::is_right(&link)),
                    _ => return,
                };
                self.right.insert((link.index, teller), is_right);
            }
            RouteNetlinkMessage::DelLink(message) => {
                let link = Link::from(message);
                if is_bridge(link.index) || ports.contains_key(&link.name) {
                    self.right.insert((link.index, Teller::Kernel), false);
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                let address = Address::new(&message);
                self.is_gateway_gone |=
                    address.is_some_and(|address| provided.bridge.is_gateway(address.ip));
            }
            _ => {}
        }
    }
}
