//! Rules against ICMP messages that would change this host's routes to pods.
//!
//! The kernel stores a reported path MTU with the route for ten minutes, and applies it to forwarded
//! packets as well. It accepts any report that quotes an echo reply of this host, so the sender need
//! not see this host's packets. An honest report to this host about a packet to a pod exists only if
//! the pod's host has a smaller MTU, and helps only processes of this host: the forward hook passes
//! reports about packets of pods to these pods.

use std::net::IpAddr;

use super::{ROUTERS_CHAIN, append};
use crate::{
    dataplane::firewall::Guard,
    netlink::{
        attributes,
        nftables::{Base, Rule, Step},
    },
};

/// Messages that change a route, and the offset of the destination address that they are about.
type RouteMessages = [(&'static [u8], u32); 2];
/// `IPPROTO_ICMP`: "fragmentation needed" (type and code) and "redirect" (RFC 792).
const ICMP: (u8, RouteMessages) = (1, [(&[3, 4], 24), (&[5], 24)]);
/// `IPPROTO_ICMPV6`: "packet too big" (RFC 4443, 3.2) and "redirect" (RFC 4861, 4.5).
const ICMPV6: (u8, RouteMessages) = (58, [(&[2], 32), (&[137], 24)]);
/// Offset of the first next-header field in an IPv6 header.
const NEXT_HEADER_OFFSET: u32 = 6;

/// Appends the rules that drop these messages, from any sender, if they are about packets to the
/// overlay's networks.
pub(super) fn refuse_route_messages(table: &str, guard: &Guard, steps: &mut Vec<Step>) {
    for network in &guard.networks {
        let (protocol, messages) = match network.addr() {
            IpAddr::V4(_) => ICMP,
            IpAddr::V6(_) => ICMPV6,
        };
        let (value, mask) =
            (attributes::octets(network.network()), attributes::octets(network.netmask()));
        for (start, at) in messages {
            let of_family = Rule::new().family_of(network.addr()).transport(protocol);
            let message = of_family.holds(Base::Transport, 0, start);
            let about_pod = message.clone().masked(Base::Transport, at, &mask, &value, true);
            steps.push(append(table, ROUTERS_CHAIN, &about_pod.drop()));
            // IPv6 fragments are reassembled after this hook, and the first one may end before the
            // address. Routers never fragment these messages, which have at most 1280 bytes.
            if protocol == ICMPV6.0 {
                let extended = message.lacks(Base::Network, NEXT_HEADER_OFFSET, &[protocol]);
                steps.push(append(table, ROUTERS_CHAIN, &extended.drop()));
            }
        }
    }
}
