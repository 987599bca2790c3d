//! Pods that are gone: those that ended while the agent was away, and those whose runtime has not said so.
//!
//! A veth pair goes with its namespace, so a pod without one uses its addresses no more. They are taken back
//! when a later look confirms it, and at once where they are needed.

use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use tokio::sync::oneshot::Sender;

use super::{
    Agent,
    docker::{Join, Reservation},
    pod_address::AddressError,
    pods::status_of,
    wirer::{Job, Looked, Suspect},
};
use crate::{
    api::{AttachRequest, Attached, AttachmentName, PodError, PodErrorKind, PodStatus},
    cni::{Note, Spool},
    model::{Attachment, Pod},
    pods::{NoAddress, wiring::link_name},
};

/// Between two looks for notes of the CNI plugin. It leaves them when an agent that runs does not answer.
const NOTES_EVERY: Duration = Duration::from_secs(5);

/// What waits for a look at the veth pairs.
pub(super) enum Looking {
    /// A pod for which there is no address, as long as all others are there.
    Attach {
        request: AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    },
    Reserve(Reservation),
    Join(Join),
    Release {
        reply: Sender<Result<Vec<PodStatus>, PodError>>,
    },
}

impl Looking {
    pub(super) fn is_of(&self, attachment: &Attachment) -> bool {
        match self {
            Self::Attach { request, .. } => {
                request.container == attachment.container()
                    && request.interface == attachment.interface()
            }
            Self::Reserve(_) | Self::Join(_) | Self::Release { .. } => false,
        }
    }

    pub(super) fn refuse(self, error: PodError) {
        match self {
            Self::Attach { reply, .. } => _ = reply.send(Err(error)),
            Self::Reserve(reservation) => reservation.refuse(error),
            Self::Join(join) => join.refuse(error),
            Self::Release { reply } => _ = reply.send(Err(error)),
        }
    }
}

impl Agent {
    /// Does what the CNI plugin has noted while no agent answered it.
    pub(super) fn catch_up(&mut self) {
        self.pods.catch_up_at = Some(Instant::now() + NOTES_EVERY);
        let spool = Spool::beside(&self.config.socket);
        let mut notes = spool.read();
        notes.retain(|note| !self.pods.applied_notes.values().flatten().any(|other| other == note));
        if notes.is_empty() {
            return;
        }
        tracing::info!(count = notes.len(), "carrying out what the CNI plugin has noted");
        for note in &notes {
            let names = match note {
                Note::Detach(name) => vec![name.clone()],
                Note::Collect { owner, valid } => self.not_valid(owner, valid),
            };
            for AttachmentName { container, interface } in names {
                match Attachment::new(&container, &interface) {
                    Ok(attachment) => self.detach_then(&attachment, None, |_| ()),
                    Err(error) => tracing::warn!(%error, "a note of the CNI plugin"),
                }
            }
        }
        // Behind all of them.
        let number = self.pods.next();
        self.pods.applied_notes.insert(number, notes);
        self.writer.save(Vec::new(), number);
    }

    /// A pod that is asked for is a new one: what was noted before is not about it.
    pub(super) fn catch_up_before(&mut self, request: &AttachRequest) {
        let (container, interface) = (request.container.clone(), request.interface.clone());
        let detach = Note::Detach(AttachmentName { container, interface });
        let collect = Note::Collect { owner: request.owner.clone(), valid: Vec::new() };
        let spool = Spool::beside(&self.config.socket);
        if [detach, collect].iter().any(|note| spool.holds(note)) {
            self.catch_up();
        }
    }

    /// Drops notes when what they asked for is on disk.
    pub(super) fn drop_notes(&mut self, number: u64) {
        let notes = self.pods.applied_notes.remove(&number);
        let spool = Spool::beside(&self.config.socket);
        notes.iter().flatten().for_each(|note| spool.drop(note));
    }

    fn not_valid(&self, owner: &str, valid: &[AttachmentName]) -> Vec<AttachmentName> {
        let its = self.pods.table.iter().filter(|pod| pod.owner == owner);
        let names = its.map(|pod| AttachmentName::from(&pod.attachment));
        names.filter(|name| !valid.contains(name)).collect()
    }

    /// Whether a pod is there, as far as is known.
    pub(super) fn is_present(&self, pod: &Pod) -> bool {
        !self.pods.absent.contains(&link_name(&pod.attachment))
    }

