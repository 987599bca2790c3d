//! The kernel's neighbor entries of pods on their bridge: set by gossamer, and not left to be asked for.
//!
//! Where pods are held to their MACs, their entries are permanent. These stay when packets to unused
//! addresses of any network fill the table, which has 1,024 places for all interfaces and namespaces
//! (`gc_thresh3`), and do not count there since Linux 5.0. An entry that another program has pinned to
//! another MAC would cut the pod off from its host.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use super::bridge::{Mended, Provided, Tenants};
use crate::{
    model::Mac,
    netlink::{
        Netlink,
        neighbour::{permanent, without},
    },
};

/// Makes the permanent entries what they should be.
///
/// # Errors
/// The kernel does not show its entries.
pub(super) fn keep(
    netlink: &mut Netlink,
    provided: &Provided,
    ports: &Tenants,
    mended: &mut Mended,
) -> io::Result<()> {
    let (bridge, index) = (&provided.bridge, provided.index);
    let pods: BTreeMap<IpAddr, Option<Mac>> = ports
        .values()
        .flat_map(|tenant| tenant.addresses.iter().map(|address| (address, tenant.mac)))
        .collect();
    let (mut right, mut changes) = (BTreeSet::new(), Vec::new());
    for (ip, mac) in netlink.pinned_neighbours(index)? {
        let is_of_pods = bridge.subnets.iter().any(|subnet| subnet.contains(&ip));
        match pods.get(&ip) {
            Some(Some(of_pod)) if *of_pod == mac => _ = right.insert(ip),
            // Its MAC is not known here.
            Some(None) => {}
            Some(Some(_)) => {
                mended.note(format!("the neighbor entry of {ip} on {}", bridge.name), index);
                changes.push(without(index, ip));
            }
            // Its pod is gone.
            None if is_of_pods && bridge.anti_spoofing => changes.push(without(index, ip)),
            None => {}
        }
    }
    if bridge.anti_spoofing {
        let lacking = pods.iter().filter(|(ip, _)| !right.contains(ip));
        let lacking = lacking.filter_map(|(ip, mac)| Some(permanent(index, *ip, (*mac)?)));
        changes.extend(lacking);
    }
    for refused in netlink.apply(changes)? {
        tracing::debug!(error = %refused.to_io(), "neighbor entry of a pod not set right");
    }
    Ok(())
}
