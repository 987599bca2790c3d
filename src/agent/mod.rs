//! The shell: one loop that feeds the core and carries out what it asks for.
//!
//! Events (network, disk, kernel, operator, clock, signals) come in one at a time, become inputs of the
//! core, and its outputs are executed. The loop owns everything; there is no lock. Decisions are the
//! core's: here is only IO. SIGTERM ends the agent and leaves the kernel's state in place.

mod answers;
mod archive;
mod arrivals;
mod auditor;
mod bridge;
mod clock;
mod company;
mod connections;
mod data_plane;
mod disk;
mod docker;
mod doors;
mod ending;
mod events;
mod far;
mod forwarder;
mod fragments;
mod hooks;
mod host_view;
mod inquest;
mod knock;
mod kubernetes;
mod legacy;
mod limits;
mod neighbor_tables;
mod opponents;
mod overruns;
mod owners;
mod packet_filter;
mod path_words;
mod ping;
mod pod_address;
mod pods;
mod probe;
mod programmer;
mod raw_tcp;
mod recall;
mod receive_buffer;
mod recent;
mod reload;
mod reports;
mod routes;
mod secrets;
mod service;
mod signals;
mod start;
mod status;
mod subnet_env;
mod surroundings;
mod survey;
mod tap;
mod threads;
mod told;
mod underlay;
mod vanished;
mod waiting;
mod wirer;

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use self::{
    answers::Asking,
    archive::{Archive, Kept},
    arrivals::{Arrival, Arrivals, News},
    clock::Clock,
    company::Company,
    data_plane::KernelState,
    doors::{Closed, Doors},
    events::Journal,
    far::Far,
    forwarder::Forwarder,
    inquest::Inquest,
    kubernetes::Source,
    ping::Round,
    pods::PodState,
    probe::Prober,
    programmer::Programmer,
    receive_buffer::Unread,
    secrets::Steps,
    service::Service,
    signals::Signals,
    status::Waiter,
    survey::Surveys,
    underlay::Chosen,
    wirer::Wirer,
};
use crate::{
    api::Question,
    config::Config,
    core::{Command, Gate, Input, Node, Output, Target},
    store::{StateDir, Writer, Written},
    transport::{Event, Transport},
    wire::{Keyring, Token},
};

pub use ending::Ending;
pub use knock::{is_own, knock, own_sentence};
pub use limits::LACKS_IPV6;
pub use reload::Reread;
pub use signals::guard;
pub use start::{StartFailure, random, run};
pub use underlay::choose as choose_underlay;

/// A turn of the loop that takes longer is logged: everything else waits for it.
const SLOW_TURN: Duration = Duration::from_millis(100);
/// How long the end waits for answers to Docker.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// Events taken in one turn before the outputs are carried out.
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
    far: Far,
    asking: Asking,
    inquest: Inquest,
    kernel: KernelState,
    prober: Prober,
    company: Company,
    unread: Unread,
    pods: PodState,
    wirer: Wirer,
    underlay: Chosen,
    config: Config,
    state: Arc<StateDir>,
    /// Of the settings alone.
    given_seeds: Vec<String>,
    /// The token as it was last saved.
    saved_token: Option<Token>,
    archive: Archive,
    keyring: Keyring,
    /// Steps with secrets that are not on disk yet.
    steps: Steps,
    /// Whether this process created the state, so that a refusal may remove it.
    fresh: bool,
    /// Who waits for convergence, and for how many members.
    waiters: Vec<Waiter>,
    /// Pings that wait for answers.
    rounds: Vec<Round>,
    leave_reply: Option<oneshot::Sender<Result<Option<String>, String>>>,
    store_failure: Option<String>,
    service: Service,
    journal: Journal,
    /// Where no questions come in that should.
    closed: Closed,
    surveys: Surveys,
    /// Where the subnet of this node is said, if that is outside the cluster.
    source: Option<Source>,
    /// Set when the kernel refuses the device of a node that has only just come.
    giving_up: Option<(String, Instant)>,
    /// Where threads that are started later tell what they find.
    news: threads::Sender,
    ended: threads::Ended,
    ending: Option<Ending>,
}

