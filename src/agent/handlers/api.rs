//! Requests at the control socket and the `http` listener.

use std::time::{Duration, Instant};

use crate::{
    agent::{Agent, Ending, operator::status::Waiter},
    api::AgentRequest,
    core::{Command, Input},
};

impl Agent {
    /// Answers a request, or stores it until it can be answered.
    pub(in crate::agent) fn on_request(&mut self, request: AgentRequest) {
        // A client that has changed something sees that in its next status.
        if !request.is_of_reader() {
            self.requests.recent_status = None;
        }
        match request {
            AgentRequest::Status { reply } => _ = reply.send(self.recent_status()),
            AgentRequest::Alive { reply } => _ = reply.send(()),
            AgentRequest::Wait { seconds, members, reply } => {
                let deadline = Instant::now() + Duration::from_secs(seconds);
                self.input(Input::Command(Command::Sync));
                self.add_waiter(Waiter { members, deadline, reply });
            }
            AgentRequest::Token { reply } => {
                let mut address = self.node.address();
                // Until the host has that address, members know it by an earlier one.
                if let Some(bound) = self.config.bound_peer_address() {
                    address.set_ip(bound);
                }
                let seeds = vec![address.to_string()];
                let _ = reply.send(self.token(seeds).map(|token| token.to_string()));
            }
            AgentRequest::Leave { reply } if self.requests.leave_reply.is_some() => {
                let _ = reply.send(Err("this node is already leaving".to_owned().into()));
            }
            AgentRequest::Leave { reply } => {
                self.requests.leave_reply = Some(reply);
                self.input(Input::Command(Command::Leave));
            }
            AgentRequest::Forget { node, force, reply } => {
                self.report_running_hosts();
                let forgotten = self.node.forget(self.clock.now(), &node, force);
                let _ = reply.send(match forgotten {
                    Ok(id) => Ok(self.forget_progress(id)),
                    Err(why) => Err(why.to_string().into()),
                });
            }
            AgentRequest::ResetIdentity { reply } => {
                let _ = reply.send(Ok(()));
                self.lifetime.ending = Some(Ending::Restart);
            }
            AgentRequest::Ping { node, reply } => self.begin_ping(&node, reply),
            AgentRequest::Attach { request, netns, reply } => self.attach(request, netns, reply),
            AgentRequest::Detach { request, netns, reply } => self.detach(&request, netns, reply),
            AgentRequest::Check { request, netns, reply } => self.check_pod(&request, netns, reply),
            AgentRequest::Pods { reply } => self.list_pods(reply),
            AgentRequest::Release { reply } => self.release_vanished(reply),
            AgentRequest::PastEvents { reply } => _ = reply.send(self.journal.past()),
            AgentRequest::Events { reply } => _ = reply.send(self.journal.feed()),
            AgentRequest::Samples { reply } => _ = reply.send(self.journal.samples()),
            AgentRequest::Matrix { reply } => self.show_matrix(reply),
            AgentRequest::Routes { reply } => self.show_routes(reply),
            AgentRequest::Secret { step, force, reply } => self.change_secret(step, force, reply),
            AgentRequest::Peer { node, reply } => self.show_peer(&node, reply),
            AgentRequest::History { reply } => self.storage.archive.read(reply),
        }
    }
}
