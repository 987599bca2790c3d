//! Passes the routes of a veth pair that is being removed to other interfaces of the same pod.

use std::{fs::File, path::Path};

use super::{AttachResult, PodWorker};
use crate::{model::Attachment, pods::desired::Tenant};

impl<F: Fn(AttachResult)> PodWorker<'_, F> {
    /// Gives the routes of a veth pair that is being removed to another one of the same container.
    pub(super) fn hand_over(
        &mut self,
        attachment: &Attachment,
        tenant: Option<&Tenant>,
        opened: Option<&File>,
        index: u32,
    ) {
        let is_same_container =
            |(_, other): &(_, &Tenant)| other.container == attachment.container();
        let others = self.tenants.iter().filter(is_same_container).map(|(veth, _)| veth);
        let others: Vec<&String> = others.collect();
        if others.is_empty() {
            return;
        }
        // The others share its addresses.
        self.touched = true;
        let (Some(bridge), Some(tenant)) = (&self.kept, tenant) else { return };
        let netns = Path::new(&tenant.netns);
        if let Err(error) = self.wiring.hand_over(bridge, index, (netns, opened), &others) {
            tracing::debug!(pod = %attachment, %error, "routes not passed to the pod's other interfaces");
        }
    }
}
