//! Pods on a bridge of another program (flannel's CNI plugin, `dockerd --bip`, pods made by hand).
//!
//! The agent makes no pod of its own there: that program may assign the address to a pod at any time.

use super::TrialInput;
use crate::netlink::Netlink;

/// Returns the name of another program's bridge that has ports and an address of this node's subnets.
pub fn bridge(netlink: &mut Netlink, setting: &TrialInput) -> Option<String> {
    let links = netlink.links().ok()?;
    let addresses = netlink.addresses().ok()?;
    let is_of_subnet = |link: u32| {
        let mut own = addresses.iter().filter(|address| address.link == link);
        own.any(|address| setting.subnets.iter().any(|subnet| subnet.contains(&address.ip)))
    };
    let has_port = |bridge: u32| links.iter().any(|link| link.is_plugged_into(bridge));
    let found = links.iter().find(|link| {
        link.kind == "bridge"
            && link.name != setting.bridge
            && is_of_subnet(link.index)
            && has_port(link.index)
    });
    found.map(|link| link.name.clone())
}
