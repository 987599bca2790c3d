//! What comes in to the loop, and from where.

use tokio::sync::mpsc;

use super::{
    answers::Answers, archive::Kept, attach_worker::AttachResult, forwarder::ForwarderEvent,
    inquest::Found, kernel_event::KernelEvent, kubernetes::NodeReport, remote_pods,
};
use crate::{
    api::Question, docker as docker_plugin, icmp::IcmpEvent, store::WriteEvent, transport::Event,
};

/// What a turn of the loop begins with.
pub(super) enum Arrival {
    Deadline,
    /// The settings are to be read again.
    Hangup,
    LoopEvent(LoopEvent),
    Network(Event),
    Icmp(IcmpEvent),
}

/// What comes in from threads and from the control socket.
pub(super) enum LoopEvent {
    Disk(WriteEvent),
    Kernel(KernelEvent),
    Forwarding(ForwarderEvent),
    RemotePods(remote_pods::RemotePodsEvent),
    Answers(Answers),
    Found(Found),
    Pods(AttachResult),
    Api(Question),
    Docker(docker_plugin::Request),
    Node(NodeReport),
    Kept(Kept),
}

/// Everything that comes in but signals and the clock. Each source has its turn, however busy the others are.
pub(super) struct Arrivals {
    pub(super) threads: mpsc::UnboundedReceiver<LoopEvent>,
    pub(super) network: mpsc::Receiver<Event>,
    pub(super) heard: mpsc::Receiver<IcmpEvent>,
}

impl Arrivals {
    /// Waits for the next one.
    pub(super) async fn next(&mut self) -> Arrival {
        tokio::select! {
            Some(news) = self.threads.recv() => Arrival::LoopEvent(news),
            Some(event) = self.network.recv() => Arrival::Network(event),
            Some(heard) = self.heard.recv() => Arrival::Icmp(heard),
            // The agent holds a sender of the first.
            else => std::future::pending().await,
        }
    }

    /// Takes one of each source, as far as there is one now.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Arrival> + use<> {
        let arrivals = [
            self.threads.try_recv().ok().map(Arrival::LoopEvent),
            self.network.try_recv().ok().map(Arrival::Network),
            self.heard.try_recv().ok().map(Arrival::Icmp),
        ];
        arrivals.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{CallError, CallId};

    #[test]
    fn every_source_has_its_turn_however_busy_the_others_are() {
        let (to_threads, threads) = mpsc::unbounded_channel();
        let (to_network, network) = mpsc::channel(100);
        let (_to_heard, heard) = mpsc::channel(1);
        for number in 0..100 {
            let _ = to_threads.send(LoopEvent::Disk(WriteEvent::Saved(number)));
            let call = CallId(number);
            let _ = to_network.try_send(Event::Answer { call, result: Err(CallError::Myself) });
        }
        let mut arrivals = Arrivals { threads, network, heard };
        for _ in 0..100 {
            let taken: Vec<_> = arrivals.take().collect();
            assert!(matches!(taken[..], [Arrival::LoopEvent(_), Arrival::Network(_)]));
        }
        assert_eq!(arrivals.take().count(), 0);
    }
}
