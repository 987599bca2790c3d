//! How an agent ends: why, and what it removes then.

use std::time::{Duration, Instant};

use super::{Agent, data_plane::remove_traces};
use crate::{
    core::{Command, Input, Stop},
    model::NodeId,
    wire::visible,
    worker::Thread,
};

/// How long its threads are waited for when the agent ends, so that all takes less than
/// [`super::signals::TIMEOUT`].
const THREAD_PATIENCE: Duration = Duration::from_millis(3500);
/// How an agent ended that had started well.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// A signal: all state stays, in the kernel too.
    Stopped,
    /// The node left its cluster: nothing of it is left on this host.
    Left { successor: Option<NodeId> },
    /// It is no member any more under this identity, and is to join as a new node.
    Restart,
    /// It was given another subnet, and is to start again with that one.
    Reassigned,
    /// It cannot go on; the sentence says why.
    Failed(String),
    /// This program has failed: all state stays, in the kernel too.
    Broken(String),
}

impl Agent {
    pub(super) fn on_stop(&mut self, stop: Stop) {
        self.ending = Some(match stop {
            Stop::Left { successor } => match self.giving_up.take() {
                Some((why, _)) => Ending::Failed(why),
                None => Ending::Left { successor },
            },
            Stop::Expelled { successor } => {
                tracing::error!(
                    successor = successor.map(tracing::field::display),
                    "the cluster holds this node as gone for good: it joins as a new one, with another subnet"
                );
                Ending::Restart
            }
            Stop::Refused(refusal) => Ending::Failed(visible(&format!("join refused: {refusal}"))),
            Stop::Rejected { seed, why } => {
                let name = self.config.seeds.get(seed).map_or("?", String::as_str);
                Ending::Failed(visible(&format!("join {name}: {why}")))
            }
        });
    }

    /// Whether anything in the kernel can be of this node. What cannot is another overlay's.
    pub(super) const fn has_made_something(&self) -> bool {
        !self.fresh || self.kernel.programmed_once
    }

    /// Ends what must end, and removes what must not stay.
    pub(super) async fn finish(mut self) -> Ending {
        let ending = self.ending.take().unwrap_or(Ending::Stopped);
        self.service.stopping();
        self.input(Input::Command(Command::Save));
        self.carry_out();
        let traces =
            self.node.cluster().map(|cluster| (cluster.settings.vni, cluster.settings.pool));
        let made_something = self.has_made_something();
        self.transport.close().await;
        let threads = [
            self.programmer.end(),
            self.forwarder.end(),
            self.remote_pods.end(),
            self.asking.end(),
            self.inquest.end(),
            self.attach_worker.end(),
            self.writer.end(),
            self.archive.end(),
        ];
        await_threads(threads).await;
        let refused = self.fresh && matches!(ending, Ending::Failed(_));
        let ends = matches!(ending, Ending::Left { .. } | Ending::Restart) || refused;
        if ends && made_something {
            remove_traces(traces, &self.config);
        }
        if (matches!(ending, Ending::Left { .. }) || refused)
            && let Err(error) = self.state.wipe()
        {
            tracing::error!(%error, "state not removed");
        }
        if let Some(reply) = self.leave_reply.take() {
            let answer = match &ending {
                Ending::Left { successor } => {
                    Ok(successor.map(|successor| self.node.name_of(successor).to_owned()))
                }
                Ending::Failed(why) => Err(why.clone()),
                Ending::Stopped | Ending::Restart | Ending::Reassigned | Ending::Broken(_) => {
                    Err("the agent was stopped before it had left".to_owned())
                }
            };
            let _ = reply.send(answer);
            // The reply travels through another task; it must be on its way before the process ends.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ending
    }
}

/// Waits for threads, without those that hang in a disk or in the kernel.
async fn await_threads<const N: usize>(threads: [Thread; N]) {
    let deadline = Instant::now() + THREAD_PATIENCE;
    for thread in threads {
        if let Err(name) = thread.join(deadline).await {
            tracing::error!(thread = name, "thread hangs: the agent ends without it");
        }
    }
}
