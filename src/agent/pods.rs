//! The loop's side of pods: addresses are given and taken back, kept on disk, and veth pairs are made.
//!
//! An answer is given when both the disk and the kernel have done their part. What fails half-way is taken
//! back. The work itself is the writer's and the wirer's; here nothing waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::IpAddr,
    os::fd::OwnedFd,
    time::Instant,
};

use tokio::sync::oneshot::Sender;

use super::{
    Agent,
    archive::Saved,
    attach_worker::{AttachResult, Job},
    docker::is_of_a_network,
    pod_address::NotGiven,
    vanished_pods::PendingRequest,
};
use crate::{
    api::{
        AttachRequest, Attached, AttachedAddress, AttachedRoute, AttachmentName, EventKind,
        EventLevel, PodError, PodErrorKind, PodStatus,
    },
    cni::Note,
    core::View,
    docker,
    model::{Attachment, Mac, Pod, Time},
    pods::{
        Pods,
        bridge::{Bridge, Tenant, Tenants, mac_at},
        furnish::DefaultRoute,
        gateway,
        wiring::{ConnectedPod, End, link_name},
        with_length,
    },
    store::Writer,
    wire::{Key, Record},
};

/// Pods of this node, and what is under way with them.
#[derive(Default)]
pub(super) struct PodState {
    pub(super) table: Pods,
    /// Before anything else.
    to_save: Vec<(Key, Vec<u8>)>,
    /// What their bridge is kept like.
    pub(super) bridge: Option<Bridge>,
    /// What is wrong with their bridge, as sentences.
    pub(super) problems: Vec<String>,
    /// Where sysctls let pods give this host routes, if the table of nftables does not see to it.
    pub(super) open: Vec<String>,
    /// A warning about ports of other programs on their bridge.
    pub(super) guests: Option<String>,
    /// Since when addresses are held for containers of Docker's that have not come yet.
    pub(super) reserved: BTreeMap<Attachment, Time>,
    /// What Docker has asked for before this node had a subnet, and since when it waits.
    pub(super) early: Vec<(Instant, docker::Request)>,
    /// Veth pairs that should be there and are not, as last told.
    pub(super) absent: BTreeSet<String>,
    /// What the bridge is to be made like when the first pod comes.
    pub(super) expected: Option<Bridge>,
    /// How often it is still to be looked whether that can be.
    pub(super) looks_ahead: usize,
    /// Why no pod can be plugged in.
    pub(super) refusal: Option<String>,
    /// What waits for a look at the veth pairs.
    pub(super) looking: BTreeMap<u64, PendingRequest>,
    number: u64,
    pub(super) attaching: BTreeMap<u64, Attaching>,
    /// What is said when the disk has it, or when it is silent for too long.
    pub(super) saving: BTreeMap<u64, Answer<()>>,
    /// Under which number the disk has what this start of the host has changed.
    boot_number: Option<u64>,
    /// When to look for notes of the CNI plugin again.
    pub(super) next_notes_check: Option<Instant>,
    /// Notes that are kept until the disk has what they asked for.
    pub(super) carried_out: BTreeMap<u64, Vec<Note>>,
    /// Answers that wait for the kernel: pods that are not known may have an interface all the same.
    unplugging: BTreeMap<u64, Answer<bool>>,
}

/// Gives an answer as soon as it may be given.
pub(super) type Answer<T> = Box<dyn FnOnce(Result<T, PodError>) + Send>;

/// Waits for the disk and for the kernel.
pub(super) struct Attaching {
    bridge: Bridge,
    pub(super) pod: Pod,
    pub(super) saved: bool,
    connected: Option<ConnectedPod>,
    pub(super) reply: Answer<Attached>,
}

impl PodState {
    /// Ends of pods' veth pairs that should be there.
    pub(super) fn links(&self) -> BTreeSet<String> {
        self.table.iter().map(|pod| link_name(&pod.attachment)).collect()
    }

    /// Whether a pod is being connected.
    pub(super) fn is_attaching(&self, attachment: &Attachment) -> bool {
        self.attaching.values().any(|attaching| attaching.pod.attachment == *attachment)
    }

    /// Who is behind the veth pairs that should be there.
    pub(super) fn tenants(&self) -> Tenants {
        let tenant = |pod: &Pod| (link_name(&pod.attachment), Tenant::new(pod, mac_of(pod)));
        // Addresses that are only held have no veth pair.
        let held = |pod: &&Pod| pod.owner == docker::OWNER && pod.netns.is_empty();
        self.table.iter().filter(|pod| !held(pod)).map(tenant).collect()
    }

