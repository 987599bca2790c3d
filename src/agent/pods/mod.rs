//! The event loop's side of pods: it assigns and releases addresses, stores records, and orders veth pairs.
//!
//! A request is answered when both the disk and the kernel have done their part; a request that fails
//! half-way is undone. The writer and the attach worker do the work, so the loop never waits.

pub(super) mod address;
mod bridge;
pub(super) mod disk_stall;
pub(super) mod lost;
mod queries;
pub(super) mod vanished;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::fd::OwnedFd,
    time::Instant,
};

use tokio::sync::oneshot::Sender;

use self::{
    address::{AddressError, is_network_reservation},
    vanished::PendingRequest,
};
use crate::{
    agent::{
        Agent,
        workers::{
            archive::SavedFile,
            attach_worker::{AttachResult, Job},
        },
    },
    api::{
        AttachRequest, Attached, AttachedAddress, AttachedRoute, AttachmentName, EventKind,
        EventLevel, PodError, PodErrorKind,
    },
    cni::Note,
    docker::{self, mac_of},
    model::{Attachment, Pod, Problem, Time},
    pods::{
        Pods,
        desired::{Bridge, Tenant, Tenants},
        furnish::DefaultRoute,
        gateway,
        wiring::{ConnectedPod, End, link_name},
        with_length,
    },
    store::{LostPod, Writer},
    wire::{Key, Record},
};

/// The pods of this node, and the requests in progress.
#[derive(Default)]
pub(super) struct PodState {
    /// The pods and their addresses.
    pub(super) table: Pods,
    /// Records to write before any other.
    to_save: Vec<(Key, Vec<u8>)>,
    /// The desired state of the bridge, as last ordered.
    pub(super) bridge: Option<Bridge>,
    /// Problems of the bridge.
    pub(super) problems: Vec<Problem>,
    /// Interfaces whose sysctls let pods announce routes to this host, unless an nftables rule prevents it.
    pub(super) open: Vec<Problem>,
    /// Notices about ports of other programs on the bridge.
    pub(super) notices: Vec<Problem>,
    /// Pods that lost their network when this host became a new node.
    pub(super) lost: Vec<LostPod>,
    /// Since when addresses are reserved for containers of Docker that have not come yet.
    pub(super) reserved: BTreeMap<Attachment, Time>,
    /// Requests of Docker that wait for this node's subnet, and since when.
    pub(super) early_requests: Vec<(Instant, docker::Request)>,
    /// Names of veth pairs that should exist and do not, as last reported.
    pub(super) absent: BTreeSet<String>,
    /// The bridge whose creation was last checked, before the first pod.
    pub(super) expected_bridge: Option<Bridge>,
    /// Number of these checks that are not answered yet.
    pub(super) pending_bridge_checks: usize,
    /// Why no pod can be connected to the bridge.
    pub(super) refusal: Option<Problem>,
    /// Requests that wait for a lookup of the veth pairs.
    pub(super) pending_lookups: BTreeMap<u64, PendingRequest>,
    /// The number last drawn.
    number: u64,
    /// ADD requests that wait for the disk or the kernel.
    pub(super) pending_attaches: BTreeMap<u64, PendingAttach>,
    /// Replies to give when the disk has written the record, or has stalled for too long.
    pub(super) pending_saves: BTreeMap<u64, Answer<()>>,
    /// Number of the write that removes the pods of an earlier boot.
    boot_number: Option<u64>,
    /// When to read the notes of the CNI plugin again.
    pub(super) next_notes_check: Option<Instant>,
    /// Applied notes, kept until their effect is on disk.
    pub(super) applied_notes: BTreeMap<u64, Vec<Note>>,
    /// Replies to DEL requests for unknown pods, which wait for the kernel: they may have an interface all
    /// the same.
    pending_detaches: BTreeMap<u64, Answer<bool>>,
}

/// Sends the reply to a request.
pub(super) type Answer<T> = Box<dyn FnOnce(Result<T, PodError>) + Send>;

/// An ADD request that waits for the disk and the kernel.
pub(super) struct PendingAttach {
    bridge: Bridge,
    /// The pod to connect.
    pub(super) pod: Pod,
    /// Whether the record is on disk.
    pub(super) saved: bool,
    /// The result of the kernel's part.
    connected: Option<ConnectedPod>,
    /// Sends the reply.
    pub(super) reply: Answer<Attached>,
}

impl PodState {
    /// Returns the names of the veth ends that should exist on this host.
    pub(super) fn links(&self) -> BTreeSet<String> {
        self.table.iter().map(|pod| link_name(&pod.attachment)).collect()
    }

    /// Whether a pod is being connected.
    pub(super) fn is_attaching(&self, attachment: &Attachment) -> bool {
        self.pending_attaches.values().any(|pending| pending.pod.attachment == *attachment)
    }

