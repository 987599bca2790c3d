//! Inputs of the core and its outputs, which the agent executes.

use crate::{
    agent::Agent,
    core::{Delivery, Input, Output, Target},
    rpc,
    transport::{Call, Event, Received},
};

impl Agent {
    /// Passes an event of the gossip transport to the core, or to the inquiries.
    pub(in crate::agent) fn on_network(&mut self, event: Event) {
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

    /// Passes an input to the core.
    pub(in crate::agent) fn input(&mut self, input: Input) {
        self.node.handle(self.clock.now(), input);
    }

    /// Carries out the core's outputs. The gate holds those that depend on an unfinished write.
    pub(in crate::agent) fn carry_out(&mut self) {
        while let Some(output) = self.node.poll_output() {
            if let Some(output) = self.storage.gate.pass(output) {
                self.execute(output);
            }
        }
        self.storage.gate.take_shed().into_iter().for_each(|reply| self.transport.give_up(reply));
    }

    /// Executes an output of the core.
    pub(in crate::agent) fn execute(&mut self, output: Output) {
        match output {
            Output::Send { to, address, bytes, delivery: Delivery::Datagram, .. } => {
                self.transport.send(to, address, bytes);
            }
            Output::Send { to, address, bytes, delivery: Delivery::Stream, .. } => {
                self.transport.send_reliably(to, address, bytes);
            }
            Output::Call { call, to: Target::Member { node, address }, bytes, .. } => {
                self.transport.call(Call::Node(call), node, address, bytes);
            }
            Output::Call { call, to: Target::Seed(seed), bytes, .. } => {
                let name = self.config.seeds.get(seed).cloned().unwrap_or_default();
                self.transport.call_name(Call::Node(call), name, bytes);
            }
            Output::Reply { reply, bytes, .. } => self.transport.reply(reply, bytes),
            Output::Write { records, seq } => {
                self.storage.writer.write(records, seq);
            }
            Output::Program { view, .. } => {
                self.transport.learn_overlay(view.settings.pool.networks().iter().collect());
                self.kernel.wanted.view = Some(view);
                self.kernel.wanted.withdrawn = false;
                self.program();
            }
            Output::Withdraw => {
                self.kernel.wanted.view = None;
                self.kernel.wanted.withdrawn = true;
                if self.may_have_kernel_state() {
                    self.program();
                } else {
                    self.input(Input::KernelSubnet(None));
                }
            }
            Output::SlotsChanged(changes) => self.record_owner_changes(&changes),
            Output::CannotLeave(why) => {
                if let Some(reply) = self.requests.leave_reply.take() {
                    let _ = reply.send(Err(why.into()));
                }
            }
            Output::Stop(stop) => self.on_stop(stop),
        }
    }
}