    /// From what the disk has, and the pods whose veth pairs are there. After a new start of the host no
    /// container is there any more, even where no runtime will say so; addresses that a network of Docker's
    /// holds are not of containers. No veth pair is there then: one that is proves that the note of the
    /// start is wrong.
    pub(super) fn remember(records: &[(Key, Record)], same_boot: bool, found: &[Pod]) -> Self {
        if !same_boot && !found.is_empty() {
            tracing::warn!(
                count = found.len(),
                "the state directory is of another start of this host: pods are known by their interfaces"
            );
        }
        let has_veth = |pod: &Pod| {
            let is_it =
                |veth: &Pod| veth.attachment == pod.attachment && veth.addresses == pod.addresses;
            found.iter().any(is_it)
        };
        let pods = records.iter().filter_map(|(_, record)| match record {
            Record::Pod(pod) => Some(pod.clone()),
            _ => None,
        });
        let (known, gone): (Vec<Pod>, Vec<Pod>) =
            pods.partition(|pod| same_boot || is_of_a_network(pod) || has_veth(pod));
        let removals = gone.iter().map(|pod| (Key::Pod(pod.addresses.first), Vec::new()));
        Self { to_save: removals.collect(), table: Pods::new(known), ..Self::default() }
    }

    /// Takes in pods whose interfaces are there and whose records a damaged or restored disk has lost. An
    /// interface whose addresses another pod has is left to be swept away.
    pub(super) fn adopt(&mut self, found: Vec<Pod>) {
        let is_unknown = |pod: &Pod| {
            self.table.get(&pod.attachment).is_none()
                && pod.addresses.iter().all(|address| self.table.holder(address).is_none())
        };
        let found: Vec<Pod> = found.into_iter().filter(is_unknown).collect();
        if found.is_empty() {
            return;
        }
        tracing::warn!(count = found.len(), "pods are known by their interfaces alone");
        self.to_save.extend(found.iter().map(record));
        let known = std::mem::take(&mut self.table);
        self.table = Pods::new(known.iter().cloned().chain(found));
    }

    /// Writes down what has changed since the last run.
    pub(super) fn begin(&mut self, writer: &Writer) {
        let number = self.next();
        writer.save(std::mem::take(&mut self.to_save), number);
        self.boot_number = Some(number);
    }

    /// A number for something that is under way.
    pub(super) fn next(&mut self) -> u64 {
        self.number += 1;
        self.number
    }
}

impl Agent {
    pub(super) fn attach(
        &mut self,
        request: AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    ) {
        // A plugin that is gone has noted what is to become of the pod, or its runtime asks again.
        if reply.is_closed() {
            return;
        }
        self.apply_notes_before(&request);
        match self.give_address(&request) {
            // A pod that is gone may stand in the way.
            Err(NotGiven::Address(error)) if error.is_pod_conflict() => {
                self.check_gone_pods(PendingRequest::Attach { request, netns, reply });
            }
            given => self.attach_with(given, &request, netns, reply),
        }
    }