    /// Returns the pods that should have a veth pair, by the name of its end on this host.
    pub(super) fn tenants(&self) -> Tenants {
        let tenant = |pod: &Pod| (link_name(&pod.attachment), Tenant::new(pod, mac_of(pod)));
        // Reserved addresses have no veth pair.
        let is_reserved = |pod: &&Pod| pod.owner == docker::OWNER && pod.netns.is_empty();
        self.table.iter().filter(|pod| !is_reserved(pod)).map(tenant).collect()
    }

    /// Builds the state from the records on disk and the pods that have veth pairs (`found`).
    ///
    /// After a reboot no container exists, even where no runtime reports that; only the addresses that a
    /// network of Docker reserves remain. If a veth pair exists all the same, the recorded boot is wrong, and
    /// its pod is kept.
    pub(super) fn from_records(records: &[(Key, Record)], same_boot: bool, found: &[Pod]) -> Self {
        if !same_boot && !found.is_empty() {
            tracing::warn!(
                count = found.len(),
                "state directory is of another boot; pods restored from their interfaces"
            );
        }
        let has_veth = |pod: &Pod| {
            let is_same =
                |veth: &Pod| veth.attachment == pod.attachment && veth.addresses == pod.addresses;
            found.iter().any(is_same)
        };
        let pods = records.iter().filter_map(|(_, record)| match record {
            Record::Pod(pod) => Some(pod.clone()),
            _ => None,
        });
        let (known, gone): (Vec<Pod>, Vec<Pod>) =
            pods.partition(|pod| same_boot || is_network_reservation(pod) || has_veth(pod));
        let removals = gone.iter().map(|pod| (Key::Pod(pod.addresses.first), Vec::new()));
        Self { to_save: removals.collect(), table: Pods::new(known), ..Self::default() }
    }

    /// Adds pods whose interfaces exist and whose records a damaged or restored disk has lost. An interface
    /// whose addresses belong to another pod is left for removal.
    pub(super) fn adopt(&mut self, found: Vec<Pod>) {
        let is_unknown = |pod: &Pod| {
            self.table.get(&pod.attachment).is_none()
                && pod.addresses.iter().all(|address| self.table.holder(address).is_none())
        };
        let found: Vec<Pod> = found.into_iter().filter(is_unknown).collect();
        if found.is_empty() {
            return;
        }
        tracing::warn!(count = found.len(), "pods without records restored from their interfaces");
        self.to_save.extend(found.iter().map(record));
        let known = std::mem::take(&mut self.table);
        self.table = Pods::new(known.iter().cloned().chain(found));
    }

    /// Writes the changes since the last run.
    pub(super) fn save_initial(&mut self, writer: &Writer) {
        let number = self.next();
        writer.save(std::mem::take(&mut self.to_save), number);
        self.boot_number = Some(number);
    }

    /// Draws a number for a request in progress.
    pub(super) fn next(&mut self) -> u64 {
        self.number += 1;
        self.number
    }
}

impl Agent {
    /// Handles an ADD request.
    pub(super) fn attach(
        &mut self,
        request: AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    ) {
        // A plugin that has gone noted what is to become of the pod, or its runtime repeats the request.
        if reply.is_closed() {
            return;
        }
        self.apply_notes_before(&request);
        match self.assign_address(&request) {
            // A pod that no longer exists may hold the address: look for it.
            Err(AddressError::Address(error)) if error.is_pod_conflict() => {
                self.check_gone_pods(PendingRequest::Attach { request, netns, reply });
            }
            assigned => self.attach_with(assigned, &request, netns, reply),
        }
    }

    /// Continues an ADD request with the assigned address, or replies with the reason of the refusal.
    pub(super) fn attach_with(
        &mut self,
        assigned: Result<(Bridge, Pod), AddressError>,
        request: &AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    ) {
        match assigned {
            Err(error) => _ = reply.send(Err(error.into())),
            Ok((bridge, pod)) => {
                let answer = move |result| _ = reply.send(result);
                let netns = netns.map(File::from);
                let default_route = match (request.default_route, request.others_first) {
                    (false, _) => DefaultRoute::None,
                    (true, false) => DefaultRoute::IfMissing,
                    (true, true) => DefaultRoute::AfterOthers,
                };
                let end = End::Inside { netns, default_route };
                self.connect(bridge, pod, end, Box::new(answer));
            }
        }
    }

