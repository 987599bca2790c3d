//! The trial of checksum offload: the event loop's side of [`crate::dataplane::offload`].

use super::Prober;
use crate::{
    agent::Agent,
    api::{EventKind, EventLevel},
    dataplane::offload::DatagramRequest,
};

impl Agent {
    /// Tries without checksum offload where echoes arrive through the tunnel and datagrams do not.
    pub(super) fn update_offload(&mut self) {
        let now = self.clock.now();
        let mut without_datagrams = self.prober.paths.losing_datagrams();
        without_datagrams.retain(|node| self.has_tunnel(*node));
        // The state of the device is known only once the kernel has the last ordered state.
        let is_settled = self.kernel.progress.is_complete();
        let is_on = self.kernel.device.checksum_offload.filter(|_| is_settled);
        let Prober { offload, paths, .. } = &mut self.prober;
        let (before, was_guilty) = (offload.wanted(), offload.is_broken());
        if let Some(DatagramRequest { peers, count }) =
            offload.advance(now, is_on, without_datagrams, |node| paths.tally(node))
        {
            paths.request_datagrams(now, &peers, count);
        }
        let (wanted, is_guilty) = (offload.wanted(), offload.is_broken());
        if is_guilty != was_guilty {
            self.report_offload(is_guilty);
        }
        if wanted != before {
            tracing::info!(
                ?wanted,
                "checksum offload changed for a test: echoes returned, datagrams did not"
            );
            self.program();
        }
    }

    /// Logs, and adds an event, that packets with offloaded checksums get lost or arrive again.
    fn report_offload(&mut self, is_guilty: bool) {
        let (level, text) = match is_guilty {
            true => (
                EventLevel::Warn,
                "packets whose checksums were left to the network card do not arrive: checksum offload is \
                 turned off on this host's tunnel device",
            ),
            false => (
                EventLevel::Info,
                "packets whose checksums are left to the network card arrive again: checksum offload is \
                 turned on again",
            ),
        };
        tracing::warn!("{text}");
        self.journal.note(EventKind::Path, level, text.to_owned());
    }
}
