//! The event loop's side of the silence diagnosis: which peers are silent, and the findings about them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use super::{Case, MAX_SUSPECTS, SilenceDiagnosis, SilenceFindings, VERDICT_LIFETIME};
use crate::{
    agent::Agent,
    dataplane::{
        desired::{RouteTarget, device_name},
        foreign::ClosedPort,
        silence::{Place, Suspect, Verdict},
    },
    model::{NodeId, PathState, Problem},
};

/// The silent peers to diagnose with their labels. They are chosen again only when what they follow from has
/// changed, because labels take a pass over all members.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// The hash of gossip's opinions, and the silent peers.
    follows_from: (u64, Vec<NodeId>),
    labels: BTreeMap<NodeId, String>,
}

impl SilenceDiagnosis {
    /// Drops all findings.
    pub fn forget(&mut self) {
        (self.findings, self.recovered) = (SilenceFindings::default(), BTreeMap::new());
    }

    /// Returns the verdict on a silent peer.
    pub fn verdict(&self, node: NodeId) -> Option<&Verdict> {
        self.findings.verdicts.get(&node)
    }

    /// Returns the problem that another machine has this host's address.
    pub const fn claim(&self) -> Option<&Problem> {
        self.findings.claim.as_ref()
    }

    /// Returns a chain that drops packets to the port of gossip while no other member answers.
    pub const fn closed_gossip(&self) -> Option<&ClosedPort> {
        self.findings.closed_gossip.as_ref()
    }

    /// Orders a case, if it has changed, and drops the verdicts on peers that recovered a while ago.
    fn set(&mut self, case: Option<Case>) {
        if self.ordered == case {
            return;
        }
        let suspects = case.iter().flat_map(|case| &case.suspects);
        let silent: BTreeSet<NodeId> = suspects.map(|suspect| suspect.node).collect();
        let Self { findings, recovered, .. } = self;
        if !case.as_ref().is_some_and(|case| case.isolated) {
            findings.closed_gossip = None;
        }
        findings.drop_refuted(&silent);
        let is_kept = |at: &Instant| at.elapsed() < VERDICT_LIFETIME;
        findings.verdicts.retain(|node, _| recovered.get(node).is_none_or(is_kept));
        recovered.retain(|node, _| !silent.contains(node) && findings.verdicts.contains_key(node));
        for node in findings.verdicts.keys().filter(|node| !silent.contains(node)) {
            recovered.entry(*node).or_insert_with(Instant::now);
        }
        self.ordered.clone_from(&case);
        self.worker.order(case);
    }
}

impl SilenceFindings {
    /// Drops the verdicts on peers that are no longer silent, if packets that pass refute them.
    fn drop_refuted(&mut self, silent: &BTreeSet<NodeId>) {
        self.verdicts.retain(|node, verdict| silent.contains(node) || verdict.may_recur);
    }
}

impl Agent {
    /// Orders a diagnosis if the set of silent peers has changed.
    pub(in crate::agent) fn update_silence_diagnosis(&mut self) {
        self.name_suspects();
        let case = self.diagnosis_case();
        self.threads.monitors.silence_diagnosis.set(case);
    }

    /// Stores the findings about peers that are still silent, and logs new causes.
    pub(in crate::agent) fn on_silence_findings(
        &mut self,
        SilenceFindings { claim, verdicts, closed_gossip }: SilenceFindings,
    ) {
        let ordered =
            self.threads.monitors.silence_diagnosis.ordered.iter().flat_map(|case| &case.suspects);
        let silent: BTreeSet<NodeId> = ordered.map(|suspect| suspect.node).collect();
        let known = &mut self.threads.monitors.silence_diagnosis.findings;
        let mut new: Vec<Problem> = Vec::new();
        new.extend(claim.clone().filter(|_| known.claim != claim));
        known.claim = claim;
        known.closed_gossip = closed_gossip;
        for (node, verdict) in verdicts.into_iter().filter(|(node, _)| silent.contains(node)) {
            let is_known = |cause: &Problem| {
                known.claim.as_ref() == Some(cause)
                    || known.verdicts.values().any(|earlier| earlier.cause.as_ref() == Some(cause))
            };
            new.extend(verdict.cause.clone().filter(|cause| !is_known(cause)));
            known.verdicts.insert(node, verdict);
        }
        new.iter().for_each(|problem| tracing::warn!("{problem}"));
    }