    /// Stores and connects a pod; replies when both are done.
    pub(super) fn connect(&mut self, bridge: Bridge, pod: Pod, end: End, reply: Answer<Attached>) {
        let number = self.pods.next();
        let (job_bridge, job_pod) = (bridge.clone(), pod.clone());
        let mac = mac_of(&pod);
        // The disk first: it takes longest, and its thread leaves the CPU to the kernel meanwhile.
        self.storage.writer.save(vec![record(&pod)], number);
        self.threads.attach_worker.ask(Job::Connect {
            number,
            bridge: job_bridge,
            pod: job_pod,
            mac,
            end,
        });
        self.pods.bridge = Some(bridge.clone());
        let pending = PendingAttach { bridge, pod, saved: false, connected: None, reply };
        self.pods.pending_attaches.insert(number, pending);
        // The pod may have the address from which forwarding is tried.
        self.update_forwarder();
    }

    /// Returns the bridge to which pods are connected.
    ///
    /// # Errors
    /// Fails while no pod can be connected: the disk accepts no writes, or this node has no subnet in use.
    pub(super) fn ready_bridge(&self) -> Result<Bridge, PodError> {
        let not_ready = |why: String| PodError::new(PodErrorKind::NotReady, why);
        if let Some(error) = self.disk_error() {
            return Err(error);
        }
        let view = self.kernel.programmed_view();
        let view = view.ok_or_else(|| not_ready("this node has no subnet in use yet".to_owned()));
        view.map(|view| self.bridge(view))
    }

    /// Whether this node uses its subnet.
    pub(super) fn has_subnet_in_use(&self) -> bool {
        self.kernel.programmed_view().is_some()
    }

