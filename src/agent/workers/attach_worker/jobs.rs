//! Connects and disconnects single pods.

use std::fs::File;

use super::{AttachResult, PendingDelete, PodWorker};
use crate::{
    model::{Attachment, Mac, Pod},
    pods::{
        desired::{Bridge, Tenant},
        wiring::{ConnectedPod, End, WiringError, link_name},
    },
};

impl<F: Fn(AttachResult)> PodWorker<'_, F> {
    /// Connects a pod. Its addresses are admitted before its veth pair exists.
    pub(super) fn connect(
        &mut self,
        bridge: Bridge,
        pod: &Pod,
        mac: Option<Mac>,
        end: &End,
    ) -> Result<ConnectedPod, WiringError> {
        let veth = link_name(&pod.attachment);
        let tenant = Tenant::new(pod, mac);
        self.tables.admit(&bridge, &veth, &tenant, &self.tenants);
        let result = self.wiring.connect(&bridge, pod, mac, end);
        if result.is_ok() {
            self.seen = Some(bridge.clone());
        }
        // A bridge that has not been checked may have ports of other programs.
        self.touched |= self.kept.as_ref() != Some(&bridge);
        self.kept = Some(bridge);
        self.fetched.0.remove(&veth);
        if result.is_ok() {
            self.tenants.insert(veth, tenant);
        } else {
            self.tables.revoke(&veth, &tenant);
        }
        result
    }

    /// Disconnects a pod, and reports the result or leaves that to the thread that deletes veth pairs.
    pub(super) fn disconnect(&mut self, number: u64, attachment: Attachment, netns: Option<&File>) {
        let veth = link_name(&attachment);
        let tenant = self.tenants.remove(&veth);
        if let Some(tenant) = &tenant {
            self.tables.revoke(&veth, tenant);
            self.wiring.forget_neighbors(tenant.addresses);
        }
        // The container's other veth pairs share its addresses.
        let is_same_container = |other: &Tenant| other.container == attachment.container();
        self.touched |= self.tenants.values().any(is_same_container);
        let result = match self.wiring.index(&attachment) {
            Ok(Some(index)) => {
                self.hand_over(&attachment, tenant.as_ref(), netns, index);
                // The other thread lives as long as this one, so sending cannot fail.
                let _ = self.pending_deletes.send(PendingDelete { number, attachment, index });
                return;
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        (self.report)(AttachResult::Disconnected { number, attachment, result });
    }
}
