//! The agent: one loop that passes events to the core and carries out its outputs.
//!
//! Events (network, disk, kernel, operator, clock, signals) are processed one at a time and become
//! inputs of the core. The loop owns all state; there are no locks. The core decides; this module does
//! the IO. SIGTERM ends the agent and leaves the kernel's state in place.

mod arrivals;
mod clock;
mod diagnosis;
mod handlers;
mod host;
mod kubernetes;
mod listeners;
mod operator;
mod pods;
mod reload;
mod service;
mod shutdown;
mod signals;
mod start;
mod threads;
mod workers;

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use self::{
    arrivals::{Arrival, Arrivals, LoopEvent},
    clock::Clock,
    diagnosis::{
        forwarder::Forwarder, isolation::Isolation, pod_answers::PodAnswerCheck,
        remote_pods::RemotePods, silence::SilenceDiagnosis,
    },
    handlers::{kernel::KernelState, probe::Prober},
    host::receive_buffer::ReceiveDrops,
    kubernetes::PodCidrSource,
    listeners::{ListenerProblems, Listeners},
    operator::{events::Journal, ping::PingRound, secrets::Steps, status::Waiter, survey::Surveys},
    pods::PodState,
    service::Service,
    signals::Signals,
    workers::{
        archive::{Archive, ArchiveEvent},
        attach_worker::AttachWorker,
        programmer::Programmer,
    },
};
use crate::{
    api::{ApiError, Question},
    config::Config,
    core::{Command, Gate, Input, Node, Output, Target},
    rpc::{self, Inquiries},
    store::{StateDir, WriteEvent, Writer},
    transport::{Call, Event, Received, Transport},
    underlay::ChosenUnderlay,
    wire::{Keyring, Token},
};

pub use reload::SettingsReader;
pub use shutdown::Ending;
pub use signals::guard;
pub use start::{StartFailure, run};

/// A longer turn of the loop is logged, because everything else waits for it.
const SLOW_TURN: Duration = Duration::from_millis(100);
/// Time that the end waits for answers to Docker.
const DOCKER_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum number of rounds of events in one turn, before the outputs are carried out.
const EVENTS_PER_TURN: usize = 64;

