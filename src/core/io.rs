//! Everything that can happen to a node and everything it can ask for: the core's whole boundary.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::{
    model::NodeId,
    wire::{Inquiry, Key, Refusal, Report},
};

use super::{slots::Change, view::View};

/// Numbers the durable writes of one process. An output that depends on one names it in `after`.
pub type WriteSeq = u64;

/// A question this node asked; it is answered exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// A question a peer asked, as numbered by whoever carries the answer back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplyId(pub u64);

/// What happens to a node. Peers are authenticated: `from` is proven by the transport.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame that wants no answer.
    Message {
        from: NodeId,
        bytes: Vec<u8>,
    },
    /// A frame that wants one; it leaves as [`Output::Reply`].
    Request {
        from: NodeId,
        reply: ReplyId,
        bytes: Vec<u8>,
    },
    /// The end of a call of ours. Whoever carries calls ends each one, in time, once.
    Answer {
        call: CallId,
        result: Result<(NodeId, Vec<u8>), CallError>,
    },
    /// The time asked for by `Node::poll_timeout` has come.
    Timeout,
    /// The kernel is equal now to what was asked for: it uses this subnet, or none.
    InUse(Option<IpNet>),
    /// This host has another underlay address from now on; the port stays.
    Moved {
        underlay: IpAddr,
    },
    Command(Command),
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Hand all slots to a successor and go for good.
    Leave,
    /// Compare states with a peer now rather than at the next round.
    Sync,
    /// The process is about to end: write what has only been gathered so far.
    Save,
    /// The disk has lost what was written: write everything again.
    SaveAll,
}

/// Whom to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Member {
        node: NodeId,
        address: SocketAddr,
    },
    /// The n-th configured seed: its name is resolved again for each call.
    Seed(usize),
}

/// Why a call brought no answer. None of them changed any state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("no answer: {0}")]
    Unreachable(String),
    /// The handshake failed on somebody's certificate: the secrets differ.
    #[error("the handshake was refused: {0}")]
    Rejected(String),
    /// The address is our own.
    #[error("that is this node itself")]
    Myself,
}

/// What a node asks for. Outputs with `after: n` may leave only once write `n` is durable; the order of
/// outputs is otherwise free.
#[derive(Clone, Debug)]
pub enum Output {
    /// A frame for a member, lossy.
    Send {
        to: NodeId,
        address: SocketAddr,
        bytes: Vec<u8>,
        after: WriteSeq,
    },
    Call {
        call: CallId,
        to: Target,
        bytes: Vec<u8>,
        after: WriteSeq,
    },
    Reply {
        reply: ReplyId,
        bytes: Vec<u8>,
        after: WriteSeq,
    },
    /// Records to write in one batch and to flush; then the number is to be reported as durable.
    Write {
        records: Vec<(Key, Vec<u8>)>,
        seq: WriteSeq,
    },
    /// What the kernel is to be made equal to; replaces any earlier one.
    Program {
        view: View,
        after: WriteSeq,
    },
    /// The kernel is to hold nothing of ours any more; replaces [`Output::Program`].
    Withdraw,
    /// Slots that changed hands, for the audit log.
    Owned(Vec<Change>),
    /// [`Command::Leave`] cannot be done, for this reason; the node goes on as before.
    CannotLeave(String),
    /// Whether a member answered that [`Node::ping`] had asked.
    ///
    /// [`Node::ping`]: super::Node::ping
    Answered {
        node: NodeId,
        answered: bool,
    },
    /// A member wants to know; whoever carries this node answers with [`Node::report`].
    ///
    /// [`Node::report`]: super::Node::report
    Inquired {
        reply: ReplyId,
        from: NodeId,
        inquiry: Inquiry,
    },
    /// What a member answered that [`Node::inquire`] had asked, if anything.
    ///
    /// [`Node::inquire`]: super::Node::inquire
    Reported {
        node: NodeId,
        number: u64,
        report: Option<Box<Report>>,
    },
    /// The node's work is over.
    Stop(Stop),
}

/// Why a node stops of its own accord.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It left; everything it owned belongs to the successor now (nobody, if it was the last one).
    Left { successor: Option<NodeId> },
    /// The others hold this identity as gone: forgotten (then there is a successor), or left before its
    /// state was restored. Its host may come back under a new one.
    Expelled { successor: Option<NodeId> },
    /// A seed refused it for a reason that will not go away.
    Refused(Refusal),
    /// Every seed refused its certificate.
    Rejected { seed: usize, why: String },
}