impl Agent {
    async fn run(
        mut self,
        mut signals: Signals,
        mut arrivals: Arrivals,
        reread: &Reread,
        doors: &Doors,
    ) -> Ending {
        self.carry_out();
        self.catch_up();
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
            self.on_arrival(first, turn, reread);
            for _ in 0..EVENTS_PER_TURN {
                let mut more = arrivals.take().peekable();
                if more.peek().is_none() {
                    break;
                }
                more.for_each(|arrival| self.on_arrival(arrival, turn, reread));
            }
            self.carry_out();
            self.restore_paths();
            self.serve_waiters();
            self.answer_early();
            self.end_waiting_for_disk();
            self.end_rounds();
            self.end_surveys(turn);
            self.report_to_service(turn);
            self.watch(turn);
            let took = turn.elapsed();
            if took > SLOW_TURN {
                tracing::warn!(?took, "a turn of the event loop was slow");
            }
        }
        if self.ending == Some(Ending::Stopped) {
            self.answer_docker_to_the_end(&mut arrivals, reread, doors).await;
        }
        self.finish().await
    }

    /// Answers what Docker has asked before the end: what is lost it repeats without the request's body.
    async fn answer_docker_to_the_end(
        &mut self,
        arrivals: &mut Arrivals,
        reread: &Reread,
        doors: &Doors,
    ) {
        let mut answered = pin!(doors.close_plugin());
        let mut deadline = pin!(tokio::time::sleep(LAST_ANSWERS));
        loop {
            let arrival = tokio::select! {
                biased;
                () = &mut answered => return,
                () = &mut deadline => return,
                arrival = arrivals.next() => arrival,
            };
            self.on_arrival(arrival, Instant::now(), reread);
            self.carry_out();
            self.answer_early();
        }
    }

    fn on_arrival(&mut self, arrival: Arrival, now: Instant, reread: &Reread) {
        match arrival {
            Arrival::Deadline => self.on_deadline(now),
            Arrival::Hangup => self.reload(reread),
            Arrival::News(news) => self.on_news(news),
            Arrival::Network(event) => self.on_network(event),
            Arrival::Heard(heard) => self.on_heard(heard),
        }
    }

    fn next_deadline(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        let core = self.node.poll_timeout().map(|at| self.clock.instant(at));
        let waiters = self.waiters.iter().map(|waiter| waiter.deadline);
        let rounds = self.rounds.iter().map(Round::deadline);
        let giving_up = self.giving_up.as_ref().map(|(_, until)| *until);
        core.into_iter()
            .chain(self.next_probe())
            .chain(self.service.next())
            .chain([self.journal.next()])
            .chain(self.surveys.deadline())
            .chain(waiters)
            .chain(rounds)
            .chain(giving_up)
            .chain(self.pods.catch_up_at)
            .chain(self.end_of_waiting_for_disk())
            .chain(self.source.iter().filter_map(Source::next))
            .fold(far, Instant::min)
    }

    fn on_deadline(&mut self, now: Instant) {
        if self.node.poll_timeout().is_some_and(|at| self.clock.instant(at) <= now) {
            self.input(Input::Timeout);
        }
        if self.next_probe().is_some_and(|at| at <= now) {
            self.probe();
            self.update_forwarder();
            self.update_far();
            self.look_for_pods();
            self.update_inquest();
        }
        self.ask_about_node(now);
        if self.pods.catch_up_at.is_some_and(|at| at <= now) {
            self.catch_up();
        }
        if let Some((why, _)) = self.giving_up.take_if(|(_, until)| *until <= now) {
            self.ending = Some(Ending::Failed(why));
        }
    }

    fn on_network(&mut self, event: Event) {
        if let Some(input) = self.transport.handle(event) {
            self.input(input);
        }
    }

    fn on_news(&mut self, news: News) {
        match news {
            News::Disk(Written::Durable(seq)) => {
                // Not before: a token that names a cluster says that the database knew it.
                self.save_token();
                for output in self.gate.open(seq) {
                    self.execute(output);
                }
            }
            News::Disk(Written::Failing(why)) => {
                tracing::error!(%why, "cannot write to the state directory: nothing new is granted");
                self.store_failure = Some(why);
            }
            News::Disk(Written::Recovered) => {
                tracing::info!("the state directory can be written again");
                self.store_failure = None;
            }
            News::Disk(Written::Emptied) => {
                tracing::error!("the database was lost and is written anew");
                self.input(Input::Command(Command::SaveAll));
                self.save_pods();
            }
            News::Disk(Written::Saved(number)) => self.on_saved(number),
            News::Kernel(told) => self.on_told(told),
            News::Forwarding(news) => self.on_forwarding(news),
            News::Far(told) => self.on_far(told),
            News::Answers(state) => self.on_answers(state),
            News::Found(found) => self.on_found(found),
            News::Pods(wired) => self.on_wired(wired),
            News::Api(request) => self.on_api(request),
            News::Docker(request) => self.on_docker(request),
            // Who waits for convergence is served at the end of the turn.
            News::Kept(Kept::Subnet) => {}
            News::Kept(Kept::Secrets(result)) => self.on_secrets_kept(result),
            News::Node(heard) => self.on_heard_of_node(heard),
        }
    }

    fn input(&mut self, input: Input) {
        self.node.handle(self.clock.now(), input);
    }

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
                self.transport.call(call, node, address, bytes);
            }
            Output::Call { call, to: Target::Seed(seed), bytes, .. } => {
                let name = self.config.seeds.get(seed).cloned().unwrap_or_default();
                self.transport.call_name(call, name, bytes);
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
                if self.has_made_something() {
                    self.program();
                } else {
                    self.input(Input::InUse(None));
                }
            }
            Output::Owned(changes) => self.note_owners(&changes),
            Output::CannotLeave(why) => {
                if let Some(reply) = self.leave_reply.take() {
                    let _ = reply.send(Err(why));
                }
            }
            Output::Answered { node, answered } => self.on_answered(node, answered),
            Output::Inquired { reply, from, inquiry } => self.on_inquired(reply, from, inquiry),
            Output::Reported { node, number, report } => self.on_reported(node, number, report),
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
                let _ = reply.send(Err("it is leaving already".to_owned()));
            }
            Question::Leave { reply } => {
                self.leave_reply = Some(reply);
                self.input(Input::Command(Command::Leave));
            }
            Question::Forget { node, force, reply } => {
                let forgotten = self.node.forget(self.clock.now(), &node, force);
                let _ = reply.send(match forgotten {
                    Ok(id) => Ok(self.forget_progress(id)),
                    Err(why) => Err(why.to_string()),
                });
            }
            Question::ResetIdentity { reply } => {
                let _ = reply.send(Ok(()));
                self.ending = Some(Ending::Anew);
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
