//! The overlay that these settings lead to, for the checks before a start.

use std::net::IpAddr;

use super::{Config, DEFAULT_VXLAN_PORT};
use crate::{dataplane::kernel::PlannedOverlay, model::ClusterSettings};

impl Config {
    /// Returns the overlay that this host is about to run. `known`: the settings of its cluster; without
    /// them, a host that does not join creates one.
    pub fn planned_overlay(
        &self,
        known: Option<ClusterSettings>,
        underlay: Option<IpAddr>,
    ) -> PlannedOverlay {
        let (vni, port) = match known {
            Some(known) => (known.vni, known.vxlan_port),
            None => (self.vni, self.wish.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT)),
        };
        let creates = known.is_none() && self.create.is_some() && self.pod_cidr.is_none();
        let pool = known.or(self.create).map(|settings| settings.pool);
        PlannedOverlay { vni, port, underlay, pool, creates }
    }
}
