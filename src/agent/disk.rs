//! Runtimes that wait for a disk which takes nothing: they are told so, and do not wait with it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{Agent, attach_worker::Job, pods::Attaching, status::DISK_TIMEOUT};
use crate::{
    api::{PodError, PodErrorKind},
    docker,
};

impl Agent {
    /// What is said to those who need the disk while it takes nothing.
    pub(super) fn unwritten(&self) -> Option<PodError> {
        let why = self.store_problem()?;
        let why = format!("the state directory cannot be written: {why}");
        Some(PodError::new(PodErrorKind::NotReady, why))
    }

    /// When runtimes have waited long enough for the disk; none, if no runtime waits.
    pub(super) fn end_of_waiting_for_disk(&self) -> Option<Instant> {
        let waits = !self.pods.saving.is_empty()
            || self.pods.attaching.values().any(|attaching| !attaching.saved);
        let silent = self.writer.silent_for().filter(|_| waits)?;
        let left = (DISK_TIMEOUT + Duration::from_millis(1)).saturating_sub(silent);
        Some(Instant::now() + left)
    }

    /// Answers those who wait for a disk that takes nothing: runtimes ask again, and the plugin notes the
    /// ends of pods. A pod that would be known by its interface alone is unplugged again.
    pub(super) fn end_waiting_for_disk(&mut self) {
        let Some(error) = self.unwritten() else { return };
        let (saved, unsaved): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.pods.attaching)
                .into_iter()
                .partition(|(_, attaching)| attaching.saved);
        self.pods.attaching = saved;
        for Attaching { pod, reply, .. } in unsaved.into_values() {
            let attachment = pod.attachment;
            tracing::warn!(pod = %attachment, "not connected: the disk takes nothing");
            if pod.owner == docker::OWNER {
                // Docker gives the address back by itself.
                let number = self.pods.next();
                self.attach_worker.ask(Job::Disconnect { number, attachment, netns: None });
            } else {
                self.detach_then(&attachment, None, |_| ());
            }
            reply(Err(error.clone()));
        }
        for answer in std::mem::take(&mut self.pods.saving).into_values() {
            answer(Err(error.clone()));
        }
    }
}
