//! Checks the path MTUs that routers reported, and makes the kernel forget wrong ones.

use std::net::IpAddr;

use crate::{
    agent::Agent,
    api::{EventKind, EventLevel},
    dataplane::path_mtu_reports::Action,
    model::NodeId,
    netlink::Netlink,
    sysctl,
};

impl Agent {
    /// Probes the paths with path MTUs that routers reported, and makes the kernel forget those that are
    /// wrong.
    pub(in crate::agent) fn check_path_mtu_reports(&mut self) {
        let now = self.clock.now();
        let told = self.kernel.routing.path_mtus.iter().filter(|(_, path)| path.learned);
        let told = told.map(|(host, path)| (*host, path.mtu)).collect();
        self.prober.reports.update(now, &told);
        while let Some(action) = self.prober.reports.poll(now) {
            let (Action::SendFullSize(host) | Action::DropReport(host, _)) = action;
            let Some(node) = self.prober.paths.holder(host) else { continue };
            match action {
                Action::SendFullSize(_) => self.fill_underlay(node),
                Action::DropReport(_, told) => self.forget_path_mtus(node, host, told),
            }
        }
    }

    /// Makes the kernel forget a wrong path MTU. For IPv4 the kernel can only forget all of them;
    /// routers report the correct ones again.
    fn forget_path_mtus(&mut self, node: NodeId, host: IpAddr, told: u32) {
        // If the report keeps coming back, the status already has it as a problem.
        let is_told = self.prober.reports.recurring_false_mtu(host).is_some();
        let forgotten = match host {
            IpAddr::V4(_) => sysctl::write("net/ipv4/route/flush", "1"),
            IpAddr::V6(host) => Netlink::open().and_then(|mut netlink| netlink.forget_path(host)),
        };
        let text = format!(
            "a router reported that the path to {} ({host}) carries {told} bytes, which is wrong: packets of \
             full size arrive; {}",
            self.node.name_of(node),
            match &forgotten {
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
