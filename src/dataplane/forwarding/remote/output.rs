//! The actions and results of the trials.

use std::net::IpAddr;

use super::{
    Half,
    message::{Kind, Sort},
};
use crate::model::NodeId;

/// A sort of packets on one half of the path to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RemoteWay {
    /// The peer.
    pub node: NodeId,
    /// The half of the path.
    pub half: Half,
    /// The sort of packets.
    pub sort: Sort,
}

/// Random loss on one half of the path to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteLoss {
    /// The peer.
    pub node: NodeId,
    /// The half of the path.
    pub half: Half,
    /// The share of lost packets in percent.
    pub percent: u32,
}

/// An action for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoteOutput {
    /// A round with this number begins. Everything that follows uses new source ports, as new connections do.
    Begin(u32),
    /// Send a packet.
    Send {
        /// Address of the peer's pod.
        to: IpAddr,
        /// What to send.
        kind: Kind,
        /// Number of the round.
        number: u32,
        /// Payload size in bytes of a datagram or connection; `None` for a first segment.
        size: Option<usize>,
    },
    /// Ask these peers which packets of the round with this number arrived.
    RequestReports(u32, Vec<NodeId>),
}
