//! Requests of container runtimes while the disk accepts no writes: they fail after a time instead of waiting
//! for the disk.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    agent::{Agent, pods::PendingAttach, storage::DISK_TIMEOUT, workers::attach_worker::Job},
    api::{PodError, PodErrorKind},
    docker,
};

impl Agent {
    /// Returns the error for requests that need the disk while it accepts no writes.
    pub(super) fn disk_error(&self) -> Option<PodError> {
        let why = self.storage.failure()?;
        let why = format!("the state directory cannot be written: {why}");
        Some(PodError::new(PodErrorKind::NotReady, why))
    }

    /// Returns when the requests that wait for the disk have to fail; `None` if none waits.
    pub(in crate::agent) fn disk_stall_deadline(&self) -> Option<Instant> {
        let waits = !self.pods.pending_saves.is_empty()
            || self.pods.pending_attaches.values().any(|pending| !pending.saved);
        let stalled = self.storage.writer.silent_for().filter(|_| waits)?;
        let left = (DISK_TIMEOUT + Duration::from_millis(1)).saturating_sub(stalled);
        Some(Instant::now() + left)
    }

    /// Fails the requests that wait for the stalled disk: runtimes repeat an ADD, and the plugin keeps a note
    /// of a DEL. A pod without a record on disk is disconnected again.
    pub(in crate::agent) fn fail_requests_on_disk_stall(&mut self) {
        let Some(error) = self.disk_error() else { return };
        let (saved, unsaved): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.pods.pending_attaches)
                .into_iter()
                .partition(|(_, pending)| pending.saved);
        self.pods.pending_attaches = saved;
        for PendingAttach { pod, reply, .. } in unsaved.into_values() {
            let attachment = pod.attachment;
            tracing::warn!(pod = %attachment, "pod not connected: the disk accepts no writes");
            if pod.owner == docker::OWNER {
                // Docker releases the address itself.
                let number = self.pods.next();
                self.threads.attach_worker.ask(Job::Disconnect { number, attachment, netns: None });
            } else {
                self.detach_then(&attachment, None, |_| ());
            }
            reply(Err(error.clone()));
        }
        for answer in std::mem::take(&mut self.pods.pending_saves).into_values() {
            answer(Err(error.clone()));
        }
    }
}
