//! The core's interface: inputs to a node, and outputs that the agent or the simulator carries out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    model::{CallError, CallId, NodeId, ReplyId, Slot, View, WriteSeq},
    wire::{Key, Refusal},
};

use super::slots::Change;

/// An event for a node. The transport has authenticated every `from`.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame that needs no reply.
    Message {
        /// The sender.
        from: NodeId,
        /// The encoded frame.
        bytes: Vec<u8>,
    },
    /// A frame that needs a reply, as [`Output::Reply`].
    Request {
        /// The sender.
        from: NodeId,
        /// Identifies the reply.
        reply: ReplyId,
        /// The encoded frame.
        bytes: Vec<u8>,
    },
    /// The result of an [`Output::Call`]. The transport ends each call exactly once, within its timeout.
    Answer {
        /// The call that ended.
        call: CallId,
        /// The node that answered and its encoded response, or the failure.
        result: Result<(NodeId, Vec<u8>), CallError>,
    },
    /// The time returned by `Node::poll_timeout` has come.
    Timeout,
    /// The kernel now equals the last [`Output::Program`] or [`Output::Withdraw`]: it uses this subnet, or
    /// none.
    KernelSubnet(Option<IpNet>),
    /// The slots whose kernel entries belong to no known member and stay until the slot's owner is confirmed,
    /// in place of those of the last such input.
    RetainedEntries(BTreeSet<Slot>),
    /// The host's underlay address has changed; the port has not.
    UnderlayChanged {
        /// The new address.
        underlay: IpAddr,
    },
    /// The members that gossip does not hold as active although their hosts run, in place of those of the
    /// last such input.
    RunningHosts(RunningHosts),
    /// A command of the operator or of the agent.
    Command(Command),
}

/// Members whose hosts run: their kernels have just answered probes, after the round trip given, or at least
/// their packets arrive (`None`). Their pods use their subnets, whatever gossip says.
pub type RunningHosts = BTreeMap<NodeId, Option<Duration>>;

/// A command of the operator or of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Hand all slots to a successor and end membership.
    Leave,
    /// Compare states with a peer now instead of at the next round.
    Sync,
    /// The process is about to end: write all changes that were deferred.
    Save,
    /// The disk has lost records: write all of them again.
    SaveAll,
}

/// The recipient of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A member.
    Member {
        /// The member's id; the transport verifies it.
        node: NodeId,
        /// The address of its QUIC endpoint.
        address: SocketAddr,
    },
    /// The seed with this index in the configuration. The transport resolves its name for each call.
    Seed(usize),
}

/// How a frame travels. No frame outlives its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// In a datagram, which may be lost. A frame that is too large takes a stream.
    Datagram,
    /// On a stream: lost packets are sent again.
    Stream,
}

/// An effect for the agent or the simulator to carry out. Outputs with `after: n` must wait until write `n`
/// is durable; otherwise they may be carried out in any order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send a frame to a member.
    Send {
        /// The recipient.
        to: NodeId,
        /// The recipient's address.
        address: SocketAddr,
        /// The encoded frame.
        bytes: Vec<u8>,
        /// How it travels.
        delivery: Delivery,
        /// The write to wait for.
        after: WriteSeq,
    },
    /// Send a request and report its result as [`Input::Answer`].
    Call {
        /// Identifies the call.
        call: CallId,
        /// The recipient.
        to: Target,
        /// The encoded frame.
        bytes: Vec<u8>,
        /// The write to wait for.
        after: WriteSeq,
    },
    /// Reply to an [`Input::Request`].
    Reply {
        /// The `reply` of the request.
        reply: ReplyId,
        /// The encoded frame.
        bytes: Vec<u8>,
        /// The write to wait for.
        after: WriteSeq,
    },
    /// Write and flush these records as one batch, then report `seq` as durable to the [`Gate`].
    ///
    /// [`Gate`]: super::Gate
    Write {
        /// Keys and encoded records.
        records: Vec<(Key, Vec<u8>)>,
        /// The number of this write.
        seq: WriteSeq,
    },
    /// Make the kernel equal to this view; replaces any earlier one.
    Program {
        /// The view.
        view: View,
        /// The write to wait for.
        after: WriteSeq,
    },
    /// Remove everything of gossamer's from the kernel; replaces [`Output::Program`].
    Withdraw,
    /// Slot records have changed, for the audit log.
    SlotsChanged(Vec<Change>),
    /// [`Command::Leave`] is impossible for this reason; the node remains a member.
    CannotLeave(String),
    /// The node has ended for this reason and produces no more work.
    Stop(Stop),
}

/// The reason for which a node stops by its own decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The node left.
    Left {
        /// The member that owns its slots now; `None` if there is no other member, or if the leave was
        /// resumed after a restart.
        successor: Option<NodeId>,
    },
    /// Peers hold this node id as gone. Its host may join again under a new one.
    Expelled {
        /// The member that takes over its slots if it was forgotten; `None` if it had left before its state
        /// directory was restored.
        successor: Option<NodeId>,
    },
    /// A seed refused the node for a reason that a retry does not change.
    Refused(Refusal),
    /// Every seed refused the node's certificate.
    Rejected {
        /// The index of one of the seeds.
        seed: usize,
        /// The transport's error.
        why: String,
    },
}

/// The subnet that the kernel uses. Pods have addresses in it, whatever the slot table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelSubnet {
    /// The kernel's state was not reported since the start.
    Unknown,
    Nothing,
    Subnet(IpNet),
}
