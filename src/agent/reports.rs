//! The loop's side of what routers have told of paths: what is tried, and what the kernel is to forget.

use std::net::IpAddr;

use super::Agent;
use crate::{
    api::{EventKind, EventLevel},
    dataplane::{kernel::sysctl, path_mtu_reports::Action},
    model::NodeId,
    netlink::Netlink,
};

impl Agent {
    /// Tries what routers have told of the paths to peers, and has the kernel forget what is false.
    pub(super) fn judge_reports(&mut self) {
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

    /// Of IPv4 the kernel can forget all reports only. Those that are true are told again.
    fn forget_path_mtus(&mut self, node: NodeId, host: IpAddr, told: u32) {
        // The problem in the status tells of one that comes back.
        let is_told = self.prober.reports.recurring_false_mtu(host).is_some();
        let forgotten = match host {
            IpAddr::V4(_) => sysctl::write("net/ipv4/route/flush", "1"),
            IpAddr::V6(host) => Netlink::open().and_then(|mut netlink| netlink.forget_path(host)),
        };
        let text = format!(
            "a host has told that the path to {} ({host}) carries {told} bytes, which is false: packets of \
             full size arrive; {}",
            self.node.name_of(node),
            match &forgotten {
                Ok(()) => "the kernel was made to forget it".to_owned(),
                Err(error) => format!("the kernel could not be made to forget it: {error}"),
            }
        );
        if is_told {
            return tracing::debug!("{text}");
        }
        tracing::warn!("{text}");
        self.journal.note(EventKind::Path, EventLevel::Warn, text);
    }
}
