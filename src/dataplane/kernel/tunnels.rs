//! Interfaces by which this host sends into tunnels of VXLAN.

use std::collections::BTreeSet;

use rtnetlink::packet_route::link::LinkAttribute;

use super::listens_on;
use crate::netlink::link::Link;

/// Names of the VXLAN devices for this port, of whatever program, and of the interfaces on top of them:
/// bridges and bonds that one is a port of, and VLANs, macvlans and the like.
pub fn into_tunnels(links: &[Link], port: u16) -> BTreeSet<String> {
    let devices = links.iter().filter(|link| listens_on(link, port));
    let mut found: BTreeSet<u32> = devices.map(|link| link.index).collect();
    loop {
        let is_new = |link: &&Link| !found.contains(&link.index) && is_on(link, &found, links);
        let above: Vec<u32> = links.iter().filter(is_new).map(|link| link.index).collect();
        if above.is_empty() {
            break;
        }
        found.extend(above);
    }
    let found = links.iter().filter(|link| found.contains(&link.index));
    found.map(|link| link.name.clone()).collect()
}

/// Whether an interface is on top of one of these. What leaves by a VRF leaves by one of its ports as well,
/// and what comes out of a veth pair belongs to no user any more.
fn is_on(link: &Link, those: &BTreeSet<u32>, links: &[Link]) -> bool {
    let has_lower = || {
        link.peer_namespace().is_none()
            && link.message.attributes.iter().any(
                |attribute| matches!(attribute, LinkAttribute::Link(index) if those.contains(index)),
            )
    };
    let has_port = || {
        let mut ports = links.iter().filter(|port| port.controller() == Some(link.index));
        ports.any(|port| those.contains(&port.index))
    };
    !matches!(&*link.kind, "vrf" | "veth") && (has_lower() || has_port())
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkInfo, LinkMessage};

    use super::*;

    fn link(index: u32, name: &str, info: Vec<LinkInfo>, more: &[LinkAttribute]) -> Link {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        message.attributes.push(LinkAttribute::LinkInfo(info));
        message.attributes.extend_from_slice(more);
        Link::from(message)
    }

    #[test]
    fn interfaces_above_vxlan_devices_of_the_port_lead_into_tunnels_and_no_others() {
        let vxlan = |index, name, port, more: &[_]| {
            let data = LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Port(port)]));
            link(index, name, vec![LinkInfo::Kind(InfoKind::Vxlan), data], more)
        };
        let other =
            |index, name, kind, more: &[_]| link(index, name, vec![LinkInfo::Kind(kind)], more);
        let (controller, lower) = (LinkAttribute::Controller, LinkAttribute::Link);
        let of_another_namespace = [lower(1), LinkAttribute::LinkNetNsId(0)];
        let links = [
            vxlan(1, "gossamer.1", 8472, &[]),
            vxlan(2, "vx2", 8472, &[controller(3)]),
            other(3, "br3", InfoKind::Bridge, &[]),
            other(4, "vlan4", InfoKind::Vlan, &[lower(3)]),
            other(5, "eth5", InfoKind::Veth, &[controller(3)]),
            vxlan(6, "vx6", 4789, &[controller(7)]),
            other(7, "br7", InfoKind::Bridge, &[]),
            other(8, "vlan8", InfoKind::Vlan, &[lower(7)]),
            other(9, "mac9", InfoKind::MacVlan, &of_another_namespace),
            vxlan(10, "vx10", 8472, &[controller(11)]),
            other(11, "vrf11", InfoKind::Vrf, &[]),
        ];
        let names: Vec<String> = into_tunnels(&links, 8472).into_iter().collect();
        assert_eq!(names, ["br3", "gossamer.1", "vlan4", "vx10", "vx2"]);
        assert!(into_tunnels(&links, 9).is_empty());
    }
}