    /// Takes back the addresses of pods that are gone.
    pub(super) fn release_vanished(&mut self, reply: Sender<Result<Vec<PodStatus>, PodError>>) {
        self.look(Looking::Release { reply });
    }

    /// Asks which pods are gone. [`Agent::on_looked`] has the answer.
    pub(super) fn look(&mut self, looking: Looking) {
        let number = self.pods.next();
        let pods = self
            .suspects()
            .map(|pod| Suspect { link: link_name(&pod.attachment), netns: pod.netns.clone() });
        let job = Job::Look { number, pods: pods.collect() };
        self.pods.looking.insert(number, looking);
        self.wirer.ask(job);
    }

    /// Pods that may be gone. What Docker has asked for and not plugged in yet has no veth pair.
    fn suspects(&self) -> impl Iterator<Item = &Pod> {
        let may_be = |pod: &&Pod| !pod.netns.is_empty() && !self.pods.is_attaching(&pod.attachment);
        self.pods.table.iter().filter(may_be)
    }

    pub(super) fn on_looked(&mut self, number: u64, result: io::Result<Looked>) {
        let Some(looking) = self.pods.looking.remove(&number) else { return };
        let looked = result.map_err(|error| {
            PodError::new(PodErrorKind::Failed, format!("looking for pods that are gone: {error}"))
        });
        match (looking, looked) {
            (looking, Err(error)) => looking.refuse(error),
            (Looking::Release { reply }, Ok(looked)) => {
                let released = self.take_back(&looked.gone);
                let number = self.pods.next();
                let answer =
                    move |saved: Result<(), PodError>| _ = reply.send(saved.map(|()| released));
                self.pods.saving.insert(number, Box::new(answer));
                self.writer.save(Vec::new(), number);
            }
            (Looking::Reserve(reservation), Ok(looked)) => {
                self.take_back(&looked.gone);
                self.retry_reservation(reservation);
            }
            (Looking::Join(join), Ok(looked)) => {
                self.take_back(&looked.gone);
                self.finish_join(join);
            }
            (Looking::Attach { request, netns, reply }, Ok(looked)) => {
                self.take_back(&looked.gone);
                match self.assign_address(&request) {
                    Err(AddressError::Address(error)) => {
                        let again = is_about_to_change(&error, &looked.going);
                        let error = PodError { again, ..error.into() };
                        let _ = reply.send(Err(error));
                    }
                    given => self.attach_with(given, &request, netns, reply),
                }
            }
        }
    }

    /// What the bridge's keeper has seen. Pods that were gone a while ago too are forgotten.
    pub(super) fn on_absent(&mut self, links: BTreeSet<String>, confirmed: &BTreeSet<String>) {
        self.pods.absent = links;
        self.take_back(confirmed);
    }

    /// Forgets pods by their veth pairs; says which.
    fn take_back(&mut self, links: &BTreeSet<String>) -> Vec<PodStatus> {
        let is_gone = |pod: &&Pod| links.contains(&link_name(&pod.attachment));
        let gone: Vec<Pod> = self.suspects().filter(is_gone).cloned().collect();
        for pod in &gone {
            let (name, address) = (&pod.attachment, pod.addresses.first);
            tracing::info!(pod = %name, %address, "gone without notice: its addresses are free again");
            self.detach_then(name, None, |_| ());
        }
        gone.iter().map(|pod| PodStatus { orphan: true, ..status_of(pod) }).collect()
    }
}

/// Whether the kernel is removing a pod that is in the way.
fn is_about_to_change(error: &NoAddress, going: &BTreeSet<String>) -> bool {
    match error {
        NoAddress::Attached { attachment, .. } => going.contains(&link_name(attachment)),
        NoAddress::Taken { holder, .. } | NoAddress::MacTaken { holder, .. } => {
            going.contains(&link_name(holder))
        }
        NoAddress::Exhausted(_) => !going.is_empty(),
        NoAddress::Outside { .. }
        | NoAddress::Gateway { .. }
        | NoAddress::GroupMac(_)
        | NoAddress::AddressMac(_)
        | NoAddress::MacOfHost(_)
        | NoAddress::TwoOfOneFamily { .. }
        | NoAddress::TwoPlaces { .. } => false,
    }
}
