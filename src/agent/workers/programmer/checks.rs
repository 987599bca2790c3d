//! Checks of the kernel thread besides its tables: the underlay, overlaps, and routes of packets.

use std::{collections::BTreeSet, net::IpAddr, time::Instant};

use super::{DesiredState, MIN_CHECK_INTERVAL, RETRY_INTERVAL, Reconciler, State};
use crate::{
    agent::{diagnosis::auditor::Place, workers::kernel_event::KernelEvent},
    dataplane::{kernel::overlaps, repair_conflict::Kind},
    sysctl,
    underlay::recheck,
};

impl<F: Fn(KernelEvent)> Reconciler<F> {
    /// Returns when to check the underlay next.
    pub(super) fn underlay_due(&self, now: Instant) -> Option<Instant> {
        let earliest = self
            .underlay_checked_at
            .map_or(now, |underlay_checked_at| underlay_checked_at + MIN_CHECK_INTERVAL);
        let touched = self.recheck.underlay.then_some(earliest);
        touched.into_iter().chain(self.underlay.due()).chain(self.flaps.due()).min()
    }

    /// Checks the underlay and reports changes.
    pub(super) fn check_underlay(&mut self, now: Instant) {
        self.recheck.underlay = false;
        self.underlay_checked_at = Some(now);
        let peers: BTreeSet<_> = self.underlays().collect();
        let present = self.underlay.present();
        let check = recheck(&mut self.netlink, &self.config, present, peers.into_iter());
        if let Some(change) = self.underlay.step(now, check) {
            (self.report)(KernelEvent::Underlay(change));
        }
        self.check_carrier(now);
        // A change may be an address inside the overlay's networks.
        self.check_overlaps();
    }

    /// Checks whether the carrier of the underlay interface flaps.
    fn check_carrier(&mut self, now: Instant) {
        let name = &self.underlay.present().name;
        match self.netlink.link(name) {
            Ok(Some(link)) => self.flaps.update(now, &link),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "underlay carrier not read"),
        }
        let flapping = self.flaps.problem(name);
        if flapping != self.flapping {
            self.flapping.clone_from(&flapping);
            (self.report)(KernelEvent::Flapping(flapping));
        }
    }

    /// Returns the underlay addresses of the peers.
    pub(super) fn underlays(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let all =
            self.desired_state.iter().filter_map(|desired_state| match &desired_state.state {
                State::Overlay(all, _) => Some(all.underlays()),
                State::Nothing { .. } => None,
            });
        all.flatten()
    }

    /// Reports addresses of this host inside the overlay's networks if they have changed.
    pub(super) fn check_overlaps(&mut self) {
        let Some(DesiredState { state: State::Overlay(all, _), .. }) = &self.desired_state else {
            return;
        };
        let networks: Vec<_> = all.pool.networks().iter().collect();
        let slots = all.device.addresses.iter().filter_map(|ip| all.pool.slot_of(*ip));
        let own: Vec<_> = slots.flat_map(|slot| all.pool.subnets(slot).iter()).collect();
        let has_all_routes = self.demand.in_use().is_none();
        match overlaps(&mut self.netlink, &networks, Some(&all.pool), &own, has_all_routes) {
            Ok(overlaps) => {
                if overlaps != self.overlaps {
                    self.overlaps.clone_from(&overlaps);
                    (self.report)(KernelEvent::Overlaps(overlaps));
                }
            }
            Err(error) => tracing::debug!(%error, "addresses of interfaces not read"),
        }
    }

    /// Looks up the routes of packets. Unprogrammed packets are diverted by design, so it waits for the
    /// entries.
    pub(super) fn audit(&mut self) {
        let now = Instant::now();
        if std::mem::take(&mut self.recheck.routing) {
            self.auditor.on_change(now, self.kernel.take_foreign());
        }
        let device = self.kernel.device().filter(|_| self.reached);
        let (Some(DesiredState { state: State::Overlay(all, firewall), .. }), Some(device)) =
            (&self.desired_state, device)
        else {
            return self.auditor.postpone(now);
        };
        let is_due = self.auditor.due() <= now;
        let desired = self.part.as_ref().unwrap_or(all);
        let place = Place::new(device, self.underlay.present(), firewall);
        if let Some(routing) = self.auditor.run_pass(now, &mut self.netlink, desired, place) {
            (self.report)(KernelEvent::Routing(routing));
        }
        if is_due
            && let Err(error) = self.next_hops.keep(&mut self.netlink, &self.auditor.next_hops())
        {
            tracing::debug!(%error, "neighbor entries of next hops not updated");
        }
    }

    /// Makes the kernel forget a wrong path MTU. For IPv4 the kernel can only forget all of them; routers
    /// report the correct ones again.
    pub(super) fn forget_path(&mut self, host: IpAddr, told: u32) {
        let forgotten = match host {
            IpAddr::V4(_) => sysctl::write("net/ipv4/route/flush", "1"),
            IpAddr::V6(host) => self.netlink.forget_path(host),
        };
        let result = forgotten.map_err(|error| error.to_string());
        (self.report)(KernelEvent::PathForgotten { host, told, result });
    }

    /// Reports the packet counters of members.
    pub(super) fn count_packets(&mut self) {
        let Some(DesiredState { state: State::Overlay(_, firewall), .. }) = &self.desired_state
        else {
            return;
        };
        if let Some(counted) = self.host_checks.count_packets(&firewall.table) {
            (self.report)(KernelEvent::Counted(counted));
        }
    }

    /// Checks the host (sysctls, chains) and overlaps.
    pub(super) fn check_host(&mut self) {
        self.is_forwarding_switched = false;
        self.host_checked_at = Some(Instant::now());
        let Some(DesiredState { state: State::Overlay(desired, _), .. }) = &self.desired_state
        else {
            return;
        };
        let bridge = self.config.bridge_name(desired.device.vni);
        self.host_checks.check(desired, &bridge, &self.underlay.present().name);
        self.report_host();
        self.check_overlaps();
        // A notification may have been lost.
        self.recheck.underlay = true;
    }

    /// Returns when to check the host because forwarding was switched; not at once each time, so that
    /// programs that switch it in turn cannot use a whole CPU.
    pub(super) fn host_check_due(&self) -> Option<Instant> {
        let gap = RETRY_INTERVAL.max(self.host_checks.repair_conflicts.pause(Kind::Sysctls));
        let due = self.host_checked_at.map_or_else(Instant::now, |checked_at| checked_at + gap);
        self.is_forwarding_switched.then_some(due)
    }

    /// Reports the host checks if they have changed.
    pub(super) fn report_host(&mut self) {
        if let Some(state) = self.host_checks.take_change() {
            (self.report)(KernelEvent::Host(state));
        }
    }
}
