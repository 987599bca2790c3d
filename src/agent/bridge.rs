//! The loop's side of the pods' bridge: what it is to be like, and whether pods can be plugged into it.

use super::{Agent, attach_worker::Job};
use crate::{core::View, dataplane::desired::device_name, pods::bridge::Bridge};

impl Agent {
    /// Pods of an earlier run are plugged in as those of this one are; a subnet or an MTU may have changed.
    pub(super) fn keep_bridge(&mut self) {
        let bridge = self.kernel.wanted.as_ref().map(|view| self.bridge(view));
        if self.pods.table.is_empty() || self.pods.bridge == bridge {
            return;
        }
        self.pods.bridge.clone_from(&bridge);
        if let Some(bridge) = bridge {
            self.attach_worker.ask(Job::Keep { bridge, tenants: self.pods.tenants() });
        }
    }

    /// Has it looked at, before any pod comes, whether the bridge can be made.
    pub(super) fn expect_bridge(&mut self) {
        let bridge = self.kernel.wanted.as_ref().map(|view| self.bridge(view));
        if let Some(bridge) = bridge.filter(|bridge| self.pods.expected.as_ref() != Some(bridge)) {
            self.pods.expected = Some(bridge.clone());
            self.pods.looks_ahead += 1;
            self.attach_worker.ask(Job::Expect(bridge));
        }
    }

    pub(super) fn bridge(&self, view: &View) -> Bridge {
        Bridge {
            name: self.config.bridge_name(view.settings.vni),
            subnets: self.subnets_of_pods(view.own.subnets),
            networks: self.subnets_of_pods(view.settings.pool.networks()),
            mtu: self.underlay.mtu,
            table: device_name(view.settings.vni),
            anti_spoofing: self.config.anti_spoofing,
        }
    }

    /// Why no pod can be connected, as far as is known. This is the one place that says so.
    pub(super) fn refuses_pods(&self) -> Option<String> {
        let not_ready = self.ready_bridge().err().map(|error| error.error);
        not_ready.or_else(|| self.pods.refusal.clone())
    }

    pub(super) fn on_refusal(&mut self, refusal: Option<String>) {
        match &refusal {
            Some(why) => tracing::error!("{why}"),
            None => tracing::info!("pods can be connected again"),
        }
        self.pods.refusal = refusal;
    }

    /// Whether it is known of the bridge that pods can be plugged in.
    pub(super) const fn takes_pods(&self) -> bool {
        self.pods.looks_ahead == 0 && self.pods.refusal.is_none()
    }
}
