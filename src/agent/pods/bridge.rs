//! The event loop's side of the pods' bridge: its desired state, and whether pods can be connected to it.

use crate::{
    agent::{Agent, workers::attach_worker::Job},
    core::View,
    dataplane::desired::device_name,
    model::Problem,
    pods::desired::Bridge,
};

impl Agent {
    /// Orders the desired state of the bridge when it has changed, as after a change of the subnet or the
    /// MTU. Pods of an earlier run are connected to it too.
    pub(in crate::agent) fn keep_bridge(&mut self) {
        let bridge = self.kernel.wanted.view.as_ref().map(|view| self.bridge(view));
        if self.pods.table.is_empty() || self.pods.bridge == bridge {
            return;
        }
        self.pods.bridge.clone_from(&bridge);
        if let Some(bridge) = bridge {
            self.threads.attach_worker.ask(Job::Keep { bridge, tenants: self.pods.tenants() });
        }
    }

    /// Orders a check, before the first pod comes, of whether the bridge can be made.
    pub(in crate::agent) fn expect_bridge(&mut self) {
        let bridge = self.kernel.wanted.view.as_ref().map(|view| self.bridge(view));
        if let Some(bridge) =
            bridge.filter(|bridge| self.pods.expected_bridge.as_ref() != Some(bridge))
        {
            self.pods.expected_bridge = Some(bridge.clone());
            self.pods.pending_bridge_checks += 1;
            self.threads.attach_worker.ask(Job::Expect(bridge));
        }
    }

    /// Returns the desired state of the bridge for this view.
    pub(in crate::agent) fn bridge(&self, view: &View) -> Bridge {
        Bridge {
            name: self.config.bridge_name(view.settings.vni),
            subnets: self.underlay.subnets_of_pods(view.own.subnets),
            networks: self.underlay.subnets_of_pods(view.settings.pool.networks()),
            mtu: self.underlay.mtu,
            table: device_name(view.settings.vni),
            anti_spoofing: self.config.anti_spoofing,
        }
    }

    /// Returns why no pod can be connected, if a reason is known. No other function reports this.
    pub(in crate::agent) fn refuses_pods(&self) -> Option<String> {
        let not_ready = self.ready_bridge().err().map(|error| error.error);
        not_ready.or_else(|| self.pods.refusal.as_ref().map(Problem::to_string))
    }

    /// Stores and logs whether the bridge refuses pods: the reason, or `None` once it accepts them again.
    pub(super) fn on_refusal(&mut self, refusal: Option<Problem>) {
        match &refusal {
            Some(why) => tracing::error!("{why}"),
            None => tracing::info!("bridge accepts pods again"),
        }
        self.pods.refusal = refusal;
    }

    /// Whether the checks are complete and the bridge accepts pods.
    pub(in crate::agent) const fn takes_pods(&self) -> bool {
        self.pods.pending_bridge_checks == 0 && self.pods.refusal.is_none()
    }
}