    /// Chooses the silent peers to diagnose, and names them. Of several with one address, only one is
    /// diagnosed, because packets do not show which of them is meant.
    fn name_suspects(&mut self) {
        let is_silent = |node: NodeId, state: PathState| {
            let is_known = state != PathState::Unknown;
            let is_lost = state.is_lost() || state == PathState::PartlyLost;
            is_lost || is_known && !self.prober.paths.is_alive(node)
        };
        let silent = self.path_states().filter(|(node, state, _)| is_silent(*node, *state));
        let silent: Vec<NodeId> = silent.map(|(node, ..)| node).collect();
        let opinions = if silent.is_empty() { 0 } else { self.node.opinions_hash() };
        let follows_from = (opinions, silent);
        if self.threads.monitors.silence_diagnosis.named.follows_from == follows_from {
            return;
        }
        let mut named: BTreeMap<NodeId, String> = BTreeMap::new();
        if let [_, ..] = follows_from.1[..] {
            let Some(view) = self.kernel.programmed_view() else { return };
            let labels = self.node.labels();
            let states: BTreeMap<NodeId, PathState> =
                self.path_states().map(|(node, state, _)| (node, state)).collect();
            let successors = self.successors(&labels, &states);
            let mut by_address: BTreeMap<IpAddr, NodeId> = BTreeMap::new();
            for node in &follows_from.1 {
                let Some(peer) = view.peers.get(node) else { continue };
                let Some(state) = states.get(node) else { continue };
                if !successors.supersede(*node, *state) {
                    let one = by_address.entry(peer.vtep.underlay).or_insert(*node);
                    if self.node.is_active(*node) {
                        *one = *node;
                    }
                }
            }
            named = by_address.into_values().map(|node| (node, labels.of(node))).collect();
        }
        self.threads.monitors.silence_diagnosis.named = Named { follows_from, labels: named };
    }

    /// Returns the input of a diagnosis; `None` while the data plane or the underlay is not ready.
    fn diagnosis_case(&self) -> Option<Case> {
        let view = self.kernel.programmed_view()?;
        if self.lacks_underlay() || !self.underlay.is_present() {
            return None;
        }
        let local = self.underlay.local;
        let underlay = self.current_underlay();
        let named = &self.threads.monitors.silence_diagnosis.named.labels;
        let suspects = named.iter().filter_map(|(node, name)| {
            let (node, name) = (*node, name.clone());
            let address = view.peers.get(&node)?.vtep.underlay;
            let mac = view.peers.get(&node)?.vtep.mac;
            let vtep = view.peers.get(&node)?.leases.first()?.1.first.network();
            let of_family = address.is_ipv4() == local.is_ipv4();
            let gossip = self.node.address_of(node)?.port();
            let lives = self.prober.paths.is_alive(node);
            let subnet = view.peers.get(&node)?.leases.first()?.1.first;
            let tunnelled = matches!(underlay.way(address, subnet), RouteTarget::Overlay(_));
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
        let suspects: Vec<Suspect> = suspects.take(MAX_SUSPECTS).collect();
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
        let isolated = self.is_isolated();
        Some(Case { place, pinned, isolated, suspects })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovered_peer_keeps_verdict_of_rule_and_loses_verdict_of_next_hop() {
        let node = |byte| NodeId::from_bytes([byte; 8]);
        let of = |may_recur| Verdict { may_recur, ..Verdict::default() };
        let verdicts = [(node(1), of(true)), (node(2), of(false)), (node(3), of(false))].into();
        let mut findings = SilenceFindings { verdicts, ..SilenceFindings::default() };
        findings.drop_refuted(&[node(3)].into());
        let kept: Vec<NodeId> = findings.verdicts.into_keys().collect();
        assert_eq!(kept, [node(1), node(3)], "the second answers again");
    }
}
