//! Requests to the kernel that several files of this room send.

use std::net::IpAddr;

use rtnetlink::{
    LinkUnspec,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
    },
};

use crate::netlink::{
    Request,
    link::{address_message, no_ipv6_address},
};

/// Returns a request to disable automatic IPv6 addresses on a port, which needs none. A kernel without IPv6
/// refuses it, as does any kernel for a link with an MTU below 1280.
pub(super) fn without_address(port: &str) -> Request {
    let message = LinkUnspec::new_with_name(port).append_extra_attribute(no_ipv6_address()).build();
    Request { message: RouteNetlinkMessage::SetLink(message), flags: 0 }
}

/// Returns a request to add an address to an interface.
pub(super) fn address_request(link: u32, ip: IpAddr, prefix_len: u8) -> Request {
    let mut message = address_message(link, ip, prefix_len);
    // Duplicate detection would delay IPv6 by a second. The address is known to be unique.
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    Request { message: RouteNetlinkMessage::NewAddress(message), flags }
}
