//! The preferred subnet that this node did not get. A node keeps its subnet, so the preference counts only at
//! its first start.

use ipnet::IpNet;

use crate::model::{Problem, ProblemCode, SlotState};

use super::Node;

impl Node {
    /// Returns a notice if this node has another subnet than the preferred one.
    pub fn missed_preference(&self) -> Option<Problem> {
        let wanted = self.config.prefer_subnet.filter(|_| self.config.assigned.is_none())?;
        let cluster_state = self.replica.cluster_state.as_ref()?;
        let own = self.lifecycle.own_subnets(&self.replica)?;
        if own.iter().any(|subnet| subnet.network() == wanted) {
            return None;
        }
        let pool = cluster_state.cluster.settings.pool;
        let instead = format!("this node has {}", own.first);
        let what = match pool.slot_at(wanted) {
            None => format!("preferred {wanted} begins no subnet of this cluster: {instead}"),
            Some(slot) => {
                let subnets = pool.subnets(slot);
                let subnet = subnets.iter().find(|subnet| subnet.network() == wanted);
                let subnet = subnet.unwrap_or(subnets.first);
                match cluster_state.slots.record(slot) {
                    Some(record) if record.state == SlotState::Leased => {
                        let owner = self.name_of(record.owner);
                        format!("preferred {subnet} belongs to {owner}: {instead}")
                    }
                    record => {
                        let overlaps = |network: &&IpNet| {
                            network.contains(&subnet) || subnet.contains(*network)
                        };
                        match self.config.occupied.iter().find(overlaps) {
                            Some(network) => format!(
                                "preferred {subnet} is not used, because another interface or route of this \
                                 host has {network}: {instead}"
                            ),
                            None => match record {
                                Some(record) => format!(
                                    "preferred {subnet} is a free subnet of {}, which has not granted it: \
                                     {instead}",
                                    self.name_of(record.owner)
                                ),
                                None => format!("preferred {subnet} has no known owner: {instead}"),
                            },
                        }
                    }
                }
            }
        };
        let fix = "remove prefer_subnet, or set another one (gossamer leases --free) and give this one up \
                   (gossamer leave; its pods lose their addresses)";
        Some(Problem::new(ProblemCode::PreferredSubnet, wanted, what, fix).notice())
    }
}
