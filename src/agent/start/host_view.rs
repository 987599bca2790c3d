//! The state of the kernel before an agent changes anything, and what forbids a start.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    dataplane::{
        desired::device_name,
        kernel::{Kernel, KernelError},
        overlap::{self, Foreign},
    },
    model::{Attachment, ClusterSettings, Mac, Pod, Pool},
    pods::wiring::Wiring,
};

/// The overlay that this host is about to run.
pub(super) struct PlannedOverlay<'a> {
    /// VXLAN network identifier.
    pub(in crate::agent) vni: u32,
    /// UDP port of the tunnels.
    pub(in crate::agent) port: u16,
    /// Underlay address of this host.
    pub(in crate::agent) underlay: IpAddr,
    /// Settings of the cluster that is known or created.
    pub(in crate::agent) settings: Option<ClusterSettings>,
    /// The pool, if the cluster is created by this start.
    pub(in crate::agent) created: Option<Pool>,
    /// Name of the pods' bridge.
    pub(in crate::agent) bridge: &'a str,
}

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

/// Reads the kernel, and refuses a start that conflicts with it.
///
/// # Errors
/// Fails when a device, port or network of another program conflicts with the overlay, or when the kernel
/// does not answer.
pub(super) fn inspect(plan: &PlannedOverlay<'_>) -> Result<HostView, KernelError> {
    let mut kernel = Kernel::open()?;
    let device = device_name(plan.vni);
    kernel.preflight(&device, plan.vni, plan.port)?;
    let foreign = kernel.foreign_networks()?;
    if let Some(pool) = &plan.created {
        refuse_occupied(&foreign, pool)?;
    }
    if let Some(settings) = &plan.settings {
        kernel.refuse_overlap(&device, plan.underlay, &settings.pool)?;
    }
    let mut wiring = Wiring::open()?;
    let (pods, macs) = (wiring.found(plan.bridge)?, wiring.macs()?);
    Ok(HostView { kernel, foreign, pods, macs })
}

/// Refuses to create a cluster whose networks already lead elsewhere on this host.
fn refuse_occupied(foreign: &[Foreign], pool: &Pool) -> Result<(), KernelError> {
    match overlap::find_forbidding(foreign, pool) {
        None => Ok(()),
        Some((network, found)) => Err(KernelError::Overlap {
            network,
            what: found.network,
            interface: found.interface.clone(),
        }),
    }
}
