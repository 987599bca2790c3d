//! The next hops to silent peers, and the kernel's neighbor entries of them.

use std::{collections::BTreeSet, net::IpAddr};

use rtnetlink::packet_route::neighbour::NeighbourState;

use super::PeerRoutes;
use crate::{
    dataplane::silence::{Facts, Pinned, Place, Suspect, Watch},
    model::Mac,
    netlink::{Netlink, link::Link},
};

impl PeerRoutes {
    /// Returns the next hop to a peer, and its interface.
    pub(super) fn hop(&self, address: IpAddr) -> Option<(IpAddr, &Link)> {
        let route = self.routes.get(&address)?;
        let link = self.links.iter().find(|link| link.index == route.link)?;
        Some((route.gateway.unwrap_or(address), link))
    }

    /// Returns all next hops to a peer, and their interfaces: those of a route with several first.
    pub(super) fn all_hops(&self, address: IpAddr) -> Vec<(u32, IpAddr)> {
        let single = self.hop(address).map(|(hop, link)| (link.index, hop));
        match self.shared.get(&address) {
            Some(hops) => hops.clone(),
            None => single.into_iter().collect(),
        }
    }

    /// Returns what is known about the next hops to a peer.
    pub fn hop_facts(
        &self,
        netlink: &mut Netlink,
        place: &Place,
        address: IpAddr,
        watch: &Watch,
    ) -> Facts {
        let contested = self.gateway(place, address);
        let contested = contested.map(|gateway| (gateway, watch.contestants(gateway)));
        Facts {
            unresolved: self.unresolved(netlink, address),
            pinned: self.pinned(netlink, address, |hop| watch.answering(hop)),
            contested: contested.filter(|(_, macs)| !macs.is_empty()),
            is_shared: self.shared.contains_key(&address),
            ..Facts::default()
        }
    }

    /// Lets the kernel verify its entries of the next hops to these peers, except the hops that have
    /// answered. An entry can be in use for a minute after its machine has died.
    pub fn verify_hops(
        &self,
        netlink: &mut Netlink,
        suspects: &[Suspect],
        has_answered: impl Fn(IpAddr) -> bool,
    ) {
        let hops = suspects.iter().flat_map(|suspect| self.all_hops(suspect.address));
        let hops: BTreeSet<(u32, IpAddr)> = hops.collect();
        for (link, hop) in hops.into_iter().filter(|(_, hop)| !has_answered(*hop)) {
            if let Err(error) = netlink.verify_neighbor(link, hop) {
                tracing::debug!(%error, %hop, "next hop not verified");
            }
        }
    }

    /// Returns the next hops to all peers on the underlay's interface.
    pub fn hops(&self, place: &Place) -> BTreeSet<IpAddr> {
        let hops = self.routes.keys().filter_map(|address| self.hop(*address));
        hops.filter(|(_, link)| link.index == place.link).map(|(hop, _)| hop).collect()
    }

    /// Returns the router to a peer on the underlay's interface.
    pub fn gateway(&self, place: &Place, address: IpAddr) -> Option<IpAddr> {
        let (hop, link) = self.hop(address)?;
        (hop != address && link.index == place.link).then_some(hop)
    }

    /// Whether one of these interfaces is that of the next hop to a peer, or a port of it.
    pub fn has_next_hop_at(
        &self,
        address: IpAddr,
        mut interfaces: impl Iterator<Item = u32>,
    ) -> bool {
        let Some((_, wanted)) = self.hop(address) else { return false };
        let is_match =
            |link: &Link| link.index == wanted.index || link.controller() == Some(wanted.index);
        interfaces.any(|index| self.links.iter().any(|link| link.index == index && is_match(link)))
    }

    /// Returns a next hop to a peer and its interface, if the kernel cannot resolve its hardware address.
    fn unresolved(&self, netlink: &mut Netlink, address: IpAddr) -> Option<(IpAddr, String)> {
        self.all_hops(address).into_iter().find_map(|(index, hop)| {
            let link = self.links.iter().find(|link| link.index == index)?;
            let state = netlink.neighbour(index, hop).ok()??;
            let is_unresolved =
                matches!(state, NeighbourState::Incomplete | NeighbourState::Failed);
            is_unresolved.then(|| (hop, link.name.clone()))
        })
    }

    /// Returns the fixed neighbor entry of the next hop to a peer, if other hardware addresses answer for
    /// that hop.
    fn pinned(
        &self,
        netlink: &mut Netlink,
        address: IpAddr,
        answering: impl Fn(IpAddr) -> BTreeSet<Mac>,
    ) -> Option<Pinned> {
        let (address, link) = self.hop(address)?;
        let answering = answering(address);
        let mac = netlink.fixed_neighbor(link.index, address).ok()??;
        let is_other = !answering.is_empty() && !answering.contains(&mac);
        let interface = link.name.clone();
        is_other.then_some(Pinned { address, interface, mac, answering, no_arp: link.no_arp })
    }
}