/// The agent between start and end.
struct Agent {
    node: Node,
    clock: Clock,
    transport: Transport,
    writer: Writer,
    gate: Gate,
    programmer: Programmer,
    forwarder: Forwarder,
    remote_pods: RemotePods,
    answer_check: PodAnswerCheck,
    silence_diagnosis: SilenceDiagnosis,
    kernel: KernelState,
    prober: Prober,
    isolation: Isolation,
    receive_drops: ReceiveDrops,
    pods: PodState,
    attach_worker: AttachWorker,
    underlay: ChosenUnderlay,
    config: Config,
    state: Arc<StateDir>,
    /// Seeds of the configuration only.
    configured_seeds: Vec<String>,
    /// The last saved token.
    saved_token: Option<Token>,
    archive: Archive,
    keyring: Keyring,
    /// Changes of the keyring that are not on disk yet.
    steps: Steps,
    /// Whether this process created the state, so that a refusal may remove it.
    fresh: bool,
    /// Requests that wait for convergence with a number of members.
    waiters: Vec<Waiter>,
    /// Pings that wait for answers.
    ping_rounds: Vec<PingRound>,
    /// The operator's request to leave, until it is answered.
    leave_reply: Option<oneshot::Sender<Result<Option<String>, ApiError>>>,
    /// Why the disk cannot be written.
    store_failure: Option<String>,
    service: Service,
    journal: Journal,
    /// Control sockets that could not be opened.
    listener_problems: ListenerProblems,
    inquiries: Inquiries<operator::inquiries::Purpose>,
    surveys: Surveys,
    /// Where the subnet of this node comes from, if it is assigned from outside the cluster.
    source: Option<PodCidrSource>,
    /// Set when the kernel refuses the device of a new node: the reason, and when the agent ends.
    giving_up: Option<(String, Instant)>,
    /// Sends events of threads that are started later.
    news: threads::Sender,
    /// Monitoring threads that have ended.
    ended: threads::Ended,
    /// How the agent ends; set once it is to end.
    ending: Option<Ending>,
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
        while self.ending.is_none() {
            let wake = tokio::time::Instant::from_std(self.next_deadline());
            let first = tokio::select! {
                biased;
                _ = signals.terminate.recv() => { self.ending = Some(Ending::Stopped); continue }
                _ = signals.interrupt.recv() => { self.ending = Some(Ending::Stopped); continue }
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
        if self.ending == Some(Ending::Stopped) {
            self.answer_docker_to_the_end(&mut arrivals, read_settings, listeners).await;
        }
        self.finish().await
    }

    /// Answers Docker's requests before the end: Docker repeats a lost request without its body.
    async fn answer_docker_to_the_end(
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

    /// Passes an event to its handler.
    fn on_arrival(&mut self, arrival: Arrival, now: Instant, read_settings: &SettingsReader) {
        match arrival {
            Arrival::Deadline => self.on_deadline(now),
            Arrival::Hangup => self.reload(read_settings),
            Arrival::LoopEvent(news) => self.on_loop_event(news),
            Arrival::Network(event) => self.on_network(event),
            Arrival::Icmp(heard) => self.on_icmp_event(heard),
        }
    }

    /// Returns when the loop must run again without an event.
    fn next_deadline(&self) -> Instant {
        let latest = Instant::now() + Duration::from_secs(3600);
        let core = self.node.poll_timeout().map(|at| self.clock.instant(at));
        let waiters = self.waiters.iter().map(|waiter| waiter.deadline);
        let ping_rounds = self.ping_rounds.iter().map(PingRound::deadline);
        let giving_up = self.giving_up.as_ref().map(|(_, until)| *until);
        core.into_iter()
            .chain(self.next_probe())
            .chain(self.service.next())
            .chain([self.journal.next()])
            .chain(self.surveys.deadline())
            .chain(waiters)
            .chain(ping_rounds)
            .chain(giving_up)
            .chain(self.pods.next_notes_check)
            .chain(self.disk_stall_deadline())
            .chain(self.source.iter().filter_map(PodCidrSource::next))
            .fold(latest, Instant::min)
    }

    /// Handles the passing of deadlines.
    fn on_deadline(&mut self, now: Instant) {
        if self.node.poll_timeout().is_some_and(|at| self.clock.instant(at) <= now) {
            self.input(Input::Timeout);
        }
        if self.next_probe().is_some_and(|at| at <= now) {
            self.probe();
            self.update_forwarder();
            self.update_remote_pods();
            self.refresh_roster();
            self.update_silence_diagnosis();
        }
        self.poll_pod_cidrs(now);
        if self.pods.next_notes_check.is_some_and(|at| at <= now) {
            self.apply_notes();
        }
        if let Some((why, _)) = self.giving_up.take_if(|(_, until)| *until <= now) {
            self.ending = Some(Ending::Failed(why));
        }
    }

    fn on_network(&mut self, event: Event) {
        match self.transport.handle(event) {
            Some(Received::Message { from, bytes }) => self.input(Input::Message { from, bytes }),
            Some(Received::Request { from, reply, bytes }) if rpc::is_inquiry(&bytes) => {
                self.on_inquiry_frame(from, reply, &bytes);
            }
            Some(Received::Request { from, reply, bytes }) => {
                self.input(Input::Request { from, reply, bytes });
            }
            Some(Received::Answer { call: Call::Node(call), result }) => {
                self.input(Input::Answer { call, result });
            }
            Some(Received::Answer { call: Call::Inquiry(id), result }) => {
                self.on_inquiry_end(id, result);
            }
            None => {}
        }
    }

    fn on_loop_event(&mut self, news: LoopEvent) {
        match news {
            LoopEvent::Disk(WriteEvent::Durable(seq)) => {
                // Not earlier: a token that names a cluster implies that the database contains it.
                self.save_token();
                for output in self.gate.open(seq) {
                    self.execute(output);
                }
            }
            LoopEvent::Disk(WriteEvent::Failing(why)) => {
                tracing::error!(%why, "state directory not writable, nothing new is granted");
                self.store_failure = Some(why);
            }
            LoopEvent::Disk(WriteEvent::Recovered) => {
                tracing::info!("state directory writable again");
                self.store_failure = None;
            }
            LoopEvent::Disk(WriteEvent::Emptied) => {
                tracing::error!("database lost, rewriting it");
                self.input(Input::Command(Command::SaveAll));
                self.save_pods();
            }
            LoopEvent::Disk(WriteEvent::Saved(number)) => self.on_saved(number),
            LoopEvent::Kernel(told) => self.on_kernel_event(told),
            LoopEvent::Forwarding(news) => self.on_forwarding(news),
            LoopEvent::RemotePods(told) => self.on_remote_pods(told),
            LoopEvent::PodAnswers(state) => self.on_answers(state),
            LoopEvent::SilenceFindings(findings) => self.on_silence_findings(findings),
            LoopEvent::Pods(wired) => self.on_attach_result(wired),
            LoopEvent::Api(request) => self.on_api(request),
            LoopEvent::Docker(request) => self.on_docker(request),
            // Requests that wait for convergence are answered at the end of the turn.
            LoopEvent::Archive(ArchiveEvent::SubnetFile) => {}
            LoopEvent::Archive(ArchiveEvent::Secrets(result)) => self.on_secrets_saved(result),
            LoopEvent::Node(heard) => self.on_node_report(heard),
        }
    }

    fn input(&mut self, input: Input) {
        self.node.handle(self.clock.now(), input);
    }

    /// Carries out the core's outputs. The gate holds those that depend on an unfinished write.
    fn carry_out(&mut self) {
        while let Some(output) = self.node.poll_output() {
            if let Some(output) = self.gate.pass(output) {
                self.execute(output);
            }
        }
        self.gate.take_shed().into_iter().for_each(|reply| self.transport.give_up(reply));
    }

    fn execute(&mut self, output: Output) {
        match output {
            Output::Send { to, address, bytes, .. } => self.transport.send(to, address, bytes),
            Output::Call { call, to: Target::Member { node, address }, bytes, .. } => {
                self.transport.call(Call::Node(call), node, address, bytes);
            }
            Output::Call { call, to: Target::Seed(seed), bytes, .. } => {
                let name = self.config.seeds.get(seed).cloned().unwrap_or_default();
                self.transport.call_name(Call::Node(call), name, bytes);
            }
            Output::Reply { reply, bytes, .. } => self.transport.reply(reply, bytes),
            Output::Write { records, seq } => {
                self.writer.write(records, seq);
            }
            Output::Program { view, .. } => {
                self.transport.learn_overlay(view.settings.pool.networks().iter().collect());
                self.kernel.wanted = Some(view);
                self.kernel.withdrawn = false;
                self.program();
            }
            Output::Withdraw => {
                self.kernel.wanted = None;
                self.kernel.withdrawn = true;
                if self.may_have_kernel_state() {
                    self.program();
                } else {
                    self.input(Input::KernelSubnet(None));
                }
            }
            Output::SlotsChanged(changes) => self.record_owner_changes(&changes),
            Output::CannotLeave(why) => {
                if let Some(reply) = self.leave_reply.take() {
                    let _ = reply.send(Err(why.into()));
                }
            }
            Output::Stop(stop) => self.on_stop(stop),
        }
    }

    fn on_api(&mut self, question: Question) {
        match question {
            Question::Status { reply } => _ = reply.send(self.status()),
            Question::Alive { reply } => _ = reply.send(()),
            Question::Wait { seconds, members, reply } => {
                let deadline = Instant::now() + Duration::from_secs(seconds);
                self.input(Input::Command(Command::Sync));
                self.add_waiter(Waiter { members, deadline, reply });
            }
            Question::Token { reply } => {
                let seeds = vec![self.node.address().to_string()];
                let _ = reply.send(self.token(seeds).map(|token| token.to_string()));
            }
            Question::Leave { reply } if self.leave_reply.is_some() => {
                let _ = reply.send(Err("this node is already leaving".to_owned().into()));
            }
            Question::Leave { reply } => {
                self.leave_reply = Some(reply);
                self.input(Input::Command(Command::Leave));
            }
            Question::Forget { node, force, reply } => {
                let forgotten = self.node.forget(self.clock.now(), &node, force);
                let _ = reply.send(match forgotten {
                    Ok(id) => Ok(self.forget_progress(id)),
                    Err(why) => Err(why.to_string().into()),
                });
            }
            Question::ResetIdentity { reply } => {
                let _ = reply.send(Ok(()));
                self.ending = Some(Ending::Restart);
            }
            Question::Ping { node, reply } => self.begin_ping(&node, reply),
            Question::Attach { request, netns, reply } => self.attach(request, netns, reply),
            Question::Detach { request, netns, reply } => self.detach(&request, netns, reply),
            Question::Check { request, netns, reply } => self.check_pod(&request, netns, reply),
            Question::Pods { reply } => self.list_pods(reply),
            Question::Release { reply } => self.release_vanished(reply),
            Question::PastEvents { reply } => _ = reply.send(self.journal.past()),
            Question::Events { reply } => _ = reply.send(self.journal.feed()),
            Question::Samples { reply } => _ = reply.send(self.journal.samples()),
            Question::Matrix { reply } => self.show_matrix(reply),
            Question::Routes { reply } => self.show_routes(reply),
            Question::Secret { step, force, reply } => self.change_secret(step, force, reply),
            Question::Peer { node, reply } => self.show_peer(&node, reply),
            Question::History { reply } => self.archive.read(reply),
        }
    }
}
