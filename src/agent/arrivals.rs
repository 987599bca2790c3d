//! The inputs of the event loop, and their sources.

use tokio::sync::mpsc;

use crate::{
    agent::{
        diagnosis::{
            forwarder::ForwarderEvent, pod_answers::PodAnswers, remote_pods::RemotePodsEvent,
            silence::SilenceFindings,
        },
        workers::{archive::ArchiveEvent, attach_worker::AttachResult, kernel_event::KernelEvent},
    },
    api::AgentRequest,
    docker as docker_plugin,
    icmp::IcmpEvent,
    kubernetes::NodeReport,
    store::WriteEvent,
    transport::Event,
};

/// One input: a turn of the loop begins with it.
pub(super) enum Arrival {
    /// A deadline of the loop has passed.
    Deadline,
    /// SIGHUP: the settings have to be read again.
    Hangup,
    /// From a thread, or from the control socket.
    LoopEvent(LoopEvent),
    /// From the gossip transport.
    Network(Event),
    /// From the sockets of the path probe.
    Icmp(IcmpEvent),
}

/// A report of a thread, or a request from the control socket or Docker.
pub(super) enum LoopEvent {
    /// The writer of the database has written, or cannot write.
    Disk(WriteEvent),
    /// The programmer has changed or read the kernel.
    Kernel(KernelEvent),
    /// The trial of forwarding on this host has a result.
    Forwarding(ForwarderEvent),
    /// The trial between pods of different hosts has a result.
    RemotePods(RemotePodsEvent),
    /// Whether pods of this host answer ARP or neighbor discovery.
    PodAnswers(PodAnswers),
    /// Why peers are silent.
    SilenceFindings(SilenceFindings),
    /// The attach worker has made, removed or looked up veth pairs.
    Pods(AttachResult),
    /// A request at the control socket or the `http` listener.
    Api(AgentRequest),
    /// A request of Docker.
    Docker(docker_plugin::Request),
    /// What Kubernetes says about this node and others.
    Node(NodeReport),
    /// The archive has written a small file, or cannot write it.
    Archive(ArchiveEvent),
}

/// All sources but signals and the clock. They take turns, so a busy source does not delay the others.
pub(super) struct Arrivals {
    /// From threads and sockets of requests.
    pub(super) threads: mpsc::UnboundedReceiver<LoopEvent>,
    /// From the gossip transport.
    pub(super) network: mpsc::Receiver<Event>,
    /// From the sockets of the path probe.
    pub(super) icmp: mpsc::Receiver<IcmpEvent>,
}

impl Arrivals {
    /// Waits for the next input.
    pub(super) async fn next(&mut self) -> Arrival {
        tokio::select! {
            Some(event) = self.threads.recv() => Arrival::LoopEvent(event),
            Some(event) = self.network.recv() => Arrival::Network(event),
            Some(event) = self.icmp.recv() => Arrival::Icmp(event),
            // Unreachable while the agent runs: it holds a sender of `threads`.
            else => std::future::pending().await,
        }
    }

    /// Makes later requests fail at once, because the agent ends and answers none of them.
    pub(super) fn refuse_requests(&mut self) {
        self.threads.close();
        while self.threads.try_recv().is_ok() {}
    }

    /// Takes at most one waiting input of each source.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Arrival> + use<> {
        let arrivals = [
            self.threads.try_recv().ok().map(Arrival::LoopEvent),
            self.network.try_recv().ok().map(Arrival::Network),
            self.icmp.try_recv().ok().map(Arrival::Icmp),
        ];
        arrivals.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;
    use crate::{
        model::{CallError, CallId},
        transport::Call,
    };

    #[test]
    fn request_to_an_ending_agent_fails_at_once() {
        let (to_threads, threads) = mpsc::unbounded_channel();
        let ((_to_network, network), (_to_icmp, icmp)) = (mpsc::channel(1), mpsc::channel(1));
        let mut arrivals = Arrivals { threads, network, icmp };
        let (reply, mut waiting) = tokio::sync::oneshot::channel();
        let status = LoopEvent::Api(AgentRequest::Status { reply });
        assert!(to_threads.send(status).is_ok());
        arrivals.refuse_requests();
        assert!(waiting.try_recv().is_err_and(|error| error == TryRecvError::Closed));
        let (reply, _) = tokio::sync::oneshot::channel();
        assert!(to_threads.send(LoopEvent::Api(AgentRequest::Alive { reply })).is_err());
    }

    #[test]
    fn take_all_sources_busy_returns_one_input_of_each() {
        let (to_threads, threads) = mpsc::unbounded_channel();
        let (to_network, network) = mpsc::channel(100);
        let (_to_icmp, icmp) = mpsc::channel(1);
        for number in 0..100 {
            let _ = to_threads.send(LoopEvent::Disk(WriteEvent::Saved(number)));
            let call = Call::Node(CallId(number));
            let _ = to_network.try_send(Event::Answer { call, result: Err(CallError::Myself) });
        }
        let mut arrivals = Arrivals { threads, network, icmp };
        for _ in 0..100 {
            let taken: Vec<_> = arrivals.take().collect();
            assert!(matches!(taken[..], [Arrival::LoopEvent(_), Arrival::Network(_)]));
        }
        assert_eq!(arrivals.take().count(), 0);
    }
}
