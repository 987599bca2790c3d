//! Change notifications of interfaces and of the tables of pods' addresses.

use std::{thread, time::Instant};

use super::{AttachResult, MIN_REPAIR_INTERVAL, PodWorker};
use crate::pods::link_updates::LinkUpdates;

impl<F: Fn(AttachResult)> PodWorker<'_, F> {
    /// Reads the notifications, and records whether the bridge or the tables must be checked.
    pub(super) fn listen(&mut self) {
        let awaited = match &self.kept {
            Some(bridge) => self.refusal.as_ref().map(|_| bridge),
            None => self.expected.as_ref(),
        };
        let (mut named, mut updates) = (false, LinkUpdates::default());
        let read = self.monitor.read(|message| {
            named |= awaited.is_some_and(|bridge| bridge.is_named(&message));
            self.wiring.record_update(&self.tenants, message, &mut updates);
        });
        match read {
            Ok(overrun) => self.overruns.note(overrun),
            Err(error) => {
                tracing::error!(%error, "interface notifications not read");
                thread::sleep(MIN_REPAIR_INTERVAL);
            }
        }
        self.touched |= named || updates.needs_repair() || self.overruns.take(Instant::now());
        match self.tables.touched() {
            Ok(touched) => self.table_touched |= touched,
            Err(error) => tracing::debug!(%error, "nftables notifications not read"),
        }
    }
}
