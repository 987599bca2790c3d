//! The state of the kernel before an agent changes anything, and what forbids a start.

use std::collections::BTreeMap;

use crate::{
    dataplane::{
        kernel::{Kernel, KernelError, PlannedOverlay},
        overlap::Foreign,
    },
    model::{Attachment, Mac, Pod},
    pods::wiring::Wiring,
};

/// What the kernel reports.
pub(super) struct HostView {
    /// The open connection to the kernel.
    pub(in crate::agent) kernel: Kernel,
    /// Networks that other programs use on this host.
    pub(in crate::agent) foreign: Vec<Foreign>,
    /// Pods known by their interfaces.
    pub(in crate::agent) pods: Vec<Pod>,
    /// MACs of the pods' interfaces.
    pub(in crate::agent) macs: BTreeMap<Attachment, Mac>,
}

/// Reads the kernel, and refuses a start that conflicts with it. `bridge` is the name of the pods' bridge.
///
/// # Errors
/// Fails when a device, port or network of another program conflicts with the overlay, or when the kernel
/// does not answer.
pub(super) fn inspect(plan: &PlannedOverlay, bridge: &str) -> Result<HostView, KernelError> {
    let mut kernel = Kernel::open()?;
    let foreign = kernel.refuse_conflicts(plan)?;
    let mut wiring = Wiring::open()?;
    let (pods, macs) = (wiring.found(bridge)?, wiring.macs()?);
    Ok(HostView { kernel, foreign, pods, macs })
}
