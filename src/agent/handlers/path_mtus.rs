//! Path MTUs: routes follow what paths carry, and the kernel forgets wrong reports of routers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    agent::Agent,
    api::{EventKind, EventLevel},
    core::Peer,
    dataplane::{desired::overhead, path_mtu_reports::Action},
    model::NodeId,
};

/// Smallest MTU, in bytes, that is set on a route: no IPv4 path carries less (RFC 791 requires hosts to
/// accept 576 bytes).
const ROUTE_MTU_MIN: u32 = 576;

impl Agent {
    /// Lowers the MTU of the route to a peer to what its path carries. The kernel then reports larger
    /// packets to the sending pods (RFC 1191); otherwise they would be lost or fragmented without
    /// notice.
    pub(super) fn follow_path_mtus(&mut self) {
        let Some(view) = &self.kernel.wanted.view else { return };
        let device = self.underlay.tunnel_mtu;
        let headers = overhead(self.underlay.local);
        let fits = |(node, peer): (&NodeId, &Peer)| {
            let probed = self.prober.paths.mtu_reduction(*node);
            let probed = probed.map(|less| self.underlay.mtu.saturating_sub(less));
            let host = peer.vtep.underlay;
            // An MTU set by a route of this host needs no probe.
            let by_route =
                self.kernel.diagnoses.routing.path_mtus.get(&host).filter(|path| !path.learned);
            let by_route = by_route.map(|path| path.mtu);
            let told = by_route.or_else(|| self.prober.reports.correct_mtu(host));
            let told = told.map(|mtu| mtu.saturating_sub(headers));
            let fits = probed.into_iter().chain(told).min()?;
            (ROUTE_MTU_MIN..device).contains(&fits).then_some((*node, fits))
        };
        let narrow: BTreeMap<NodeId, u32> = view.peers.iter().filter_map(fits).collect();
        if narrow == self.kernel.wanted.narrow {
            return;
        }
        let before = std::mem::replace(&mut self.kernel.wanted.narrow, narrow);
        let now = &self.kernel.wanted.narrow;
        let changed = |node: &&NodeId| before.get(node) != now.get(node);
        for node in
            before.keys().chain(now.keys()).collect::<BTreeSet<_>>().into_iter().filter(changed)
        {
            let name = self.node.name_of(*node);
            let text = match now.get(node) {
                Some(mtu) => format!(
                    "the path to {name} carries packets of {mtu} bytes, less than the {device} of this \
                     host's overlay device: the MTU of its route is lowered to {mtu}"
                ),
                None => format!("the path to {name} carries packets of {device} bytes again"),
            };
            tracing::info!("{text}");
            self.journal.note(EventKind::Path, EventLevel::Warn, text);
        }
        self.program();
    }

    /// Probes the paths with path MTUs that routers reported, and makes the kernel forget those that are
    /// wrong.
    pub(super) fn check_path_mtu_reports(&mut self) {
        let now = self.clock.now();
        let told = self.kernel.diagnoses.routing.path_mtus.iter().filter(|(_, path)| path.learned);
        let told = told.map(|(host, path)| (*host, path.mtu)).collect();
        self.prober.reports.update(now, &told);
        while let Some(action) = self.prober.reports.poll(now) {
            let (Action::SendFullSize(host) | Action::DropReport(host, _)) = action;
            let Some(node) = self.prober.paths.holder(host) else { continue };
            match action {
                Action::SendFullSize(_) => self.fill_underlay(node),
                Action::DropReport(_, told) => self.threads.programmer.forget_path(host, told),
            }
        }
    }

    /// Reports that the kernel has forgotten the wrong path MTU `told` of a router, or why it has not.
    pub(super) fn on_path_forgotten(
        &mut self,
        host: IpAddr,
        told: u32,
        forgotten: &Result<(), String>,
    ) {
        let Some(node) = self.prober.paths.holder(host) else { return };
        // If the report keeps coming back, the status already has it as a problem.
        let is_told = self.prober.reports.recurring_false_mtu(host).is_some();
        let text = format!(
            "a router reported that the path to {} ({host}) carries {told} bytes, which is wrong: packets of \
             full size arrive; {}",
            self.node.name_of(node),
            match forgotten {
                Ok(()) => "the kernel has dropped the report".to_owned(),
                Err(error) => format!("the kernel could not drop the report: {error}"),
            }
        );
        if is_told {
            return tracing::debug!("{text}");
        }
        tracing::warn!("{text}");
        self.journal.note(EventKind::Path, EventLevel::Warn, text);
    }
}
