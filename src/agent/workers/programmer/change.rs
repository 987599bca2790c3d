//! Programs the changes between two desired states without reading the kernel, so that a join costs the
//! same in a cluster of any size. Notifications and the slow timer still compare everything.

use super::{DesiredState, Reconciler, State};
use crate::{
    agent::workers::kernel_event::{KernelEvent, Outcome},
    dataplane::{desired::Desired, kernel::Report},
};

/// A desired state that the kernel equals.
pub(super) struct Established {
    desired: Box<Desired>,
    /// Index of gossamer's device.
    device: Option<u32>,
    /// Whether the device uses checksum offload; `None` if unknown.
    checksum_offload: Option<bool>,
}

impl Established {
    /// Returns the state after a comparison, if nothing else is in the kernel.
    pub(super) fn after(report: &Report, state: &State) -> Option<Self> {
        let State::Overlay(desired, _) = state else { return None };
        let is_equal = report.failed.is_empty() && report.retained.is_empty();
        is_equal.then(|| Self {
            desired: desired.clone(),
            device: report.device,
            checksum_offload: report.checksum_offload,
        })
    }
}

impl<F: Fn(KernelEvent)> Reconciler<F> {
    /// Programs the changes since the established state, and reports the result. Returns `false` if
    /// everything has to be compared: without such a state, after a change by another program, or after a
    /// refusal.
    pub(super) fn program_change(&mut self) -> bool {
        if !self.is_change_of_entries() {
            return false;
        }
        // New members are admitted before packets are sent to them.
        self.update_table(false);
        let Some(DesiredState { number, state: State::Overlay(all, _) }) = &self.desired_state
        else {
            return false;
        };
        let Some(before) = self.established.take() else { return false };
        let result = self.kernel.change(&before.desired, all);
        let Some(report) = result.ok().filter(|report| report.failed.is_empty()) else {
            return false;
        };
        let Established { device, checksum_offload, .. } = before;
        self.established = Some(Established { desired: all.clone(), device, checksum_offload });
        self.reached = true;
        self.recheck.routing = true;
        let report = Report { device, checksum_offload, ..report };
        let outcome = Outcome { number: *number, repair: false, result: Ok(report) };
        (self.report)(KernelEvent::Outcome(outcome));
        self.report_host();
        true
    }

    /// Returns whether the kernel equals an earlier desired state with the same device, so that the changes
    /// since then can be programmed without reading the kernel. Comparisons find what this overlooks.
    fn is_change_of_entries(&self) -> bool {
        let Some(DesiredState { state: State::Overlay(all, _), .. }) = &self.desired_state else {
            return false;
        };
        let is_same_device = |Established { desired, .. }: &Established| {
            desired.device == all.device && desired.pool == all.pool
        };
        self.established.as_ref().is_some_and(is_same_device)
            && all.unconfirmed.is_empty()
            && self.demand.in_use().is_none()
            && !self.recheck.ours
    }
}
