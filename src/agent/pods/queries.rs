//! Requests that read pods: CHECK, and the list of all pods.

use std::{fs::File, net::IpAddr, os::fd::OwnedFd};

use tokio::sync::oneshot::Sender;

use crate::{
    agent::{Agent, workers::attach_worker::Job},
    api::{AttachmentName, PodError, PodErrorKind, PodStatus},
    docker::mac_of,
    model::{Attachment, Pod},
    pods::wiring::link_name,
};

impl Agent {
    /// Handles a CHECK request: whether the kernel still has what the pod was assigned.
    pub(in crate::agent) fn check_pod(
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
                self.threads.attach_worker.ask(Job::Check { pod, netns, mac, reply });
            }
        }
    }

    /// Replies with all pods; the attach worker adds which of them the kernel lacks.
    pub(in crate::agent) fn list_pods(&self, reply: Sender<Vec<PodStatus>>) {
        let pods = self.pods.table.iter().map(status_of).collect();
        self.threads.attach_worker.ask(Job::List { pods, reply });
    }
}

/// Returns the status of a pod without the kernel's part.
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
