//! Frees addresses of pods that ended while the agent did not run, or whose runtime did not report their
//! end.
//!
//! A veth pair disappears together with its namespace, so a pod without one no longer uses its
//! addresses. They are freed when a second check confirms it, and immediately if they are needed.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::oneshot::Sender;

use crate::{
    agent::{
        Agent,
        pods::{address::AddressError, queries::status_of},
        workers::attach_worker::{GonePods, Job, Suspect},
    },
    api::{AttachRequest, Attached, AttachmentName, PodError, PodErrorKind, PodStatus},
    cni::{Note, Spool},
    docker::{Endpoint, EndpointInterface},
    model::{Attachment, Mac, Pod},
    pods::{NoAddress, wiring::link_name},
};

/// Time between two checks for notes of the CNI plugin. It leaves notes if a running agent does not
/// answer.
const NOTES_INTERVAL: Duration = Duration::from_secs(5);

/// A request for an interface of an endpoint, for the container in this sandbox.
pub(in crate::agent) struct Join {
    pub(in crate::agent) endpoint: Endpoint,
    pub(in crate::agent) sandbox: String,
    pub(in crate::agent) reply: Sender<Result<EndpointInterface, PodError>>,
}

/// A request for any or a certain address of a pool, for the container that will have this MAC.
pub(in crate::agent) struct Reservation {
    pub(in crate::agent) pool: IpNet,
    pub(in crate::agent) address: Option<IpAddr>,
    pub(in crate::agent) mac: Option<Mac>,
    pub(in crate::agent) reply: Sender<Result<IpNet, PodError>>,
}

/// A request that waits for a check of the veth pairs.
pub(in crate::agent) enum PendingRequest {
    /// A pod for which no address is free unless another pod is gone.
    Attach {
        request: AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    },
    /// Docker's request for an address.
    Reserve(Reservation),
    /// Docker's request to connect an endpoint.
    Join(Join),
    /// The command that frees the addresses of pods that are gone.
    Release { reply: Sender<Result<Vec<PodStatus>, PodError>> },
}

impl PendingRequest {
    /// Returns whether the request is about this attachment.
    pub(in crate::agent) fn is_of(&self, attachment: &Attachment) -> bool {
        match self {
            Self::Attach { request, .. } => {
                request.container == attachment.container()
                    && request.interface == attachment.interface()
            }
            Self::Reserve(_) | Self::Join(_) | Self::Release { .. } => false,
        }
    }

    /// Answers the request with an error.
    pub(in crate::agent) fn refuse(self, error: PodError) {
        match self {
            Self::Attach { reply, .. } => _ = reply.send(Err(error)),
            Self::Reserve(reservation) => reservation.refuse(error),
            Self::Join(join) => join.refuse(error),
            Self::Release { reply } => _ = reply.send(Err(error)),
        }
    }
}

impl Agent {
    /// Carries out what the CNI plugin noted while no agent answered it.
    pub(in crate::agent) fn apply_notes(&mut self) {
        self.pods.next_notes_check = Some(Instant::now() + NOTES_INTERVAL);
        self.check_lost_pods();
        let spool = Spool::beside(&self.config.socket);
        let mut notes = spool.read();
        notes.retain(|note| !self.pods.applied_notes.values().flatten().any(|other| other == note));
        if notes.is_empty() {
            return;
        }
        tracing::info!(count = notes.len(), "carrying out notes of the CNI plugin");
        for note in &notes {
            let names = match note {
                Note::Detach(name) => vec![name.clone()],
                Note::Collect { owner, valid } => self.stale_attachments(owner, valid),
            };
            for AttachmentName { container, interface } in names {
                match Attachment::new(&container, &interface) {
                    Ok(attachment) => self.detach_then(&attachment, None, |_| ()),
                    Err(error) => tracing::warn!(%error, "note of the CNI plugin invalid"),
                }
            }
        }
        // This write comes after the writes of all notes.
        let number = self.pods.next();
        self.pods.applied_notes.insert(number, notes);
        self.storage.writer.save(Vec::new(), number);
    }

    /// Carries out earlier notes about a requested pod first: they concern its predecessor, not the new
    /// pod.
    pub(in crate::agent) fn apply_notes_before(&mut self, request: &AttachRequest) {
        let (container, interface) = (request.container.clone(), request.interface.clone());
        let detach = Note::Detach(AttachmentName { container, interface });
        let collect = Note::Collect { owner: request.owner.clone(), valid: Vec::new() };
        let spool = Spool::beside(&self.config.socket);
        if [detach, collect].iter().any(|note| spool.holds(note)) {
            self.apply_notes();
        }
    }

    /// Removes notes whose changes are on disk.
    pub(in crate::agent) fn drop_notes(&mut self, number: u64) {
        let notes = self.pods.applied_notes.remove(&number);
        let spool = Spool::beside(&self.config.socket);
        notes.iter().flatten().for_each(|note| spool.drop(note));
    }

