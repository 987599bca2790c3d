//! What forbids an overlay on this host, before anything is changed. The agent refuses to start for these
//! reasons, and `init`, `join` and the doctor give the same ones.

use std::net::{IpAddr, Ipv4Addr};

use super::{Kernel, KernelError};
use crate::{
    dataplane::{
        desired::device_name,
        overlap::{self, Foreign},
    },
    model::Pool,
};

/// The overlay that this host is about to run.
#[derive(Clone, Copy, Debug)]
pub struct PlannedOverlay {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of the tunnels.
    pub port: u16,
    /// Underlay address of this host, if it has one.
    pub underlay: Option<IpAddr>,
    /// The pool of the cluster that is known or created.
    pub pool: Option<Pool>,
    /// Whether this start creates the cluster.
    pub creates: bool,
}

impl Kernel {
    /// Refuses an overlay that conflicts with this host. Returns the networks of other programs. What this
    /// process may not do is its last reason.
    ///
    /// # Errors
    /// Fails when a device, port or network of another program conflicts with the overlay, or when the
    /// kernel does not answer.
    pub fn refuse_conflicts(&mut self, plan: &PlannedOverlay) -> Result<Vec<Foreign>, KernelError> {
        let device = device_name(plan.vni);
        let permitted = match self.preflight(&device, plan.vni, plan.port) {
            Err(error @ KernelError::NotPermitted) => Err(error),
            checked => Ok(checked?),
        };
        let foreign = self.foreign_networks()?;
        if let Some(pool) = &plan.pool {
            if plan.creates
                && let Some((network, found)) = overlap::find_forbidding(&foreign, pool)
            {
                let (what, interface) = (found.network, found.interface.clone());
                return Err(KernelError::Overlap { network, what, interface });
            }
            let underlay = plan.underlay.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
            self.refuse_overlap(&device, underlay, pool)?;
        }
        permitted.map(|()| foreign)
    }
}
