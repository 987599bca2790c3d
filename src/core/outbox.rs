//! What leaves a node: its outputs in order, the records that changed since they were last written, and the
//! calls that have no answer yet.
//!
//! This is the only place that queues an output, and so the only one that decides which write an output waits
//! for, when changed records are written, and whether the kernel's view is outdated.
//!
//! Records of this node's own slots must be durable before any peer receives them. Records from peers can be
//! fetched again, so they are collected for up to a second to save flash wear, and no message waits for them.
//! Both kinds are flushed, because what members know of each other's grants must survive a power cut. Without
//! changes nothing is written.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use crate::{
    model::{CallId, NodeId, ReplyId, Time, View, WriteSeq},
    wire::{Key, Record},
};

use super::{Delivery, Output, Purpose, Stop, Target, slots::Change};

/// How long records from peers may wait to be written.
const MAX_WRITE_DELAY: Duration = Duration::from_secs(1);

/// The outputs of a node, and what they depend on.
pub(super) struct Outbox {
    outputs: VecDeque<Output>,
    dirty: Dirty,
    /// Number of the last write, and of the last one that messages to peers have to wait for.
    last_write: WriteSeq,
    last_urgent_write: WriteSeq,
    /// The write that saves the present start. No packet leaves before it is durable, so no incarnation that
    /// a peer has seen is used twice.
    identity_write: WriteSeq,
    /// The write that saves the last change of this node's own slots.
    lease_write: WriteSeq,
    last_call: u64,
    /// Calls without an answer, with the purpose that decides how the answer is handled.
    open_calls: BTreeMap<CallId, Purpose>,
    /// Whether something that the view depends on has changed since it was computed.
    view_stale: bool,
    /// The earliest time of the next view.
    next_view: Time,
    kernel_request: KernelRequest,
}

/// Records that changed since they were last written.
#[derive(Default)]
struct Dirty {
    keys: BTreeSet<Key>,
    /// Whether messages depend on one of them, so that it is written at once.
    is_urgent: bool,
    /// When the rest is written at the latest.
    lazy_at: Option<Time>,
}

/// The last output for the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
enum KernelRequest {
    Nothing,
    Overlay(View),
    Withdraw,
}

impl Outbox {
    /// Creates an outbox whose first output is the write of the number of this start.
    pub(super) fn new(starts: u32) -> Self {
        let first_write = 1;
        let records = vec![(Key::Starts, Record::Starts(starts).encode())];
        Self {
            outputs: VecDeque::from([Output::Write { records, seq: first_write }]),
            dirty: Dirty::default(),
            last_write: first_write,
            last_urgent_write: first_write,
            identity_write: first_write,
            lease_write: 0,
            last_call: 0,
            open_calls: BTreeMap::new(),
            view_stale: true,
            next_view: Time::ZERO,
            kernel_request: KernelRequest::Nothing,
        }
    }

    /// Returns the next output, oldest first.
    pub(super) fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Returns when [`Self::write_changes`] is due at the latest.
    pub(super) fn write_due(&self) -> Option<Time> {
        self.dirty.lazy_at
    }

    /// Marks a record that has changed. No message waits until it is written.
    pub(super) fn mark(&mut self, key: Key) {
        self.dirty.keys.insert(key);
    }

    /// Marks a record that has changed. All messages from now on wait until it is durable.
    pub(super) fn mark_urgent(&mut self, key: Key) {
        self.mark(key);
        self.dirty.is_urgent = true;
    }

    /// Notes that this node's own slots have changed: a new view waits until they are durable.
    pub(super) fn mark_lease(&mut self) {
        self.lease_write = self.last_write + 1;
    }

    /// Marks the number of starts, which has changed: all packets wait until it is durable.
    pub(super) fn mark_identity(&mut self) {
        self.mark_urgent(Key::Starts);
        self.identity_write = self.after();
    }

    /// Makes the collected records due now.
    pub(super) fn hasten_writes(&mut self, now: Time) {
        self.dirty.lazy_at = self.dirty.lazy_at.map(|at| at.min(now));
    }

    /// Writes the changed records in one batch if one is urgent or the oldest has waited long enough.
    /// `encoded` returns the present encoding of a record.
    pub(super) fn write_changes(&mut self, now: Time, encoded: impl Fn(Key) -> Option<Vec<u8>>) {
        if self.dirty.keys.is_empty() {
            return;
        }
        let due = *self.dirty.lazy_at.get_or_insert(now + MAX_WRITE_DELAY);
        if !self.dirty.is_urgent && now < due {
            return;
        }
        let Dirty { keys, is_urgent, .. } = std::mem::take(&mut self.dirty);
        self.last_write += 1;
        let seq = self.last_write;
        if is_urgent {
            self.last_urgent_write = seq;
        }
        let records = keys.into_iter().filter_map(|key| Some((key, encoded(key)?)));
        self.outputs.push_back(Output::Write { records: records.collect(), seq });
    }

    /// Returns the write that messages have to wait for: the one that holds all urgent changes up to now.
    fn after(&self) -> WriteSeq {
        if self.dirty.is_urgent { self.last_write + 1 } else { self.last_urgent_write }
    }

