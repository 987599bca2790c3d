//! Keeps the kernel's neighbor entries of next hops of tunnel packets when its tables are full.
//!
//! All namespaces and interfaces share one table of each family (`gc_thresh3`), and a pod can fill it by
//! questions in its own namespace. The kernel then drops entries that are older than five seconds, and makes
//! no new ones, so tunnels and gossip would end. Entries with `extern_learn` stay and take no place (Linux
//! 5.0); unlike permanent ones they follow the MAC of their hosts.

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

/// Index of an interface, and an address behind it.
pub type Hop = (u32, IpAddr);

#[derive(Debug, Default)]
pub struct NextHops {
    kept: BTreeSet<Hop>,
    /// Interfaces by which MACs are asked for: on others an entry without one would keep packets back.
    asking: BTreeSet<u32>,
}

impl NextHops {
    /// Keeps these, and no others that were kept before.
    ///
    /// # Errors
    /// The kernel does not show its entries.
    pub fn keep(&mut self, netlink: &mut Netlink, wanted: &BTreeSet<Hop>) -> io::Result<()> {
        if wanted.is_empty() && self.kept.is_empty() {
            return Ok(());
        }
        let there = netlink.neighbors()?;
        for refused in netlink.apply(self.changes(wanted, &there))? {
            tracing::debug!(error = %refused.to_io(), "neighbor entry of a next hop not kept");
        }
        Ok(())
    }

    fn changes(&mut self, wanted: &BTreeSet<Hop>, there: &[Neighbor]) -> Vec<Request> {
        let resolved = there.iter().filter(|entry| entry.is_resolved);
        self.asking.extend(resolved.map(|entry| entry.link));
        let there: BTreeMap<Hop, &Neighbor> =
            there.iter().map(|entry| ((entry.link, entry.ip), entry)).collect();
        let mut changes = Vec::new();
        for hop @ (link, ip) in wanted.iter().copied() {
            let mac = match there.get(&hop) {
                Some(entry) if entry.is_resolved && !entry.stays => entry.mac,
                None if self.asking.contains(&link) => None,
                _ => continue,
            };
            changes.push(protected_entry(link, ip, mac, ROUTE_PROTOCOL));
        }
        let given_up = self.kept.difference(wanted).filter_map(|hop| there.get(hop));
        changes.extend(given_up.filter_map(|entry| given_back(entry)));
        self.kept.clone_from(wanted);
        changes
    }
}

/// What makes an entry as it would be without gossamer; none, if it is not of its making.
pub(super) fn given_back(entry: &Neighbor) -> Option<Request> {
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

    fn kept(hop: Hop, is_resolved: bool) -> Neighbor {
        Neighbor { stays: true, protocol: Some(ROUTE_PROTOCOL), ..entry(hop, is_resolved) }
    }

    fn keep((link, ip): Hop, mac: Option<Mac>) -> Request {
        protected_entry(link, ip, mac, ROUTE_PROTOCOL)
    }

    #[test]
    fn entries_of_next_hops_stay_as_long_as_they_are_wanted() {
        let mut hops = NextHops::default();
        let wanted = BTreeSet::from([hop(1), hop(2), hop(3)]);
        let there = [entry(hop(1), true), entry(hop(2), false), entry(hop(9), true)];
        let changes = hops.changes(&wanted, &there);
        assert_eq!(
            changes,
            [keep(hop(1), Some(MAC)), keep(hop(3), None)],
            "what is asked for is left"
        );
        let there = [kept(hop(1), true), kept(hop(2), false), kept(hop(3), false)];
        assert_eq!(hops.changes(&wanted, &there), []);
        let (link, ip) = hop(1);
        let changes = hops.changes(&BTreeSet::from([hop(2)]), &there);
        assert_eq!(changes, [unprotected_entry(link, ip, MAC), entry_removal(link, hop(3).1)]);
        let of_another = Neighbor { protocol: None, ..kept(hop(2), true) };
        assert_eq!(hops.changes(&BTreeSet::new(), &[of_another]), []);
    }

    #[test]
    fn entry_is_not_made_where_no_mac_is_asked_for() {
        let mut hops = NextHops::default();
        let tunnel = Neighbor { is_resolved: false, ..entry((8, [10, 99, 0, 9].into()), true) };
        assert_eq!(hops.changes(&BTreeSet::from([(8, [10, 99, 0, 1].into())]), &[tunnel]), []);
    }
}