    pub(super) fn attach_with(
        &mut self,
        given: Result<(Bridge, Pod), NotGiven>,
        request: &AttachRequest,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Attached, PodError>>,
    ) {
        match given {
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

    /// Answered when the pod is on disk and plugged in.
    pub(super) fn connect(&mut self, bridge: Bridge, pod: Pod, end: End, reply: Answer<Attached>) {
        let number = self.pods.next();
        let (on, one) = (bridge.clone(), pod.clone());
        let mac = mac_of(&pod);
        // The disk first: it takes longest, and its thread leaves the processor to the kernel's work.
        self.writer.save(vec![record(&pod)], number);
        self.attach_worker.ask(Job::Connect { number, bridge: on, pod: one, mac, end });
        self.pods.bridge = Some(bridge.clone());
        let attaching = Attaching { bridge, pod, saved: false, connected: None, reply };
        self.pods.attaching.insert(number, attaching);
        // It may have the address that forwarding is tried from.
        self.update_forwarder();
    }

    /// What pods are plugged into.
    ///
    /// # Errors
    /// As long as nobody can be.
    pub(super) fn ready_bridge(&self) -> Result<Bridge, PodError> {
        let not_ready = |why: String| PodError::new(PodErrorKind::NotReady, why);
        if let Some(error) = self.unwritten() {
            return Err(error);
        }
        let view = self.subnet_in_use();
        let view = view.ok_or_else(|| not_ready("this node has no subnet in use yet".to_owned()));
        view.map(|view| self.bridge(view))
    }

    fn subnet_in_use(&self) -> Option<&View> {
        self.kernel.wanted.as_ref().filter(|_| self.kernel.programmed_once)
    }

    pub(super) fn has_subnet_in_use(&self) -> bool {
        self.subnet_in_use().is_some()
    }

    pub(super) fn detach(
        &mut self,
        request: &AttachmentName,
        netns: Option<OwnedFd>,
        reply: Sender<Result<bool, PodError>>,
    ) {
        match Attachment::new(&request.container, &request.interface) {
            // A plugin that does not wait any more has noted it.
            _ if reply.is_closed() => {}
            Err(error) => _ = reply.send(Err(PodError::invalid(error))),
            Ok(attachment) => {
                let netns = netns.map(File::from);
                let Some(error) = self.unwritten() else {
                    let answer = move |result| _ = reply.send(result);
                    return self.detach_then(&attachment, netns, answer);
                };
                // The pod goes all the same. The plugin keeps its note until the disk has that.
                self.detach_then(&attachment, netns, |_| ());
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Answered with whether there was anything.
    pub(super) fn detach_then(
        &mut self,
        attachment: &Attachment,
        netns: Option<File>,
        answer: impl FnOnce(Result<bool, PodError>) + Send + 'static,
    ) {
        // Other interfaces of the container, which take over its routes, have to be known for that.
        self.keep_bridge();
        self.give_up_attaching(attachment);
        let number = self.pods.next();
        // The kernel takes long to remove an interface. The answer need not wait for that: whoever connects
        // the same one again does.
        if self.forget_pod(number, attachment) {
            let answer = |saved: Result<(), PodError>| answer(saved.map(|()| true));
            self.pods.saving.insert(number, Box::new(answer));
        } else {
            self.pods.unplugging.insert(number, Box::new(answer));
        }
        self.attach_worker.ask(Job::Disconnect { number, attachment: attachment.clone(), netns });
    }

    /// Who asked for it does not want it any more.
    fn give_up_attaching(&mut self, attachment: &Attachment) {
        let why = || {
            let why = format!("{attachment} was disconnected meanwhile");
            PodError::new(PodErrorKind::NotReady, why)
        };
        let looking = self.pods.looking.iter().filter(|(_, looking)| looking.is_of(attachment));
        let looking: Vec<u64> = looking.map(|(number, _)| *number).collect();
        let waiting = looking.iter().filter_map(|number| self.pods.looking.remove(number));
        waiting.for_each(|looking| looking.refuse(why()));
        let mut all = self.pods.attaching.iter();
        let found = all.find(|(_, attaching)| attaching.pod.attachment == *attachment);
        let number = found.map(|(number, _)| *number);
        if let Some(attaching) = number.and_then(|number| self.pods.attaching.remove(&number)) {
            (attaching.reply)(Err(why()));
        }
    }

    /// Whether the kernel still has what a pod was given.
    pub(super) fn check_pod(
        &mut self,
        name: &AttachmentName,
        netns: Option<OwnedFd>,
        reply: Sender<Result<Vec<IpAddr>, PodError>>,
    ) {
        let known = Attachment::new(&name.container, &name.interface)
            .map_err(PodError::invalid)
            .and_then(|attachment| {
                let pod = self.pods.table.get(&attachment).cloned();
                let unknown = || format!("{attachment}: no such pod here");
                pod.ok_or_else(|| PodError::new(PodErrorKind::Unknown, unknown()))
            });
        match known {
            Err(error) => _ = reply.send(Err(error)),
            Ok(pod) => {
                let netns = netns.map(File::from);
                let mac = mac_of(&pod).filter(|_| self.config.anti_spoofing);
                self.attach_worker.ask(Job::Check { pod, netns, mac, reply });
            }
        }
    }

    pub(super) fn on_attach_result(&mut self, wired: AttachResult) {
        match wired {
            AttachResult::Connected { number, result: Ok(connected) } => {
                if let Some(attaching) = self.pods.attaching.get_mut(&number) {
                    attaching.connected = Some(connected);
                }
                self.finish_attaching(number);
            }
            AttachResult::Connected { number, result: Err(error) } => {
                let Some(attaching) = self.pods.attaching.remove(&number) else { return };
                let Attaching { pod, reply, .. } = attaching;
                tracing::warn!(pod = %pod.attachment, %error, "not connected");
                // Docker has asked for the address before, and gives it back by itself.
                if pod.owner != docker::OWNER {
                    self.forget_pod(number, &pod.attachment);
                }
                reply(Err(error.into()));
            }
            AttachResult::GonePods { number, result } => self.on_gone_pods(number, result),
            AttachResult::Absent { links, confirmed } => self.on_absent(links, &confirmed),
            AttachResult::PlaceChecked => {
                self.pods.looks_ahead = self.pods.looks_ahead.saturating_sub(1)
            }
            AttachResult::Refusal(refusal) => self.on_refusal(refusal),
            AttachResult::BridgeRepaired { result, problems, open, guests } => {
                match result {
                    Ok(mended) => {
                        self.note_repair("bridge", mended.bridge + mended.ports);
                        self.note_repair("sysctl", mended.sysctls);
                        self.note_repair("anti-spoofing", mended.spoofing);
                    }
                    Err(error) => tracing::error!(%error, "the pods' bridge"),
                }
                let known = &self.pods.problems;
                let new = problems.iter().filter(|problem| !known.contains(problem));
                new.for_each(|problem| tracing::error!("{problem}"));
                self.pods.problems = problems;
                self.pods.open = open;
                if let Some(warning) = guests.as_ref().filter(|_| guests != self.pods.guests) {
                    tracing::warn!("{warning}");
                }
                self.pods.guests = guests;
            }
            AttachResult::Disconnected { number, attachment, result } => {
                if let Err(error) = &result {
                    tracing::error!(pod = %attachment, %error, "its interface was not removed");
                }
                if let Some(reply) = self.pods.unplugging.remove(&number) {
                    let failed = |error| {
                        let what = format!("removing {}: {error}", link_name(&attachment));
                        PodError::new(PodErrorKind::Failed, what)
                    };
                    reply(result.map_err(failed));
                }
            }
        }
    }

    /// Something of ours is on disk.
    pub(super) fn on_saved(&mut self, number: u64) {
        self.drop_notes(number);
        if self.pods.boot_number.take_if(|at| *at == number).is_some() {
            self.archive.save(Saved::Boot);
        }
        if let Some(answer) = self.pods.saving.remove(&number) {
            answer(Ok(()));
        }
        if let Some(attaching) = self.pods.attaching.get_mut(&number) {
            attaching.saved = true;
        }
        self.finish_attaching(number);
    }

    /// Takes the addresses of a pod back and removes its record; false, if there is none.
    pub(super) fn forget_pod(&mut self, number: u64, attachment: &Attachment) -> bool {
        let pod = self.pods.table.detach(self.clock.now(), attachment);
        let Some(pod) = pod else { return false };
        // The problem may be one of this pod.
        if !self.kernel.answers.problems.is_empty() {
            self.update_roster();
        }
        let text = format!("{attachment} has given {} back", pod.addresses.first);
        self.journal.note(EventKind::Pod, EventLevel::Info, text);
        self.writer.save(vec![(Key::Pod(pod.addresses.first), Vec::new())], number);
        true
    }

    fn finish_attaching(&mut self, number: u64) {
        let is_done = |attaching: &Attaching| attaching.saved && attaching.connected.is_some();
        if !self.pods.attaching.get(&number).is_some_and(is_done) {
            return;
        }
        let Some(attaching) = self.pods.attaching.remove(&number) else { return };
        let Attaching { bridge, pod, connected: Some(connected), reply, .. } = attaching else {
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
        tracing::info!(pod = %pod.attachment, address = %pod.addresses.first, "connected");
        let text = format!("{} has {}", pod.attachment, pod.addresses.first);
        self.journal.note(EventKind::Pod, EventLevel::Info, text);
    }

    /// All of them, for a database that was lost.
    pub(super) fn save_pods(&mut self) {
        let records = self.pods.table.iter().map(record).collect();
        let number = self.pods.next();
        self.writer.save(records, number);
    }

    /// Which of them the kernel still has is for the thread to say.
    pub(super) fn list_pods(&self, reply: Sender<Vec<PodStatus>>) {
        let pods = self.pods.table.iter().map(status_of).collect();
        self.attach_worker.ask(Job::List { pods, reply });
    }
}

pub(super) fn status_of(pod: &Pod) -> PodStatus {
    PodStatus {
        container: pod.attachment.container().to_owned(),
        interface: pod.attachment.interface().to_owned(),
        owner: pod.owner.clone(),
        addresses: pod.addresses.iter().collect(),
        link: link_name(&pod.attachment),
        netns: pod.netns.clone(),
        orphan: false,
    }
}

pub(super) fn record(pod: &Pod) -> (Key, Vec<u8>) {
    (Key::Pod(pod.addresses.first), Record::Pod(pod.clone()).encode())
}

/// The MAC that a pod has; Docker gives its containers MACs of its own.
pub(super) fn mac_of(pod: &Pod) -> Option<Mac> {
    let follows = || (pod.owner != docker::OWNER).then(|| mac_at(pod.addresses.first));
    pod.mac.or_else(follows)
}