    /// Handles a DEL request.
    pub(super) fn detach(
        &mut self,
        request: &AttachmentName,
        netns: Option<OwnedFd>,
        reply: Sender<Result<bool, PodError>>,
    ) {
        match Attachment::new(&request.container, &request.interface) {
            // A plugin that no longer waits has noted the request.
            _ if reply.is_closed() => {}
            Err(error) => _ = reply.send(Err(PodError::invalid(error))),
            Ok(attachment) => {
                let netns = netns.map(File::from);
                let Some(error) = self.disk_error() else {
                    let answer = move |result| _ = reply.send(result);
                    return self.detach_then(&attachment, netns, answer);
                };
                // Disconnects the pod all the same. The plugin keeps its note until the disk has written
                // that.
                self.detach_then(&attachment, netns, |_| ());
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Disconnects a pod; replies with whether there was one.
    pub(super) fn detach_then(
        &mut self,
        attachment: &Attachment,
        netns: Option<File>,
        answer: impl FnOnce(Result<bool, PodError>) + Send + 'static,
    ) {
        // Other interfaces of the container take over its routes, and have to be known for that.
        self.keep_bridge();
        self.cancel_attach(attachment);
        let number = self.pods.next();
        // The kernel takes long to remove an interface. Only a new ADD of the same one waits for that.
        if self.forget_pod(number, attachment) {
            let answer = |saved: Result<(), PodError>| answer(saved.map(|()| true));
            self.pods.pending_saves.insert(number, Box::new(answer));
        } else {
            self.pods.pending_detaches.insert(number, Box::new(answer));
        }
        self.threads.attach_worker.ask(Job::Disconnect {
            number,
            attachment: attachment.clone(),
            netns,
        });
    }

    /// Fails the pending ADD request of an attachment that is being disconnected.
    fn cancel_attach(&mut self, attachment: &Attachment) {
        let why = || {
            let why = format!("{attachment} was disconnected before it was ready");
            PodError::new(PodErrorKind::NotReady, why)
        };
        let looking =
            self.pods.pending_lookups.iter().filter(|(_, looking)| looking.is_of(attachment));
        let looking: Vec<u64> = looking.map(|(number, _)| *number).collect();
        let waiting = looking.iter().filter_map(|number| self.pods.pending_lookups.remove(number));
        waiting.for_each(|looking| looking.refuse(why()));
        let mut all = self.pods.pending_attaches.iter();
        let found = all.find(|(_, pending)| pending.pod.attachment == *attachment);
        let number = found.map(|(number, _)| *number);
        if let Some(pending) = number.and_then(|number| self.pods.pending_attaches.remove(&number))
        {
            (pending.reply)(Err(why()));
        }
    }

    /// Applies a report of the attach worker.
    pub(super) fn on_attach_result(&mut self, result: AttachResult) {
        match result {
            AttachResult::Connected { number, result: Ok(connected) } => {
                if let Some(pending) = self.pods.pending_attaches.get_mut(&number) {
                    pending.connected = Some(connected);
                }
                self.finish_attach(number);
            }
            AttachResult::Connected { number, result: Err(error) } => {
                let Some(pending) = self.pods.pending_attaches.remove(&number) else {
                    return;
                };
                let PendingAttach { pod, reply, .. } = pending;
                tracing::warn!(pod = %pod.attachment, %error, "pod not connected");
                // Docker reserved the address before, and releases it itself.
                if pod.owner != docker::OWNER {
                    self.forget_pod(number, &pod.attachment);
                }
                reply(Err(error.into()));
            }
            AttachResult::GonePods { number, result } => self.on_gone_pods(number, result),
            AttachResult::Absent { links, confirmed } => self.on_absent(links, &confirmed),
            AttachResult::PlaceChecked => {
                self.pods.pending_bridge_checks = self.pods.pending_bridge_checks.saturating_sub(1)
            }
            AttachResult::Refusal(refusal) => self.on_refusal(refusal),
            AttachResult::BridgeRepaired { result, problems, open, notices } => {
                match result {
                    Ok(mended) => {
                        self.record_and_log_repair("bridge", mended.bridge + mended.ports);
                        self.record_and_log_repair("sysctl", mended.sysctls);
                        self.record_and_log_repair("anti-spoofing", mended.spoofing);
                    }
                    Err(error) => tracing::error!(%error, "bridge of pods not repaired"),
                }
                let known = &self.pods.problems;
                let new = problems.iter().filter(|problem| !known.contains(problem));
                new.for_each(|problem| tracing::error!("{problem}"));
                self.pods.problems = problems;
                self.pods.open = open;
                let known = &self.pods.notices;
                let new = notices.iter().filter(|notice| !known.contains(notice));
                new.for_each(|notice| tracing::warn!("{notice}"));
                self.pods.notices = notices;
            }
            AttachResult::Disconnected { number, attachment, result } => {
                if let Err(error) = &result {
                    tracing::error!(pod = %attachment, %error, "interface of pod not removed");
                }
                if let Some(reply) = self.pods.pending_detaches.remove(&number) {
                    let failed = |error| {
                        let what = format!("removing {}: {error}", link_name(&attachment));
                        PodError::new(PodErrorKind::Failed, what)
                    };
                    reply(result.map_err(failed));
                }
            }
        }
    }

    /// Continues the requests that wait for this write.
    pub(super) fn on_saved(&mut self, number: u64) {
        self.drop_notes(number);
        if self.pods.boot_number.take_if(|at| *at == number).is_some() {
            self.storage.archive.save(SavedFile::Boot);
        }
        if let Some(answer) = self.pods.pending_saves.remove(&number) {
            answer(Ok(()));
        }
        if let Some(pending) = self.pods.pending_attaches.get_mut(&number) {
            pending.saved = true;
        }
        self.finish_attach(number);
    }

    /// Releases the addresses of a pod and removes its record; false if there is no such pod.
    pub(super) fn forget_pod(&mut self, number: u64, attachment: &Attachment) -> bool {
        let pod = self.pods.table.detach(self.clock.now(), attachment);
        let Some(pod) = pod else { return false };
        // A reported problem may concern this pod.
        if !self.kernel.diagnoses.answers.problems.is_empty() {
            self.update_roster();
        }
        let text = format!("{attachment} released {}", pod.addresses.first);
        self.journal.note(EventKind::Pod, EventLevel::Info, text);
        self.storage.writer.save(vec![(Key::Pod(pod.addresses.first), Vec::new())], number);
        true
    }

    /// Replies to an ADD request, once both the disk and the kernel are done.
    fn finish_attach(&mut self, number: u64) {
        let is_done = |pending: &PendingAttach| pending.saved && pending.connected.is_some();
        if !self.pods.pending_attaches.get(&number).is_some_and(is_done) {
            return;
        }
        let Some(pending) = self.pods.pending_attaches.remove(&number) else { return };
        let PendingAttach { bridge, pod, connected: Some(connected), reply, .. } = pending else {
            return;
        };
        let addresses = pod.addresses.iter().zip(bridge.subnets.iter()).map(|(ip, subnet)| {
            let address = with_length(ip, subnet);
            AttachedAddress { address, gateway: gateway(subnet) }
        });
        reply(Ok(Attached {
            mac: connected.mac,
            link: link_name(&pod.attachment),
            link_mac: connected.link_mac,
            bridge: bridge.name,
            bridge_mac: connected.bridge_mac,
            mtu: bridge.mtu,
            addresses: addresses.collect(),
            routes: connected
                .routes
                .iter()
                .map(|route| AttachedRoute { to: route.to, via: route.via })
                .collect(),
        }));
        tracing::info!(pod = %pod.attachment, address = %pod.addresses.first, "pod connected");
        let text = format!("{} has {}", pod.attachment, pod.addresses.first);
        self.journal.note(EventKind::Pod, EventLevel::Info, text);
    }

    /// Writes all records, after the database was lost.
    pub(super) fn save_pods(&mut self) {
        let records = self.pods.table.iter().map(record).collect();
        let number = self.pods.next();
        self.storage.writer.save(records, number);
    }
}

/// Returns the record of a pod, with its key.
pub(super) fn record(pod: &Pod) -> (Key, Vec<u8>) {
    (Key::Pod(pod.addresses.first), Record::Pod(pod.clone()).encode())
}
