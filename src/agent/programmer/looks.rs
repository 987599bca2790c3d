//! What the kernel's thread looks at beside its tables: the underlay, overlaps, and the ways of packets.

use std::{collections::BTreeSet, net::IpAddr, time::Instant};

use super::{Goal, LOOK_GAP, Reconciler, State};
use crate::{
    agent::{auditor::Place, told::Told, underlay::look_again},
    dataplane::kernel::overlaps,
};

impl<F: Fn(Told)> Reconciler<F> {
    pub(super) fn underlay_due(&self, now: Instant) -> Option<Instant> {
        let earliest = self.looked.map_or(now, |looked| looked + LOOK_GAP);
        let touched = self.touched.underlay.then_some(earliest);
        touched.into_iter().chain(self.underlay.due()).chain(self.flaps.due()).min()
    }

    pub(super) fn look_at_underlay(&mut self, now: Instant) {
        self.touched.underlay = false;
        self.looked = Some(now);
        let peers: BTreeSet<_> = self.underlays().collect();
        let present = self.underlay.present();
        let look = look_again(&mut self.netlink, &self.config, present, peers.into_iter());
        if let Some(change) = self.underlay.step(now, look) {
            (self.tell)(Told::Underlay(change));
        }
        self.look_for_flaps(now);
        // What has changed may be an address inside the overlay's networks.
        self.look_for_overlaps();
    }

    fn look_for_flaps(&mut self, now: Instant) {
        let name = &self.underlay.present().name;
        match self.netlink.link(name) {
            Ok(Some(link)) => self.flaps.look(now, &link),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "the underlay's carrier not looked at"),
        }
        let flapping = self.flaps.problem(name);
        if flapping != self.flapping {
            self.flapping.clone_from(&flapping);
            (self.tell)(Told::Flapping(flapping));
        }
    }

    /// Underlay addresses of the peers.
    pub(super) fn underlays(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let all = self.goal.iter().filter_map(|goal| match &goal.state {
            State::Overlay(all, _) => Some(all.underlays()),
            State::Nothing { .. } => None,
        });
        all.flatten()
    }

    pub(super) fn look_for_overlaps(&mut self) {
        let Some(Goal { state: State::Overlay(all, _), .. }) = &self.goal else { return };
        let networks: Vec<_> = all.pool.networks().iter().collect();
        let slots = all.device.addresses.iter().filter_map(|ip| all.pool.slot_of(*ip));
        let own: Vec<_> = slots.flat_map(|slot| all.pool.subnets(slot).iter()).collect();
        let has_all_routes = self.demand.in_use().is_none();
        match overlaps(&mut self.netlink, &networks, &own, has_all_routes) {
            Ok(overlaps) => {
                if overlaps != self.overlaps {
                    self.overlaps.clone_from(&overlaps);
                    (self.tell)(Told::Overlaps(overlaps));
                }
            }
            Err(error) => tracing::debug!(%error, "addresses of interfaces not read"),
        }
    }

    /// Asks where the kernel sends packets. What is not programmed yet goes astray by design.
    pub(super) fn audit(&mut self) {
        let now = Instant::now();
        if std::mem::take(&mut self.touched.routing) {
            self.auditor.touch(now, self.kernel.take_foreign());
        }
        let device = self.kernel.device().filter(|_| self.reached);
        let (Some(Goal { state: State::Overlay(all, firewall), .. }), Some(device)) =
            (&self.goal, device)
        else {
            return self.auditor.put_off(now);
        };
        let is_due = self.auditor.due() <= now;
        let desired = self.part.as_ref().unwrap_or(all);
        let place = Place::new(device, self.underlay.present(), firewall);
        if let Some(routing) = self.auditor.look(now, &mut self.netlink, desired, place) {
            (self.tell)(Told::Routing(routing));
        }
        if is_due
            && let Err(error) = self.next_hops.keep(&mut self.netlink, &self.auditor.next_hops())
        {
            tracing::debug!(%error, "neighbor entries of next hops not looked at");
        }
    }
}