    /// Sends a gossip packet, which waits for this node's identity only.
    pub(super) fn send_packet(&mut self, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        self.outputs.push_back(Output::Send {
            to,
            address,
            bytes,
            delivery: Delivery::Datagram,
            after: self.identity_write,
        });
    }

    /// Sends facts.
    pub(super) fn send_facts(&mut self, to: NodeId, address: SocketAddr, bytes: Vec<u8>) {
        self.outputs.push_back(Output::Send {
            to,
            address,
            bytes,
            delivery: Delivery::Stream,
            after: self.after(),
        });
    }

    /// Sends a request. [`Self::end_call`] returns the purpose when the call has ended.
    pub(super) fn call(&mut self, to: Target, purpose: Purpose, bytes: Vec<u8>) {
        self.last_call += 1;
        let call = CallId(self.last_call);
        self.open_calls.insert(call, purpose);
        self.outputs.push_back(Output::Call { call, to, bytes, after: self.after() });
    }

    /// Returns the purpose of a call that has ended, or `None` if its answer is not wanted any more.
    pub(super) fn end_call(&mut self, call: CallId) -> Option<Purpose> {
        self.open_calls.remove(&call)
    }

    /// Ignores the answers to calls with such a purpose.
    pub(super) fn ignore_answers(&mut self, is_ignored: impl Fn(&Purpose) -> bool) {
        self.open_calls.retain(|_, purpose| !is_ignored(purpose));
    }

    /// Sends the response to a request.
    pub(super) fn reply(&mut self, reply: ReplyId, bytes: Vec<u8>) {
        self.outputs.push_back(Output::Reply { reply, bytes, after: self.after() });
    }

    /// Reports changed slots for the audit log.
    pub(super) fn report_changes(&mut self, changes: Vec<Change>) {
        if !changes.is_empty() {
            self.outputs.push_back(Output::SlotsChanged(changes));
        }
    }

    /// Reports that the node cannot leave.
    pub(super) fn report_cannot_leave(&mut self, why: &str) {
        self.outputs.push_back(Output::CannotLeave(why.to_owned()));
    }

    /// Ends the node.
    pub(super) fn stop(&mut self, why: Stop) {
        self.outputs.push_back(Output::Stop(why));
    }

    /// Notes that something has changed that the view depends on.
    pub(super) fn invalidate_view(&mut self) {
        self.view_stale = true;
    }

    /// Returns when the view has to be computed again, if something has changed.
    pub(super) fn next_view(&self) -> Option<Time> {
        self.view_stale.then_some(self.next_view)
    }

    /// Notes that the view is computed.
    pub(super) fn note_view(&mut self) {
        self.view_stale = false;
    }

    /// Queues a view for the kernel if it differs from the last one. It waits for the write of this node's
    /// own slots, so that the kernel uses them only once they are on disk. The next view waits until `next`.
    pub(super) fn program(&mut self, view: View, next: Time) {
        let request = KernelRequest::Overlay(view.clone());
        if self.kernel_request != request {
            self.kernel_request = request;
            self.next_view = next;
            self.outputs.push_back(Output::Program { view, after: self.lease_write });
        }
    }

    /// Queues the removal of everything from the kernel if a view was programmed, or, with `is_certain`, if
    /// nothing was requested yet.
    pub(super) fn withdraw(&mut self, is_certain: bool) {
        let is_needed = match self.kernel_request {
            KernelRequest::Nothing => is_certain,
            KernelRequest::Overlay(_) => true,
            KernelRequest::Withdraw => false,
        };
        if is_needed {
            self.kernel_request = KernelRequest::Withdraw;
            self.outputs.push_back(Output::Withdraw);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(outbox: &mut Outbox) -> Vec<WriteSeq> {
        let seq = |output| match output {
            Output::Write { seq, .. } => Some(seq),
            _ => None,
        };
        std::iter::from_fn(|| outbox.poll()).filter_map(seq).collect()
    }

    #[test]
    fn urgent_record_is_written_at_once_and_others_within_a_second() {
        let at = |millis| Time::ZERO + Duration::from_millis(millis);
        let mut outbox = Outbox::new(1);
        let encoded = |_| Some(Vec::new());
        assert_eq!(written(&mut outbox), [1]);
        outbox.mark(Key::Slots(1));
        outbox.write_changes(at(0), encoded);
        outbox.write_changes(at(999), encoded);
        assert_eq!((outbox.after(), written(&mut outbox)), (1, vec![]));
        outbox.write_changes(at(1_000), encoded);
        assert_eq!((outbox.after(), written(&mut outbox)), (1, vec![2]), "no message waits for it");
        outbox.mark_urgent(Key::Slots(2));
        assert_eq!(outbox.after(), 3);
        outbox.write_changes(at(1_001), encoded);
        assert_eq!((outbox.after(), written(&mut outbox)), (3, vec![3]));
    }

    #[test]
    fn withdrawal_follows_a_view_once() {
        let mut outbox = Outbox::new(1);
        outbox.poll();
        outbox.withdraw(false);
        assert!(outbox.poll().is_none(), "the kernel holds nothing of this process");
        outbox.withdraw(true);
        outbox.withdraw(true);
        assert!(matches!(outbox.poll(), Some(Output::Withdraw)));
        assert!(outbox.poll().is_none());
    }
}
