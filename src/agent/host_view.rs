//! What the kernel of a host says before an agent makes anything.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::{
    dataplane::{
        desired::device_name,
        kernel::{Kernel, KernelError},
        overlap::Foreign,
    },
    model::{Attachment, ClusterSettings, Mac, Pod, Pool},
    pods::wiring::Wiring,
};

/// What is asked for.
pub(super) struct Plan<'a> {
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) underlay: IpAddr,
    /// Of the cluster that is known or created.
    pub(super) settings: Option<ClusterSettings>,
    /// The pool of a cluster that is created now.
    pub(super) created: Option<Pool>,
    pub(super) bridge: &'a str,
}

/// The answers.
pub(super) struct HostView {
    pub(super) kernel: Kernel,
    /// Networks of others.
    pub(super) foreign: Vec<Foreign>,
    /// Pods by their interfaces.
    pub(super) pods: Vec<Pod>,
    pub(super) macs: BTreeMap<Attachment, Mac>,
}

/// Asks the kernel, and refuses what is in the way.
///
/// # Errors
/// Something of another program is in the way, or the kernel does not answer.
pub(super) fn look(plan: &Plan<'_>) -> Result<HostView, KernelError> {
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

/// A cluster is not created with networks that lead elsewhere on this host.
fn refuse_occupied(foreign: &[Foreign], pool: &Pool) -> Result<(), KernelError> {
    let networks: Vec<IpNet> = pool.networks().iter().collect();
    let mut pairs = networks.iter().flat_map(|network| foreign.iter().map(move |f| (network, f)));
    match pairs.find(|(network, found)| found.forbids(network)) {
        None => Ok(()),
        Some((network, found)) => Err(KernelError::Overlap {
            network: *network,
            what: found.network,
            interface: found.interface.clone(),
        }),
    }
}