    /// Returns the pods of this owner that are not among `valid`.
    fn stale_attachments(&self, owner: &str, valid: &[AttachmentName]) -> Vec<AttachmentName> {
        let its = self.pods.table.iter().filter(|pod| pod.owner == owner);
        let names = its.map(|pod| AttachmentName::from(&pod.attachment));
        names.filter(|name| !valid.contains(name)).collect()
    }

    /// Returns whether the pod's veth pair existed at the last check.
    pub(in crate::agent) fn is_present(&self, pod: &Pod) -> bool {
        !self.pods.absent.contains(&link_name(&pod.attachment))
    }

    /// Frees the addresses of pods that are gone.
    pub(in crate::agent) fn release_vanished(
        &mut self,
        reply: Sender<Result<Vec<PodStatus>, PodError>>,
    ) {
        self.check_gone_pods(PendingRequest::Release { reply });
    }

    /// Starts a check of which pods are gone. [`Agent::on_gone_pods`] handles the result.
    pub(in crate::agent) fn check_gone_pods(&mut self, looking: PendingRequest) {
        let number = self.pods.next();
        let pods = self
            .possibly_gone()
            .map(|pod| Suspect { link: link_name(&pod.attachment), netns: pod.netns.clone() });
        let job = Job::FindGone { number, pods: pods.collect() };
        self.pods.pending_lookups.insert(number, looking);
        self.threads.attach_worker.ask(job);
    }

    /// Returns pods that may be gone. An endpoint that Docker has not connected yet has no veth pair.
    fn possibly_gone(&self) -> impl Iterator<Item = &Pod> {
        let may_be = |pod: &&Pod| !pod.netns.is_empty() && !self.pods.is_attaching(&pod.attachment);
        self.pods.table.iter().filter(may_be)
    }

    /// Handles the result of a check, and continues the request that waited for it.
    pub(in crate::agent) fn on_gone_pods(&mut self, number: u64, result: io::Result<GonePods>) {
        let Some(looking) = self.pods.pending_lookups.remove(&number) else { return };
        let looked = result.map_err(|error| {
            PodError::new(
                PodErrorKind::Failed,
                format!("pods that are gone could not be determined: {error}"),
            )
        });
        match (looking, looked) {
            (looking, Err(error)) => looking.refuse(error),
            (PendingRequest::Release { reply }, Ok(looked)) => {
                let released = self.free_pods(&looked.gone);
                let number = self.pods.next();
                let answer =
                    move |saved: Result<(), PodError>| _ = reply.send(saved.map(|()| released));
                self.pods.pending_saves.insert(number, Box::new(answer));
                self.storage.writer.save(Vec::new(), number);
            }
            (PendingRequest::Reserve(reservation), Ok(looked)) => {
                self.free_pods(&looked.gone);
                self.retry_reservation(reservation);
            }
            (PendingRequest::Join(join), Ok(looked)) => {
                self.free_pods(&looked.gone);
                self.finish_join(join);
            }
            (PendingRequest::Attach { request, netns, reply }, Ok(looked)) => {
                self.free_pods(&looked.gone);
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

    /// Handles a check by the bridge thread. Frees pods that were already gone in an earlier check.
    pub(in crate::agent) fn on_absent(
        &mut self,
        links: BTreeSet<String>,
        confirmed: &BTreeSet<String>,
    ) {
        self.pods.absent = links;
        self.free_pods(confirmed);
    }

    /// Frees the pods with these veth pairs and returns them.
    fn free_pods(&mut self, links: &BTreeSet<String>) -> Vec<PodStatus> {
        let is_gone = |pod: &&Pod| links.contains(&link_name(&pod.attachment));
        let gone: Vec<Pod> = self.possibly_gone().filter(is_gone).cloned().collect();
        for pod in &gone {
            let (name, address) = (&pod.attachment, pod.addresses.first);
            tracing::info!(pod = %name, %address, "gone without notice, addresses freed");
            self.detach_then(name, None, |_| ());
        }
        gone.iter().map(|pod| PodStatus { orphan: true, ..status_of(pod) }).collect()
    }
}

/// Returns whether the kernel is removing the pod that caused the error, so that a repetition may
/// succeed.
fn is_about_to_change(error: &NoAddress, going: &BTreeSet<String>) -> bool {
    match error {
        NoAddress::Attached { attachment, .. } => going.contains(&link_name(attachment)),
        NoAddress::Taken { holder, .. } | NoAddress::MacTaken { holder, .. } => {
            going.contains(&link_name(holder))
        }
        NoAddress::Exhausted(_) => !going.is_empty(),
        NoAddress::Outside { .. }
        | NoAddress::Gateway { .. }
        | NoAddress::Reserved { .. }
        | NoAddress::GroupMac(_)
        | NoAddress::AddressMac(_)
        | NoAddress::MacOfHost(_)
        | NoAddress::TwoOfOneFamily { .. }
        | NoAddress::TwoPlaces { .. } => false,
    }
}
