//! Neighbor entries of pods on their bridge, which gossamer sets instead of leaving them to ARP and ND.
//!
//! With anti-spoofing, the entries are permanent. Permanent entries are not evicted when packets to unused
//! addresses of any network fill the neighbor table, which has 1,024 places for all interfaces and namespaces
//! (`gc_thresh3`). Since Linux 5.0 they do not count toward that limit. A permanent entry of another program
//! with a wrong MAC would cut the pod off from its host, so it is removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use super::desired::{ReadyBridge, RepairReport, Tenants};
use crate::{
    model::Mac,
    netlink::{
        Netlink,
        neighbour::{entry_removal, permanent_entry},
    },
};

/// Adds missing permanent entries, and removes wrong ones and those of pods that are gone.
///
/// # Errors
/// If the kernel's entries cannot be read or changed.
pub(super) fn keep(
    netlink: &mut Netlink,
    ready_bridge: &ReadyBridge,
    ports: &Tenants,
    report: &mut RepairReport,
) -> io::Result<()> {
    let (bridge, index) = (&ready_bridge.bridge, ready_bridge.index);
    let pods: BTreeMap<IpAddr, Option<Mac>> = ports
        .values()
        .flat_map(|tenant| tenant.addresses.iter().map(|address| (address, tenant.mac)))
        .collect();
    let (mut right, mut changes) = (BTreeSet::new(), Vec::new());
    for (ip, mac) in netlink.permanent_neighbors(index)? {
        let is_pod_conflict = bridge.subnets.iter().any(|subnet| subnet.contains(&ip));
        match pods.get(&ip) {
            Some(Some(of_pod)) if *of_pod == mac => _ = right.insert(ip),
            // The pod's MAC is unknown, so the entry cannot be checked.
            Some(None) => {}
            Some(Some(_)) => {
                report.note(format!("the neighbor entry of {ip} on {}", bridge.name), index);
                changes.push(entry_removal(index, ip));
            }
            // The pod of this address is gone.
            None if is_pod_conflict && bridge.anti_spoofing => {
                changes.push(entry_removal(index, ip))
            }
            None => {}
        }
    }
    if bridge.anti_spoofing {
        let missing = pods.iter().filter(|(ip, _)| !right.contains(ip));
        let missing = missing.filter_map(|(ip, mac)| Some(permanent_entry(index, *ip, (*mac)?)));
        changes.extend(missing);
    }
    for refused in netlink.apply(changes)? {
        tracing::debug!(error = %refused.to_io(), "neighbor entry of a pod not repaired");
    }
    Ok(())
}
