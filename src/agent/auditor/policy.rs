//! Policy rules of this host that may take some packets of pods.

use std::io;

use rtnetlink::packet_route::route::RouteProtocol;

use crate::{
    dataplane::{
        audit::{Own, Selected},
        desired::ROUTE_PROTOCOL,
    },
    netlink::{Netlink, route::Rule},
};

/// Rules of a family that packets are tried against.
const MAX_RULES: usize = 32;

/// What the policy rules of both families select that may be packets between pods, apart from what every
/// packet meets. Marks cannot be known from here. Packets of pods come in by these links.
///
/// # Errors
/// The kernel does not show its rules.
pub fn selected(netlink: &mut Netlink, own: &[Own], links: &[u32]) -> io::Result<Vec<Selected>> {
    let mut selected = Vec::new();
    for ipv4 in [true, false] {
        let inside = own.iter().find(|own| own.subnet.addr().is_ipv4() == ipv4);
        if inside.is_none_or(|own| own.inside.is_none()) {
            continue;
        }
        let rules = netlink.rules(ipv4)?;
        for rule in rules.iter().filter(|rule| selects(rule)).take(MAX_RULES) {
            let input = match &rule.input {
                Some(name) => match netlink.link(name)? {
                    Some(link) if links.contains(&link.index) => Some(link.index),
                    _ => continue,
                },
                None => None,
            };
            selected.push(Selected { selector: rule.selector, input, ipv4 });
        }
    }
    Ok(selected)
}

/// Whether it is another program's and concerns some packets, and which ones is known.
fn selects(rule: &Rule) -> bool {
    let Rule { selector, inverted, mark, protocol, .. } = rule;
    let is_ours = *protocol == Some(RouteProtocol::Other(ROUTE_PROTOCOL));
    let some = selector.from.is_some()
        || selector.to.is_some()
        || selector.transport.is_some()
        || selector.tos != 0;
    some && !inverted && mark.is_none() && !is_ours
}
