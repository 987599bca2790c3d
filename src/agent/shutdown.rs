//! The end of an agent: the last answers, and what it removes.

use std::{
    collections::BTreeSet,
    pin::pin,
    time::{Duration, Instant},
};

use crate::{
    agent::{
        Agent, SettingsReader, arrivals::Arrivals, ending::Ending, listeners::Listeners,
        workers::archive::SavedFile,
    },
    config::Config,
    core::{Command, Input, Stop},
    dataplane::{
        desired::device_name,
        kernel::{Extent, Kernel},
    },
    model::{Pool, seed_failure},
    pods::wiring::Wiring,
    wire::visible,
    worker::Thread,
};

/// Time that the end waits for answers to Docker.
const DOCKER_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// How long to wait for threads at the end, so that the whole end takes less than
/// [`crate::agent::signals::TIMEOUT`].
const THREAD_JOIN_TIMEOUT: Duration = Duration::from_millis(3500);

/// Most pods that a log line names.
const MAX_NAMED_PODS: usize = 20;

impl Agent {
    /// Answers Docker's requests before the end: Docker repeats a lost request without its body.
    pub(super) async fn answer_docker_to_the_end(
        &mut self,
        arrivals: &mut Arrivals,
        read_settings: &SettingsReader,
        listeners: &Listeners,
    ) {
        let mut answered = pin!(listeners.close_plugin());
        let mut deadline = pin!(tokio::time::sleep(DOCKER_DRAIN_TIMEOUT));
        loop {
            let arrival = tokio::select! {
                biased;
                () = &mut answered => return,
                () = &mut deadline => return,
                arrival = arrivals.next() => arrival,
            };
            self.on_arrival(arrival, Instant::now(), read_settings);
            self.carry_out();
            self.answer_early_docker_requests();
        }
    }

    /// Ends the agent for the reason that the core gives.
    pub(super) fn on_stop(&mut self, stop: Stop) {
        self.lifetime.ending = Some(match stop {
            Stop::Left { successor } => match self.lifetime.giving_up.take() {
                Some((why, _)) => Ending::Failed(why),
                None => Ending::Left { successor },
            },
            Stop::Expelled { successor } => {
                let why = match successor {
                    Some(_) => "was forgotten by the cluster",
                    None => "has left the cluster, and its state is a copy from before",
                };
                tracing::error!(
                    successor = successor.map(tracing::field::display),
                    "this node {why}; joining as a new node with another subnet"
                );
                Ending::Restart
            }
            Stop::Refused(refusal) => Ending::Failed(visible(&format!("join refused: {refusal}"))),
            Stop::Rejected { seed, why } => {
                let name = self.config.seeds.get(seed).map_or("?", String::as_str);
                Ending::Failed(visible(&format!("join: {}", seed_failure(name, &why))))
            }
        });
    }

    /// Whether the kernel can hold anything of this node. If not, what it holds belongs to another overlay.
    pub(super) const fn may_have_kernel_state(&self) -> bool {
        !self.lifetime.fresh || self.kernel.progress.programmed_once
    }

    /// Returns the number of pods on this host, and the names of the first.
    fn present_pods(&self) -> (usize, String) {
        let pods = self.pods.table.iter().filter(|pod| self.is_present(pod));
        let names: BTreeSet<&str> = pods.map(|pod| pod.attachment.container()).collect();
        let shown: Vec<&str> = names.iter().copied().take(MAX_NAMED_PODS).collect();
        (names.len(), visible(&shown.join(", ")))
    }

    /// Ends the threads and connections, and removes the state that this ending requires to remove.
    pub(super) async fn finish(mut self) -> Ending {
        let ending = self.lifetime.ending.take().unwrap_or(Ending::Stopped);
        self.service.stopping();
        self.input(Input::Command(Command::Save));
        self.carry_out();
        let cluster = self.node.cluster().map(|known| (known.settings.vni, known.settings.pool));
        let has_kernel_state = self.may_have_kernel_state();
        let pods = self.present_pods();
        // The next start names them, see `pods::lost`.
        let lost_pods = match ending {
            Ending::Restart if has_kernel_state => self.losing_pods(),
            _ => std::mem::take(&mut self.pods.lost),
        };
        self.storage.archive.save(SavedFile::LostPods(lost_pods));
        self.transport.close().await;
        let threads = [
            self.threads.programmer.end(),
            self.threads.attach_worker.end(),
            self.storage.writer.end(),
            self.storage.archive.end(),
        ];
        await_threads(threads.into_iter().chain(self.threads.monitors.end())).await;
        let refused = self.lifetime.fresh && matches!(ending, Ending::Failed(_));
        let ends = matches!(ending, Ending::Left { .. } | Ending::Restart) || refused;
        if ends && has_kernel_state {
            if let (count @ 1.., pods) = pods {
                tracing::warn!(count, pods, "pods lose their interfaces: restart them");
            }
            remove_traces(cluster, &self.config);
        }
        if (matches!(ending, Ending::Left { .. }) || refused)
            && let Err(error) = self.storage.directory.wipe()
        {
            tracing::error!(%error, "state not removed");
        }
        match &ending {
            Ending::Stopped => tracing::info!("stopped; the kernel keeps forwarding"),
            Ending::Left { successor: Some(successor) } => {
                let name = self.node.name_of(*successor);
                tracing::info!(%successor, name, "left the cluster");
            }
            Ending::Left { successor: None } => {
                tracing::info!("left; it was in no cluster or alone")
            }
            _ => {}
        }
        if let Some(reply) = self.requests.leave_reply.take() {
            let answer = match &ending {
                Ending::Left { successor } => {
                    Ok(successor.map(|successor| self.node.name_of(successor).to_owned()))
                }
                Ending::Failed(why) => Err(why.clone().into()),
                Ending::Stopped | Ending::Restart | Ending::Reassigned | Ending::Broken(_) => {
                    Err("the agent was stopped before the node had left".to_owned().into())
                }
            };
            let _ = reply.send(answer);
            // Another task sends the reply, and must do so before the process ends.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ending
    }
}

/// Waits for threads until the deadline; a thread that hangs in a disk or kernel operation is abandoned.
async fn await_threads(threads: impl Iterator<Item = Thread>) {
    let deadline = Instant::now() + THREAD_JOIN_TIMEOUT;
    for thread in threads {
        if let Err(name) = thread.join(deadline).await {
            tracing::error!(thread = name, "thread did not end in time and was abandoned");
        }
    }
}

/// Removes what the overlay of a VNI has in the kernel, the pods' bridge with its veth pairs, and
/// `subnet.env`.
fn remove_traces(traces: Option<(u32, Pool)>, config: &Config) {
    let Some((vni, pool)) = traces else { return };
    let device = device_name(vni);
    let bridge = config.bridge_name(vni);
    let removed = Wiring::open().and_then(|mut wiring| wiring.remove(&bridge));
    if let Err(error) = removed {
        tracing::error!(%error, "bridge not removed");
    }
    let extent = Extent::Overlay { device: &device, pool: &pool, with_pods: true };
    let removed = Kernel::open().and_then(|mut kernel| {
        let found = kernel.leftovers(extent)?;
        kernel.sweep(found)
    });
    if let Err(error) = removed {
        tracing::error!(%error, "not everything was removed from the kernel");
    }
    let _ = std::fs::remove_file(&config.subnet_file);
}
