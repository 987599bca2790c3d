//! The loop's side of an inquest: which peers are silent, and what was found of them.

use std::collections::BTreeSet;

use super::{Case, Found, SUSPECTS};
use crate::{
    agent::Agent,
    dataplane::{
        desired::{Way, device_name},
        silence::{Place, Suspect},
    },
    model::{NodeId, PathState},
};

impl Agent {
    /// Tells the thread which peers are silent, if that has changed.
    pub(in crate::agent) fn update_inquest(&mut self) {
        let case = self.inquest_case();
        self.inquest.set(case);
    }

    pub(in crate::agent) fn on_found(&mut self, Found { claim, verdicts }: Found) {
        let told = self.inquest.told.iter().flat_map(|case| &case.suspects);
        let silent: BTreeSet<NodeId> = told.map(|suspect| suspect.node).collect();
        let found = &mut self.inquest.found;
        let mut new: Vec<String> = Vec::new();
        new.extend(claim.clone().filter(|_| found.claim != claim));
        found.claim = claim;
        for (node, verdict) in verdicts.into_iter().filter(|(node, _)| silent.contains(node)) {
            let is_known = |cause: &String| {
                found.claim.as_ref() == Some(cause)
                    || found.verdicts.values().any(|known| known.cause.as_ref() == Some(cause))
            };
            new.extend(verdict.cause.clone().filter(|cause| !is_known(cause)));
            found.verdicts.insert(node, verdict);
        }
        new.iter().for_each(|problem| tracing::warn!("{problem}"));
    }

    fn inquest_case(&self) -> Option<Case> {
        let view = self.kernel.wanted.as_ref().filter(|_| self.kernel.programmed_once)?;
        if self.kernel.underlay_problem.is_some() || !self.underlay.is_present() {
            return None;
        }
        let local = self.underlay.local;
        let is_silent = |node: NodeId, state: PathState| {
            let is_known = state != PathState::Unknown;
            let is_lost = self.is_lost(state) || state == PathState::PartlyLost;
            is_lost || is_known && !self.prober.paths.is_alive(node)
        };
        let silent = self.path_states().filter(|(node, state, _)| is_silent(*node, *state));
        let underlay = self.underlay.with_mode(self.config.mode);
        let suspects = silent.filter_map(|(node, ..)| {
            let address = view.peers.get(&node)?.vtep.underlay;
            let mac = view.peers.get(&node)?.vtep.mac;
            let name = self.node.name_of(node).to_owned();
            let vtep = view.peers.get(&node)?.leases.first()?.1.first.network();
            let of_family = address.is_ipv4() == local.is_ipv4();
            let gossip = self.node.address_of(node)?.port();
            let lives = self.prober.paths.is_alive(node);
            let subnet = view.peers.get(&node)?.leases.first()?.1.first;
            let tunnelled = matches!(underlay.way(address, subnet), Way::Overlay(_));
            of_family.then_some(Suspect {
                node,
                name,
                address,
                gossip,
                mac,
                vtep,
                lives,
                tunnelled,
            })
        });
        let suspects: Vec<Suspect> = suspects.take(SUSPECTS).collect();
        let place = Place {
            link: self.underlay.link,
            interface: self.underlay.name.clone(),
            device: device_name(view.settings.vni),
            local,
            source: self.underlay.source,
            port: view.settings.vxlan_port,
            gossip: self.node.address().port(),
            guard: self.config.firewall.guard,
            overlay: view.settings.pool.network(),
        };
        let pinned = self.underlay.pinned;
        Some(Case { place, pinned, suspects })
    }
}
