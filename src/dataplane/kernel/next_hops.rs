//! Protects the neighbor entries of next hops of tunnel packets when the kernel's tables are full.
//!
//! All namespaces and interfaces share one table per family (`gc_thresh3`), and a pod can fill it
//! with requests in its own namespace. The kernel then drops entries that are older than five
//! seconds and creates no new ones, so tunnels and gossip would fail. Entries with `extern_learn`
//! are not dropped and not counted (Linux 5.0). Unlike permanent entries, they follow changes of
//! the next hop's MAC.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use crate::{
    dataplane::desired::ROUTE_PROTOCOL,
    netlink::{
        Netlink, Request,
        neighbour::{Neighbor, entry_removal, protected_entry, unprotected_entry},
    },
};

/// Index of an interface, and an address that is reached by it.
pub type Hop = (u32, IpAddr);

/// The protected entries.
#[derive(Debug, Default)]
pub struct NextHops {
    /// Next hops whose entries are protected.
    protected: BTreeSet<Hop>,
    /// Interfaces on which the kernel resolves MACs. On others, an entry without a MAC would block
    /// packets.
    resolving: BTreeSet<u32>,
}

impl NextHops {
    /// Protects the entries of the next hops `wanted`, and ends the protection of others.
    ///
    /// # Errors
    /// When the kernel's entries cannot be listed.
    pub fn keep(&mut self, netlink: &mut Netlink, wanted: &BTreeSet<Hop>) -> io::Result<()> {
        if wanted.is_empty() && self.protected.is_empty() {
            return Ok(());
        }
        let present = netlink.neighbors()?;
        for refused in netlink.apply(self.changes(wanted, &present))? {
            tracing::debug!(error = %refused.to_io(), "could not protect the neighbor entry of a next hop");
        }
        Ok(())
    }

    /// Returns the requests that protect the wanted entries and release others. `present` lists the
    /// present entries.
    fn changes(&mut self, wanted: &BTreeSet<Hop>, present: &[Neighbor]) -> Vec<Request> {
        let resolved = present.iter().filter(|entry| entry.is_resolved);
        self.resolving.extend(resolved.map(|entry| entry.link));
        let present: BTreeMap<Hop, &Neighbor> =
            present.iter().map(|entry| ((entry.link, entry.ip), entry)).collect();
        let mut changes = Vec::new();
        for hop @ (link, ip) in wanted.iter().copied() {
            let mac = match present.get(&hop) {
                Some(entry) if entry.is_resolved && !entry.stays => entry.mac,
                None if self.resolving.contains(&link) => None,
                _ => continue,
            };
            changes.push(protected_entry(link, ip, mac, ROUTE_PROTOCOL));
        }
        let released = self.protected.difference(wanted).filter_map(|hop| present.get(hop));
        changes.extend(released.filter_map(|entry| restoring_request(entry)));
        self.protected.clone_from(wanted);
        changes
    }
}

/// Returns the request that restores an entry to its state without gossamer; `None` if gossamer
/// does not protect it.
pub(super) fn restoring_request(entry: &Neighbor) -> Option<Request> {
    let Neighbor { link, ip, mac, stays, protocol, is_resolved } = *entry;
    let is_ours = stays && protocol == Some(ROUTE_PROTOCOL);
    let mac = mac.filter(|_| is_resolved);
    is_ours.then(|| {
        mac.map_or_else(|| entry_removal(link, ip), |mac| unprotected_entry(link, ip, mac))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Mac;

    const MAC: Mac = Mac::from_bytes([2, 0, 0, 0, 0, 9]);

    fn hop(last: u8) -> Hop {
        (7, [10, 99, 0, last].into())
    }

    fn entry((link, ip): Hop, is_resolved: bool) -> Neighbor {
        let mac = is_resolved.then_some(MAC);
        Neighbor { link, ip, mac, is_resolved, stays: false, protocol: None }
    }

    fn protected(hop: Hop, is_resolved: bool) -> Neighbor {
        Neighbor { stays: true, protocol: Some(ROUTE_PROTOCOL), ..entry(hop, is_resolved) }
    }

    fn protecting((link, ip): Hop, mac: Option<Mac>) -> Request {
        protected_entry(link, ip, mac, ROUTE_PROTOCOL)
    }

    #[test]
    fn entries_of_next_hops_are_protected_while_they_are_wanted() {
        let mut hops = NextHops::default();
        let wanted = BTreeSet::from([hop(1), hop(2), hop(3)]);
        let present = [entry(hop(1), true), entry(hop(2), false), entry(hop(9), true)];
        let changes = hops.changes(&wanted, &present);
        assert_eq!(
            changes,
            [protecting(hop(1), Some(MAC)), protecting(hop(3), None)],
            "an entry in resolution is left alone"
        );
        let present = [protected(hop(1), true), protected(hop(2), false), protected(hop(3), false)];
        assert_eq!(hops.changes(&wanted, &present), []);
        let (link, ip) = hop(1);
        let changes = hops.changes(&BTreeSet::from([hop(2)]), &present);
        assert_eq!(changes, [unprotected_entry(link, ip, MAC), entry_removal(link, hop(3).1)]);
        let of_another = Neighbor { protocol: None, ..protected(hop(2), true) };
        assert_eq!(hops.changes(&BTreeSet::new(), &[of_another]), []);
    }

    #[test]
    fn entry_is_not_created_on_an_interface_without_resolution() {
        let mut hops = NextHops::default();
        let tunnel = Neighbor { is_resolved: false, ..entry((8, [10, 99, 0, 9].into()), true) };
        assert_eq!(hops.changes(&BTreeSet::from([(8, [10, 99, 0, 1].into())]), &[tunnel]), []);
    }
}
