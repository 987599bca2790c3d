//! The agent: one loop that passes events to the core and carries out its outputs.
//!
//! Events (network, disk, kernel, operator, clock, signals) are processed one at a time and become
//! inputs of the core. The loop owns all state; there are no locks. The core decides; this module does
//! the IO. SIGTERM ends the agent and leaves the kernel's state in place.

mod arrivals;
mod clock;
mod counted_line;
mod diagnosis;
mod ending;
mod handlers;
mod host;
mod listeners;
mod operator;
mod pods;
mod reload;
mod service;
mod shutdown;
mod signals;
mod start;
mod storage;
mod threads;
mod workers;

use std::time::{Duration, Instant};

use self::{
    arrivals::{Arrival, Arrivals, LoopEvent},
    clock::Clock,
    diagnosis::gossip::GossipState,
    ending::Lifetime,
    handlers::{kernel::KernelState, kubernetes::Sources, probe::Prober},
    listeners::Listeners,
    operator::{events::Journal, requests::Requests, secrets::KnownSecrets},
    pods::PodState,
    service::Service,
    signals::Signals,
    storage::Storage,
    threads::Threads,
    workers::archive::ArchiveEvent,
};
use crate::{
    config::Config,
    core::{Input, Node},
    kubernetes::PodCidrSource,
    transport::Transport,
    underlay::ChosenUnderlay,
};

pub use ending::{Ending, StartFailure};
pub use reload::SettingsReader;
pub use signals::{EndRequest, guard, survive_file_size_limit};
pub use start::run;

/// A longer turn of the loop is logged, because everything else waits for it.
const SLOW_TURN: Duration = Duration::from_millis(100);
/// Time after which a turn takes no further events: outputs are carried out, and gossip is answered.
const TURN_BUDGET: Duration = Duration::from_millis(50);
/// Maximum number of rounds of events in one turn, before the outputs are carried out.
const EVENTS_PER_TURN: usize = 64;

/// The agent between start and end.
struct Agent {
    /// The core, which decides.
    node: Node,
    clock: Clock,
    config: Config,
    transport: Transport,
    underlay: ChosenUnderlay,
    threads: Threads,
    kernel: KernelState,
    pods: PodState,
    storage: Storage,
    secrets: KnownSecrets,
    /// Probes of the paths to peers.
    prober: Prober,
    gossip: GossipState,
    /// Seeds and subnets from outside the cluster.
    sources: Sources,
    /// Requests of operators.
    requests: Requests,
    /// Events for operators.
    journal: Journal,
    /// Reports to the service manager.
    service: Service,
    lifetime: Lifetime,
}

impl Agent {
    /// Runs the loop until the agent ends.
    async fn run(
        mut self,
        mut signals: Signals,
        mut arrivals: Arrivals,
        read_settings: &SettingsReader,
        listeners: &Listeners,
    ) -> Ending {
        self.carry_out();
        self.apply_notes();
        while self.lifetime.ending.is_none() {
            let wake = tokio::time::Instant::from_std(self.next_deadline());
            let first = tokio::select! {
                biased;
                () = signals.end.wait() => { self.lifetime.ending = Some(Ending::Stopped); continue }
                _ = signals.hangup.recv() => Arrival::Hangup,
                () = tokio::time::sleep_until(wake) => Arrival::Deadline,
                arrival = arrivals.next() => arrival,
            };
            let turn = Instant::now();
            self.on_arrival(first, turn, read_settings);
            for _ in 0..EVENTS_PER_TURN {
                let mut more = arrivals.take().peekable();
                if more.peek().is_none() {
                    break;
                }
                more.for_each(|arrival| self.on_arrival(arrival, turn, read_settings));
                if turn.elapsed() >= TURN_BUDGET {
                    break;
                }
            }
            self.carry_out();
            self.restore_paths();
            self.serve_waiters();
            self.answer_early_docker_requests();
            self.fail_requests_on_disk_stall();
            self.finish_pings();
            self.end_overdue_surveys(turn);
            self.report_to_service(turn);
            self.record_changes(turn);
            let took = turn.elapsed();
            if took > SLOW_TURN {
                tracing::warn!(?took, "slow turn of the event loop");
            }
        }
        if self.lifetime.ending == Some(Ending::Stopped) {
            self.answer_docker_to_the_end(&mut arrivals, read_settings, listeners).await;
        }
        arrivals.refuse_requests();
        self.finish().await
    }

    /// Passes an event to its handler.
    fn on_arrival(&mut self, arrival: Arrival, now: Instant, read_settings: &SettingsReader) {
        match arrival {
            Arrival::Deadline => self.on_deadline(now),
            Arrival::Hangup => self.reload(read_settings),
            Arrival::LoopEvent(event) => self.on_loop_event(event),
            Arrival::Network(event) => self.on_network(event),
            Arrival::Icmp(event) => self.on_icmp_event(event),
        }
    }

    /// Returns when the loop must run again without an event.
    fn next_deadline(&self) -> Instant {
        let latest = Instant::now() + Duration::from_secs(3600);
        let core = self.node.poll_timeout().map(|at| self.clock.instant(at));
        let giving_up = self.lifetime.giving_up.as_ref().map(|(_, until)| *until);
        core.into_iter()
            .chain(self.next_probe())
            .chain(self.service.next())
            .chain([self.journal.next()])
            .chain(self.requests.deadlines())
            .chain(giving_up)
            .chain(self.pods.next_notes_check)
            .chain(self.disk_stall_deadline())
            .chain(self.sources.kubernetes.iter().filter_map(PodCidrSource::next))
            .fold(latest, Instant::min)
    }

    /// Handles the passing of deadlines.
    fn on_deadline(&mut self, now: Instant) {
        if self.node.poll_timeout().is_some_and(|at| self.clock.instant(at) <= now) {
            self.input(Input::Timeout);
        }
        if self.next_probe().is_some_and(|at| at <= now) {
            self.probe();
        }
        self.poll_pod_cidrs(now);
        if self.pods.next_notes_check.is_some_and(|at| at <= now) {
            self.apply_notes();
        }
        if let Some((why, _)) = self.lifetime.giving_up.take_if(|(_, until)| *until <= now) {
            self.lifetime.ending = Some(Ending::Failed(why));
        }
    }

    fn on_loop_event(&mut self, event: LoopEvent) {
        match event {
            LoopEvent::Disk(event) => self.on_write_event(event),
            LoopEvent::Kernel(event) => self.on_kernel_event(event),
            LoopEvent::Forwarding(event) => self.on_forwarding(event),
            LoopEvent::RemotePods(event) => self.on_remote_pods(event),
            LoopEvent::PodAnswers(state) => self.on_answers(state),
            LoopEvent::SilenceFindings(findings) => self.on_silence_findings(findings),
            LoopEvent::Pods(wired) => self.on_attach_result(wired),
            LoopEvent::Api(request) => self.on_request(request),
            LoopEvent::Docker(request) => self.on_docker(request),
            // Requests that wait for convergence are answered at the end of the turn.
            LoopEvent::Archive(ArchiveEvent::SubnetFile) => {}
            LoopEvent::Archive(ArchiveEvent::Secrets(result)) => self.on_secrets_saved(result),
            LoopEvent::Node(event) => self.on_node_report(event),
        }
    }
}
